"""The receiving side: the weights of a version on the host, taken on from version to version."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.patch import Changes, Patch, values
from rlsparse.patch.apply import check_empty
from rlsparse.tensor_file import Bits, read_header, save_checkpoint
from rlsparse.weight_sync.anchors import (
    HostTensor,
    Region,
    check_cover,
    read_anchor,
    read_checkpoint,
)
from rlsparse.weight_sync.versions import Notes, VersionFolder

OnChange = Callable[[str, NDArray[np.int64], Bits], Any]
"""Called with the name of a tensor, flat positions in it [k], and the bits [k] there now.

If it has a method ``check``, that is called with all tensors before any is changed, and may raise
``PatchError`` (see ``scatter``).
"""

_PIECE = 2**18
_ALL_PIECE = 2**22


class PatchReceiver:
    """Weights of one version, bit for bit as the trainer serves them, and the way to the next.

    Args:
        tensors: the weights.
        version: which one they are.
        stream: of which run; None takes that of the first patch.
        folder: where versions come from, if ``follow`` and ``resynchronise`` shall work.
        settings_from: folder with the configuration and tokenizer files that ``save`` copies.

    Attributes:
        tensors: name -> the weights on the host; not to be changed.
        version: see above.
        stream: likewise.
    """

    def __init__(
        self,
        tensors: dict[str, HostTensor],
        *,
        version: int = 0,
        stream: str | None = None,
        folder: VersionFolder | None = None,
        settings_from: str | Path | None = None,
    ) -> None:
        self.tensors = tensors
        self.version = version
        self.stream = stream
        self._folder = folder
        self._settings_from = None if settings_from is None else Path(settings_from)
        self._is_broken = False

    @classmethod
    def open(cls, folder: str | Path, version: int | None = None) -> "PatchReceiver":
        """Begin at an anchor.

        Args:
            folder: the one that a ``PatchWriter`` writes.
            version: of the anchor; None takes the newest.

        Raises:
            CheckpointError: no such folder.
            PatchError: no such anchor, or it is damaged.
        """
        receiver = cls({}, folder=VersionFolder(Path(folder)))
        receiver.resynchronise(version=version)
        return receiver

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, folder: str | Path | None = None, version: int = 0
    ) -> "PatchReceiver":
        """Begin at a checkpoint that is here already, such as the base that the training began at.

        It must be in the format that is served. Patches know the checksums of what they start from,
        so that another checkpoint is refused.

        Args:
            checkpoint: what ``Checkpoint.open`` takes.
            folder: the one that a ``PatchWriter`` writes; without it ``apply`` alone works.
            version: which one the checkpoint is.

        Raises:
            CheckpointError: it cannot be read.
        """
        found = Checkpoint.open(checkpoint)
        settings = found.path if isinstance(found.path, Path) and found.path.is_dir() else None
        place = VersionFolder(Path(folder)) if folder is not None else None
        tensors = read_checkpoint(found)
        return cls(tensors, version=version, folder=place, settings_from=settings)

    # --- forward ---------------------------------------------------------------------------------

    def follow(self, on_change: OnChange | None = None, until: int | None = None) -> int:
        """Apply all that the folder has, in order.

        Where what leads on was cleaned away, or is of a new run, a newer anchor is taken instead.

        Args:
            on_change: as of ``apply`` and ``resynchronise``.
            until: the version to stop at; None goes on to the newest.

        Returns:
            The version reached: that of before if there is nothing new.

        Raises:
            PatchError: as ``apply``; a version is missing and there is no newer anchor.
            CheckpointError: the folder is gone.
        """
        while step := self._next(math.inf if until is None else until):
            version, files, is_anchor = step
            try:
                if is_anchor:
                    self._load(files, on_change)
                else:
                    self._apply(files, on_change, version)
            except PatchError:
                if self._is_broken or all(file.exists() for file in files):
                    raise  # else they were cleaned away in the meantime: look again
        return self.version

    def _next(self, until: float) -> tuple[int, list[Path], bool] | None:
        """The version to take next, its files, and whether they are an anchor."""
        folder = self._known_folder()
        if until == math.inf and (found := self._newer_run(folder.anchors())):
            return found
        patches, anchors = (
            {version: files for version, files in found.items() if self.version < version <= until}
            for found in (folder.patches(), folder.anchors())
        )
        if self.version + 1 not in patches and anchors:
            return max(anchors), anchors[max(anchors)], True
        return (min(patches), patches[min(patches)], False) if patches else None

    def _newer_run(self, anchors: dict[int, list[Path]]) -> tuple[int, list[Path], bool] | None:
        """The last anchor, if another run wrote it: each begins with one, so that run is newer."""
        if not anchors or self.stream is None:
            return None
        version, files = max(anchors.items())
        try:
            notes = Notes.of(files[0], read_header(files[0])[1])
        except (PatchError, CheckpointError):
            return None  # it was cleaned away in the meantime, or is damaged
        return None if notes.stream == self.stream else (version, files, True)

    def apply(
        self, files: str | Path | Sequence[str | Path], on_change: OnChange | None = None
    ) -> bool:
        """Go on to the version that a patch leads to; all is checked before anything is changed.

        Args:
            files: the patch, or those of all workers that wrote parts of it.
            on_change: gets what changed, a piece at a time, of each tensor once the checksum of all
                of it agrees. An engine that raises in it must be given all weights again.

        Returns:
            False if this version or a later one is here already: nothing is done then.

        Raises:
            PatchError: damaged, of another run or model, not all parts, or it does not start from
                the version here; nothing is changed. Or the result has other checksums, which
                memory that fails would explain: then all is refused until ``resynchronise``.
        """
        given = [files] if isinstance(files, str | Path) else files
        return self._apply([Path(file) for file in given], on_change)

    def _apply(
        self, files: list[Path], on_change: OnChange | None, expected: int | None = None
    ) -> bool:
        """``apply``, of files that are ``expected`` to lead to a version."""
        patches = [Patch.open(file) for file in files]
        notes = self._checked_notes(patches)
        if expected not in (None, notes.version):
            raise PatchError(_misnamed(files[0], notes.version))
        if notes.version <= self.version:
            return False
        self._check_base(files[0], notes)
        self._check_fit(patches)
        _check_engine(on_change, self.tensors)
        changes = [Changes(patch, name) for patch in patches for name in patch.tensors]
        for one in changes:
            one.check()
        self._is_broken = True
        for one in changes:  # the last block of each is still decoded, mostly the only one
            self._apply_one(one, on_change)
        self.version, self.stream, self._is_broken = notes.version, notes.stream, False
        return True

    def _checked_notes(self, patches: Sequence[Patch]) -> Notes:
        """What all parts say alike."""
        if self._is_broken:
            raise PatchError(
                f"an earlier patch left the weights after version {self.version} in an unknown "
                f"state: {self._remedy()}"
            )
        if not patches:
            raise PatchError("no patch is given: give that of a version, or all of its parts")
        notes = [Notes.of(patch.path, patch.metadata) for patch in patches]
        first = notes[0]
        if {(n.version, n.base_version, n.stream, n.part[1]) for n in notes} != {
            (first.version, first.base_version, first.stream, first.part[1])
        } or sorted(n.part[0] for n in notes) != [*range(1, first.part[1] + 1)]:
            raise PatchError(
                f"version {first.version} has {first.part[1]} parts, given are "
                f"{[patch.path.name for patch in patches]}: give each of them once"
            )
        if self.stream not in (None, first.stream):
            raise PatchError(
                f"{patches[0].path} is of run {first.stream}, the weights here of {self.stream}: "
                f"{self._remedy()}"
            )
        return first

    def _check_base(self, file: Path, notes: Notes) -> None:
        base, own = notes.base_version, self.version
        if base > own:
            missing = f"{own + 1}" if base == own + 1 else f"{own + 1} to {base}"
            raise PatchError(
                f"{file} starts from version {base}, here is {own}: apply version {missing} first, "
                f"or {self._remedy()}"
            )
        if base < own:
            raise PatchError(
                f"{file} leads from version {base} to {notes.version}, here is {own}: apply the "
                f"one that starts from {own}, or {self._remedy()}"
            )

    def _remedy(self) -> str:
        anchors = [*self._folder.anchors()] if self._folder else []
        if anchors:
            return f"resynchronise from anchor {anchors[-1]}"
        return "begin again at an anchor of that run"

    def _check_fit(self, patches: Sequence[Patch]) -> None:
        regions: dict[str, list[Region]] = {}
        for patch in patches:
            for name, said in patch.tensors.items():
                own = self.tensors.get(name)
                if own is None or (own.dtype, own.shape) != (said.dtype, said.shape):
                    here = f"{own.dtype} {list(own.shape)}" if own else "nothing of that name"
                    raise PatchError(
                        f"{patch.path} expects {name} as {said.dtype} {list(said.shape)}, here is "
                        f"{here}; begin at an anchor of that run"
                    )
                regions.setdefault(name, []).append(_region(said.part, own))
        for name, found in regions.items():
            check_cover(str(patches[0].path), name, self.tensors[name].bits.size, found)
        for patch in patches:
            for name, said in patch.tensors.items():
                own = self.tensors[name]
                if own.checksum(_region(said.part, own)) != said.xxh3_before:
                    raise PatchError(
                        f"{patch.path} starts from other weights: {name} has another checksum "
                        f"here at version {self.version}; {self._remedy()}"
                    )

    def _apply_one(self, changes: Changes, on_change: OnChange | None) -> None:
        patch, name = changes.patch, changes.name
        said, own = patch.tensors[name], self.tensors[name]
        start, stop = _region(said.part, own)
        digest = xxhash.xxh3_128()
        places: list[NDArray[np.int64]] = []
        for low in range(start, stop, _PIECE) if said.num_changed else ():
            piece = own.bits[low : min(low + _PIECE, stop)]
            for positions, found in changes.between(low - start, low - start + piece.size):
                values.apply(patch.values, found, positions, piece)
                if on_change:
                    places.append(positions.astype(np.int64) + low)
            digest.update(piece.data)
        after = digest.hexdigest() if said.num_changed else said.xxh3_before
        if after != said.xxh3_after:
            raise PatchError(
                f"the result of {patch.path} in {name} has another checksum: {self._remedy()}"
            )
        for region in [*own.checksums]:
            if region[0] < stop and start < region[1]:
                del own.checksums[region]
        own.checksums[start, stop] = after
        for where in places if on_change else ():
            assert on_change
            on_change(name, where, own.bits[where])

    # --- all at once -----------------------------------------------------------------------------

    def resynchronise(
        self, on_change: OnChange | None = None, *, version: int | None = None
    ) -> None:
        """Begin again at an anchor of the folder, whatever is here.

        Args:
            on_change: gets all weights.
            version: of the anchor; None takes the newest.

        Raises:
            PatchError: no such anchor, or it is damaged; what is here stays.
            CheckpointError: the folder is gone.
        """
        anchors = self._known_folder().anchors()
        if not anchors or version not in (None, *anchors):
            wanted = "anchor" if version is None else f"anchor {version}"
            known = (
                f"anchors there: {', '.join(map(str, anchors))}"
                if anchors
                else ("the first appears when a PatchWriter is made")
            )
            raise PatchError(f"no whole {wanted} in {self._known_folder().path}; {known}")
        files = anchors[max(anchors) if version is None else version]
        self._load(files, on_change)

    def _load(self, files: list[Path], on_change: OnChange | None) -> None:
        notes, tensors = read_anchor(files)
        if self._known_folder().anchor(notes.version) != files[0].parent:
            raise PatchError(_misnamed(files[0].parent, notes.version))
        _check_engine(on_change, tensors)
        self.tensors = tensors
        self.version, self.stream, self._is_broken = notes.version, notes.stream, False
        self._settings_from = files[0].parent
        if on_change:
            self.hand_out(on_change)

    def hand_out(self, on_change: OnChange) -> None:
        """Give all weights to an engine, as if all had changed."""
        _check_engine(on_change, self.tensors)
        for name, positions, bits in self._all():
            on_change(name, positions, bits)

    def _all(self) -> Iterator[tuple[str, NDArray[np.int64], Bits]]:
        for name, tensor in self.tensors.items():
            for start in range(0, tensor.bits.size, _ALL_PIECE):
                bits = tensor.bits[start : start + _ALL_PIECE]
                yield name, np.arange(start, start + bits.size), bits

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint of this version, with the configuration files of the anchor.

        Raises:
            PatchError: an earlier patch failed half-way, or the folder is not empty.
        """
        if self._is_broken:
            raise PatchError(f"the weights here are of no version: {self._remedy()}")
        folder = Path(folder)
        check_empty(folder)
        tensors = {name: (one.dtype, one.shape, one.bits) for name, one in self.tensors.items()}
        save_checkpoint(folder, tensors, None, self._settings_from)

    def _known_folder(self) -> VersionFolder:
        if self._folder is None:
            raise PatchError(
                "this receiver began at a checkpoint and knows no folder of versions: give it one "
                "as `folder`"
            )
        return self._folder


def _check_engine(on_change: OnChange | None, tensors: dict[str, HostTensor]) -> None:
    if on_change is not None and not callable(on_change):
        raise PatchError(
            f"on_change is {on_change!r}; give a function (name, positions, bits), or scatter(...)"
        )
    if check := getattr(on_change, "check", None):
        check(tensors)


def _misnamed(path: Path, version: int) -> str:
    return f"{path} has version {version}, not the one of its name: give files their own names"


def _region(part: Region | None, tensor: HostTensor) -> Region:
    return part or (0, tensor.bits.size)
