"""A mask that is worked out tensor by tensor: what it is of, and how it is written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsparse import masks
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import CheckpointError
from rlsparse.kernels import popcount
from rlsparse.masks import Mask, MaskFile, Packed

Shapes = Mapping[str, tuple[int, ...]]

_MAX_NAMES = 3


@dataclass(frozen=True)
class MadeMask:
    """A ``masks.Mask`` that is made when it is asked for; iterate over it for all of it.

    Attributes:
        shapes: weight tensor -> its shape; tied ones once.
        base_fingerprint: ``checkpoint.fingerprint`` of the base that it is of; empty if of several.
        metadata: ``kind``, ``source``, and whatever it takes to make it again.
        make: gives the packed mask of a tensor.
    """

    shapes: Shapes
    base_fingerprint: str
    metadata: dict[str, str]
    make: Callable[[str], Packed]

    def packed(self, name: str) -> Packed:
        """The packed mask of a weight tensor."""
        return self.make(name)

    def __iter__(self) -> Iterator[tuple[str, tuple[int, ...], Packed]]:
        """Name, shape and packed mask of each weight tensor, in order of name."""
        for name in sorted(self.shapes):
            yield name, self.shapes[name], self.packed(name)


def held(mask: Mask) -> MadeMask:
    """The same mask in memory, so that the files it is made of may go."""
    packed = {name: mask.packed(name) for name in mask.shapes}
    return MadeMask(mask.shapes, mask.base_fingerprint, dict(mask.metadata), packed.__getitem__)


def write(path: Path, mask: Mask) -> None:
    """Write a mask file, atomically and with one tensor in memory at a time.

    Raises:
        CheckpointError: no weight is in the mask, or it cannot be made.
    """
    packed = _not_empty(mask)
    masks.write_stream(path, mask.shapes, packed, mask.base_fingerprint, mask.metadata)


def _not_empty(mask: Mask) -> Iterator[Packed]:
    num_selected = 0
    for name in sorted(mask.shapes):
        packed = mask.packed(name)
        num_selected += popcount(packed)
        yield packed
    if not num_selected:
        raise CheckpointError(
            f"no weight is in this mask ({described(mask)} of {mask.metadata.get('source', '')}), "
            "so that nothing could be trained with it; nothing is written"
        )


def described(mask: Mask) -> str:
    """What a mask is, in a few words."""
    kind = mask.metadata.get("kind", "mask")
    return f"{kind} {mask.path}" if isinstance(mask, MaskFile) else kind


def shapes_of(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The weight tensors of a base, tied ones once, and their shapes."""
    return {info.name: info.shape for info in base.counted}


def check_one_model(models: Mapping[str, Shapes]) -> None:
    """Check that what several things are about is one model.

    Args:
        models: what to call each of them -> its weight tensors and their shapes.

    Raises:
        CheckpointError: names or shapes of one differ from those of the first.
    """
    (first, ours), *others = models.items()
    for label, theirs in others:
        names = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        if names:
            shown = ", ".join(_difference(n, ours, theirs) for n in names[:_MAX_NAMES])
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            raise CheckpointError(
                f"{label} is of another model than {first}: {shown}{more}; give what is of one "
                "model, tied weights under the embedding's name alone"
            )


def _difference(name: str, ours: Shapes, theirs: Shapes) -> str:
    if name not in theirs:
        return f"it lacks {name}"
    if name not in ours:
        return f"only it has {name}"
    return f"{name} is {list(theirs[name])}, not {list(ours[name])}"


def open_base(base: str | Path, mask: Mask) -> Checkpoint:
    """Open the base that a mask is of.

    Raises:
        CheckpointError: it cannot be read, or has other tensors or weights than the mask says.
    """
    opened = Checkpoint.open(base)
    check_one_model({str(base): shapes_of(opened), described(mask): mask.shapes})
    expected = mask.base_fingerprint
    if expected and expected != (own := fingerprint(opened)):
        raise CheckpointError(
            f"{described(mask)} is of the base {expected[:12]}, {base} is {own[:12]}; give the "
            "checkpoint before training"
        )
    return opened
