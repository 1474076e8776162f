"""The stage that compares trials, on a small study that has run; oracles read full checkpoints."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import aggregate, agreement
from pipelines.plan import Plan, make_plan
from pipelines.sweep import _spec, phases, run_trial
from pipelines.table_files import read_table, table_file
from rlsparse.errors import PatchError
from rlsparse.models import TINY
from rlsparse.patch import PATCH_FILE
from rlsparse.study import Trial
from rlsparse.study_file import load_study
from rlsparse.tables import snapshot_folder

TEXT = """
question: Does the mask recover the weights?
baseline:
  task: {num_train_problems: 16, num_eval_problems: 16}
  algorithm: {name: sft}
  train: {num_steps: 2, batch_size: 8, learning_rate: 1.0e-5}
  probe: {score_snapshots: false}
  keep_checkpoints: true
factors:
  train.mask: [null, {from: cell}]
seeds: [0, 1]
controls: [same_seed]
"""


def plan_in(folder: Path, *overrides: str) -> Plan:
    file = folder / "study.yaml"
    file.write_text(TEXT)
    return make_plan(load_study(file, overrides), str(folder / "runs"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study with its trials done, and nothing else."""
    folder = tmp_path_factory.mktemp("agreement")
    plan = plan_in(folder)
    for phase in phases(plan.trials):
        for trial in phase:
            run_trial(_spec(plan, trial))
    return folder


@pytest.fixture
def plan(ran: Path, tmp_path: Path, tasks_here: None) -> Plan:
    """The same in a place of its own; tasks run here, without Ray."""
    shutil.copytree(ran / "runs", tmp_path / "runs")
    return plan_in(tmp_path)


def weights(plan: Plan, trial: Trial) -> torch.Tensor:
    folder = Path(plan.storage.path(f"trials/{trial.trial_id}/checkpoint"))
    return flat(folder / "model.safetensors")


def flat(file: Path) -> torch.Tensor:
    tensors = load_file(file)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def expected(theta: torch.Tensor, full: torch.Tensor) -> list[dict[str, object]]:
    base = flat(TINY / "model.safetensors")
    rows = []
    changed = base.view(torch.int16) != full.view(torch.int16)
    for scope, kept in (("all", torch.ones_like(changed)), ("changed", changed)):
        row: dict[str, object] = {"scope": scope, "num_elements": int(kept.sum())}
        for key, side in (("", theta), ("base_", base)):
            delta = (side[kept].double() - full[kept].double()).abs()
            same = side[kept].view(torch.int16) == full[kept].view(torch.int16)
            row[f"num_{key}equal_bitwise"] = int(same.sum())
            row[f"num_{key}equal_abs_1e-05"] = int((delta <= 1e-5).sum())
            row[f"num_{key}equal_abs_1e-04"] = int((delta <= 1e-4).sum())
            name = "update" if key else "difference"
            row[f"sum_sq_{name}"] = pytest.approx(float(delta.square().sum()), rel=1e-12, abs=0)
        rows.append(row)
    return rows


def test_counts_are_those_of_full_checkpoints(plan: Plan) -> None:
    items = agreement.pending(plan)
    assert len(items) == 2 + 1 + 2
    agreement.run(plan, items)
    by_id = {trial.trial_id: trial for trial in plan.trials}
    relations = []
    for trial in plan.trials:
        rows = read_table(plan.storage, "agreement", trial.trial_id).to_pylist()
        (reference,) = {row.pop("reference") for row in rows}
        assert {row.pop("trial_id") for row in rows} == {trial.trial_id}
        (relation,) = {row.pop("relation") for row in rows}
        relations.append((trial.label, by_id[reference].label, relation))
        assert rows == expected(weights(plan, trial), weights(plan, by_id[reference]))
        every, inside = rows
        if relation == "rerun":
            assert every["sum_sq_difference"] == 0
        else:
            assert 0 < inside["num_equal_bitwise"] < inside["num_elements"]
        if relation == "subnetwork":  # outside the mask neither moved
            outside = [every[k] - inside[k] for k in ("num_equal_bitwise", "num_elements")]
            assert outside[0] == outside[1]
    full, masked = ([f"sft s{seed} mask={label}" for seed in (0, 1)]
                    for label in ("null", "final(cell)"))  # fmt: skip
    assert set(relations) == {
        (masked[0], full[0], "subnetwork"),
        (masked[1], full[1], "subnetwork"),
        (full[0], full[1], "other seed"),
        (full[1], full[0], "other seed"),
        (f"{full[0]} same_seed", full[0], "rerun"),
    }


def test_parts_are_kept_and_the_rest_concludes_anew(plan: Plan) -> None:
    agreement.run(plan, agreement.pending(plan))
    assert agreement.pending(plan) == []
    ids = {trial.trial_id for trial in plan.trials}
    found = aggregate._optional(plan.storage, ids)
    assert found.keys() == {"agreement"}
    assert set(found["agreement"]["trial_id"].to_pylist()) == ids
    for stage in ("aggregate", "mlflow"):
        plan.storage.write_json(f"stages/{stage}.json", "digest")
    agreement.drop_stale(plan)
    assert plan.storage.exists("stages/aggregate.json"), "nothing was stale"

    trial = plan.trials[0].trial_id
    before = plan.storage.read_bytes(table_file("agreement", trial))
    plan.storage.delete(table_file("agreement", trial))
    (item,) = agreement.pending(plan)
    assert item["part"] == trial
    agreement.run(plan, [item])
    assert plan.storage.read_bytes(table_file("agreement", trial)) == before
    assert not plan.storage.exists("stages/aggregate.json")
    assert not plan.storage.exists("stages/mlflow.json")

    plan.storage.write_json(f"stages/agreement/{trial}.json", {**item, "sha256": ["e", "f"]})
    assert [again["part"] for again in agreement.pending(plan)] == [trial]


def test_unfinished_trials_and_studies_without_masks_have_no_pairs(plan: Plan) -> None:
    agreement.run(plan, agreement.pending(plan))
    failed = plan.trials[0]
    plan.ledger.fail(failed.trial_id, "it broke")
    agreement.drop_stale(plan)
    ids = {trial.trial_id for trial in plan.trials}
    kept = {name.removesuffix(".parquet") for name in plan.storage.list(table_file("agreement"))}
    assert failed.config.train.mask is None
    assert kept == {t.trial_id for t in plan.trials if t.config.seed == 1 and t.needs}
    assert kept < ids
    unmasked = [trial for trial in plan.trials if trial.config.train.mask is None]
    without = dataclasses.replace(plan, trials=tuple(unmasked))
    plan.storage.write_json("stages/aggregate.json", "digest")
    assert agreement.pending(without) == []
    agreement.drop_stale(without)
    assert plan.storage.list(table_file("agreement")) == []
    assert not plan.storage.exists("stages/aggregate.json")
    assert aggregate._optional(plan.storage, ids) == {}


@pytest.mark.parametrize("side", [0, 1])
def test_a_damaged_patch_is_one_line_that_names_its_trial(plan: Plan, side: int) -> None:
    masked = next(trial for trial in plan.trials if trial.config.train.mask is not None)
    (item,) = (one for one in agreement.pending(plan) if one["part"] == masked.trial_id)
    damaged = item["trials"][side]
    patch = Path(plan.storage.path(f"trials/{damaged}/{snapshot_folder(2)}/{PATCH_FILE}"))
    content = bytearray(patch.read_bytes())
    content[-1] ^= 1
    patch.write_bytes(content)
    with pytest.raises(PatchError) as caught:
        agreement.run(plan, [item])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"trial {damaged}: ")
    assert line.endswith(f"; delete {plan.storage.url}/trials/{damaged} and run again")
    assert not plan.storage.exists(table_file("agreement", masked.trial_id))
    assert agreement.pending(plan)
