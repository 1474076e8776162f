"""Damages patches and anchors, their checksums made to agree: ``fuzz_patches.py WHAT FOLDER``.

What comes of it must be an error of ours or exactly the right weights. Kernels read memory, so that
it runs in a process of its own, whose crash is a failure like any other.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted
import xxhash
from damage import Parts, damaged_anchor, damaged_patch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted import Tensor

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.patch import Changes, Patch, apply_patch, new_patch, verify_patch, write
from rlsparse.patch.export import export_patch
from rlsparse.patch.side import patched
from rlsparse.patch.squash import squash
from rlsparse.weight_sync.anchors import AnchorPart, write_anchor
from rlsparse.weight_sync.receiver import PatchReceiver
from rlsparse.weight_sync.versions import Notes, VersionFolder

SHAPES = {"a": ("bf16", (12, 10)), "b": ("fp32", (70,)), "c": ("u8", (64,)), "d": ("bf16", (9,))}
CODEC = {"a": "gaps", "b": "indices", "c": "bitmap", "d": None}
NUM_EXAMPLES = 400

State = dict[str, Tensor]

# --- what is damaged -----------------------------------------------------------------------------


def states() -> list[State]:
    """Three states of a small model of which one tensor does not change."""
    rng = np.random.default_rng(0)
    found: list[State] = [{}]
    for name, (dtype, shape) in SHAPES.items():
        item = planted.unsigned(dtype)
        bits = rng.integers(0, np.iinfo(item).max, int(np.prod(shape)), item, endpoint=True)
        found[0][name] = Tensor(dtype, shape, bits)
    for _ in range(2):
        moved = {
            n: planted.plant(rng, t, 0.0 if n == "d" else 0.3)[0] for n, t in found[-1].items()
        }
        found.append(moved)
    return found


def patch_file(
    path: Path, before: State, after: State, parts: dict[str, Any], **options: Any
) -> None:
    """A patch of several blocks a tensor, of all codecs."""
    with new_patch(path, **options) as builder:
        for name, tensor in before.items():
            builder.codec = CODEC[name]
            part = parts.get(name)
            own = builder.tensor(name, tensor.dtype, tensor.shape, part)
            sides = [side[name].bits[slice(*part) if part else slice(None)]
                     for side in (before, after)]  # fmt: skip
            for start in range(0, sides[0].size, 16):
                own.compare(*(side[start : start + 16] for side in sides))
            own.close()


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        (one.dtype, one.shape) == (expected[name].dtype, expected[name].shape)
        and np.array_equal(one.bits, expected[name].bits)
        for name, one in found.items()
    )


def stored(checkpoint: Checkpoint) -> State:
    return {
        name: Tensor(info.dtype, info.shape, info.read())
        for name, info in checkpoint.tensors.items()
    }


class Patches:
    """Patches of all codings and compressions, and what is done with one that may be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.states, self.seen = folder, states(), Counter()
        self.base_path = planted.write_folder(folder / "base", self.states[0])
        self.base, self.damaged = Checkpoint.open(self.base_path), folder / "damaged"
        self.files: list[list[Path]] = []
        for coding in ("relative", "absolute"):
            for compression in ("zstd", "none"):
                files = [folder / f"{coding}-{compression}-{step}" for step in (1, 2)]
                for step, file in enumerate(files):
                    patch_file(
                        file, *self.states[step : step + 2], {}, coding=coding,
                        compression=compression, base_fingerprint=fingerprint(self.base),
                    )  # fmt: skip
                self.files.append(files)

    def check(self, content: bytes, next_file: Path) -> None:
        """All uses of a file that may be the first patch; each is right, or refuses."""
        self.damaged.write_bytes(content)
        for use in (self.verify, self.apply, self.read, self.export, self.squash):
            try:
                use(next_file)
                self.seen[use.__name__, "right"] += 1
            except (PatchError, CheckpointError):
                self.seen[use.__name__, "refused"] += 1

    def verify(self, _: Path) -> None:
        patch = Patch.open(self.damaged)
        verify_patch(self.base, patch)
        assert same(stored(patched(self.base, patch)), self.states[1])

    def apply(self, _: Path) -> None:
        out = self.folder / f"out-{self.seen.total()}"
        try:
            apply_patch(self.base_path, self.damaged, out)
        except PatchError:
            assert not (out / "model.safetensors").exists()
            raise
        assert same(stored(Checkpoint.open(out)), self.states[1])

    def read(self, _: Path) -> None:
        """Without the checksums of what comes of it: only what cannot be decoded is refused."""
        patch = Patch.open(self.damaged)
        for name in patch.tensors:
            Changes(patch, name).check()
        stored(patched(self.base, patch))
        if patch.values == "absolute":
            export_patch(patch, self.folder / "alone")

    def export(self, _: Path) -> None:
        out = self.folder / "exported"
        export_patch(Patch.open(self.damaged), out, self.base)
        arrays, found = Parts.of(out.read_bytes()).arrays, {}
        for name, tensor in self.states[0].items():
            found[name] = Tensor(tensor.dtype, tensor.shape, tensor.bits.copy())
            if f"{name}.idx" in arrays:
                places = np.frombuffer(arrays[f"{name}.idx"][2], "<i4")
                values = np.frombuffer(arrays[f"{name}.val"][2], tensor.bits.dtype)
                found[name].bits[places] = values
        assert same(found, self.states[1])

    def squash(self, next_file: Path) -> None:
        chain = [Patch.open(self.damaged), Patch.open(next_file)]
        whole = squash(chain, self.folder / "squashed")
        verify_patch(self.base, whole)
        assert same(stored(patched(self.base, whole)), self.states[2])


class Sync:
    """A folder of weight sync of one worker or two, and a receiver of what may be damaged."""

    def __init__(self, folder: Path, num_parts: int) -> None:
        self.folder, self.states, self.seen = VersionFolder(folder), states(), Counter()
        self.parts, shares = [], [(0, 1), (0, 0.4), (0.4, 1)]
        folder.mkdir()
        for number, share in enumerate(shares[:1] if num_parts == 1 else shares[1:], 1):
            part = number, num_parts
            self.parts.append(part)
            regions = {n: tuple(int(s * t.bits.size) for s in share)
                       for n, t in self.states[0].items()}  # fmt: skip
            anchored = {
                n: AnchorPart(
                    t.dtype, t.shape, regions[n],
                    xxhash.xxh3_128_hexdigest(t.bits[slice(*regions[n])].tobytes()),
                    iter([t.bits[slice(*regions[n])]]),
                )
                for n, t in self.states[0].items()
            }  # fmt: skip
            write_anchor(self.folder.anchor_file(0, part), Notes(0, 0, "s", part), anchored, None)
            for step in (0, 1):
                notes = Notes(step + 1, step, "s", part).metadata()
                patch_file(
                    self.folder.patch_file(step + 1, part), *self.states[step : step + 2],
                    regions if num_parts > 1 else {}, base_fingerprint="", metadata=notes,
                )  # fmt: skip

    def check(self) -> None:
        """Follow from the anchor: what is here at the end is a version, whole, or refused."""
        receiver = None
        try:
            receiver = PatchReceiver.open(self.folder.path, 0)
            assert receiver.version == 0
            assert self.version_of(receiver) == 0
            receiver.follow()
            self.seen["right"] += 1
        except (PatchError, CheckpointError):
            self.seen["refused"] += 1
        if receiver and not receiver._is_broken:
            assert self.version_of(receiver) == receiver.version

    def version_of(self, receiver: PatchReceiver) -> int:
        found = {n: Tensor(t.dtype, t.shape, t.bits) for n, t in receiver.tensors.items()}
        return [same(found, state) for state in self.states].index(True)


# --- runs ----------------------------------------------------------------------------------------

fuzzed = settings(
    max_examples=NUM_EXAMPLES, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def fuzz_patches(folder: Path) -> Counter:
    patches = Patches(folder)
    for file, next_file in patches.files:
        patches.check(file.read_bytes(), next_file)
    assert {kind for _, kind in patches.seen} == {"right"}

    @fuzzed
    @given(st.data())
    def run(data: Any) -> None:
        file, next_file = data.draw(st.sampled_from(patches.files))
        patches.check(damaged_patch(data, file.read_bytes()), next_file)

    run()
    return Counter(kind for _, kind in patches.seen.elements())


def fuzz_sync(folder: Path) -> Counter:
    whole = [Sync(folder / "one", 1), Sync(folder / "two", 2)]
    for sync in whole:
        sync.check()
    assert whole[0].seen == whole[1].seen == {"right": 1}

    @fuzzed
    @given(st.data())
    def run(data: Any) -> None:
        sync = data.draw(st.sampled_from(whole))
        part, version = data.draw(st.sampled_from(sync.parts)), data.draw(st.integers(-1, 2))
        is_anchor = version < 1
        file = (
            sync.folder.anchor_file(0, part) if is_anchor else sync.folder.patch_file(version, part)
        )
        content = file.read_bytes()
        file.write_bytes(
            damaged_anchor(data, content) if is_anchor else damaged_patch(data, content)
        )
        try:
            sync.check()
        finally:
            file.write_bytes(content)

    run()
    return whole[0].seen + whole[1].seen


FUZZERS: dict[str, Callable[[Path], Counter]] = {"patches": fuzz_patches, "sync": fuzz_sync}

if __name__ == "__main__":
    write.PIECE, write.BLOCK_CHANGES = 32, 10
    print(json.dumps(FUZZERS[sys.argv[1]](Path(sys.argv[2]))))
