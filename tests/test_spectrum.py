"""The shape of planted updates, against plain numpy; its null, its controls and its rows."""

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsparse import tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.definitions import RANK_TOLERANCES
from rlsparse.errors import CheckpointError
from rlsparse.placement import Lifts
from rlsparse.spectrum import _random_steps, adapter_hint, measure_spectrum, spectrum_rows

METHODS = ["exact", "gram"]


def to_bits(weights: np.ndarray, dtype: str) -> np.ndarray:
    rounded = weights.astype(np.float32).astype(planted.FLOATS[dtype])
    return rounded.reshape(-1).view(planted.unsigned(dtype))


def from_bits(bits: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return bits.view(planted.FLOATS[dtype]).astype(np.float64).reshape(shape)


def is_finite(bits: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return np.isfinite(bits.view(planted.FLOATS[dtype]).astype(np.float64))


def steps(rng, bits: np.ndarray, density: float) -> np.ndarray:
    """Each weight that moves goes one code up or down; zeros go up."""
    moves = rng.choice(np.array([1, -1]), bits.size) * (rng.random(bits.size) < density)
    moves = np.where(bits == 0, abs(moves), moves)
    return (bits.astype(np.int64) + moves).astype(bits.dtype)


def make(kind: str) -> tuple[str, tuple[int, int], np.ndarray, np.ndarray]:
    """An update: format, shape, bits before and after."""
    rng = np.random.default_rng(sum(kind.encode()))
    shape = {"wide": (40, 130), "tall": (130, 40), "one row": (1, 64)}.get(kind, (64, 96))
    weights = rng.standard_normal(shape) * 0.02
    dtype = "fp32" if kind in ("adapter", "noise") else "bf16"
    if kind == "low base":
        weights = np.outer(weights[:, 0], weights[0]) / 0.02
        weights[:, 50:] = 0
    before = to_bits(weights, dtype)
    exact = from_bits(before, dtype, shape)
    if kind in ("adapter", "rounded adapter"):
        low = rng.standard_normal((shape[0], 6)) @ rng.standard_normal((6, shape[1]))
        return dtype, shape, before, to_bits(exact + 0.002 * low, dtype)
    if kind == "noise":
        return dtype, shape, before, to_bits(exact + 1e-4 * rng.standard_normal(shape), dtype)
    if kind == "few rows":
        after = steps(rng, before, 0.5).reshape(shape)
        after[5:] = before.reshape(shape)[5:]
        return dtype, shape, before, after.ravel()
    return dtype, shape, before, steps(rng, before, 0.1)


KINDS = [
    "steps", "wide", "tall", "one row", "adapter", "rounded adapter", "noise", "few rows",
    "low base",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_plain_numpy(kind, method):
    dtype, shape, before, after = make(kind)
    found = measure_spectrum(before, after, dtype, shape, method=method, principal_rank=4)
    old, new = (from_bits(bits, dtype, shape) for bits in (before, after))
    delta = new - old
    sigma = np.linalg.svd(delta, compute_uv=False)
    sigma_old, sigma_new = (np.linalg.svd(one, compute_uv=False) for one in (old, new))
    assert (found.method, found.full_rank) == (method, min(shape))
    assert (found.num_elements, found.num_changed) == (delta.size, np.sum(before != after))
    assert tuple(found.ranks) == RANK_TOLERANCES
    assert found.ranks["default"] == np.linalg.matrix_rank(delta.astype(np.float32))
    for name in RANK_TOLERANCES[1:]:
        assert found.ranks[name] == np.linalg.matrix_rank(delta, rtol=float(name))
    energy = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert found.energy_rank == 1 + next(i for i, part in enumerate(energy) if part >= 0.99)
    spread = sigma[sigma > 0] / sigma.sum()
    assert found.entropy_rank == pytest.approx(np.exp(-np.sum(spread * np.log(spread))), rel=1e-4)
    assert found.stable_rank == pytest.approx(np.sum(delta**2) / sigma[0] ** 2)
    assert found.frobenius_norm == pytest.approx(np.linalg.norm(delta))
    assert found.sigma_max == pytest.approx(sigma[0])
    drift = np.linalg.norm(sigma_new - sigma_old) / np.linalg.norm(sigma_old)
    assert found.nss == pytest.approx(drift, rel=1e-6, abs=3e-8)
    squares = np.sort(delta.ravel() ** 2)[::-1]
    for share, value in ((0.01, found.top_1pct_share), (0.1, found.top_10pct_share)):
        top = squares[: math.ceil(share * squares.size)].sum() / squares.sum()
        assert value == pytest.approx(top)
    assert found.null is not None
    assert (found.null.null, found.null.nss_random) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_both_methods_agree(kind):
    dtype, shape, before, after = make(kind)
    exact, gram = (
        measure_spectrum(before, after, dtype, shape, method=method, seed=3, principal_rank=4)
        for method in METHODS
    )
    for one, other in ((exact, gram), (exact.null, gram.null)):
        left, right = one.columns(), other.columns()
        assert left.keys() == right.keys()
        for name in left.keys() - {"method"}:
            if left[name] is None:
                assert right[name] is None
            else:
                assert right[name] == pytest.approx(left[name], rel=1e-5, abs=1e-7), name


def test_auto_is_gram_above_the_constant(monkeypatch):
    dtype, shape, before, after = make("steps")
    assert measure_spectrum(before, after, dtype, shape).method == "exact"
    monkeypatch.setattr("rlsparse.decomposition.GRAM_ABOVE", 63)
    assert measure_spectrum(before, after, dtype, shape).method == "gram"


def test_a_tolerance_below_the_resolution_has_no_rank():
    rng = np.random.default_rng(0)
    before = to_bits(rng.standard_normal((2, 400_000)), "bf16")
    after = steps(rng, before, 0.01)
    exact, gram = (
        measure_spectrum(before, after, "bf16", (2, 400_000), method=method) for method in METHODS
    )
    # The default tolerance is max(m, n) eps = 0.048 here.
    assert exact.ranks == dict.fromkeys(RANK_TOLERANCES, 2)
    assert gram.ranks == {**exact.ranks, "1e-06": None}
    assert gram.columns()["rank_share_1e-06"] is None
    assert gram.columns()["rank_share_1e-05"] == 1


def test_the_update_of_few_rows_has_their_rank_and_stripes():
    found = measure_spectrum(*reorder(make("few rows")))
    assert found.ranks == dict.fromkeys(RANK_TOLERANCES, 5)
    assert found.stripes.untouched_row_share == 59 / 64
    assert found.stripes.row_dispersion > 20
    assert found.null.stripes.row_dispersion < 2
    # Same density, full rank: rank says where the changes lie, not how many they are.
    assert found.null.num_changed == found.num_changed
    assert min(found.null.ranks.values()) > 60


def reorder(update: tuple) -> tuple:
    dtype, shape, before, after = update
    return before, after, dtype, shape


# --- what cannot be measured -----------------------------------------------------------------


def test_an_unchanged_matrix():
    _, shape, before, _ = make("steps")
    found = measure_spectrum(before, before.copy(), "bf16", shape)
    assert found.ranks == dict.fromkeys(RANK_TOLERANCES, 0)
    assert (found.energy_rank, found.frobenius_norm, found.sigma_max, found.nss) == (0, 0, 0, 0)
    assert (found.num_changed, found.looks_like_adapter) == (0, False)
    assert found.entropy_rank is found.stable_rank is found.nss_random is None
    assert found.lifts == Lifts()
    assert found.stripes.untouched_row_share == 1
    assert found.null == replace(found, null=None)


@pytest.mark.parametrize("method", METHODS)
def test_only_signs_of_zeros_change(method):
    weights = np.random.default_rng(0).standard_normal((6, 8))
    weights[2, :4] = 0
    before = to_bits(weights, "bf16")
    after = before ^ np.where(before == 0, 0x8000, 0).astype(np.uint16)
    found = measure_spectrum(before, after, "bf16", (6, 8), method=method)
    assert found.num_changed == 4
    assert found.ranks == dict.fromkeys(RANK_TOLERANCES, 0)
    assert (found.nss, found.frobenius_norm) == (0, 0)
    assert found.nss_random == pytest.approx(0, abs=1e-12)
    assert found.entropy_rank is found.stable_rank is found.top_1pct_share is None
    assert found.null.energy_rank > 0


def test_signs_of_a_matrix_of_zeros():
    before = np.zeros(48, np.uint16)
    found = measure_spectrum(before, before | 0x8000, "bf16", (6, 8))
    assert (found.num_changed, found.frobenius_norm, found.nss) == (48, 0, None)
    assert not found.looks_like_adapter


@pytest.mark.parametrize("method", METHODS)
def test_a_base_of_zeros(method):
    rng = np.random.default_rng(0)
    after = to_bits(rng.standard_normal((6, 8)), "bf16")
    found = measure_spectrum(np.zeros_like(after), after, "bf16", (6, 8), method=method)
    assert found.nss is found.nss_random is None
    assert (found.principal_rank, found.cosines_left, found.lifts) == (0, [], Lifts())
    assert found.ranks["default"] == 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("is_before", [True, False])
def test_nonfinite_weights_are_refused(bad, is_before):
    sides = [np.ones((3, 4)), np.full((3, 4), 2.0)]
    sides[0 if is_before else 1][1, 2] = bad
    with pytest.raises(CheckpointError, match="1 of 12 pairs have a NaN or an infinity"):
        measure_spectrum(*(to_bits(side, "fp32") for side in sides), "fp32", (3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (12,)}, "no pair of matrices"),
        ({"shape": (3, 5)}, "no pair of matrices"),
        ({"shape": (0, 4), "before": 0, "after": 0}, "no pair of matrices"),
        ({"after": 8}, "12 and 8 weights"),
        ({"dtype": "i16"}, "in i16 make no pair of matrices.*bf16"),
        ({"method": "qr"}, "method 'qr'.*auto, exact, gram"),
        ({"mask_share": 1.0}, "mask_share 1.0"),
        ({"principal_rank": 0}, "principal_rank 0"),
    ],
)
def test_bad_calls_are_refused(change, message):
    given = {"before": 12, "after": 12, "dtype": "bf16", "shape": (3, 4)} | change
    before, after = (np.zeros(given.pop(side), np.uint16) for side in ("before", "after"))
    dtype, shape = given.pop("dtype"), given.pop("shape")
    with pytest.raises(CheckpointError, match=message):
        measure_spectrum(before, after, dtype, shape, **given)


@given(
    st.sampled_from(["bf16", "fp16", "fp32", "fp64", "fp8_e4m3", "fp8_e5m2"]),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_no_finite_bits_give_nan(dtype, shape, seed):
    """Any bit patterns at all: subnormals, both zeros and the largest weights."""
    rng = np.random.default_rng(seed)
    unsigned = planted.unsigned(dtype)
    size = shape[0] * shape[1]
    sides = [rng.integers(0, np.iinfo(unsigned).max, size, unsigned, True) for _ in range(2)]
    if dtype == "fp64":  # no further than 300 decades apart: 1e-154 to 2
        sides = [side & ~np.uint64(1 << 62) | np.uint64(1 << 61) for side in sides]
    for side in sides:
        side[~is_finite(side, dtype)] = 0
    sides[1] = np.where(rng.random(size) < 0.5, *sides)
    for method in METHODS:
        found = measure_spectrum(*sides, dtype, shape, method=method)
        for row in (found.columns(), found.null.columns()):
            for value in row.values():
                numbers = value if isinstance(value, list) else [value]
                assert all(math.isfinite(n) for n in numbers if isinstance(n, float))


# --- the null and the control ----------------------------------------------------------------


def ordered(bits: np.ndarray) -> np.ndarray:
    """Codes that rise by 1 from each representable value to the next; both zeros are 0."""
    sign = 1 << (8 * bits.itemsize - 1)
    codes = [int(b) for b in bits]
    return np.array([-(c - sign) if c >= sign else c for c in codes], object)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64", "fp8_e4m3", "fp8_e5m2"])
def test_the_null_moves_weights_to_the_next_value(dtype):
    rng = np.random.default_rng(0)
    unsigned = planted.unsigned(dtype)
    bits = rng.integers(0, np.iinfo(unsigned).max, 4000, unsigned, True)
    bits[~is_finite(bits, dtype)] = 0
    sign = 1 << (8 * unsigned.itemsize - 1)
    largest = {
        "bf16": 0x7F7F, "fp16": 0x7BFF, "fp32": 0x7F7F_FFFF, "fp64": 0x7FEF_FFFF_FFFF_FFFF,
        "fp8_e4m3": 0x7E, "fp8_e5m2": 0x7B,
    }[dtype]  # fmt: skip
    bits[:60] = np.array([0, sign, 1, sign | 1, largest, sign | largest] * 10, unsigned)
    moved = _random_steps(bits, 3000, dtype, rng)
    assert moved.dtype == bits.dtype
    places = np.flatnonzero(moved != bits)
    distance = (ordered(moved) - ordered(bits))[places]
    assert places.size == 3000
    assert set(distance) == {-1, 1}
    assert abs(np.sum(distance == 1) - 1500) < 150
    assert is_finite(moved, dtype).all()
    everything = _random_steps(bits, bits.size, dtype, rng)
    assert np.all(everything != bits)


def test_the_null_is_seeded_and_of_the_same_density():
    update = reorder(make("steps"))
    first, again, other = (measure_spectrum(*update, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.null != other.null
    assert first.nss_random != other.nss_random
    assert replace(first, null=None, nss_random=None) == replace(other, null=None, nss_random=None)
    assert first.null.num_changed == first.num_changed
    # Steps planted at random are what the null is.
    assert first.null.entropy_rank == pytest.approx(first.entropy_rank, rel=0.03)
    assert first.null.frobenius_norm == pytest.approx(first.frobenius_norm, rel=0.2)


def test_the_control_of_the_drift_is_noise_of_the_same_norm():
    noise = measure_spectrum(*reorder(make("noise")))
    assert noise.nss == pytest.approx(noise.nss_random, rel=0.2)
    dtype, shape, before, _ = make("steps")
    weights = from_bits(before, dtype, shape)
    grown = measure_spectrum(before, to_bits(weights * 1.25, dtype), dtype, shape)
    assert grown.nss == pytest.approx(0.25, rel=0.01)
    assert grown.nss_random < 0.5 * grown.nss


@pytest.mark.parametrize("kind", KINDS)
def test_only_merged_adapters_look_like_one(kind):
    found = measure_spectrum(*reorder(make(kind)))
    assert found.looks_like_adapter == kind.endswith("adapter")
    assert not found.null.looks_like_adapter
    if kind == "rounded adapter":  # rounding noise hides it from the usual rank
        assert found.ranks["1e-04"] == found.full_rank


# --- rows ------------------------------------------------------------------------------------


def pairs_of(pair: planted.Pair) -> list:
    left, right = (Checkpoint.open(side).tensors for side in (pair.before, pair.after))
    return [(name, left[name], right[name], left[name].shape) for name in left]


def write_pair(folder: Path, before: dict, after: dict) -> list:
    one = planted.write_folder(folder / "one", before)
    other = planted.write_folder(folder / "other", after)
    return pairs_of(planted.Pair(one, other, before, after, {}))


def test_rows_of_a_checkpoint_pair(tmp_path):
    pair = planted.make_pair(tmp_path)
    done = []
    rows = spectrum_rows(pairs_of(pair), seed=5, on_progress=done.append)
    matrices = [name for name in sorted(planted.LLAMA_SHAPES) if "norm" not in name]
    assert [(row["tensor"], row["kind"]) for row in rows] == [
        (name, kind) for name in matrices for kind in ("update", "null")
    ]
    assert done == [math.prod(planted.LLAMA_SHAPES[name]) for name in sorted(planted.LLAMA_SHAPES)]
    names = set(tables.SCHEMAS["spectra"].names)
    for row in rows:
        assert row.keys() == names
        own = measure_spectrum(
            pair.tensors_before[row["tensor"]].bits, pair.tensors_after[row["tensor"]].bits,
            "bf16", row["shape"], seed=row["seed"],
        )  # fmt: skip
        own = own if row["kind"] == "update" else own.null
        assert own.columns().items() <= row.items()
        assert row["num_changed"] == pair.changed[row["tensor"]].sum()
    assert len({row["seed"] for row in rows}) == len(matrices)
    assert rows[-1] | {"layer": 1, "module": "v", "view": "stored", "dtype": "bf16"} == rows[-1]
    table = tables.from_rows(rows, "spectra")
    tables.write(table, "spectra", tmp_path / "spectra.parquet")
    assert tables.read(tmp_path / "spectra.parquet", "spectra").to_pylist() == table.to_pylist()
    assert table.column_names == tables.SCHEMAS["spectra"].names
    assert spectrum_rows(pairs_of(pair), seed=5) == rows
    assert spectrum_rows(pairs_of(pair), seed=6)[0]["nss_random"] != rows[0]["nss_random"]


def test_what_has_no_row_and_what_has_no_numbers(tmp_path):
    rng = np.random.default_rng(0)
    before = {
        "experts.weight": planted.random_tensor(rng, "bf16", (2, 3, 4)),
        "broken.weight": planted.random_tensor(rng, "bf16", (3, 4)),
        "empty.weight": planted.random_tensor(rng, "bf16", (0, 4)),
        "scalar": planted.random_tensor(rng, "bf16", ()),
        "norm.weight": planted.random_tensor(rng, "bf16", (8,)),
        "ids": planted.Tensor("i64", (2, 2), np.arange(4, dtype=np.uint64)),
    }
    after = {name: planted.plant(rng, tensor, 0.5)[0] for name, tensor in before.items()}
    after["broken.weight"].bits[2] = 0x7F80
    rows = spectrum_rows(write_pair(tmp_path, before, after))
    assert [(row["tensor"], row["kind"]) for row in rows] == [
        ("broken.weight", "update"), ("experts.weight", "update"), ("experts.weight", "null"),
    ]  # fmt: skip
    broken, experts, _ = rows
    assert (broken["num_elements"], broken["num_nonfinite"]) == (12, 1)
    assert "nss" not in broken
    assert (experts["shape"], experts["num_nonfinite"]) == ([2, 3, 4], 0)
    assert experts["rank_default"] == 2
    table = tables.from_rows(rows, "spectra").to_pylist()
    assert table[0]["rank_default"] is table[0]["nss"] is table[0]["looks_like_adapter"] is None


def test_common_rows_and_views(tmp_path):
    rng = np.random.default_rng(0)
    wide = planted.random_tensor(rng, "fp32", (10, 6))
    moved = planted.plant(rng, wide, 1.0)[0]
    [(name, one, other, _)] = write_pair(tmp_path, {"wte.weight": wide}, {"wte.weight": moved})
    common = spectrum_rows([(name, one, other, (7, 6))])[0]
    assert (common["shape"], common["num_changed"]) == ([7, 6], 42)
    rounded = spectrum_rows([(name, one, other, (7, 6))], view="bf16")[0]
    assert rounded["view"] == "bf16"
    assert rounded["dtype"] == "fp32"
    assert rounded["num_changed"] < 3
    half = planted.random_tensor(rng, "bf16", (10, 6))
    pairs = write_pair(tmp_path / "mixed", {"wte.weight": wide}, {"wte.weight": half})
    with pytest.raises(CheckpointError, match=r"fp32 before and bf16 after.*--cast"):
        spectrum_rows(pairs)
    assert spectrum_rows(pairs, view="bf16")[0]["num_changed"] > 50


def test_adapters_are_hinted_at(tmp_path):
    pairs = []
    for name in ("steps", "rounded adapter"):
        dtype, shape, before, after = make(name)
        sides = ({f"{name}.weight": planted.Tensor(dtype, shape, b)} for b in (before, after))
        pairs += write_pair(tmp_path / name, *sides)
    hint = adapter_hint(spectrum_rows(pairs))
    assert hint is not None
    assert hint.startswith("1 of 2 matrices look like a merged adapter (LoRA): more than 50% of")
    assert adapter_hint(spectrum_rows(pairs[:1])) is None
    assert adapter_hint([]) is None


def test_memory_stays_within_what_is_promised():
    rng = np.random.default_rng(0)
    shape = (16, 32_768)
    before = to_bits(rng.standard_normal(shape), "bf16")
    after = steps(rng, before, 0.1)
    measure_spectrum(before[:64], after[:64], "bf16", (8, 8), method="gram")
    tracemalloc.start()
    measure_spectrum(before, after, "bf16", shape, method="gram", principal_rank=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 47 * before.size
