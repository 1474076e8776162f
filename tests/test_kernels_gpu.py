"""The GPU kernels: on a CUDA device where there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the tests marked ``gpu`` run once more, in a
process of their own, on CPU tensors: ``test_all_the_others_in_the_interpreter``.
"""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted import FLOATS, unsigned
from test_kernels import (
    FIRST_NONFINITE,
    WIDTH,
    assert_same,
    moved,
    naive,
    naive_magnitude_bin,
    special_bits,
    value,
)

from rlsparse import kernels
from rlsparse.definitions import DEFINITIONS, NUM_MAGNITUDE_BINS
from rlsparse.errors import CheckpointError

pytest.importorskip("triton", reason="Triton is for Linux only")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
# The interpreter computes with numpy, which warns of the NaNs and infinities put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning") if INTERPRETED else []
KINDS = pytest.mark.parametrize("dtype", list(FLOATS))


@pytest.fixture(scope="module")
def gpu():
    """The module under test, where it can run."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from rlsparse.kernels import gpu

    return gpu


def tensor(bits, dtype: str) -> torch.Tensor:
    raw = torch.from_numpy(np.array(bits, unsigned(dtype)))
    return raw.to(DEVICE).view(TYPES[dtype])


def check(gpu, before, after, dtype: str) -> None:
    """All integers, the mask and the maximum equal; sums of float64 to 1e-12."""
    found = kernels.measure(tensor(before, dtype), tensor(after, dtype), dtype)
    expected = naive(list(map(int, before)), list(map(int, after)), dtype)
    assert found.mask.device.type == DEVICE
    assert found.sum_sq_before == pytest.approx(expected.sum_sq_before, rel=1e-12, abs=0)
    assert_same(dataclasses.replace(found, mask=found.mask.cpu().numpy()), expected)


@pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter")
def test_all_the_others_in_the_interpreter():
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *options],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="tensors on the CPU are what the interpreter measures")
def test_tensors_on_the_cpu_are_refused():
    from rlsparse.kernels import gpu

    for refused in (lambda x: gpu.measure(x, x), gpu.magnitude_histogram):
        with pytest.raises(CheckpointError, match=r"float32\[3\] on cpu is not on a CUDA device"):
            refused(torch.zeros(3))


@pytest.mark.skipif(INTERPRETED, reason="no kernel in it")
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_fp32_decides_as_float64_does_for_narrow_formats(dtype):
    """Every finite code against its neighbours, the smallest codes, and the other sign of both."""
    from rlsparse.kernels import gpu

    *taus, relative = gpu._FORMATS[TYPES[dtype]].tolerances()
    first = FIRST_NONFINITE[dtype]
    code = np.arange(first)[:, None]
    partners = np.concatenate([code - np.arange(24), 0 * code + np.arange(24)], axis=1)
    codes = np.stack(np.broadcast_arrays(code, np.clip(partners, 0, None)))
    a, b = codes.astype(unsigned(dtype)).view(FLOATS[dtype]).astype(np.float32)
    for after in (b, -b):
        with np.errstate(over="ignore"):
            delta, exact = np.abs(after - a), np.abs(after.astype(float) - a.astype(float))
        for tau, name in zip(taus, DEFINITIONS[1:-1], strict=True):
            assert ((delta > np.float32(tau)) == (exact > float(name.removeprefix("abs_")))).all()
        scale = np.maximum(a, b)
        assert (
            (delta > scale * np.float32(relative)) == (exact > 1e-3 * scale.astype(float))
        ).all()


@pytest.mark.skipif(INTERPRETED, reason="it compiles")
@pytest.mark.parametrize("name", ["compare", "magnitudes", "stripes"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(name, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does, and cannot tell how the loads come out."""
    import triton
    from triton import language as tl
    from triton.backends.compiler import GPUTarget

    from rlsparse.kernels import triton_code

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_code, name)
    constants = {
        "FORMAT": "bf16", "WORD": tl.uint32, "FIRST_NONFINITE": 0x7F80, "FIRST_NAN": 0x7F81,
        "ABS": 0x7FFF, "TAUS": (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
    }  # fmt: skip
    pointers = {
        "before": "*u16", "after": "*u16", "weights": "*u16", "mask": "*u8", "counts": "*i32",
        "sums": "*fp64", "histograms": "*i32", "row_counts": "*i32", "column_counts": "*i32",
    }  # fmt: skip
    for whole in (True, False):
        given = {**constants, "IN_BOUNDS": whole, "ALIGNED": whole}
        given = {key: given[key] for key in kernel.arg_names if key in given}
        types = {k: pointers.get(k, "i32") for k in kernel.arg_names if k not in given}
        signature = {k: types.get(k, "constexpr") for k in kernel.arg_names}
        divisible = {(kernel.arg_names.index(k),): [["tt.divisibility", 16]] for k in types}
        source = triton.compiler.ASTSource(kernel, signature, given, divisible)
        options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
        assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        listing = assembly.asm["ptx"]
        assert ".ftz" not in listing  # subnormals stay
        assert ".local" not in listing  # no spilled registers
        if whole:
            assert ".v4.b32" in listing  # 16 bytes at a time


@pytest.mark.gpu
@KINDS
def test_all_pairs_of_special_values(gpu, dtype):
    special = special_bits(dtype)
    check(gpu, [x for x in special for _ in special], special * len(special), dtype)


@pytest.mark.gpu
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@KINDS
def test_random_bits(gpu, dtype, data):
    size = data.draw(st.integers(0, 60))
    anything = st.integers(0, 2 ** WIDTH[dtype] - 1)
    bits = st.one_of(anything, st.sampled_from(special_bits(dtype)))
    before = data.draw(st.lists(bits, min_size=size, max_size=size))
    moves = st.one_of(st.just(0), st.integers(0, 600), anything)
    steps = data.draw(st.lists(moves, min_size=size, max_size=size))
    after = [(x + step) % 2 ** WIDTH[dtype] for x, step in zip(before, steps, strict=True)]
    check(gpu, before, after, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e5m2", "fp32"])
def test_any_code_against_any_other(gpu, dtype):
    rng = np.random.default_rng(11)
    before, after = rng.integers(0, 2 ** WIDTH[dtype], (2, 900), np.uint64)
    check(gpu, before, np.where(rng.random(900) < 0.5, before, after), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0, 1, 7, 8, 1023, 1024, 1025, 4096, 5003])
def test_sizes_around_the_tiles(gpu, size):
    before, after = moved(np.random.default_rng(size), "bf16", size, 0.1)
    check(gpu, before, after, "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_densities(gpu, density):
    before, after = moved(np.random.default_rng(1), "fp32", 1100, density)
    check(gpu, before, after, "fp32")


@pytest.mark.gpu
def test_one_lane_may_hold_all_changes(gpu):
    before = np.full(2048, 0x3F80, np.uint16)
    after = before.copy()
    after[24:32] += 1  # lane 3 of the first tile
    after[1047] += 300
    check(gpu, before, after, "bf16")


@pytest.mark.gpu
def test_a_nan_that_stays_is_found_in_its_tile_only(gpu):
    before, after = moved(np.random.default_rng(4), "bf16", 3100, 0.1)
    for x in (before, after):
        x[5], x[2050], x[3099] = 0x7FC1, 0x7F80, 0xFFC0
    after[1030] = 0xFF80
    check(gpu, before, after, "bf16")


@pytest.mark.gpu
def test_differences_next_to_the_tolerances(gpu):
    near = [np.float32(float(name.removeprefix("abs_"))) for name in DEFINITIONS[1:-1]]
    sides = [np.nextafter(tau, np.float32(to)) for tau in near for to in (0, 1)]
    after = np.array([*near, *sides, 1 + 2**-10, 1 + 2**-9], np.float32)
    before = np.where(after > 0.5, np.float32(1), np.float32(0))
    check(gpu, before.view(np.uint32), after.view(np.uint32), "fp32")
    exact = np.array([float(name.removeprefix("abs_")) for name in DEFINITIONS[1:-1]])
    twice = np.concatenate([exact, np.nextafter(exact, 1)])
    check(gpu, np.zeros(10, np.uint64), twice.view(np.uint64), "fp64")


@pytest.mark.gpu
def test_integers_are_compared_by_bits_only(gpu):
    before = torch.arange(1500, device=DEVICE)
    for kind in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64):
        x = before.to(kind)
        y = x.clone()
        y[[1, 9, 1300]] = (before[[1, 9, 1300]] == 0).to(kind)
        y[1300] = 0
        found = gpu.measure(x, y)
        expected = (x != y).cpu().numpy()
        assert set(found.num_changed.values()) == {int(expected.sum())}
        assert (
            found.mask.cpu().numpy().tobytes() == np.packbits(expected, bitorder="little").tobytes()
        )
        assert sum(found.ulp_histogram) == sum(found.magnitude_histogram_changed) == 0
        rest = (found.num_nonfinite, found.num_sign_flips, found.num_zero_sign_flips)
        assert (*rest, found.sum_sq_before, found.max_abs_delta) == (0, 0, 0, 0.0, 0.0)
        assert gpu.magnitude_histogram(x)[0].sum() == 0


@pytest.mark.gpu
def test_shapes_and_strides(gpu):
    x = torch.arange(24, dtype=torch.float32, device=DEVICE).reshape(4, 6)
    y = x.clone()
    y[1, 2] += 1
    assert gpu.measure(x.T, y.T).mask.tolist() == [0, 2, 0]  # place 2 * 4 + 1 when transposed
    assert gpu.measure(x.flatten()[1:], y.flatten()[1:]).mask.tolist() == [128, 0, 0]
    assert gpu.measure(x[1, 2], y[1, 2]).mask.tolist() == [1]
    assert gpu.measure(x[:0], y[:0]).num_elements == 0


@pytest.mark.gpu
def test_sides_must_fit(gpu):
    x = torch.zeros(3, device=DEVICE)
    for other in (x[:2], x.half()):
        with pytest.raises(CheckpointError, match="both must have one shape, one format"):
            gpu.measure(x, other)
    wide = torch.zeros(3, dtype=torch.complex128, device=DEVICE)
    with pytest.raises(CheckpointError, match="16 bytes per element"):
        gpu.measure(wide, wide)


@pytest.mark.gpu
@KINDS
def test_magnitude_histogram(gpu, dtype):
    rng = np.random.default_rng(1)
    with np.errstate(over="ignore"):
        weights = np.exp2(rng.uniform(-45, 17, 1300)).astype(np.float32).astype(FLOATS[dtype])
    bits = weights.view(unsigned(dtype)).tolist() + special_bits(dtype)
    if dtype == "fp64":
        bits = [code for code in bits if not abs(value(code, dtype)) > 1e100]
    finite = [v for v in (value(code, dtype) for code in bits) if np.isfinite(v)]
    expected = np.bincount(
        [naive_magnitude_bin(v) for v in finite], minlength=NUM_MAGNITUDE_BINS
    ).tolist()
    histogram, sum_sq = kernels.magnitude_histogram(tensor(bits, dtype), dtype)
    assert histogram.tolist() == expected
    assert sum_sq == pytest.approx(sum(v * v for v in finite), rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (130, 8), (129, 9), (2, 2049), (3, 4096), (260, 33), (1, 0), (0, 3)]
)
def test_stripe_counts(gpu, shape):
    changed = np.random.default_rng(2).random(shape) < 0.4
    mask = torch.from_numpy(np.packbits(changed, bitorder="little")).to(DEVICE)
    rows, columns = kernels.stripe_counts(mask, *shape)
    assert (rows.dtype, columns.dtype) == (torch.int64, torch.int64)
    assert rows.tolist() == changed.sum(1).tolist()
    assert columns.tolist() == changed.sum(0).tolist()


@pytest.mark.gpu
def test_a_mask_of_another_size_is_refused(gpu):
    with pytest.raises(CheckpointError, match="no packed mask of 3 rows of 8 weights"):
        gpu.stripe_counts(torch.zeros(2, dtype=torch.uint8, device=DEVICE), 3, 8)
