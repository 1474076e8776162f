import csv
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from rlsparse.definitions import DEFINITIONS, VIEWS
from rlsparse.errors import ConfigError
from rlsparse.presets import (
    TABLE,
    find_preset,
    load_presets,
    preset_rows,
    verification_rows,
    verify,
)

STATUSES = {"published", "disputed", "incomparable", "unpublished"}

TABLE_6 = """
allenai/Llama-3.1-Tulu-3-8B-DPO 76.04 76.04 76.14 81.38
allenai/Llama-3.1-Tulu-3-70B-DPO 87.58 87.59 87.79 95.24
deepseek-ai/deepseek-math-7b-rl 68.14 68.14 68.14 68.53
kaist-ai/mistral-orpo-beta 73.16 73.18 73.23 76.94
kaist-ai/mistral-orpo-alpha 50.40 50.41 50.48 53.23
openbmb/Eurus-7b-kto 71.78 71.79 73.14 95.98
peiyi9979/math-shepherd-mistral-7b-rl 52.45 52.47 53.21 80.77
PRIME-RL/Eurus-2-7B-PRIME 75.26 75.27 75.36 77.04
princeton-nlp/Llama-3-Instruct-8B-SimPO 71.0 71.0 71.1 76.42
princeton-nlp/Llama-3-Base-8B-SFT-SimPO 79.47 79.47 79.60 86.52
princeton-nlp/Mistral-7B-Instruct-SimPO 59.37 59.40 60.31 89.07
princeton-nlp/Mistral-7B-Base-SFT-SimPO 62.58 62.60 63.56 91.44
"""
"""2505.11711, Table 6: model, per cent unchanged at 1e-8, 1e-7, 1e-6, 1e-5."""


def diff_json(**sparsity: float) -> dict:
    return {"sparsity": dict.fromkeys(DEFINITIONS, 0.5) | sparsity}


def test_the_table_is_whole():
    presets = load_presets()
    with TABLE.open(newline="") as stream:
        assert len(list(csv.reader(stream))) == len(presets) + 1 == 32
    assert len({preset.name for preset in presets}) == len(presets)
    for preset in presets:
        assert preset.status in STATUSES
        assert preset.name
        assert preset.after
        assert preset.cast in (None, *VIEWS[1:])
        assert bool(preset.published) == (preset.status != "unpublished")
        assert all(0 < number < 1 for number in preset.published.values())
        values = [preset.published[name] for name in DEFINITIONS if name in preset.published]
        assert values == sorted(values), "a wider tolerance leaves more unchanged"
        if preset.status == "published":
            assert preset.before.count("/") == preset.after.count("/") == 1
            assert preset.tolerance in (0.001, 0.005)
            assert preset.cast == "bf16"
        else:
            assert preset.note
    assert sum(preset.status == "disputed" for preset in presets) == 9
    assert ".md" not in TABLE.read_text()


def test_numbers_are_those_of_table_6():
    printed = {line.split()[0]: line.split()[1:] for line in TABLE_6.strip().splitlines()}
    found = {p.after: p for p in load_presets() if p.source == "2505.11711 Table 6"}
    assert found.keys() == printed.keys()
    for model, numbers in printed.items():
        assert [round(100 * n, 2) for n in found[model].published.values()] == [
            float(number) for number in numbers
        ]
        assert list(found[model].published) == list(DEFINITIONS[1:5])


def test_unknown_preset():
    assert find_preset("tulu3-8b-dpo").after == "allenai/Llama-3.1-Tulu-3-8B-DPO"
    with pytest.raises(ConfigError, match=r"no preset 'tulu-8b-dpo'; did you mean tulu3-8b-dpo\?"):
        find_preset("tulu-8b-dpo")


def test_verify_against_the_published_number():
    preset = find_preset("eurus-7b-kto")
    exact = {**preset.published, "bitwise": 0.7177}
    assert verify(preset, diff_json(**exact)).passed is True
    edge = verify(preset, diff_json(**exact | {"abs_1e-06": 0.7314 + 0.001}))
    assert edge.passed is True
    beyond = verify(preset, diff_json(**exact | {"abs_1e-06": 0.7314 - 0.00101}))
    assert beyond.passed is False
    of = {one.definition: one for one in beyond.comparisons}
    assert list(of) == list(DEFINITIONS)
    assert [d for d, one in of.items() if one.passed is False] == ["abs_1e-06"]
    assert of["abs_1e-06"].difference == pytest.approx(-0.00101)
    assert (of["bitwise"].published, of["bitwise"].ours, of["bitwise"].passed) == (
        None, 0.7177, None,
    )  # fmt: skip
    rows = verification_rows(beyond)
    assert rows[3] == {
        "definition": "abs_1e-06", "published": "73.14", "ours": "73.04", "difference": "-0.10",
        "tolerance": "0.10", "verdict": "FAIL",
    }  # fmt: skip
    assert [row["verdict"] for row in rows] == ["", "pass", "pass", "FAIL", "pass", "", ""]


@pytest.mark.parametrize("status", sorted(STATUSES - {"published"}))
def test_nothing_is_checked_against_other_numbers(status):
    for preset in load_presets():
        if preset.status == status:
            found = verify(preset, diff_json(**preset.published))
            assert found.passed is None
            assert all(one.passed is one.tolerance is None for one in found.comparisons)
            verdicts = {row["verdict"] for row in verification_rows(found)}
            assert verdicts == ({""} if status == "unpublished" else {"", "not checked"})


def test_incomplete_diff():
    preset = find_preset("deepscaler-1.5b")
    for content in ({}, {"sparsity": {"bitwise": 1.0}}):
        with pytest.raises(ConfigError, match=r"lacks the sparsity under .*rel_1e-03"):
            verify(preset, content)


def test_rows_to_print():
    rows = preset_rows(load_presets())
    assert len({tuple(row) for row in rows}) == 1
    row = next(row for row in rows if row["preset"] == "deepscaler-1.5b")
    assert (row["rel_1e-03"], row["abs_1e-05"], row["status"]) == ("53.80", "", "published")
    assert "bitwise" not in row
    json.dumps(rows)


@pytest.mark.parametrize("tau", [1e-8, 1e-7, 1e-6, 1e-5])
def test_published_arithmetic_differs_from_ours_as_the_docstring_says(tau):
    """The released script's rule on every pair of bf16 weights near tau, without torch."""

    def bf16(values):
        return np.asarray(values, np.float64).astype(np.float32).astype(ml_dtypes.bfloat16)

    codes = np.arange(*bf16([tau / 4, tau * 400]).view(np.uint16)).astype(np.uint16)
    weights = codes.view(ml_dtypes.bfloat16).astype(np.float64)
    exact = np.abs(weights[:, None] - weights)
    theirs = bf16(exact).astype(np.float64) <= float(bf16(tau))
    differ = theirs != (exact <= tau)
    assert differ.any()
    assert theirs[differ].all()
    assert tau < exact[differ].min() <= exact[differ].max() < 1.0044 * tau
    assert np.maximum(weights[:, None], weights)[differ].max() < 16 * tau


def test_presets_import_little():
    heavy = ("torch", "pandas", "numpy", "pyarrow")
    code = f"import sys, rlsparse.presets; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
