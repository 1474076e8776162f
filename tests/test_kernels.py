import bisect
import math
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import FLOATS, unsigned

from rlsparse import kernels, tables
from rlsparse.definitions import (
    DEFINITIONS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    NUM_EXPONENTS,
    NUM_MAGNITUDE_BINS,
    ULP_BINS,
)
from rlsparse.errors import CheckpointError
from rlsparse.kernels import machine_code

WIDTH = {dtype: 8 * unsigned(dtype).itemsize for dtype in FLOATS}
FIRST_NONFINITE = {
    "fp64": 0x7FF0_0000_0000_0000, "fp32": 0x7F80_0000, "fp16": 0x7C00, "bf16": 0x7F80,
    "fp8_e4m3": 0x7F, "fp8_e5m2": 0x7C,
}  # fmt: skip
POWERS = [2.0**exponent for exponent in range(-1074, 1024)]
KINDS = pytest.mark.parametrize("dtype", list(FLOATS))


def value(bits: int, dtype: str) -> float:
    return float(np.array([bits], unsigned(dtype)).view(FLOATS[dtype])[0])


def rank(bits: int, dtype: str) -> int:
    """Place among all values in ascending order, -0 just below +0."""
    magnitude = bits % 2 ** (WIDTH[dtype] - 1)
    return magnitude if bits == magnitude else -magnitude - 1


def naive_magnitude_bin(weight: float) -> int:
    if weight == 0:
        return 0
    place = bisect.bisect_right(POWERS, abs(weight)) - 1
    exponent, exact = place - 1074, POWERS[place] == abs(weight)
    clipped = min(max(exponent, MIN_EXPONENT), MAX_EXPONENT)
    return 1 + exact * NUM_EXPONENTS + clipped - MIN_EXPONENT


def naive_ulp_bin(distance: int) -> int:
    for index, label in enumerate(ULP_BINS[:-1]):
        if distance <= int(label.split("-")[-1]):
            return index
    return len(ULP_BINS) - 1


def naive(before: list[int], after: list[int], dtype: str) -> kernels.ChunkCounts:
    """One weight at a time, in Python floats (float64)."""
    changed = dict.fromkeys(DEFINITIONS, 0)
    ulps = [0] * len(ULP_BINS)
    magnitudes = [0] * NUM_MAGNITUDE_BINS
    deltas, squares, flips, zero_flips, nonfinite, nans, mask = [], [], 0, 0, 0, 0, 0
    for position, (x, y) in enumerate(zip(before, after, strict=True)):
        a, b = value(x, dtype), value(y, dtype)
        finite = math.isfinite(a) and math.isfinite(b)
        nonfinite += not finite
        nans += math.isnan(a) or math.isnan(b)
        mask |= (x != y) << position
        if math.isfinite(a):
            squares.append(a * a)
            if x != y:
                magnitudes[naive_magnitude_bin(a)] += 1
        for name in DEFINITIONS:
            kind, _, tolerance = name.partition("_")
            if kind == "bitwise" or not finite:
                changed[name] += x != y
            else:
                scale = max(abs(a), abs(b)) if kind == "rel" else 1.0
                changed[name] += abs(b - a) > float(tolerance) * scale
        if finite:
            deltas.append(abs(b - a))
            flips += (a < 0 < b) or (b < 0 < a)
            zero_flips += x != y and a == b == 0
            if x != y:
                ulps[naive_ulp_bin(abs(rank(x, dtype) - rank(y, dtype)))] += 1
    return kernels.ChunkCounts(
        num_elements=len(before),
        num_changed=changed,
        ulp_histogram=ulps,
        magnitude_histogram_changed=magnitudes,
        sum_sq_before=sum(squares),
        sum_sq_delta=sum(d * d for d in deltas),
        sum_abs_delta=sum(deltas),
        max_abs_delta=max(deltas, default=0.0),
        num_sign_flips=flips,
        num_zero_sign_flips=zero_flips,
        num_nonfinite=nonfinite,
        num_nan=nans,
        mask=mask.to_bytes((len(before) + 7) // 8, "little"),
    )


def assert_same(found: kernels.ChunkCounts, expected: kernels.ChunkCounts) -> None:
    precision = {"sum_sq_before": 4e-7, "sum_sq_delta": 1e-12, "sum_abs_delta": 1e-12}
    for field in expected.__dataclass_fields__:
        ours, theirs = getattr(found, field), getattr(expected, field)
        if field == "mask":
            assert ours.tobytes() == theirs
        elif field in precision:
            assert ours == pytest.approx(theirs, rel=precision[field], abs=0), field
        else:
            assert ours == theirs, field


def special_bits(dtype: str) -> list[int]:
    """Zeros, subnormals, one, its neighbours, the largest values, infinities, NaNs; both signs."""
    width = WIDTH[dtype]
    one = int(np.array([1], FLOATS[dtype]).view(unsigned(dtype))[0])
    top = 2 ** (width - 1) - 1
    first = FIRST_NONFINITE[dtype]
    positive = {0, 1, 2, 3, one - 1, one, one + 1, first - 1, first, min(first + 1, top), top}
    return sorted(positive | {bits | 1 << (width - 1) for bits in positive})


@KINDS
def test_all_pairs_of_special_values(dtype):
    special = special_bits(dtype)
    before = [x for x in special for _ in special]
    after = special * len(special)
    item = unsigned(dtype)
    found = kernels.measure(np.array(before, item), np.array(after, item), dtype)
    assert_same(found, naive(before, after, dtype))


@settings(max_examples=60, deadline=None)
@given(st.data())
@KINDS
def test_random_bits(dtype, data):
    size = data.draw(st.integers(0, 40))
    anything = st.integers(0, 2 ** WIDTH[dtype] - 1)
    narrow = unsigned(dtype)
    bits = st.one_of(anything, st.sampled_from(special_bits(dtype)))
    before = data.draw(st.lists(bits, min_size=size, max_size=size))
    moves = st.one_of(st.just(0), st.integers(0, 600), anything)
    steps = data.draw(st.lists(moves, min_size=size, max_size=size))
    after = [(x + step) % 2 ** WIDTH[dtype] for x, step in zip(before, steps, strict=True)]
    found = kernels.measure(np.array(before, narrow), np.array(after, narrow), dtype)
    assert_same(found, naive(before, after, dtype))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_like_those_of_a_model(dtype):
    rng = np.random.default_rng(3)
    weights = (rng.standard_normal(20_001) * 0.02).astype(np.float32)
    moved = weights + (rng.standard_normal(20_001) * 1e-5).astype(np.float32)
    before = weights.astype(FLOATS[dtype]).view(unsigned(dtype))
    after = moved.astype(FLOATS[dtype]).view(unsigned(dtype))
    expected = naive(before.tolist(), after.tolist(), dtype)
    assert len(set(expected.num_changed.values())) > 3
    assert_same(kernels.measure(before, after, dtype), expected)


def moved(rng: np.random.Generator, dtype: str, size: int, density: float) -> tuple:
    """Weights like those of a model, some of them one to three codes further from zero."""
    weights = (rng.standard_normal(size) * 0.02).astype(np.float32).astype(FLOATS[dtype])
    before = weights.view(unsigned(dtype))
    steps = rng.integers(1, 4, size) * (rng.random(size) < density)
    return before, before + steps.astype(unsigned(dtype))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1023, 1024, 1025, 2111, 2112, 2113, 5000])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_sizes_around_the_blocks(size, density):
    before, after = moved(np.random.default_rng(size), "bf16", size, density)
    assert_same(
        kernels.measure(before, after, "bf16"), naive(before.tolist(), after.tolist(), "bf16")
    )


@KINDS
def test_a_nonfinite_weight_anywhere_spoils_nothing_else(dtype):
    rng = np.random.default_rng(11)
    before, after = moved(rng, dtype, 4500, 0.3)
    special = np.array(special_bits(dtype), unsigned(dtype))
    for side in (before, after):  # in the second block only, which is then judged with care
        side[1200 + np.arange(special.size)] = rng.permutation(special)
    assert_same(
        kernels.measure(before, after, dtype), naive(before.tolist(), after.tolist(), dtype)
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "i64"])
def test_pieces_add_up(dtype):
    rng = np.random.default_rng(2)
    kind = "bf16" if dtype == "bf16" else "fp32"
    before, after = moved(rng, kind, 3000, 0.2)
    if dtype == "i64":
        before, after = before.astype(np.uint64), after.astype(np.uint64)
    whole, scan = kernels.measure(before, after, dtype), kernels.Scan(3000, dtype)
    for start, stop in [(0, 64), (64, 1984), (1984, 1984), (1984, 3000)]:
        scan.add(before[start:stop], after[start:stop])
    found = scan.counts()
    assert found.mask.tobytes() == whole.mask.tobytes()
    for field in set(found.__dataclass_fields__) - {"mask"}:
        assert getattr(found, field) == pytest.approx(getattr(whole, field), rel=4e-7), field


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 200), st.floats(0, 1), st.integers(0, 2**32))
def test_stripe_counts(num_rows, num_columns, density, seed):
    mask = np.random.default_rng(seed).random((num_rows, num_columns)) < density
    rows, columns = kernels.stripe_counts(
        np.packbits(mask, axis=None, bitorder="little"), num_rows, num_columns
    )
    assert rows.tolist() == mask.sum(1).tolist()
    assert columns.tolist() == mask.sum(0).tolist()


def test_stripe_counts_of_many_full_rows():
    """More rows than a counter of 8 bits holds, several times over."""
    mask = np.ones((1000, 70), bool)
    mask[:, 3] = False
    packed = np.packbits(mask, axis=None, bitorder="little")
    rows, columns = kernels.stripe_counts(packed, *mask.shape)
    assert rows.tolist() == [69] * 1000
    assert columns.tolist() == [0 if column == 3 else 1000 for column in range(70)]


@pytest.mark.parametrize("scale", [1e-22, 1e22])
def test_squares_beyond_the_range_of_fp32(scale):
    weights = (np.random.default_rng(1).standard_normal(3000) * scale).astype(np.float32)
    bits = weights.astype(FLOATS["bf16"]).view(np.uint16)
    values = bits.view(FLOATS["bf16"]).astype(np.float64)
    found = kernels.measure(bits, bits, "bf16").sum_sq_before
    assert found == pytest.approx(float((values**2).sum()), rel=4e-7, abs=0)


def test_kernels_are_compiled_once_per_machine(tmp_path):
    code = (
        "import sys, numpy as np; from rlsparse.kernels import measure;"
        "n = measure(np.zeros(9, np.uint16), np.ones(9, np.uint16), 'bf16').num_changed['bitwise'];"
        "print(n, 'numba' in sys.modules)"
    )
    blocked = tmp_path / "a file"
    blocked.touch()  # a cache that cannot be written costs time, nothing else
    for folder, expected in [("cache", "9 True"), ("cache", "9 False"), ("a file", "9 True")]:
        environment = os.environ | {"RLSPARSE_CACHE_DIR": str(tmp_path / folder)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected
        assert ("set RLSPARSE_CACHE_DIR" in done.stderr) == (folder == "a file")
    (object_file,) = (tmp_path / "cache").glob("scan_bf16-*.o")
    whole = object_file.read_bytes()
    assert len(whole) > 1000
    for damaged in (b"", whole[:-1], whole[:500] + b"1234" + whole[504:]):
        object_file.write_bytes(damaged)
        assert machine_code._kept(object_file) is None
    object_file.write_bytes(whole)
    assert machine_code._kept(object_file) == whole[32:]
    for path, mode in [
        (object_file, 0o620),
        (object_file.parent, 0o770),
        (object_file.parent, 0o707),
    ]:
        before = path.stat().st_mode
        path.chmod(mode)  # others could have put their code there
        assert machine_code._kept(object_file) is None
        path.chmod(before)
    assert machine_code._kept(object_file) == whole[32:]


OTHER_PROCESSOR = """
import os, sys
os.environ |= {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": "+sse4.2,+popcnt"}
import llvmlite.binding as llvm
features = llvm.get_host_cpu_features()
features.clear()
features.update({"sse4.2": True, "popcnt": True})
llvm.get_host_cpu_name, llvm.get_host_cpu_features = lambda: "x86-64-v2", lambda: features
import numpy as np
from rlsparse.kernels import measure
from rlsparse.kernels.compare import compare, set_bits
sides = [np.load(file) for file in sys.argv[1:3]]
words = np.empty(-(-sides[0].size // 64), np.uint64)
print(set_bits(words, compare(*sides, words)).tolist())
counts = measure(*sides, sys.argv[3])
print([value for name, value in vars(counts).items() if name not in ("mask", "sum_sq_before")])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="poses as an older x86 processor")
def test_a_processor_without_wide_vectors_counts_the_same(tmp_path):
    before, after = moved(np.random.default_rng(8), "fp16", 5000, 0.3)
    after[1200] = FIRST_NONFINITE["fp16"]
    files = [tmp_path / "before.npy", tmp_path / "after.npy"]
    for file, bits in zip(files, (before, after), strict=True):
        np.save(file, bits)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESSOR, *map(str, files), "fp16"],
        env=os.environ | {"RLSPARSE_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    counts = vars(kernels.measure(before, after, "fp16"))
    assert done.stdout.splitlines() == [
        str(np.flatnonzero(before != after).tolist()),
        str([value for name, value in counts.items() if name not in ("mask", "sum_sq_before")]),
    ]


def test_definitions_on_known_pairs():
    def one(before: float, after: float) -> dict[str, int]:
        sides = (np.array([x], np.float32).view(np.uint32) for x in (before, after))
        return kernels.measure(*sides, "fp32").num_changed

    assert one(0.0, -0.0) == {d: int(d == "bitwise") for d in DEFINITIONS}
    assert set(one(math.nan, 0.0).values()) == {1}
    assert set(one(math.nan, math.nan).values()) == {0}
    assert set(one(math.inf, -math.inf).values()) == {1}
    tau = float(np.float32(1e-5))  # 9.99999974e-06, not above the tolerance
    assert one(0.0, tau)["abs_1e-05"] == 0
    assert one(0.0, float(np.nextafter(np.float32(1e-5), np.float32(1))))["abs_1e-05"] == 1
    exact = np.array([0.0, 1e-5]).view(np.uint64)  # only fp64 can lie on the tolerance
    assert kernels.measure(exact[:1], exact[1:], "fp64").num_changed["abs_1e-05"] == 0
    assert one(1.0, 1.0 + 2**-10)["rel_1e-03"] == 0
    assert one(1.0, 1.0 + 2**-9)["rel_1e-03"] == 1


def test_integers_are_compared_by_bits_only():
    before = np.array([1, 2, 3, 2**63], np.uint64)
    counts = kernels.measure(before, before + np.uint64([0, 1, 0, 7]), "i64")
    assert set(counts.num_changed.values()) == {2}
    assert counts.mask.tobytes() == bytes([0b1010])
    assert sum(counts.ulp_histogram) == sum(counts.magnitude_histogram_changed) == 0
    assert (counts.num_nonfinite, counts.sum_sq_delta, counts.num_sign_flips) == (0, 0.0, 0)


def test_columns_are_those_of_the_table():
    counts = kernels.measure(np.zeros(3, np.uint16), np.ones(3, np.uint16), "bf16")
    names = tables.SCHEMAS["tensor_deltas"].names
    assert list(counts.columns()) == names[names.index("num_elements") :]


def test_sides_must_fit():
    three, four = np.zeros(3, np.uint16), np.zeros(4, np.uint16)
    for before, after, dtype in [(three, four, "bf16"), (three, three, "fp32")]:
        with pytest.raises(CheckpointError, match=rf"uint16\[3\] .* as {dtype}"):
            kernels.measure(before, after, dtype)


@KINDS
def test_magnitude_histogram(dtype):
    rng = np.random.default_rng(1)
    with np.errstate(over="ignore"):
        weights = np.exp2(rng.uniform(-45, 17, 300)).astype(np.float32).astype(FLOATS[dtype])
    bits = weights.view(unsigned(dtype)).tolist() + special_bits(dtype)
    if dtype == "fp64":
        bits = [b for b in bits if not abs(value(b, dtype)) > 1e100]
    finite = [v for v in (value(b, dtype) for b in bits) if math.isfinite(v)]
    expected = [0] * NUM_MAGNITUDE_BINS
    for weight in finite:
        expected[naive_magnitude_bin(weight)] += 1
    histogram, sum_sq = kernels.magnitude_histogram(np.array(bits, unsigned(dtype)), dtype)
    assert histogram.tolist() == expected
    assert sum_sq == pytest.approx(math.fsum(v * v for v in finite), rel=1e-12)


def test_magnitude_histogram_of_integers_is_empty():
    histogram, sum_sq = kernels.magnitude_histogram(np.ones(3, np.uint8), "u8")
    assert (histogram.sum(), sum_sq, histogram.size) == (0, 0.0, NUM_MAGNITUDE_BINS)


@pytest.mark.parametrize("kind", [np.uint8, np.uint64])
@pytest.mark.parametrize("num_words", [0, 1, 5, 40_003])
def test_popcounts(kind, num_words):
    rng = np.random.default_rng(num_words)
    masks = rng.integers(0, np.iinfo(kind).max, (4, num_words), kind, endpoint=True)
    masks[1] = 0
    rows = [int.from_bytes(mask.tobytes(), "little") for mask in masks]
    expected = [[(a & b).bit_count() for b in rows] for a in rows]
    assert kernels.popcount_and(masks).tolist() == expected
    assert kernels.popcount(masks) == sum(row.bit_count() for row in rows)


# --- casts -----------------------------------------------------------------------------------


def nearest_even(weight: float, dtype: str) -> int:
    """Round by searching all values of a narrow format; ties to the even code."""
    codes = np.arange(FIRST_NONFINITE[dtype], dtype=unsigned(dtype))
    magnitudes = codes.view(FLOATS[dtype]).astype(np.float64)
    at = int(np.searchsorted(magnitudes, abs(weight), "right")) - 1
    sign = (math.copysign(1, weight) < 0) << (WIDTH[dtype] - 1)
    gap = magnitudes[-1] - magnitudes[-2] if at + 1 == codes.size else (
        magnitudes[at + 1] - magnitudes[at]
    )  # fmt: skip
    rest = abs(weight) - magnitudes[at]
    up = rest > gap / 2 or (rest == gap / 2 and at % 2 == 1)
    return (at + up) | sign


@pytest.mark.parametrize("source", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("target", ["bf16", "fp16", "fp8_e4m3", "fp8_e5m2"])
def test_casts_round_to_nearest_even(source, target):
    rng = np.random.default_rng(5)
    codes = rng.integers(0, FIRST_NONFINITE[target] - 1, 40, unsigned(target))
    low = codes.view(FLOATS[target]).astype(np.float64)
    high = (codes + 1).astype(unsigned(target)).view(FLOATS[target]).astype(np.float64)
    middle = (low + high) / 2  # ties, and their neighbours on both sides in the source
    with np.errstate(over="ignore"):
        ties = middle.astype(FLOATS[source])
    bits = ties.view(unsigned(source))
    weights = np.concatenate([bits, bits + 1, bits - 1]).astype(unsigned(source))
    weights = weights[np.isfinite(weights.view(FLOATS[source]).astype(np.float64))]
    weights = np.concatenate([weights, weights ^ unsigned(source).type(1 << (WIDTH[source] - 1))])
    found = kernels.cast_bits(weights, source, target)
    assert found.dtype == unsigned(target)
    assert found.tolist() == [nearest_even(value(b, source), target) for b in weights.tolist()]


def test_casting_up_is_exact():
    every = np.arange(2**16, dtype=np.uint16)
    up = kernels.cast_bits(every, "bf16", "fp32")
    assert np.array_equal(up, every.astype(np.uint32) << 16)
    back = kernels.cast_bits(up, "fp32", "bf16")
    numbers = ~np.isnan(up.view(np.float32))
    assert np.array_equal(back[numbers], every[numbers])
    assert np.isnan(back[~numbers].view(FLOATS["bf16"])).all()


@pytest.mark.parametrize("source", ["bf16", "fp16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("target", ["fp32", "bf16", "fp16", "fp8_e4m3"])
def test_many_weights_are_cast_as_few_are(source, target):
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2 ** WIDTH[source], 5000, unsigned(source))
    few = [
        kernels.cast_bits(bits[start : start + 100], source, target)
        for start in range(0, 5000, 100)
    ]
    found = kernels.cast_bits(bits, source, target)
    assert found.dtype == unsigned(target)
    assert np.array_equal(found, np.concatenate(few))


def test_casts_agree_with_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    weights = np.concatenate(
        [
            (rng.standard_normal(5000) * 0.02).astype(np.float32),
            np.exp2(rng.uniform(-30, 8.8, 5000)).astype(np.float32),
            np.float32([0, -0.0, 448, -448]),
        ]
    )
    bits = weights.view(np.uint32)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn}
    for dtype, kind in kinds.items():
        cast = torch.from_numpy(weights).to(kind)
        view = torch.uint8 if WIDTH[dtype] == 8 else torch.int16
        theirs = cast.view(view).numpy().view(unsigned(dtype))
        assert np.array_equal(kernels.cast_bits(bits, "fp32", dtype), theirs)


def test_fp8_has_no_infinity():
    bits = np.float32([464, 465, 1e9, -1e9, np.inf, np.nan]).view(np.uint32)
    assert kernels.cast_bits(bits, "fp32", "fp8_e4m3").tolist() == [
        0x7E, 0x7F, 0x7F, 0xFF, 0x7F, 0x7F,
    ]  # fmt: skip


def test_only_numbers_are_cast():
    with pytest.raises(CheckpointError, match="cannot cast i64; known formats: fp64"):
        kernels.cast_bits(np.zeros(1, np.uint64), "i64", "bf16")
    bits = np.zeros(1, np.uint64)
    assert kernels.cast_bits(bits, "i64", "i64") is bits


def test_importing_the_package_compiles_nothing():
    heavy = {"numba", "torch", "pandas", "ray", "mlflow"}
    code = (
        "import sys, rlsparse.kernels, rlsparse.patch, rlsparse.masks, rlsparse.diff; "
        f"sys.exit(str({heavy!r} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


# --- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_masks", [1, 2, 3, 5, 8, 33])
@pytest.mark.parametrize("num_elements", [1, 63, 512, 40_003])
def test_counts_over_masks(num_masks, num_elements):
    rng = np.random.default_rng(num_masks)
    bits = rng.random((num_masks, num_elements)) < rng.random((num_masks, 1))
    bits[0] = True
    masks = np.stack([np.packbits(row, bitorder="little") for row in bits])
    both = bits.astype(np.int64) @ bits.T.astype(np.int64)
    assert kernels.popcount_and(masks).tolist() == both.tolist()
    labels = rng.integers(0, 70, num_elements).astype(np.uint16)
    by_label = [np.bincount(labels[row], minlength=70).tolist() for row in bits]
    assert kernels.label_counts(masks, labels, 70).tolist() == by_label
    agreeing = np.bincount(bits.sum(axis=0), minlength=num_masks + 1)
    assert kernels.agreement(masks, num_elements).tolist() == agreeing.tolist()


def test_no_masks_have_no_counts():
    none = np.zeros((0, 4), np.uint64)
    assert kernels.popcount_and(none).shape == (0, 0)
    assert kernels.label_counts(none, np.zeros(256, np.uint16), 3).shape == (0, 3)
    assert kernels.agreement(none, 200).tolist() == [200]
    empty = np.zeros((2, 0), np.uint8)
    assert kernels.label_counts(empty, np.zeros(0, np.uint16), 1).tolist() == [[0], [0]]
    assert kernels.agreement(empty, 0).tolist() == [0, 0, 0]


def test_labels_must_fit_the_masks():
    masks = np.full((1, 8), 255, np.uint8)
    for labels in (np.zeros(128, np.uint16), np.zeros(60, np.int64)):
        with pytest.raises(CheckpointError, match="labels do not fit masks of 1 words"):
            kernels.label_counts(masks, labels, 4)
    with pytest.raises(CheckpointError, match="label 4 is not below the number of 4"):
        kernels.label_counts(masks, np.full(64, 4, np.uint16), 4)
