"""The report's section on subnetworks, from tables with numbers that can be checked by hand."""

import json
import re

import pytest
from report_study import make_study, make_tables, trial

from rlsparse.report.formats import NOTHING
from rlsparse.report.rows import trial_rows
from rlsparse.report.study_page import build_report
from rlsparse.report.subnetwork_rows import subnetwork_rows

FINAL = {"from": "cell"}
RANDOM = {"like": FINAL}
MASKS = {"null": None, "final(cell)": FINAL, "random(final(cell))": RANDOM}
SCORES = {"null": (0.50, 0.60, 0.40), "final(cell)": (0.52, 0.58, 0.46),
          "random(final(cell))": (0.44, 0.50, 0.36)}  # fmt: skip
RATES = (1e-5, 3e-5)
SIZE, CHANGED = 10_000, 1_000


def one(label, seed, rate=1e-5, control=None, **changes):
    """A trial; at the first rate they are the baseline's."""
    mask = MASKS[label]
    cell = {"train.mask": label, "train.learning_rate": f"{rate:g}"}
    told = {"train": {"learning_rate": rate, "mask": mask}, "seed": seed, "model": {"source": "t"}}
    role = "baseline" if label == "null" and rate == RATES[0] else "factor"
    name = f"{label} {seed} {rate:g} {control or ''}".strip()
    return trial("grpo", seed, trial_id=name, label=name, cell=json.dumps(cell)) | {
        "role": "control" if control else role,
        "control": control,
        "replicate": int(control == "same_seed"),
        "config": json.dumps(told),
        "learning_rate": rate,
        "score_after": SCORES[label][seed] + (rate - RATES[0]) * 1000,
        "mask_density": None if mask is None else 0.1 + 0.01 * seed,
        "num_in_mask": None if mask is None else 1,
    } | changes  # fmt: skip


def planned(rates=RATES[:1]):
    rows = [one(label, seed, rate) for rate in rates for label in MASKS for seed in range(3)]
    return [*rows, one("null", 0, control="same_seed")]


def pair(row, reference, relation, equal, base=500, distance=4.0):
    """Rows of the table: ``equal`` inside the mask bitwise, more of it within tolerances."""
    shared = {"trial_id": row["trial_id"], "reference": reference["trial_id"], "relation": relation}
    shared |= {"sum_sq_difference": distance, "sum_sq_update": 16.0}
    names = ("bitwise", "abs_1e-05", "abs_1e-04")
    inside = {f"num_equal_{n}": min(CHANGED, equal + 100 * i) for i, n in enumerate(names)}
    inside |= dict(zip([f"num_base_equal_{n}" for n in names], (0, base, 995), strict=True))
    every = {name: count + SIZE - CHANGED for name, count in inside.items()}
    return [
        {**shared, "scope": "all", "num_elements": SIZE, **every},
        {**shared, "scope": "changed", "num_elements": CHANGED, **inside},
    ]


def pairs(rows):
    """The table of ``planned``: final agrees more than random, each seed a little less."""
    full = {(r["seed"], r["learning_rate"]): r for r in rows
            if '"mask": null' in r["config"] and not r["control"]}  # fmt: skip
    found = []
    for row in rows:
        seed, own = row["seed"], full[row["seed"], row["learning_rate"]]
        if row["control"] == "same_seed":
            found += pair(row, own, "rerun", 1000, distance=0.0)
        elif row is own:
            other = full[(seed + 1) % 3, row["learning_rate"]]
            found += pair(row, other, "other seed", 300 + 10 * seed, distance=16.0)
        else:
            equal = 800 if "random" not in row["trial_id"] else 200
            found += pair(row, own, "subnetwork", equal - 10 * seed, base=500 + seed)
    return found


def table_of(rows, **changes):
    given = {"agreement": pairs(rows), "claims": [], "effects": [], "terms": [], "means": []}
    return make_tables(rows, **(given | changes))


def study_of(rates=RATES[:1]):
    factors = {"train.mask": [None, FINAL, RANDOM], "train.learning_rate": list(rates)}
    return make_study(factors=factors, seeds=[0, 1, 2], controls=["same_seed"])


def rows_of(rows, **changes):
    found = table_of(rows, **changes)
    return subnetwork_rows(trial_rows(study_of(), found), found)


# --- rows ------------------------------------------------------------------------------------


def test_a_row_per_mask_full_run_rerun_and_other_seed():
    found = rows_of(planned())
    said = [(row["relation"], row["mask"], row["num_finished"], row["num_pairs"]) for row in found]
    assert said == [
        ("full", None, 3, 0),
        ("subnetwork", "final(cell)", 3, 3),
        ("subnetwork", "random(final(cell))", 3, 3),
        ("rerun", None, 1, 1),
        ("other seed", None, 3, 3),
    ]
    full, final, random, again, other = found
    assert full["agreement"]["all"]["bitwise"]["equal"] is None
    assert full["score_after"] == pytest.approx(0.5)
    assert [row["mask_density"] for row in (full, again, other)] == [None] * 3
    assert final["mask_density"] == pytest.approx(0.11)
    # 800, 790, 780 of 1000 inside; of all 9000 more, of 10000.
    assert final["agreement"]["changed"]["bitwise"]["equal"] == pytest.approx(0.79)
    assert final["agreement"]["changed"]["abs_1e-05"]["equal"] == pytest.approx(0.89)
    assert final["agreement"]["changed"]["abs_1e-05"]["base"] == pytest.approx(0.501)
    assert final["agreement"]["all"]["bitwise"]["equal"] == pytest.approx(0.979)
    assert random["agreement"]["changed"]["bitwise"]["equal"] == pytest.approx(0.19)
    assert other["agreement"]["changed"]["bitwise"]["equal"] == pytest.approx(0.31)
    assert again["agreement"]["changed"]["bitwise"]["equal"] == 1
    lengths = [row["relative_l2"] for row in (final, again, other)]
    assert lengths == [0.5, 0, 1]


def test_differences_are_of_the_same_seed_with_a_t_interval():
    """Of final: .02, -.02, .06; mean .02, sd .04, half width 4.302653 * .04 / sqrt 3."""
    full, final, _, again, other = rows_of(planned())
    assert final["difference"] == pytest.approx(0.02)
    half = 4.302652729696142 * 0.04 / 3**0.5
    assert final["difference_low"] == pytest.approx(0.02 - half)
    assert final["difference_high"] == pytest.approx(0.02 + half)
    assert final["num_differences"] == 3
    assert [row["difference"] for row in (full, again, other)] == [None] * 3
    assert again["num_differences"] == 1


def test_a_run_that_failed_or_was_not_scored_is_in_no_pair():
    rows = planned()
    lost = rows[0] | {"status": "failed", "error": "it broke"}
    rows[0] = lost
    rows[4]["score_after"] = None  # final, seed 1
    kept = [row for row in pairs(planned()) if lost["trial_id"] not in
            (row["trial_id"], row["reference"])]  # fmt: skip
    full, final, random, again, other = rows_of(rows, agreement=kept)
    assert (full["num_finished"], full["num_failed"], full["num_planned"]) == (2, 1, 3)
    assert (final["num_finished"], final["num_differences"], final["difference"]) == (3, 1, None)
    assert (final["num_pairs"], random["num_pairs"], other["num_pairs"]) == (2, 2, 1)
    assert random["difference"] == pytest.approx(-0.07)
    assert final["agreement"]["changed"]["bitwise"]["equal"] == pytest.approx(0.785)
    assert again["num_differences"] == 0


def test_a_tolerance_is_vacuous_where_the_base_agrees_inside_the_mask():
    _, final, *_ = rows_of(planned())
    vacuous = {s: [n for n in found if found[n]["vacuous"]]
               for s, found in final["agreement"].items()}  # fmt: skip
    assert vacuous == {"all": [], "changed": ["abs_1e-04"]}
    assert final["agreement"]["changed"]["abs_1e-04"]["base"] == pytest.approx(0.995)


def test_cells_are_compared_with_those_alike_but_for_the_mask():
    rows = planned(RATES)
    found = rows_of(rows)
    first, second = (
        [row for row in found if row["is_baseline"] is is_baseline] for is_baseline in (True, False)
    )
    assert {row["block"] for row in first} == {"grpo learning_rate=1e-05"}
    assert {row["block"] for row in second} == {"grpo learning_rate=3e-05"}
    assert [row["relation"] for row in second] == ["full", *["subnetwork"] * 2, "other seed"]
    assert second[1]["score_after"] == pytest.approx(first[1]["score_after"] + 0.02)
    assert second[1]["difference"] == pytest.approx(first[1]["difference"])


def test_another_task_is_not_the_full_run_of_a_mask():
    told = json.loads(planned()[0]["config"]) | {"task": {"name": "products"}}
    other = one("null", 1, trial_id="other", config=json.dumps(told), score_after=0.0)
    assert rows_of([*planned(), other], agreement=pairs(planned())) == rows_of(planned())


def test_without_a_mask_there_are_no_rows_and_without_the_table_no_agreement():
    rows = planned()
    unmasked = [row for row in rows if '"mask": null' in row["config"]]
    assert rows_of(unmasked) == []
    found = rows_of(rows, agreement=[])
    assert [row["relation"] for row in found] == ["full", "subnetwork", "subnetwork", "rerun"]
    assert found[1]["difference"] == pytest.approx(0.02)
    assert found[1]["agreement"]["changed"]["bitwise"] == {
        "equal": None, "base": None, "vacuous": False
    }  # fmt: skip
    assert found[1]["relative_l2"] is None


def test_a_reference_that_changed_nothing_has_no_shares():
    rows = planned()
    nothing = {"num_elements": 0, "sum_sq_update": 0.0}
    empty = [row | (nothing if row["scope"] == "changed" else {"sum_sq_update": 0.0})
             for row in pairs(rows)]  # fmt: skip
    final = rows_of(rows, agreement=empty)[1]
    assert final["agreement"]["changed"]["bitwise"]["equal"] is None
    assert final["agreement"]["all"]["bitwise"]["equal"] == pytest.approx(0.979)
    assert final["relative_l2"] is None


# --- page ------------------------------------------------------------------------------------


def page_of(folder, rows, rates=RATES[:1], **changes):
    page = build_report(study_of(rates), table_of(rows, **changes), folder, provenance={})
    return page.read_text(), json.loads(page.with_name("report.json").read_text())


def section(text):
    found = re.search(r'<section id="subnetworks".*?</section>', text, re.DOTALL)
    return found and re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", found[0]))


def test_the_section_says_what_the_rows_say(tmp_path):
    text, content = page_of(tmp_path, planned())
    shown = section(text)
    assert 'href="#subnetworks"' in text
    for words in (
        "final(cell) 11.00 % 3 52.0 % +2.0 [-7.9, +11.9] 79.00 % base 0 % 89.00 % base 50.10 %",
        "99.00 % base 99.50 % vacuous 97.90 % base 90.00 %",
        "all weights the full run all 3 50.0 %",
        f"run again: the ceiling all 1 50.0 % {NOTHING} 100 % base 0 %",
        f"the floor all 3 {NOTHING} {NOTHING} 31.00 % base 0 %",
    ):
        assert words in shown, (words, shown)
    assert shown.count("vacuous") == 1 + 4
    assert "exact" not in shown
    assert "learning_rate=" not in shown, "there is one block, which needs no name"
    assert "all weights final(cell) random(final(cell)) grpo: loss" in shown
    assert content["subnetworks"] == json.loads(json.dumps(rows_of(planned())))


def test_long_names_of_masks_are_cut_where_they_stay_apart(tmp_path):
    final = '"from": "cell"'
    long = f'{final}, "where": {{"train.trainable_layers": [0, 1, 2, 3, 4, 5, 6, 7]}}'
    rows = [row | {"config": row["config"].replace(final, long)} for row in planned()]
    shown = section(page_of(tmp_path, rows)[0])
    assert "all weights final random(final) grpo: loss" in shown
    assert "trainable_layers" not in shown


def test_the_loss_is_drawn_by_mask_where_the_baseline_is(tmp_path):
    rows = planned(RATES)
    steps = [
        {"trial_id": row["trial_id"], "step": step, "loss": (2.0 if "random" in row["label"]
         else 1.0) / step + 0.1 * row["seed"], "reward": 0.5}
        for row in rows for step in (1, 2, 3)
    ]  # fmt: skip
    text, _ = page_of(tmp_path, rows, RATES, steps=steps)
    own = re.search(r'<section id="subnetworks".*?</section>', text, re.DOTALL)[0]
    assert section(text).count("grpo learning_rate=3e-05") == 1
    assert "Training loss under each mask (grpo learning_rate=1e-05), mean over seeds" in own
    (drawn,) = re.findall(r"<figure>.*?</figure>", own, re.DOTALL)
    assert drawn.count("<polyline") == 3
    assert "<polygon" not in drawn, "the range over seeds would hide the masks"
    tips = re.findall(r'data-tip="([^"]*)"', drawn)
    assert any("random(final(cell))" in tip and tip.endswith("step 2\n1.1") for tip in tips)
    assert len(tips) == 9
    assert not any("3e-05" in tip for tip in tips)
    training = re.search(r'<section id="training".*?</section>', text, re.DOTALL)[0]
    assert training.count("<polyline") > 3


def test_a_study_without_masks_has_no_such_section(tmp_path):
    page = build_report(make_study(), make_tables(), tmp_path, provenance={})
    assert "subnetworks" not in page.read_text().replace(".subnetworks", "")
    assert json.loads(page.with_name("report.json").read_text())["subnetworks"] == []
