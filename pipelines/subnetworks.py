"""The mask that a trial of a study trains under, made by its worker of what the study holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.plan import Base
from pipelines.storage import Storage
from rlsparse.config import TrialConfig
from rlsparse.definitions import Take
from rlsparse.errors import StorageError
from rlsparse.mask_config import FileMask, Leaf, Origin
from rlsparse.mask_making import changed, held, make_mask
from rlsparse.masks import Mask, bits_of, read_masks
from rlsparse.patch import PATCH_FILE
from rlsparse.tables import EVER_CHANGED, snapshot_folder

if TYPE_CHECKING:
    from rlsparse.subnetwork import SubnetworkMask


def load_subnetwork(
    config: TrialConfig, origins: Sequence[Origin], storage: Storage, base: Base
) -> "SubnetworkMask | None":
    """The mask of a trial; None if it has none.

    Args:
        config: the trial.
        origins: what its masks of other trials refer to (``study.Trial.origins``).
        storage: of the study.
        base: model that the trial starts from.

    Raises:
        StorageError: a trial that it is of is not done.
        CheckpointError: a mask file is damaged, or masks are of different models.
        PatchError: a trial that it is of has another base, or its files are damaged.
    """
    from rlsparse.subnetwork import SubnetworkMask

    if config.train.mask is None:
        return None
    left = iter(origins)

    def read(leaf: Leaf) -> Mask:
        if isinstance(leaf, FileMask):
            return read_masks(leaf.file)
        return _of_trial(next(left), storage, base.path)

    mask = make_mask(config.train.mask, read, base.path, seed=config.seed)
    return SubnetworkMask(bits_of(mask), base.fingerprint)


def _of_trial(origin: Origin, storage: Storage, base: Path) -> Mask:
    folder = f"trials/{origin.trial_id}"
    if not storage.is_done(folder):
        raise StorageError(
            f"the mask is of trial {origin.trial_id}, which is not done in {storage.url}; run the "
            "study again"
        )
    if origin.take == Take.EVER_CHANGED:
        with storage.local_copy(f"{folder}/{EVER_CHANGED}") as path:
            return held(read_masks(path))
    with storage.local_copy(f"{folder}/{snapshot_folder(origin.step)}/{PATCH_FILE}") as path:
        return held(changed(base, path))
