"""A trial of two workers goes on from a save of both to the bits of one that nothing disturbed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Base
from shelf import NUM_STEPS, PROBE, Shelf, assert_same_files, assert_went_on, cut, save_and_go_on
from together import in_turn, kill_and_go_on, run_together, run_whole

from pipelines.plan import Plan, make_plan
from pipelines.sweep import _spec
from rlsparse.study import Study

CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("ddp", "grpo"): {"precision": "bf16-mixed", "algorithm": {"reward": "random"}},
    ("ddp", "ppo"): {"precision": "bf16-weights"},
    ("fsdp", "sft"): {
        "precision": "bf16",
        "lr_schedule": "cosine",
        "warmup_steps": 4,
        "probe": {"step_patches": False},  # of which each worker has a part
    },
}
"""What each worker draws for itself, a model beside the policy, and parts of all."""


def make_one(storage: Path, save_interval_s: float | None) -> Plan:
    config = cut("sft", precision="fp32").model_dump(mode="json", include={"task", "train"})
    fields = {
        "name": "s",
        "question": "?",
        "seeds": [0],
        "baseline": {"algorithm": {"name": "sft"}, "probe": PROBE, **config},
        "resources": {"num_workers": 2, "save_interval_s": save_interval_s},
    }
    return make_plan(Study.model_validate(fields), str(storage))


def folder_of(plan: Plan) -> Path:
    return Path(plan.storage.path(f"trials/{plan.trials[0].trial_id}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def plans(folder: Path) -> dict[str, Plan]:
    return {
        "killed": make_one(folder / "killed", save_interval_s=0),
        "whole": make_one(folder / "whole", save_interval_s=None),
    }


@pytest.fixture(scope="module")
def together(base: Base, folder: Path, plans: dict[str, Plan]) -> dict[tuple[str, str], Shelf]:
    killed, whole = (_spec(plans[name], plans[name].trials[0]) for name in ("killed", "whole"))
    calls: list[Any] = [(kill_and_go_on, (killed, folder)), (run_whole, (whole,))]
    shelves = {}
    for (strategy, name), regime in CASES.items():
        shelves[strategy, name] = shelf = Shelf(folder / f"{strategy}-{name}")
        calls.append((save_and_go_on, (cut(name, **regime), base, shelf, [3], strategy)))
    run_together(in_turn, calls)
    return shelves


@pytest.mark.parametrize("trial", CASES)
def test_two_workers_go_on_to_the_same_bits(trial: Any, together: dict[Any, Shelf]) -> None:
    assert_went_on(together[trial], 3)


def test_each_worker_keeps_its_own_part(together: dict[Any, Shelf]) -> None:
    """Under FSDP its half of the weights; under DDP all, and what it draws for itself."""
    states: dict[str, list[dict[str, Any]]] = {}
    for strategy, name in (("ddp", "grpo"), ("fsdp", "sft")):
        save = together[strategy, name].save(3)
        found = [save / f"worker-{rank}" / "rlsparse.pt" for rank in range(2)]
        states[strategy] = [torch.load(path, weights_only=False) for path in found]
    sizes = {k: [sum(w.numel() for w in s["model"].values()) for s in v] for k, v in states.items()}
    assert sizes["ddp"][0] == sizes["ddp"][1] == sum(sizes["fsdp"])
    assert max(sizes["fsdp"]) < 0.6 * sum(sizes["fsdp"])
    drawn = [state["trl"]["_buffered_inputs"][0]["completion_ids"] for state in states["ddp"]]
    assert drawn[0].shape != drawn[1].shape or not torch.equal(*drawn)


def test_all_workers_use_the_newest_save_that_is_whole_on_each(
    together: object, folder: Path, plans: dict[str, Plan]
) -> None:
    """All report alike, or Ray Train would wait for ever; nothing is left of the saves."""

    def said(row: dict[str, Any]) -> object:
        return row.get("note") or row.get("step")

    mine, theirs = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    for one, other in zip(mine, theirs, strict=True):
        assert list(map(said, one)) == list(map(said, other))
    one, failed, *others = map(said, mine[0])
    assert [one, *others] == [1, 2, 3, 4]
    assert str(failed).startswith("step 1 could not be saved (cannot write: No space left")
    refused, *others = map(said, mine[1])
    assert re.match(
        r"the save after step 3 is not used: .*worker-1/rlsparse\.pt is damaged", str(refused)
    )
    assert others == ["goes on from step 2", 3, 4, NUM_STEPS]
    assert plans["killed"].storage.list("saves") == []


def test_a_trial_of_a_study_goes_on_to_the_same_bits(
    together: object, plans: dict[str, Plan]
) -> None:
    assert_same_files(folder_of(plans["killed"]), folder_of(plans["whole"]))
