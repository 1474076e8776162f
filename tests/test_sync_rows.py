"""The report's section on weight sync, from tables with numbers that can be checked by hand."""

import json
import re

import pytest
from report_study import make_study, make_tables, trial

from rlsparse.report.rows import trial_rows
from rlsparse.report.study_page import build_report
from rlsparse.report.sync_rows import EARLY_STEPS, size_rows, step_rows, way_rows

NUM, DENSE, STEPS = 1000, 2000, 40


def sync(trial_id, step, way, size, k=1, changed=10, encode_s=0.5, apply_s=0.25):
    return {
        "trial_id": trial_id, "k": k, "step_before": step - k, "step_after": step, "way": way,
        "num_elements": NUM, "num_changed": changed, "dense_bytes": DENSE, "size_bytes": size,
        "encode_s": encode_s, "apply_s": apply_s, "host": "h",
    }  # fmt: skip


def syncs():
    """Of two GRPO runs: 40 bytes in early steps and 20 after, one of 100; SFT has one window."""
    early = [sync("grpo0", s, "relative", 40 if s <= EARLY_STEPS else 20) for s in range(1, STEPS)]
    rows = [*early, sync("grpo1", STEPS, "relative", 100, changed=50)]
    rows += [sync("grpo0", 8, "dense", DENSE, changed=None, encode_s=0.1, apply_s=0.2)]
    rows += [sync("grpo0", 8, "indices", 60, encode_s=1.0, apply_s=2.0)]
    rows += [sync("grpo0", 8, "relative", 30, k=8, changed=20)]
    return [*rows, sync("sft0", 1, "relative", 500, changed=500)]


@pytest.fixture
def found():
    trials = [trial("grpo", 0), trial("grpo", 1), trial("sft", 0), trial("dpo", 0)]
    tables = make_tables(trials, syncs=syncs())
    return trial_rows(make_study(), tables), tables


def test_sizes(found):
    one, eight, sft = size_rows(*found)
    assert (one["group"], one["k"], one["num_windows"], one["density"]) == ("grpo", 1, STEPS, 0.01)
    assert one["size_bytes"] == {"p50": 40, "p95": 40, "max": 100}
    assert one["share"] == pytest.approx({"p50": 0.02, "p95": 0.02, "max": 0.05})
    assert (one["early"], one["late"]) == (0.02, 0.01)
    assert (eight["k"], eight["num_windows"], eight["early"], eight["late"]) == (8, 1, 0.015, None)
    assert (sft["group"], sft["density"], sft["early"], sft["late"]) == ("sft", 0.5, 0.25, None)


def test_ways(found):
    ways = {(row["k"], row["way"]): row for row in way_rows(*found, links=(1, 8))}
    assert [*ways] == [(1, "relative"), (1, "dense"), (1, "indices")]  # windows sent in all ways
    dense, indices = ways[1, "dense"], ways[1, "indices"]
    assert (dense["times_smaller"], dense["bytes_per_change"], dense["dense_from"]) == (
        1,
        None,
        None,
    )
    assert indices["times_smaller"] == pytest.approx(DENSE / 60)
    assert (indices["bytes_per_change"], indices["dense_from"]) == (6, pytest.approx(2 / 6))
    assert (indices["encode_bytes_s"], indices["apply_bytes_s"]) == (DENSE, DENSE / 2)
    assert indices["pauses"] == pytest.approx({1: 2.0 + 480e-9, 8: 2.0 + 60e-9})
    relative = ways[1, "relative"]
    assert (relative["size_bytes"], relative["dense_from"]) == (40, 0.5)


def test_a_way_that_is_always_smaller_than_all_weights(tmp_path):
    trials = [trial("grpo", 0)]
    rows = [sync("grpo0", 8, "relative", 15), sync("grpo0", 8, "dense", DENSE, changed=None)]
    tables = make_tables(trials, syncs=rows)
    ways = way_rows(trial_rows(make_study(), tables), tables)
    assert [(row["bytes_per_change"], row["dense_from"]) for row in ways] == [
        (1.5, None),
        (None,) * 2,
    ]
    page = build_report(make_study(), tables, tmp_path, provenance={}).read_text()
    assert page.count('<td class="num">never</td>') == 1
    assert not re.search(rf"to step {EARLY_STEPS}|first {EARLY_STEPS} steps", page)  # all end by it


def test_steps(found):
    steps = [(row["group"], row["step"], row["share"]) for row in step_rows(*found)]
    assert len(steps) == STEPS + 1
    assert steps[0] == ("grpo", 1, 0.02)
    assert steps[-2:] == [("grpo", STEPS, 0.05), ("sft", 1, 0.25)]


def test_no_section_without_such_trials(tmp_path):
    page = build_report(make_study(), make_tables(), tmp_path, provenance={}).read_text()
    assert 'id="syncs"' not in page
    assert json.loads((tmp_path / "report.json").read_text())["syncs"]["sizes"] == []


def test_page_and_json(found, tmp_path):
    tables = found[1]
    page = build_report(make_study(), tables, tmp_path, provenance={}, links=[25.0]).read_text()
    section = re.search(r'<section id="syncs".*?</section>', page, re.DOTALL)
    assert section
    text = re.sub(r"<[^>]+>", " ", section[0])
    assert re.search(rf"first {EARLY_STEPS} steps.*to step {EARLY_STEPS}", text, re.DOTALL)
    for shown in (
        "2.00 %",
        "5.00 %",
        "indices and values",
        "33.33 %",
        "Pause (s) at Gbit/s",
        "k of 1, 8, 64.",
    ):
        assert shown in text
    assert re.search(r">25</th>", section[0])
    assert '<td>indices and values</td><td class="num">1</td>' in section[0]  # syncs
    assert section[0].count("<svg") >= 2
    content = json.loads((tmp_path / "report.json").read_text())["syncs"]
    assert content["links"] == [25]
    assert content["sizes"][0]["share"]["max"] == 0.05
    assert set(content["ways"][0]["pauses"]) == {"25.0"}
