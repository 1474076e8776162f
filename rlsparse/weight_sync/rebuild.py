"""A checkpoint from the folder between a trainer and its receivers."""

from pathlib import Path

from rlsparse.errors import PatchError
from rlsparse.patch.apply import check_empty
from rlsparse.weight_sync.receiver import PatchReceiver
from rlsparse.weight_sync.versions import VersionFolder


def rebuild(folder: str | Path, out: str | Path, version: int | None = None) -> int:
    """Write the checkpoint of a version from the last anchor before it and the patches since.

    Args:
        folder: the one that a ``PatchWriter`` writes.
        out: folder to write, empty or not there.
        version: None takes the newest.

    Returns:
        The version.

    Raises:
        PatchError: the version is not there, what leads to it is damaged, or ``out`` is not empty.
        CheckpointError: there is no folder.
    """
    check_empty(Path(out))
    place = VersionFolder(Path(folder))
    anchors = [*place.anchors()]
    if not anchors:
        raise PatchError(
            f"{folder} has no whole anchor to begin at; give the folder that a PatchWriter writes"
        )
    known = sorted({*anchors, *place.patches()})
    before = [anchor for anchor in anchors if version is None or anchor <= version]
    if not before or version not in (None, *known):
        raise PatchError(
            f"{folder} has no way to version {version}; give one from {anchors[0]} to {known[-1]}"
        )
    receiver = PatchReceiver.open(folder, before[-1])
    receiver.follow(until=version)
    receiver.save(out)
    return receiver.version
