"""What the report says of steps and of the price of measuring, against means made by hand."""

import json

import pytest
from report_study import PROVENANCE, make_study, make_tables, trial

from rlsparse.definitions import PROBE_PARTS
from rlsparse.report import probe_rows
from rlsparse.report.rows import trial_rows
from rlsparse.report.study_page import build_report

TRIALS = [
    trial("grpo", 0, num_untouched=80, num_cancelled=5, num_final=15, cpu_s=10.0,
          probe_steps_cpu_s=0.5, probe_updates_cpu_s=1.0),
    trial("grpo", 1, num_untouched=90, num_cancelled=5, num_final=5, cpu_s=30.0,
          probe_steps_cpu_s=1.5),
    trial("sft", 0, num_untouched=100, num_cancelled=0, num_final=0, cpu_s=10.0,
          probe_steps_cpu_s=0.0),
    trial("sft", 1, status="failed", num_untouched=0, num_cancelled=50, num_final=50),
    trial("dpo", 0),
]  # fmt: skip


def step(name, number, **values):
    return {"trial_id": name, "step": number, **values}


def casts(share):
    return {column: share * (i + 1) for i, column in enumerate(probe_rows.CASTS)}


STEPS = [
    step("grpo0", 0, score=0.4),
    step("grpo0", 9, **casts(0.2), gradient_nonzero_fraction=0.8, half_ulp_precision=0.5),
    step("grpo0", 3, **casts(0.1), gradient_nonzero_fraction=1.0),
    step("grpo1", 9, **casts(0.1), gradient_nonzero_fraction=0.7, half_ulp_precision=0.25),
    step("sft1", 9, **casts(0.2)),  # failed
]


@pytest.fixture(scope="module")
def given():
    return make_tables(TRIALS, steps=STEPS, overlaps=[], consensus=[], spectra=[])


@pytest.fixture(scope="module")
def trials(given):
    return trial_rows(make_study(), given)


def test_split_of_finished_runs(given, trials):
    assert probe_rows.split_rows(trials, given) == [
        {"group": "grpo", "num_runs": 2, "untouched": pytest.approx(0.85),
         "cancelled": pytest.approx(0.05), "final": pytest.approx(0.1),
         "cancelled_of_ever": pytest.approx((5 / 20 + 5 / 10) / 2)},
        {"group": "sft", "num_runs": 1, "untouched": 1.0, "cancelled": 0.0, "final": 0.0,
         "cancelled_of_ever": None},
    ]  # fmt: skip


def test_casts_at_the_last_step(given, trials):
    (row,) = probe_rows.cast_rows(trials, given)
    assert row == {
        "group": "grpo", "num_runs": 2, **{k: pytest.approx(v) for k, v in casts(0.15).items()}
    }  # fmt: skip


def test_updates_are_averaged_over_steps_first(given, trials):
    (row,) = probe_rows.gate_rows(trials, given)
    assert row["gradient_nonzero_fraction"] == pytest.approx((0.9 + 0.7) / 2)
    assert row["half_ulp_precision"] == pytest.approx((0.5 + 0.25) / 2)
    assert row["update_below_half_ulp"] is row["half_ulp_recall"] is None


def test_prices_are_shares_of_the_runs_that_paid_them(given):
    assert probe_rows.price_rows(given) == [
        {"part": "steps", "num_runs": 3, "cpu_s": pytest.approx(2 / 3),
         "share": pytest.approx(2 / 50)},
        {"part": "updates", "num_runs": 1, "cpu_s": 1.0, "share": pytest.approx(0.1)},
    ]  # fmt: skip
    assert list(probe_rows.PRICES) == list(PROBE_PARTS)


def test_page(given, tmp_path):
    page = build_report(make_study(), given, tmp_path, provenance=PROVENANCE)
    text = page.read_text()
    for words in ("Untouched, cancelled, final", "37.50 %", "seen in other formats", "Recall",
                  "What measuring cost", "gradients and updates", "4.00 %"):  # fmt: skip
        assert words in text
    data = json.loads((tmp_path / "report.json").read_text())
    assert [row["part"] for row in data["prices"]] == ["steps", "updates"]


def test_nothing_is_said_where_nothing_was_measured(tmp_path):
    page = build_report(make_study(), make_tables(), tmp_path, provenance=PROVENANCE)
    text = page.read_text()
    for words in ("cancelled, final", "seen in other formats", "Recall", "What measuring cost"):
        assert words not in text
