"""About thirty numbers a trial, each what a reader of its tables would compute by hand."""

import math
from typing import Any

import pyarrow as pa
import pytest

from pipelines.scalars import FINAL, PER_STEP, final_scalars, measured_scalars, step_scalars
from rlsparse import tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.study import StudyBase

STUDY = StudyBase(name="s", question="?")


def trial(name: str, seed: int, cell: str = "{}", **more: Any) -> dict[str, Any]:
    return {"trial_id": name, "seed": seed, "cell": cell, "replicate": 0, "num_steps": 4, **more}


def pair(one: str, other: str, num_a: int, num_b: int, both: int, **more: Any) -> dict[str, Any]:
    """By default the last snapshots, in the default view, of all 100 weights."""
    return {
        "trial_a": one, "step_a": 4, "trial_b": other, "step_b": 4, "definition": "bitwise",
        "view": "stored", "num_elements": 100, "num_a": num_a, "num_b": num_b, "num_both": both,
        "expected_tensor": both / 2, "expected_magnitude": both / 1.25, **more,
    }  # fmt: skip


def measured(
    trials: list[dict[str, Any]], overlaps: list[dict[str, Any]], changes: Any = ()
) -> dict[str, dict[tuple[str, int], float]]:
    given = {"trials": trials, "overlaps": overlaps, "changes": list(changes)}
    made: dict[str, pa.Table] = {k: tables.from_rows(rows, k) for k, rows in given.items()}
    found = measured_scalars(STUDY, made)
    result = {t: {(name, step): x for name, step, x in rows} for t, rows in found.items()}
    assert {t: len(rows) for t, rows in found.items()} == {t: len(r) for t, r in result.items()}
    return result


def test_sparsity_of_every_snapshot_in_the_default_view() -> None:
    changes = [
        {"trial_id": "a", "step": step, "view": view, "module": module, "num_elements": n,
         **{f"num_changed_{d}": changed // (1 + i) for i, d in enumerate(DEFINITIONS)}}
        for step, view, module, n, changed in (
            (2, "stored", "q", 60, 6), (2, "stored", "v", 40, 14), (4, "stored", "q", 60, 60),
            (4, "stored", "v", 40, 40), (2, "bf16", "q", 60, 1),
        )
    ]  # fmt: skip
    found = measured([trial("a", 0)], [], changes)["a"]
    assert found["sparsity/bitwise", 2] == 1 - 20 / 100
    assert found["density/bitwise", 2] == 20 / 100
    assert found["sparsity/abs_1e-08", 2] == 1 - (3 + 7) / 100
    assert found["sparsity/rel_1e-03", 2] == 1 - (0 + 2) / 100
    assert found["sparsity/bitwise", 4] == 0
    assert len(found) == 2 * (len(DEFINITIONS) + 1)


def test_overlap_is_a_mean_over_other_seeds() -> None:
    found = measured(
        [trial("a", 0), trial("b", 1), trial("c", 2)],
        [
            pair("a", "b", 20, 30, 10),
            pair("a", "c", 20, 40, 20, expected_tensor=2.5, expected_magnitude=20.0),
            pair("b", "c", 30, 40, 0),
        ],
    )
    a = found["a"]
    assert a["overlap/jaccard_other_seed", 4] == pytest.approx((10 / 40 + 20 / 40) / 2, abs=1e-15)
    kappas = []
    for num_a, num_b, both in ((20, 30, 10), (20, 40, 20)):
        agreed = (both + 100 - num_a - num_b + both) / 100
        chance = (num_a * num_b + (100 - num_a) * (100 - num_b)) / 100**2
        kappas.append((agreed - chance) / (1 - chance))
    assert a["overlap/kappa_other_seed", 4] == pytest.approx(sum(kappas) / 2, rel=1e-12, abs=0)
    assert a["overlap/lift_tensor_other_seed", 4] == pytest.approx(
        math.sqrt(2 * 8), rel=1e-12, abs=0
    )
    assert a["overlap/lift_magnitude_other_seed", 4] == pytest.approx(
        math.sqrt(1.25), rel=1e-12, abs=0
    )
    assert found["b"]["overlap/jaccard_other_seed", 4] == pytest.approx(0.125, abs=1e-15)
    # Nothing was expected of b and c: that pair has no lift.
    assert found["b"]["overlap/lift_tensor_other_seed", 4] == pytest.approx(2, rel=1e-12, abs=0)


def test_other_cells_controls_and_parts_have_no_say() -> None:
    trials = [
        trial("a", 0), trial("b", 1), trial("same", 0, replicate=1, control="same_seed"),
        trial("other", 1, cell='{"x":"1"}'), trial("thrice", 1, control="lr_times_3"),
    ]  # fmt: skip
    overlaps = [
        pair("a", "b", 20, 20, 10),
        *(pair("a", name, 20, 20, 20) for name in ("same", "other", "thrice")),
        pair("a", "b", 20, 20, 20, module="q"),
        pair("a", "b", 20, 20, 20, tensor="model.q"),
        pair("a", "b", 20, 20, 20, view="bf16"),
        pair("a", "b", 20, 20, 20, step_a=2),
        pair("a", "b", 20, 20, 20, step_b=2),
        pair("a", "a", 20, 20, 20, step_a=2),
    ]
    found = measured(trials, overlaps)
    assert found.keys() == {"a", "b"}
    for name in "ab":
        assert found[name]["overlap/jaccard_other_seed", 4] == pytest.approx(1 / 3, abs=1e-15)


def test_empty_masks_have_no_overlap() -> None:
    found = measured([trial("a", 0), trial("b", 1)], [pair("a", "b", 0, 0, 0)])
    assert found == {"a": {}, "b": {}}


def test_only_what_a_trial_measured_is_a_number() -> None:
    rows = [{"trial_id": "a", "step": 0, "score": 0.5}, {"trial_id": "a", "step": 1, "loss": 2}]
    assert step_scalars(tables.from_rows(rows, "steps")) == [("score", 0, 0.5), ("loss", 1, 2.0)]
    summary = {"score_after": 0.5, "kl_final": None, "peak_bytes": 3, "something": 4.0}
    assert final_scalars(summary, 9) == [("score_after", 9, 0.5), ("peak_bytes", 9, 3.0)]


def test_a_trial_has_about_thirty_numbers() -> None:
    a = measured(
        [trial("a", 0), trial("b", 1)],
        [pair("a", "b", 20, 30, 10)],
        [{"trial_id": "a", "step": 4, "view": "stored", "module": "q", "num_elements": 1,
          **{f"num_changed_{d}": 0 for d in DEFINITIONS}}],
    )["a"]  # fmt: skip
    names = {*PER_STEP, *FINAL, *(name for name, _ in a)}
    assert 25 <= len(names) <= 33
