"""``rlsparse overlap`` as a user meets it."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from command import Command

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def runs(tmp_path):
    """A base and two runs that change the first half, and the middle half, of one matrix."""
    base = np.arange(1, 257, dtype=np.float32).reshape(16, 16).astype(ml_dtypes.bfloat16)
    for name, rows in (("base", []), ("one", range(8)), ("two", range(4, 12))):
        after = base.copy()
        after[list(rows)] = -after[list(rows)]
        (tmp_path / name).mkdir()
        safetensors.numpy.save_file({NAME: after}, tmp_path / name / "model.safetensors")
    command = Command(tmp_path)
    yield command
    command.close()


def test_all_numbers(runs):
    done = runs.run("overlap", "one", "two", "--base", "base", "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert (content["view"], content["masks"]) == ("stored", ["one", "two"])
    whole, module = content["overlaps"]
    assert (whole["module"], module["module"]) == (None, "up")
    assert [whole[key] for key in ("num_elements", "num_a", "num_b", "num_both")] == [
        256, 128, 128, 64,
    ]  # fmt: skip
    assert (whole["o1"], whole["o2"], whole["kappa"], whole["odds_ratio"]) == (0.5, 0.5, 0.0, 1.0)
    assert whole["jaccard"] == pytest.approx(1 / 3, rel=1e-12, abs=0)
    assert (whole["max_lift"], whole["lift"]["uniform"]) == (2.0, 1.0)
    assert whole["expected"]["margins"] == 64 * 64 * 16 * 64 / (128 * 128) / 4
    assert whole["lift"]["update_size"] is None


def test_what_people_read(runs):
    done = runs.run("overlap", "one", "two", "--base", "base", "--per-module")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[1\]\s+one", done.stdout)
    rows = [line for line in done.stdout.splitlines() if "50.00 %" in line]
    assert len(rows) == 2
    assert "all" in rows[0]
    assert "up" in rows[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("one", "two"), "give --base"),
        (("one", "--base", "base"), "two or more different masks, got 1: one"),
        (("one", "two", "--base", "nowhere"), "nowhere"),
        (("one", "two", "--base", "base", "--view", "int4"), "--view int4: choose of stored, fp32"),
        (("one", "two", "--base", "base", "--json", "no/such.json"), "cannot write no/such.json"),
    ],
)
def test_mistakes_are_one_line(runs, arguments, message):
    done = runs.run("overlap", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert message in line
