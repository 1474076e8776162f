"""Marks of the charts are where the numbers say, differ from one another, and are escaped."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from rlsparse.definitions import NULLS
from rlsparse.report import charts, heat_maps, strips, svg
from rlsparse.report.series import series_of

HOSTILE = '<script>alert("x")</script>'


def parsed(markup):
    return ElementTree.fromstring(str(markup).replace("\n", "&#10;"))  # as HTML reads them


def found(markup, name, kind=""):
    """Elements of one name that have the class ``kind``, as dictionaries."""
    root = parsed(markup)
    return [e.attrib for e in root.iter(name) if kind in ["", *e.attrib.get("class", "").split()]]


def place(mark):
    return float(mark["x"].removesuffix("%")) / 100


def cell(group, algorithm="grpo", role="factor", **changes):
    return {"group": group, "algorithm": algorithm, "role": role, "cell": {"a": group},
            "num_finished": 2, "sparsity": {"bitwise": 0.7}} | changes  # fmt: skip


# --- scales and elements ---------------------------------------------------------------------


def test_styles_differ_as_long_as_there_are_any_and_neighbours_differ_twice():
    styles = [svg.style(i) for i in range(svg.NUM_STYLES)]
    assert len(set(styles)) == svg.NUM_STYLES == 54
    for one, other in itertools.pairwise(styles):
        assert one.colour != other.colour
        assert one.shape != other.shape
    assert svg.style(svg.NUM_STYLES) == (0, 0)


@pytest.mark.parametrize(
    ("scale", "value", "share"),
    [
        (svg.Scale(0, 10), 2.5, 0.25),
        (svg.Scale(1, 100, log=True), 10, 0.5),
        (svg.Scale(0, 10), 12, 1.0),
        (svg.Scale(0, 10), -1, 0.0),
        (svg.Scale(1, 100, log=True), 0, 0.0),
    ],
)
def test_scales_map_values_to_shares(scale, value, share):
    assert scale.at(value) == pytest.approx(share, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (svg.Scale(0, 1), [0, 0.25, 0.5, 0.75, 1.0]),
        (svg.Scale(0.9, 3.4, log=True), [1, 1.5, 2, 3]),
        (svg.Scale(0.5, 2000, log=True), [1, 10, 100, 1000]),
        (svg.Scale(1e-4, 2e9, log=True), [1e-3, 1, 1e3, 1e6, 1e9]),
        (svg.Scale(1.11, 1.13, log=True), [1.11, 1.115, 1.12, 1.125, 1.13]),
        (svg.Scale(0.07, 0.93), [0.25, 0.5, 0.75]),
    ],
)
def test_ticks_are_round_and_few(scale, ticks):
    assert scale.ticks(5) == pytest.approx(ticks, rel=1e-9, abs=1e-12)


def test_labels_of_ticks_are_never_equal():
    labels = svg.labels(svg.Scale(0.4980, 0.5001), 5, lambda v: f"{v:.3g}")
    assert len({text for _, text in labels}) == len(labels) > 2


def test_a_scale_shows_all_values_whatever_they_are():
    scale = svg.scale_of([1.0, None, math.nan, 3.0, math.inf])
    assert (scale.low, scale.high) == pytest.approx((0.92, 3.08))
    for values in ([], [0.0], [5.0, 5.0], [None]):
        scale = svg.scale_of(values)
        assert scale.low < scale.high
    assert svg.scale_of([0.0, 2.0, 8.0], log=True).low < 2
    assert svg.from_zero([]) == svg.Scale(0.0, 1.0)


def test_everything_in_an_element_is_escaped():
    made = svg.tag("text", HOSTILE, data_tip=f'"{HOSTILE}', class_=None)
    assert isinstance(made, Markup)
    root = parsed(made)
    assert root.text == HOSTILE
    assert root.attrib == {"data-tip": f'"{HOSTILE}'}
    assert parsed(svg.tag("g", svg.tag("text", "<")))[0].text == "<"


# --- charts ----------------------------------------------------------------------------------


def curve(group, step, mean, measure="density"):
    return {"measure": measure, "group": group, "step": step, "mean": mean, "low": mean - 0.05,
            "high": mean + 0.05, "num_runs": 2}  # fmt: skip


def test_curves_have_marks_at_their_points_with_their_numbers():
    series = series_of([cell("a"), cell("b")])
    rows = [curve("a", 0, 0.05), curve("a", 100, 0.45), curve("b", 100, 0.25)]
    ((caption, chart),) = charts.training_charts(rows, ["a", "b"], series)
    assert caption.startswith("Density")
    first, second, other = found(chart, "use", "mark")
    assert first["data-tip"] == "a, step 0\n5.00 %\n0 % to 10.00 % over 2 runs"
    assert (first["data-c"], other["data-c"]) == ("0", "1")
    assert (first["href"], other["href"]) == ("#m0", "#m1")
    frame = svg.Frame(svg.scale_of([0, 100], pad=0.02), svg.Scale(0, 0.525), str, str)
    for mark, x, y in ((first, 0, 0.05), (second, 100, 0.45), (other, 100, 0.25)):
        across, down = frame.place(x, y)
        assert place(mark) == pytest.approx(across, abs=1e-4)
        assert float(mark["y"]) == pytest.approx(down, abs=0.01)
    assert [line["data-c"] for line in found(chart, "polyline")] == ["0", "1"]
    assert len(found(chart, "polygon", "band")) == 2


def test_losses_of_two_algorithms_are_apart():
    series = series_of([cell("a"), cell("b", "sft"), cell("c")])
    rows = [curve(g, s, 0.1 * s, "loss") for g in "abc" for s in (1, 2)]
    made = charts.loss_charts(rows, ["a", "b", "c"], series)
    assert [caption for caption, _ in made] == ["grpo: loss", "sft: loss"]
    assert [len(found(chart, "polyline")) for _, chart in made] == [2, 1]


def test_gain_has_a_mark_per_scored_trial():
    series = series_of([cell("a")])
    run = {"group": "a", "label": "a s0", "score_before": 0.4, "score_after": 0.6,
           "sparsity": {"bitwise": 0.75}}  # fmt: skip
    trials = [run, run | {"score_after": 0.3}, run | {"score_after": None}, run | {"sparsity": {}}]
    ((_, chart),) = charts.gain_chart(trials, series)
    up, down = found(chart, "use", "mark")
    assert float(up["y"]) < float(down["y"])
    assert up["data-tip"] == "a s0\n25.00 % changed\nscore 40.0 % → 60.0 %"
    assert charts.gain_chart(trials[2:], series) == []


def test_controls_have_hollow_marks_which_the_caption_explains():
    series = series_of([cell("a"), cell("a · lr", role="control")])
    run = {"label": "a s0", "score_before": 0.4, "score_after": 0.6, "sparsity": {"bitwise": 0.75}}
    studied, control = (run | {"group": group} for group in ("a", "a · lr"))
    ((caption, chart),) = charts.gain_chart([studied, control], series)
    assert [("hollow" in m["class"]) for m in found(chart, "use", "mark")] == [False, True]
    assert caption.endswith("; hollow: controls")
    assert "hollow" in series.swatch("a · lr")
    assert "hollow" not in series.swatch("a")
    ((caption, _),) = charts.gain_chart([studied], series)
    assert "hollow" not in caption


def test_a_single_snapshot_has_one_tick():
    ((_, chart),) = charts.training_charts([curve("a", 2, 0.1)], ["a"], series_of([cell("a")]))
    texts = [t.text for t in parsed(chart).iter("text") if t.attrib["class"] == "mid"]
    assert texts == ["2"]


def test_the_rounding_threshold_is_at_its_power_of_two():
    series = series_of([cell("a")])
    rows = [{"group": "a", "exponent": e, "num_elements": 1000, "density": 0.5,
             "rounding_threshold": 2.0**-8} for e in range(-12, -3)]  # fmt: skip
    ((_, chart),) = charts.magnitude_chart(rows, ["a"], series)
    (line,) = found(chart, "line", "threshold")
    marks = [place(mark) for mark in found(chart, "use", "mark")]
    at = float(line["x1"].removesuffix("%")) / 100
    # marks stand in the middles of [2^e, 2^(e + 1)]: 2^-8 is midway between the 4th and the 5th
    assert at == pytest.approx((marks[3] + marks[4]) / 2, abs=1e-3)
    assert "rounding threshold 0.00391" in str(chart)


def test_rank_histograms_stand_beside_their_nulls():
    rows = [{"algorithm": algorithm, "statistic": "rank", "kind": kind, "low": 0.9, "high": 1.0,
             "num_matrices": 7, "share": share}
            for algorithm in ("y", "x")
            for kind, share in (("update", 1.0), ("null", 0.5))]  # fmt: skip
    series = series_of([cell("x", "x"), cell("y", "y")])
    (caption, chart), (second, _) = charts.rank_charts(rows, series)
    assert second == "y: rank of the updates"  # in the order of the cells, whatever that of rows
    update, null = found(chart, "rect", "bar")
    assert caption == "x: rank of the updates"
    assert float(update["height"]) == pytest.approx(2 * float(null["height"]), abs=0.02)
    assert [place(update), place(null)] == pytest.approx([0.9, 0.95], abs=1e-3)


def test_consensus_bars_are_shares_and_marks_the_nulls():
    series = series_of([cell("a")])
    rows = [{"group": "a", "num_runs": 4, "k": k, "share": share,
             "expected": {"uniform": 0.1, "tensor": 0.2, "magnitude": None}}
            for k, share in ((0, 0.9), (1, 0.4), (4, 0.2))]  # fmt: skip
    ((_, chart),) = charts.consensus_charts(rows, ["a"], series)
    one, four = found(chart, "rect", "bar")
    assert float(one["height"]) == pytest.approx(2 * float(four["height"]), abs=0.02)
    assert "changed in 4 of 4 runs" in four["data-tip"]
    assert len(found(chart, "use", "mark")) == 4


# --- strips ----------------------------------------------------------------------------------


def relation(**lift):
    values = {null: lift.get(null) for null in NULLS}
    explained = {"tensor": 0.1, "magnitude": 0.3, "update_size": None, "left": -0.1,
                 "total": 0.3, "num_pairs": 3}  # fmt: skip
    return {"relation": "other seed", "num_pairs": 3, "lift": values, "low": values,
            "high": values, "explained": explained}  # fmt: skip


def test_lifts_are_on_a_log_axis_with_a_line_at_one():
    made = strips.relation_strips([relation(uniform=4.0, magnitude=2.0)])
    marks = found(made.rows[0], "use", "mark")
    (one,) = found(made.rows[0], "line", "axis")
    start = float(one["x1"].removesuffix("%")) / 100
    uniform, magnitude = map(place, marks)
    assert uniform - start == pytest.approx(2 * (magnitude - start), abs=1e-3)
    assert [m["href"] for m in marks] == ["#m0", "#m2"]


def test_what_is_left_below_zero_is_drawn_to_the_left():
    made = strips.explained_strips([relation()])
    tensor, magnitude, left = found(made.rows[0], "rect", "part")
    zero = float(found(made.rows[0], "line", "axis")[0]["x1"].removesuffix("%")) / 100
    assert place(tensor) == pytest.approx(zero, abs=1e-3)
    width = {k: float(bar["width"].removesuffix("%")) / 100 for k, bar in
             (("tensor", tensor), ("magnitude", magnitude), ("left", left))}  # fmt: skip
    assert place(magnitude) == pytest.approx(place(tensor) + width["tensor"], abs=1e-3)
    assert width["magnitude"] == pytest.approx(3 * width["tensor"], abs=1e-3)
    assert place(left) + width["left"] == pytest.approx(zero, abs=1e-3)
    assert "(33 % of the excess)" in tensor["data-tip"]


def test_a_cell_has_a_mark_per_run_and_its_mean():
    cells = [cell("a", sparsity={"bitwise": 0.5}), cell("b", num_finished=0)]
    trials = [{"group": "a", "label": f"a s{i}", "sparsity": {"bitwise": v}}
              for i, v in enumerate((0.4, 0.6))] + [{"group": "b", "sparsity": {}}]  # fmt: skip
    made = strips.cell_strips(trials, cells, series_of(cells))
    low, high = map(place, found(made.rows[0], "use", "mark"))
    (centre,) = found(made.rows[0], "line", "centre")
    assert float(centre["x1"].removesuffix("%")) / 100 == pytest.approx((low + high) / 2, abs=1e-3)
    assert found(made.rows[1], "use") == []


def test_intervals_of_effects_reach_from_end_to_end():
    row = {"contrast": "x against y", "shown_scale": "odds ratio", "num_runs": 4,
           "shown": 2.0, "shown_low": 1.0, "shown_high": 4.0}  # fmt: skip
    unknown = row | {"shown": None, "shown_low": None, "shown_high": None}
    made = strips.forest_strips([row, unknown])
    (line,) = found(made.rows[0], "line", "interval")
    (mark,) = found(made.rows[0], "use", "mark")
    ends = [float(line[k].removesuffix("%")) / 100 for k in ("x1", "x2")]
    assert place(mark) == pytest.approx(sum(ends) / 2, abs=1e-3)  # the middle on a log axis
    assert mark["data-tip"] == "x against y\nodds ratio 2.00 [1.00, 4.00]\n4 seeds"
    assert found(made.rows[1], "use") == []


# --- heat maps -------------------------------------------------------------------------------


def test_density_is_a_share_of_the_densest_of_all():
    series = series_of([cell("a"), cell("b", "sft")])
    rows = [{"algorithm": a, "group": g, "layer": layer, "module": module, "density": d}
            for a, g, layer, module, d in (("grpo", "a", 0, "k", 0.2),
                                           ("grpo", "a", None, "embed", 0.004),
                                           ("sft", "b", 0, "q", 0.4))]  # fmt: skip
    (first, grpo), (second, sft) = heat_maps.density_maps(rows, series)
    assert (first, second) == ("a", "b")
    assert [r["fill-opacity"] for r in found(grpo, "rect")] == ["0.50", "0.03"]
    assert [r["fill-opacity"] for r in found(sft, "rect")] == ["1.00"]
    assert [t.text for t in parsed(grpo).iter("text")] == ["20", "0.4", "0", "rest", "k", "embed"]
    assert parsed(sft).attrib == {"data-some": "1"}


def pair(a, b, lift, relation="other seed"):
    return {"a": a, "b": b, "relation": relation, "lift": dict.fromkeys(NULLS, lift),
            "share_of_a": 0.5, "share_of_b": 0.4, "jaccard": 0.3}  # fmt: skip


def test_overlap_is_symmetric_and_less_than_chance_has_its_own_colour():
    rows = [pair("x", "y", 2.0), pair("x", "z", 0.5), pair("y", "z", 8.0, heat_maps.AGAIN)]
    names = {key: (f"run {key}", str(i)) for i, key in enumerate("xyzw")}
    ((_, chart),) = heat_maps.overlap_map(rows, names)
    rects = found(chart, "rect")
    assert len(rects) == 6
    kinds = {(r["x"], r["y"]): (r["class"], r["fill-opacity"]) for r in rects}
    for one, other in (((0, 1), (1, 0)), ((0, 2), (2, 0))):
        places = [(f"{100 * c / 3:.2f}".rstrip("0").rstrip(".") + "%", str(21 * r))
                  for r, c in (one, other)]  # fmt: skip
        assert kinds[places[0]] == kinds[places[1]]
    # the same seed again does not fade the others
    assert sorted(set(kinds.values())) == [("heat less", "1.00"), ("heat more", "1.00")]
    assert {r["data-c"] for r in rects} == {"0 1", "0 2", "1 2"}
    assert "run w" not in str(chart)


def test_without_the_magnitude_null_that_of_tensors_is_shown():
    row = pair("x", "y", 2.0)
    row["lift"] = {**row["lift"], "magnitude": None}
    assert heat_maps.strongest_null([row]) == "tensor"
    assert heat_maps.overlap_map([], {}) == []


def test_effects_by_part_are_signed():
    rows = [
        {"response": "r", "factor": "f", "level": "x", "reference": "y", "layer": layer,
         "contrast": "x against y", "module": module, "within": {}, "estimate": value,
         "shown": math.exp(value),
         "shown_low": 0.5, "shown_high": 2.0, "shown_scale": "odds ratio", "p_adjusted": 0.04}
        for layer, module, value in ((0, None, 1.0), (1, None, -0.5), (None, "q", 0.2))
    ]  # fmt: skip
    (by_layer, layers), (by_module, modules) = heat_maps.effect_maps(rows)
    assert (by_layer, by_module) == ("r by layer: odds ratio", "r by module: odds ratio")
    assert [(r["class"], r["fill-opacity"]) for r in found(layers, "rect")] == [
        ("heat more", "1.00"), ("heat less", "0.50"),
    ]  # fmt: skip
    assert len(found(modules, "rect")) == 1


def test_hostile_names_are_escaped_in_every_chart():
    series = series_of([cell(HOSTILE, HOSTILE)])
    rows = [curve(HOSTILE, s, 0.1, m) for s in (1, 2) for m in ("density", "loss")]
    density = [{"algorithm": HOSTILE, "group": HOSTILE, "layer": 0, "module": HOSTILE,
                "density": 0.2}]  # fmt: skip
    made = [
        *charts.training_charts(rows, [HOSTILE], series),
        *charts.loss_charts(rows, [HOSTILE], series),
        *heat_maps.density_maps(density, series),
        *heat_maps.overlap_map([pair("x", "y", 2.0)], {"x": (HOSTILE, "0"), "y": ("b", "0")}),
    ]
    assert len(made) == 4
    for _, chart in made:
        assert not re.search("<script", str(chart))
        parsed(chart)


def test_the_consensus_has_a_tick_per_number_of_runs():
    scale = svg.Scale(0.4, 4.6)
    ticks = svg.labels(scale, 10, lambda v: f"{v:.0f}" if v == round(v) else "")
    assert [text for _, text in ticks] == ["1", "2", "3", "4"]
