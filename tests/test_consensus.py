"""Weights changed in exactly k runs, against a plain count and enumeration of outcomes."""

import itertools
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from planted import FLOATS
from planted_masks import MODULES, SHAPES, Planted, a_run, plant_runs

from rlsparse import tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.overlap import count_masks
from rlsparse.overlap.comparison import compare
from rlsparse.overlap.consensus import consensus
from rlsparse.study import StudyBase

STUDY = StudyBase(name="study", question="?")
DPO = {"cell": {"algorithm.name": "dpo"}, "algorithm": "dpo", "role": "factor"}
RUNS = [
    a_run("r0", 0, steps=(3, 9)),
    a_run("r1", 1),
    a_run("r2", 2),
    a_run("again", 0, role="control", control="same_seed", replicate=1),
    a_run("d0", 0, **DPO),
    a_run("d1", 1, **DPO),
]
GROUPS = {"grpo": ["r0", "r1", "r2"], "dpo": ["d0", "d1"]}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant_runs(tmp_path_factory.mktemp("planted"), RUNS)


def poisson_binomial(columns: list[list[bool]], strata: list[object]) -> list[float]:
    members: dict[object, list[int]] = defaultdict(list)
    for place, stratum in enumerate(strata):
        members[stratum].append(place)
    found = [0.0] * (len(columns) + 1)
    for places in members.values():
        shares = [sum(column[p] for p in places) / len(places) for column in columns]
        for outcome in itertools.product((0, 1), repeat=len(columns)):
            chance = math.prod(s if o else 1 - s for s, o in zip(shares, outcome, strict=True))
            found[sum(outcome)] += len(places) * chance
    return found


def magnitude(weight: float) -> object:
    if not math.isfinite(weight):
        return "not finite"
    digits, exponent = math.frexp(abs(weight))
    return 0 if weight == 0 else (exponent, digits == 0.5)


def test_consensus_equals_a_plain_count(planted: Planted) -> None:
    comparison = compare(STUDY, planted.runs, "stored")
    after = {run.trial_id: Checkpoint.open(run.after[9]) for run in planted.runs}
    totals = count_masks(comparison, planted.table(), Checkpoint.open(planted.path), after)
    table = consensus(totals)
    assert table.schema.equals(tables.SCHEMAS["consensus"], check_metadata=True)
    rows = iter(table.to_pylist())
    for algorithm, trials in GROUPS.items():
        for module in (None, "k", "norm", "q"):
            names = [name for name in SHAPES if module in (None, MODULES[name])]
            columns = [
                np.concatenate([planted.masks[t, 9][name] for name in names]).tolist()
                for t in trials
            ]
            weights = [
                (name, w)
                for name in names
                for w in planted.weights[name].bits.view(FLOATS["bf16"]).astype(float).tolist()
            ]
            counted = Counter(sum(bits) for bits in zip(*columns, strict=True))
            uniform = poisson_binomial(columns, [0] * len(weights))
            tensor = poisson_binomial(columns, [name for name, _ in weights])
            strata: list[object] = [(name, magnitude(w)) for name, w in weights]
            matched = poisson_binomial(columns, strata)
            for k in range(len(trials) + 1):
                row = next(rows)
                assert json.loads(row["cell"]) == {"algorithm.name": algorithm}
                assert (row["algorithm"], row["step"], row["view"]) == (algorithm, 9, "stored")
                assert (row["module"], row["num_runs"], row["k"]) == (module, len(trials), k)
                assert (row["num_elements"], row["num_changed"]) == (len(weights), counted[k])
                for null, wanted in (("uniform", uniform), ("tensor", tensor)):
                    assert row[f"expected_{null}"] == pytest.approx(wanted[k], rel=1e-9, abs=1e-9)
                assert row["expected_magnitude"] == pytest.approx(matched[k], rel=1e-9, abs=1e-9)
    assert next(rows, None) is None


def test_a_study_without_groups_has_no_consensus(planted: Planted) -> None:
    comparison = compare(STUDY, planted.runs[:1], "stored")
    after = {"r0": Checkpoint.open(planted.runs[0].after[9])}
    totals = count_masks(comparison, planted.table(), Checkpoint.open(planted.path), after)
    assert consensus(totals).equals(tables.SCHEMAS["consensus"].empty_table())
