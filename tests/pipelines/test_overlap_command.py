"""``rlsparse overlap`` as a user meets it."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from command import Command

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.patch import PATCH_FILE, TensorPair, write_patch

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


def test_narrow_terminals_get_a_block_per_pair(runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = runs.run("overlap", "one", "two", "--base", "base")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "[1] and [2], all weights" in lines
    assert "  lift  uniform 1  tensor 1  magnitude " in done.stdout
    assert "Jaccard 0.333" in done.stdout


def test_the_snapshot_that_stands_for_a_trial_is_told(runs, tmp_path):
    base, one, two = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")[NAME]
        for name in ("base", "one", "two")
    )
    own = fingerprint(Checkpoint.open(tmp_path / "base"))
    for step, after in ((2, one), (10, two)):
        snapshot = tmp_path / "trial" / "snapshots" / f"step-{step:06d}"
        snapshot.mkdir(parents=True)
        bits = (base.view(np.uint16).ravel(), after.view(np.uint16).ravel())
        pair = TensorPair(NAME, "bf16", base.shape, *bits)
        write_patch(snapshot / PATCH_FILE, [pair], base_fingerprint=own)
    done = runs.run("overlap", "trial", "one", "--base", "base", "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["snapshots"] == {"trial": "step-000010"}
    assert content["overlaps"][0]["num_both"] == 64
    done = runs.run("overlap", "trial", "one", "--base", "base")
    assert "[1]  trial (step-000010)" in done.stdout
