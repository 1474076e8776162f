"""A chain of patches, from step to step, as one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlsparse.errors import PatchError
from rlsparse.patch.blocks import CodecName, Compression
from rlsparse.patch.file import Changes, Patch, PatchedTensor
from rlsparse.patch.write import PIECE, TensorBuilder, new_patch
from rlsparse.tensor_file import Bits, bits_dtype


def squash(
    patches: Sequence[Patch],
    path: Path,
    *,
    codec: CodecName | None = None,
    compression: Compression = "zstd",
) -> Patch:
    """Write, atomically, the patch from before the first to after the last; no base is needed.

    Relative steps add up, and those that cancel vanish: blocks and checksums are those of a patch
    made of the two checkpoints. Of absolute values the last stands; a weight that went away and
    came back stays listed, and is counted as changed, unless its whole tensor came back. Tensors
    that a patch does not list are unchanged by it. The base and the note
    ``base_version`` (of weight sync) are the first's, other notes the last's.

    Args:
        patches: in order; each begins where the one before ends.
        path: file to write; it may be one of theirs.
        codec: as of ``write_patch``, as the other.
        compression: of everything.

    Raises:
        PatchError: there is none, they do not make a chain, or one is damaged; nothing is written.
    """
    chains = _chains(patches)
    first, last = patches[0], patches[-1]
    start = {key: first.metadata[key] for key in ("base_version",) if key in first.metadata}
    with new_patch(
        path, base_fingerprint=first.base_fingerprint, metadata=last.metadata | start,
        coding=first.values, codec=codec, compression=compression,
    ) as builder:  # fmt: skip
        for name in sorted(chains):
            chain = [patches[number] for number in chains[name]]
            begin, end = chain[0].tensors[name], chain[-1].tensors[name]
            tensor = builder.tensor(name, begin.dtype, begin.shape, begin.part)
            if begin.xxh3_before != end.xxh3_after:
                _add(tensor, begin, [Changes(patch, name) for patch in chain], first.values)
            tensor.close((begin.xxh3_before, end.xxh3_after))
    return Patch.open(path)


def _add(tensor: TensorBuilder, one: PatchedTensor, chain: list[Changes], coding: str) -> None:
    """Add what a tensor's changes come to.

    All are applied to zeros: of relative values that gives the sum of the steps from a zero. Of
    absolute ones those are touched that end alike from ones, too.
    """
    for start in range(0, one.num_elements, PIECE):
        zeros = np.zeros(min(PIECE, one.num_elements - start), bits_dtype(one.dtype))
        after = _applied(chain, zeros.copy(), start)
        if coding == "relative":
            tensor.compare(zeros, after)
        else:
            touched = after == _applied(chain, ~zeros, start)
            tensor.add(zeros, after, np.flatnonzero(touched).astype(np.uint32))


def _applied(chain: list[Changes], bits: Bits, start: int) -> Bits:
    for changes in chain:
        changes.apply(bits, start)
    return bits


def _chains(patches: Sequence[Patch]) -> dict[str, list[int]]:
    """Of each tensor the numbers of the patches that list it, each from where the last ends."""
    if not patches:
        raise PatchError("no patch to squash: give one or more, in order")
    chains: dict[str, list[int]] = {}
    for number, patch in enumerate(patches):
        if patch.values != patches[0].values:
            raise PatchError(
                f"{patches[0].path} has {patches[0].values} values, {patch.path} has "
                f"{patch.values} ones: a chain is of one coding; make its patches with one --values"
            )
        if chains and patch.tensors and not chains.keys() & patch.tensors.keys():
            raise PatchError(
                f"{patch.path} has no tensor that the patches before it have: it is of another "
                "model; give patches of one"
            )
        for name, tensor in patch.tensors.items():
            chain = chains.setdefault(name, [])
            if chain:
                _check_meet(name, patches[chain[-1]], patch, tensor)
            chain.append(number)
    _check_ties(patches, chains)
    return chains


def _check_meet(name: str, before: Patch, patch: Patch, tensor: PatchedTensor) -> None:
    found = before.tensors[name]
    kinds = [(one.dtype, list(one.shape), one.part) for one in (found, tensor)]
    if kinds[0] != kinds[1]:
        said = [f"{dtype} {shape}{f' part {part}' if part else ''}" for dtype, shape, part in kinds]
        raise PatchError(
            f"tensor {name} is {said[0]} in {before.path}, {said[1]} in {patch.path}: patches of "
            "one chain are of one model in one format"
        )
    if found.xxh3_after != tensor.xxh3_before:
        raise PatchError(
            f"{before.path} and {patch.path} do not meet at tensor {name}: the first ends with "
            f"the checksum {found.xxh3_after[:12]}, the second begins with "
            f"{tensor.xxh3_before[:12]}; give all patches in the order in which they were made, "
            "with none missing between them"
        )


def _check_ties(patches: Sequence[Patch], chains: Mapping[str, list[int]]) -> None:
    """Refuse where an unlisted tensor may have followed one that it was equal to: a tied head."""
    changed = [[one for one in patch.tensors.values() if one.num_changed] for patch in patches]
    befores = [{one.xxh3_before for one in each} for each in changed]
    afters = [{one.xxh3_after for one in each} for each in changed]
    for name, chain in chains.items():
        begin = patches[chain[0]].tensors[name].xxh3_before
        end = patches[chain[-1]].tensors[name].xxh3_after
        follows = [n for n in range(chain[0]) if begin in afters[n]]
        follows += [n for n in range(chain[-1] + 1, len(patches)) if end in befores[n]]
        if follows:
            raise PatchError(
                f"{patches[follows[0]].path} does not list {name}, and changes a tensor of the "
                "same bits, which it may be tied to: make one patch of the checkpoints before "
                "and after instead (rlsparse patch make)"
            )
