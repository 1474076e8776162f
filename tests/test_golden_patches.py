"""Patches that were written once are read for ever; ``record_golden`` writes them, no test does."""

import golden_patches as golden
import numpy as np
import pytest
import xxhash

from rlsparse.patch import CODECS, Changes, Patch
from rlsparse.patch.squash import squash

KNOWN = golden.known()


def test_the_known_weights_have_what_is_special():
    for dtype, special in golden.SPECIAL.items():
        changed = [one for one in KNOWN.values() if one.dtype == dtype and one.codec]
        for one in changed:
            assert {*special} <= {*one.before.tolist()}
            moved = one.before != one.after
            assert {*special} <= {*one.after[moved].tolist()}
            assert 0.3 < moved.mean() < 0.5


@pytest.mark.parametrize(("coding", "compression"), golden.WAYS)
def test_a_golden_patch_is_read_to_the_known_weights(coding, compression):
    patch = Patch.open(golden.golden_file(coding, compression))
    assert (patch.values, patch.base_fingerprint) == (coding, golden.FINGERPRINT)
    assert (patch.metadata, patch.tensors.keys()) == (golden.NOTES, KNOWN.keys())
    for name, one in KNOWN.items():
        said = patch.tensors[name]
        assert (said.dtype, said.shape, said.part) == (one.dtype, (golden.SIZE,), one.part)
        assert said.num_changed == (one.before != one.after).sum()
        sums = [xxhash.xxh3_128_hexdigest(bits.tobytes()) for bits in (one.before, one.after)]
        assert [said.xxh3_before, said.xxh3_after] == sums
        for start in (0, 1, 64, 99):
            bits = one.before[start:].copy()
            Changes(patch, name).apply(bits, start)
            assert np.array_equal(bits, one.after[start:])


@pytest.mark.parametrize(("coding", "compression"), golden.WAYS)
def test_a_golden_patch_has_what_it_is_to_show(coding, compression):
    """Several blocks of each codec, and streams that are really compressed."""
    patch = Patch.open(golden.golden_file(coding, compression))
    for name, one in KNOWN.items():
        blocks = patch.tensors[name].blocks
        if one.codec:
            assert len(blocks) > 1
            assert {block.codec for block in blocks} == {[*CODECS].index(one.codec)}
    smaller = [
        block.sizes[0] < block.position_bytes
        for name in KNOWN
        for block in patch.tensors[name].blocks
    ]
    assert any(smaller) == (compression == "zstd")


@pytest.mark.parametrize(("coding", "compression"), golden.WAYS)
def test_a_golden_patch_is_written_again(tmp_path, coding, compression):
    """Byte for byte where zstd, whose versions may differ, has no part in it."""
    file, path = golden.golden_file(coding, compression), tmp_path / "p"
    patch = golden.write_golden(path, coding, compression)
    if compression == "none":
        assert path.read_bytes() == file.read_bytes()
    assert patch.tensors.keys() == Patch.open(file).tensors.keys()


@pytest.mark.parametrize(("coding", "compression"), golden.WAYS)
def test_a_golden_patch_is_squashed_to_the_same_changes(tmp_path, coding, compression):
    patch = Patch.open(golden.golden_file(coding, compression))
    squashed = squash([patch], tmp_path / "p", compression=compression)
    assert squashed.tensors.keys() == KNOWN.keys()
    for name, one in KNOWN.items():
        bits = one.before.copy()
        Changes(squashed, name).apply(bits, 0)
        assert np.array_equal(bits, one.after)
