import io
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from matplotlib.figure import Figure
from planted import FLOATS, Tensor, make_pair, random_tensor, write_folder
from rich.console import Console
from test_report import CLIPPED, COLLIDING, chromium  # noqa: F401  (a fixture)

from rlsparse import tables
from rlsparse.definitions import (
    DEFINITIONS,
    MIN_EXPONENT,
    MODULES,
    NUM_MAGNITUDE_BINS,
    ULP_BINS,
    VIEWS,
)
from rlsparse.diff import diff_checkpoints
from rlsparse.errors import ConfigError
from rlsparse.report import diff_page, diff_plots, diff_rows, diff_terminal, plots
from rlsparse.report.formats import NOTHING, percent

PAGE_TABLES = ("base_tensors", "stripes")
HOSTILE = '<script>alert("x")</script>'
SHAPES = {
    "model.embed_tokens.weight": (96, 32),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i, (name, shape) in itertools.product(
            range(3),
            {
                "input_layernorm": (32,),
                "self_attn.q_proj": (32, 32),
                "self_attn.v_proj": (16, 32),
                "mlp.down_proj": (32, 64),
            }.items(),
        )
    },
    "model.norm.weight": (32,),
    "lm_head.weight": (96, 32),
}
MODULE_OF = {
    "embed_tokens": "embed", "input_layernorm": "norm", "q_proj": "q", "v_proj": "v",
    "down_proj": "down", "norm": "norm", "lm_head": "head",
}  # fmt: skip


def module_of(name):
    return MODULE_OF[name.split(".")[-2]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), "bf16", 0.2, 3, SHAPES)


@pytest.fixture(scope="module")
def diff(pair):
    return diff_checkpoints(
        pair.before, pair.after, casts=["bf16", "fp8_e4m3"], extra_tables=PAGE_TABLES
    )


def numbers(tensor):
    return tensor.bits.view(FLOATS[tensor.dtype]).astype(np.float64)


def joined(pair, names):
    """Bits and values of both sides of some tensors, end to end."""
    return tuple(
        np.concatenate([part(side[name]) for name in names])
        for part in (lambda tensor: tensor.bits, numbers)
        for side in (pair.tensors_before, pair.tensors_after)
    )


def folders(root, before, after):
    sides = (write_folder(root / "before", before), write_folder(root / "after", after))
    return diff_checkpoints(*sides, extra_tables=PAGE_TABLES)


# --- rows ------------------------------------------------------------------------------------


def check_measures(row, pair, names):
    bits_before, bits_after, before, after = joined(pair, names)
    delta = np.abs(after - before)
    steps = np.abs(bits_after.astype(int) - bits_before)
    assert row["num_elements"] == before.size
    assert row["sparsity"]["bitwise"] == pytest.approx(
        (bits_before == bits_after).mean(), abs=1e-15
    )
    assert row["sparsity"]["abs_1e-05"] == pytest.approx((delta <= 1e-5).mean(), abs=1e-15)
    norm = np.sqrt((delta**2).sum()) / np.sqrt((before**2).sum())
    assert row["relative_change"] == pytest.approx(norm, rel=4e-7)
    assert row["max_abs_delta"] == delta.max()
    moved = sorted(steps[steps > 0])
    if not moved:
        assert row["median_ulp"] is None
        return
    middle = moved[(len(moved) - 1) // 2]
    assert row["median_ulp"] == {1: "1", 2: "2", 3: "3-4"}[int(middle)]


def test_modules_are_measured_as_numpy_does(pair, diff):
    rows = diff_rows.module_rows(diff_rows.of_view(diff))
    assert [row["name"] for row in rows] == ["q", "v", "down", "norm", "embed", "head", "all"]
    for row in rows:
        of_module = [n for n in SHAPES if row["name"] in ("all", module_of(n))]
        check_measures(row, pair, of_module)


def test_layers_leave_norms_and_embeddings_apart_and_lose_nothing(pair, diff):
    rows = diff_rows.layer_rows(diff_rows.of_view(diff))
    assert [row["name"] for row in rows] == ["0", "1", "2", "norm", "embed", "head"]
    for row in rows:
        if row["name"].isdecimal():
            inside = [n for n in SHAPES if f".{row['name']}." in n and "norm" not in n]
        else:
            inside = [n for n in SHAPES if module_of(n) == row["name"]]
        check_measures(row, pair, inside)
    assert sum(row["num_elements"] for row in rows) == diff.num_elements


def test_layers_are_in_order_of_number():
    rows = [fake_delta(f"model.layers.{i}.mlp.up_proj.weight", i, "up") for i in (10, 9, 2)]
    assert [row["name"] for row in diff_rows.layer_rows(rows)] == ["2", "9", "10"]


def fake_delta(tensor, layer, module):
    changed = {f"num_changed_{name}": 1 for name in DEFINITIONS}
    zeros = dict.fromkeys(
        ("num_sign_flips", "num_zero_sign_flips", "num_nonfinite", "num_nan"), 0
    ) | dict.fromkeys(("sum_sq_before", "sum_sq_delta", "max_abs_delta"), 0.0)
    row = {"tensor": tensor, "layer": layer, "module": module, "num_elements": 4}
    return row | changed | zeros | {"ulp_histogram": [0] * len(ULP_BINS)}


def test_relative_change_of_zero_weights_is_unknown():
    assert diff_rows.summarise([fake_delta("a", None, "other")])["relative_change"] is None


def test_tensors_are_measured_as_numpy_does(pair, diff):
    rows = diff_rows.tensor_rows(diff_rows.of_view(diff))
    assert sorted(row["name"] for row in rows) == sorted(SHAPES)
    for row in rows:
        assert row["module"] == module_of(row["name"])
        check_measures(row, pair, [row["name"]])


def test_views_are_told_apart(pair, diff):
    _, _, before, after = joined(pair, SHAPES)
    for view, dtype in (("bf16", ml_dtypes.bfloat16), ("fp8_e4m3", ml_dtypes.float8_e4m3fn)):
        same = before.astype(np.float32).astype(dtype) == after.astype(np.float32).astype(dtype)
        found = diff_rows.sparsity_by_view(diff)[view]
        assert found["abs_1e-08"] == pytest.approx(same.mean(), abs=1e-15)
    assert diff_rows.sparsity_by_view(diff)["bf16"] == diff.sparsity


def test_cells_of_the_heat_map_hold_every_layer_and_module(pair, diff):
    cells = {
        (c["layer"], c["module"]): c["density"]
        for c in diff_rows.cell_rows(diff_rows.of_view(diff))
    }
    assert set(cells) == {
        *itertools.product(range(3), ("norm", "q", "v", "down")),
        *((None, module) for module in ("embed", "norm", "head")),
    }
    changed = pair.changed["model.layers.1.mlp.down_proj.weight"]
    assert cells[1, "down"] == pytest.approx(changed.mean(), abs=1e-15)


def test_accounting_adds_up_on_both_sides(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (40, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
    }
    before = {name: random_tensor(rng, "bf16", shape) for name, shape in shapes.items()}
    after = dict(before)
    before["old.weight"] = random_tensor(rng, "bf16", (3, 8))
    after["model.embed_tokens.weight"] = random_tensor(rng, "bf16", (48, 8))
    after["model.layers.0.mlp.up_proj.weight"] = random_tensor(rng, "bf16", (5, 8))
    before["model.layers.0.mlp.up_proj.weight"] = random_tensor(rng, "bf16", (6, 8))
    found = folders(tmp_path, before, after)
    rows = {row["name"]: row for row in diff_rows.accounting_rows(found.accounting)}
    total = rows.pop("total")
    assert total["num_before"] == 40 * 8 + 64 + 24 + 48
    assert total["num_after"] == 48 * 8 + 64 + 40
    for side in ("num_before", "num_after"):
        assert sum(row[side] or 0 for row in rows.values()) == total[side]
    assert rows["only before"]["tensors"] == ["old.weight"]
    assert rows["only before"]["num_after"] is None
    assert rows["of another shape"]["num_after"] == 40
    assert "tied to a tensor counted already" not in rows
    (resized,) = diff_rows.matched_rows(found.accounting)
    assert resized == {
        "name": "compared in their common rows",
        "tensors": ["model.embed_tokens.weight"],
    }


def test_renamed_and_mapped_tensors_are_named():
    accounting = {
        "renamed_tensors": {"llm.a": "a"},
        "mapped_tensors": {"qkv": ["q", "k"]},
        "resized_tensors": [],
    }
    assert [row["tensors"] for row in diff_rows.matched_rows(accounting)] == [
        ["llm.a = a"],
        ["qkv = q + k"],
    ]


def planted_tensor(dtype, values):
    bits = np.array(values, FLOATS[dtype])
    return Tensor(dtype, (len(values), 1), bits.view(f"<u{bits.itemsize}"))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("bf16", [1, 2]), ("bf16", [1, 4]), []),
        (("fp32", [1, 2]), ("fp32", [1, 4]), ["--cast bf16"]),
        (("bf16", [0.0, 2]), ("bf16", [-0.0, 4]), ["^1 zero changed sign only"]),
        (
            ("bf16", [1, np.inf, np.nan]),
            ("bf16", [1, 2, np.nan]),
            [r"^2 weights with NaN or infinity on a side \(1 NaN\)"],
        ),
        (("bf16", [1, np.nan]), ("bf16", [2, np.nan]), ["^1 weight with NaN or infinity"]),
        (("bf16", [1, 2]), ("bf16", [1, 2]), ["no compared weight differs"]),
    ],
)
def test_warnings(tmp_path, before, after, expected):
    found = folders(tmp_path, {"a": planted_tensor(*before)}, {"a": planted_tensor(*after)})
    said = diff_rows.warnings(found)
    assert len(said) == len(expected)
    for pattern, sentence in zip(expected, said, strict=True):
        assert re.search(pattern, sentence)


def test_two_stored_formats_are_warned_about(tmp_path):
    sides = [
        write_folder(tmp_path / dtype, {"a": planted_tensor(dtype, [1, 2])})
        for dtype in ("fp32", "bf16")
    ]
    found = diff_checkpoints(*sides, casts=["bf16"])
    assert "stored as fp32 before and bf16 after, compared as bf16" in diff_rows.warnings(found)[0]


@pytest.mark.parametrize("view", VIEWS[1:])
@pytest.mark.parametrize("dtype", ["fp64", *(name for name in FLOATS if name != "fp64")])
def test_a_view_holds_a_format_if_no_value_is_rounded(dtype, view):
    """Every value of the narrow formats; of the wide ones, the extremes and the finest steps."""
    width = FLOATS[dtype].itemsize
    if width <= 2:
        bits = np.arange(2 ** (8 * width)).astype(f"u{width}")
        given = bits.view(FLOATS[dtype])
    else:
        limits = np.finfo(FLOATS[dtype])
        given = np.array([limits.max, limits.smallest_subnormal, 1 + limits.eps], FLOATS[dtype])
    with np.errstate(all="ignore"):
        given = given.astype(np.float64)
        rounded = given.astype(FLOATS[view]).astype(np.float64)
    is_exact = np.array_equal(given, rounded, equal_nan=True)
    assert (dtype in diff_rows.HELD[view]) == is_exact


def test_a_cast_that_rounds_nothing_is_not_warned_about(tmp_path):
    sides = [
        write_folder(tmp_path / dtype, {"a": planted_tensor(dtype, [1, 2])})
        for dtype in ("bf16", "fp8_e4m3")
    ]
    lossy, exact = (diff_checkpoints(*sides, casts=[cast]) for cast in ("fp8_e4m3", "bf16"))
    assert any("rounding to it can hide" in said for said in diff_rows.warnings(lossy))
    assert not any("rounding to it" in said for said in diff_rows.warnings(exact))


def test_formats_of_tensors_on_one_side_only_are_not_rounded(tmp_path):
    before = {"a": planted_tensor("bf16", [1, 2]), "b": planted_tensor("fp32", [1])}
    found = folders(tmp_path, before, {"a": planted_tensor("bf16", [1, 4])})
    assert diff_rows.warnings(found) == []


def codes(dtype, numbers):
    return Tensor(dtype, (len(numbers), 1), np.array(numbers, np.uint8))


@pytest.mark.parametrize(
    ("before", "after", "scales"),
    [
        ({"a.weight_scale_inv": 1}, {"a.weight_scale_inv": 2}, "1 scale tensor"),
        ({"a.weight_scale": 1}, {}, "1 scale tensor"),
        ({}, {"a.scales": 1, "a.qzeros": 1}, "2 scale tensors"),
        ({"a.weight.absmax": 1}, {"b.weight.absmax": 1}, "2 scale tensors"),
        ({"a.scale": 1, "scales.a": 1}, {"a.scale": 2, "scales.a": 1}, None),
    ],
)
@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2", "u8", "bf16"])
def test_codes_are_not_taken_for_values(tmp_path, dtype, before, after, scales):
    weights = planted_tensor("bf16", [1, 2]) if dtype == "bf16" else codes(dtype, [1, 2])
    sides = [
        {"a.weight": weights} | {name: planted_tensor("fp32", [x]) for name, x in side.items()}
        for side in (before, after)
    ]
    said = [s for s in diff_rows.warnings(folders(tmp_path, *sides)) if "code by code" in s]
    if scales and dtype != "bf16":
        assert len(said) == 1
        assert said[0].endswith(f"dequantise both sides to compare values ({scales})")
    else:
        assert said == []


def spectrum(tensor, kind, **changes):
    row = {
        "tensor": tensor, "view": "stored", "module": "q", "kind": kind, "shape": [4, 2, 5],
        "num_nonfinite": 0, "rank_share_default": 1.0, "energy_rank": 2, "stable_rank": 3.0,
        "nss": 0.5, "nss_random": None, "principal_lift_in_decile": None,
        "low_lift_in_decile": 1.0, "looks_like_adapter": False,
    }  # fmt: skip
    return row | changes


SPECTRA = [
    spectrum("a", "update"),
    spectrum("a", "null", rank_share_default=0.5, energy_rank=4, stable_rank=99.0),
    spectrum("b", "update", rank_share_default=0.5, looks_like_adapter=True),
    spectrum("b", "null", rank_share_default=0.25, energy_rank=4),
    {"tensor": "c", "view": "stored", "module": "k", "kind": "update", "num_nonfinite": 3},
]


def test_spectra_are_medians_beside_their_null():
    (row,) = diff_rows.spectrum_rows(SPECTRA)
    assert list(row) == ["name", "tensors", *diff_rows.SPECTRUM]
    assert (row["name"], row["tensors"]) == ("q", 2)
    assert (row["rank"], row["rank, null"]) == (0.75, 0.375)
    assert (row["99 % energy"], row["99 % energy, null"]) == (0.5, 1.0)
    assert row["stable rank"] == 3.0
    assert row["NSS, noise"] is None


def test_merged_adapters_are_warned_about(diff):
    assert diff_rows.warnings(diff) == []
    sentence, left_out = diff_rows.warnings(diff, SPECTRA)
    assert re.search("1 of 3 matrices look like a merged adapter", sentence)
    assert left_out == "1 matrix holds NaN or infinities: no spectrum"


def test_spectra_in_words():
    (line,) = diff_rows.spectrum_lines(SPECTRA)
    assert line == [
        *("q", "2", "75.00 %", "37.50 %", "50.00 %", "100 %", "3", "0.5"),
        *(NOTHING, NOTHING, "1"),
    ]


@pytest.mark.parametrize("share", [0.9996, 0.99999])
def test_nearly_full_rank_is_not_full(share):
    (line,) = diff_rows.spectrum_lines([spectrum("a", "update", rank_share_default=share)])
    assert line[2].startswith("99.9")


def test_long_lists_are_cut(tmp_path):
    accounting = {
        "renamed_tensors": {},
        "mapped_tensors": {"experts": [f"expert.{i}" for i in range(384)], "ab": ["a", "b"]},
        "resized_tensors": [],
    }
    (row,) = diff_rows.matched_rows(accounting)
    assert row["tensors"] == ["experts = expert.0 + 383 more", "ab = a + b"]
    assert diff_rows.shortened(list("abc"), 3) == "a, b, c"
    assert diff_rows.shortened(list("abcd"), 2) == "a, b and 2 more"
    before = {f"gone.{i:02}": planted_tensor("bf16", [i]) for i in range(30)}
    kept = {f"kept.{i:02}": planted_tensor("bf16", [i]) for i in range(30)}
    sides = (
        write_folder(tmp_path / "before", before | kept),
        write_folder(tmp_path / "after", {f"net.{name}": value for name, value in kept.items()}),
    )
    found = diff_checkpoints(*sides, aliases={"net.": ""}, extra_tables=PAGE_TABLES)
    text = " ".join(Elements(diff_page.build_page(found)).text)
    assert "gone.19 and 10 more" in text
    assert "net.kept.19 = kept.19 and 10 more" in text
    terminal = io.StringIO()
    diff_terminal.print_diff(Console(file=terminal, width=10_000), found)
    assert "(gone.00, gone.01, gone.02, gone.03, gone.04 and 25 more)" in terminal.getvalue()
    assert "net.kept.04 = kept.04 and 25 more)" in terminal.getvalue()


def test_stripes_of_a_striped_update(tmp_path):
    rng = np.random.default_rng(0)
    before = random_tensor(rng, "bf16", (64, 64))
    moved = np.zeros((64, 64), np.uint16)
    moved[::8] = 1  # whole rows change
    after = replace(before, bits=before.bits + moved.reshape(-1))
    name = "model.layers.0.self_attn.q_proj.weight"
    found = folders(tmp_path, {name: before}, {name: after})
    (row,) = diff_rows.stripe_rows(found.tables["stripes"])
    assert (row["name"], row["tensors"]) == ("q", 1)
    assert row["untouched_row_share"] == 7 / 8
    assert row["untouched_column_share"] == 0
    assert row["row_dispersion"] > 50
    assert row["column_dispersion"] == 0


# --- figures ---------------------------------------------------------------------------------


def test_density_by_magnitude_is_that_of_numpy(pair, diff, monkeypatch):
    figure = Figure()
    monkeypatch.setattr(diff_plots, "draw", lambda name, title, size, paint: paint(figure))
    removed = {"tensor": "removed", "magnitude_histogram": [10**6] * NUM_MAGNITUDE_BINS}
    base = [*diff.tables["base_tensors"], removed]
    diff_page._magnitudes(diff_rows.of_view(diff), base)
    bits_before, bits_after, before, _ = joined(pair, SHAPES)
    changed = bits_before != bits_after
    mantissa, exponent = np.frexp(np.abs(before))
    is_power = mantissa == 0.5
    drawn = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    for label, inside, shift in (
        ("between powers of two", ~is_power & (before != 0), 0.5),
        ("exact powers of two", is_power, 0),
    ):
        weights = Counter((exponent[inside] - 1).tolist())
        expected = {
            e + shift: changed[inside & (exponent - 1 == e)].mean()
            for e, count in weights.items()
            if count >= diff_plots.MIN_BIN_WEIGHTS and e > MIN_EXPONENT
        }
        found = dict(map(tuple, drawn.get(label, [])))
        assert found == pytest.approx(expected)
    assert len(drawn["between powers of two"]) >= 4


def test_ulp_bars_are_shares_of_the_changed_weights(monkeypatch):
    figure = Figure()
    monkeypatch.setattr(diff_plots, "draw", lambda name, title, size, paint: paint(figure))
    diff_plots.ulp_histogram([6, 3, 0, 0, 1, 0, 0, 0, 0, 0])
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    assert bars == pytest.approx([0.6, 0.3, 0, 0, 0.1])


# --- files -----------------------------------------------------------------------------------


def test_the_folder_holds_the_tables_the_json_and_the_page(diff, tmp_path):
    page = diff_page.write_diff(diff, tmp_path / "new" / "out")
    folder = page.parent
    assert {path.name for path in folder.iterdir()} == {
        "tensor_deltas.parquet", "base_tensors.parquet", "stripes.parquet", "diff.json",
        "index.html",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    for name, rows in diff.tables.items():
        table = tables.read(folder / f"{name}.parquet", name).to_pylist()
        assert len(table) == len(rows)
        for found, row in zip(table, rows, strict=True):
            for key, value in row.items():
                assert np.array_equal(found[key], value), (name, key)
    said = json.loads((folder / "diff.json").read_text())
    assert said == json.loads(json.dumps(diff_rows.json_content(diff, None)))


def test_an_empty_folder_is_filled_and_a_full_one_kept(diff, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    diff_page.write_diff(diff, out)
    kept = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="give a new folder to --out"):
        diff_page.write_diff(diff, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == kept
    assert list(tmp_path.iterdir()) == [out]


def test_a_failure_leaves_nothing_behind(diff, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no page")

    monkeypatch.setattr(diff_page, "build_page", fail)
    with pytest.raises(RuntimeError):
        diff_page.write_diff(diff, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_clear_line(diff, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*give a new folder"):
        diff_page.write_diff(diff, tmp_path / "file" / "out")


def plain(content):
    """What JSON makes of it; refuses NaN and infinities."""
    return json.loads(json.dumps(content, allow_nan=False))


def test_json_holds_what_is_printed_beside_the_contract(pair, diff):
    said = plain(diff_rows.json_content(diff, None))
    extra = {"totals", "modules", "layers", "warnings"}
    assert {k: v for k, v in said.items() if k not in extra} == plain(diff.to_json())
    check_measures(said["totals"], pair, SHAPES)
    bits_before, bits_after, before, after = joined(pair, SHAPES)
    assert sum(said["totals"]["ulp_histogram"]) == (bits_before != bits_after).sum()
    flipped = np.signbit(before) != np.signbit(after)
    assert said["totals"]["num_sign_flips"] == (flipped & (before != 0) & (after != 0)).sum()
    assert [row["name"] for row in said["modules"]][-2:] == ["head", "all"]
    assert said["modules"][-1] == {"name": "all"} | said["totals"]
    assert [row["name"] for row in said["layers"]][:3] == ["0", "1", "2"]
    assert said["warnings"] == []
    with_spectra = plain(diff_rows.json_content(diff, SPECTRA))
    assert len(with_spectra["warnings"]) == 2
    assert len(with_spectra["spectra"]) == len(SPECTRA)


def test_json_is_plain_where_weights_are_not(tmp_path):
    found = folders(
        tmp_path,
        {"a": planted_tensor("fp32", [np.nan, np.inf, -0.0, 1])},
        {"a": planted_tensor("fp32", [1, np.nan, 0.0, 2])},
    )
    said = plain(diff_rows.json_content(found, None))
    totals = said["totals"]
    counts = [totals[f"num_{name}"] for name in ("nonfinite", "nan", "zero_sign_flips")]
    assert counts == [2, 2, 1]
    assert len(said["warnings"]) == 3


# --- page ------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        assert not [k for k, _ in attributes if k.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_loads_nothing_and_escapes_every_name(tmp_path):
    rng = np.random.default_rng(0)
    before = {
        f"model.layers.0.{HOSTILE}.weight": random_tensor(rng, "bf16", (8, 8)),
        f"{HOSTILE}.old": random_tensor(rng, "bf16", (2, 2)),
    }
    after = {k: v for k, v in before.items() if "old" not in k}
    found = folders(tmp_path / HOSTILE.replace("/", "_"), before, after)
    page = Elements(diff_page.build_page(found))
    assert page.tags["script"] == 0
    assert [a for a in page.addresses if not a.startswith(("data:", "#"))] == []
    text = "".join(page.text)
    assert text.count(HOSTILE) == 2
    assert HOSTILE.replace("/", "_") in text


def test_the_page_says_what_the_terminal_says(diff):
    text = " ".join(Elements(diff_page.build_page(diff, SPECTRA)).text)
    total = diff_rows.summarise(diff_rows.of_view(diff))
    assert f"{percent(total['sparsity']['bitwise'])} of {diff.num_elements:,} weights" in text
    for values in diff_rows.sparsity_by_view(diff).values():
        for value in values.values():
            assert percent(value) in text
    assert "look like a merged adapter" in text
    assert "Shape of the update" in text
    for name in SHAPES:
        assert name in text


def heading(text):
    return re.search("<title>(.*?)</title>.*<h1>(.*?)</h1>", text, re.DOTALL).groups()


@pytest.mark.parametrize(
    ("casts", "meaning"), [([], "bit for bit"), (["bf16"], "after rounding to bf16")]
)
def test_the_headline_is_true_of_the_view(tmp_path, casts, meaning):
    one, other = (
        write_folder(tmp_path / name, {"a": planted_tensor("fp32", [1, value])})
        for name, value in (("before", 2), ("after", 2.00001))
    )
    found = diff_checkpoints(one, other, casts=casts, extra_tables=PAGE_TABLES)
    share = "100 % (exact)" if casts else "50.00 %"
    title, headline = heading(diff_page.build_page(found))
    comma = "" if casts else ","
    assert title.startswith(f"{share} unchanged{comma} {meaning}: ")
    assert headline == f"{share} of 2 weights are unchanged{comma} {meaning}"
    same = [said for said in diff_rows.warnings(found) if "no compared weight" in said]
    assert same == ["no compared weight differs in any bit after rounding to bf16"] * len(casts)


def test_the_relative_definition_is_named_as_it_is_measured(tmp_path):
    """1e-3 of the larger side: 1000 -> 1001.0005 is within it, though not within 1e-3 of 1000."""
    found = folders(
        tmp_path, {"a": planted_tensor("fp32", [1000])}, {"a": planted_tensor("fp32", [1001.0005])}
    )
    assert found.sparsity["rel_1e-03"] == 1
    text = " ".join(Elements(diff_page.build_page(found)).text)
    assert "|Δ| ≤ 1e-03 max(|w|, |w'|)" in text
    terminal = io.StringIO()
    diff_terminal.print_diff(Console(file=terminal, width=10_000), found)
    assert "rel_1e-03: |d| <= 1e-03 max(|w|, |w'|), w before" in terminal.getvalue()


@pytest.mark.parametrize("has_finite", [True, False])
def test_matrices_without_a_spectrum_are_said(diff, has_finite):
    left_out = [SPECTRA[-1], SPECTRA[-1] | {"tensor": "d"}]
    rows = [*(SPECTRA[:2] if has_finite else []), *left_out]
    said = "2 matrices hold NaN or infinities: no spectrum"
    assert said in " ".join(Elements(diff_page.build_page(diff, rows)).text)
    terminal = io.StringIO()
    diff_terminal.print_diff(Console(file=terminal, width=10_000), diff, rows)
    assert said in terminal.getvalue()
    assert ("99 % energy" in terminal.getvalue()) == has_finite
    assert ("1 = no preference" in terminal.getvalue()) == has_finite


@pytest.mark.parametrize(("num_layers", "num_modules"), [(3, 11), (41, 4), (3, 10)])
def test_the_heat_map_always_tells_percentages(num_layers, num_modules):
    cells = [
        {"algorithm": "stored", "layer": layer, "module": module, "density": 0.02 * (layer % 3)}
        for layer in range(num_layers)
        for module in MODULES[:num_modules]
    ]
    text = plots.density_heat_map("stored", cells, 0.04)
    in_cells = re.findall(r">([024])</text>", text)
    assert ("4 %" in text) == (num_layers > 40 or num_modules > 10)
    assert in_cells.count("4") >= num_modules or "4 %" in text


def test_equal_diffs_give_equal_pages(diff):
    assert diff_page.build_page(diff) == diff_page.build_page(diff)


def test_nothing_changed_has_a_page(tmp_path):
    tensors = {"a.weight": planted_tensor("bf16", [1, 2])}
    text = diff_page.build_page(folders(tmp_path, tensors, tensors))
    assert "no compared weight differs in any bit" in text
    assert "No weight that has a value changed" in text


def test_a_long_list_of_tensors_is_cut_and_said(diff, monkeypatch):
    monkeypatch.setattr(diff_page, "MAX_TENSORS", 5)
    text = " ".join(Elements(diff_page.build_page(diff)).text)
    assert f"The first 5 of {len(SHAPES)}; tensor_deltas.parquet has all." in text


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_fits_laptop_and_phone(chromium, diff, tmp_path, width, scheme):  # noqa: F811
    file: Path = diff_page.write_diff(diff, tmp_path / "out", spectra=None)
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(COLLIDING) == []
    assert page.get_by_role("img").count() == file.read_text().count("<svg ") == 6
    context.close()
