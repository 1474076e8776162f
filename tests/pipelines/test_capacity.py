"""A trial that fits nowhere is refused before anything trains; others share the memory."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from rich.console import Console

from pipelines import capacity, study
from pipelines.capacity import (
    Capacity,
    admit,
    check_engines,
    host_bytes,
    host_memory,
    memory_of,
    misfit,
)
from pipelines.dry_run import print_dry_run
from pipelines.plan import Plan, make_plan, wall_seconds
from pipelines.session import ENVIRONMENT
from pipelines.sweep import num_slots, run_trials
from rlsparse.costs import GPU_HOST_BYTES
from rlsparse.errors import ConfigError
from rlsparse.study import Study

GB = 10**9


def plan_of(
    folder: Path,
    resources: dict[str, Any] | None = None,
    factors: dict[str, Any] | None = None,
    **baseline: Any,
) -> Plan:
    fields = {
        "name": "s",
        "question": "?",
        "baseline": {
            "algorithm": {"name": "sft"},
            "task": {"num_train_problems": 8, "num_eval_problems": 8},
            "train": {"num_steps": 1, "batch_size": 8},
            **baseline,
        },
        "seeds": [0, 1],
        "resources": resources or {},
        "factors": factors or {},
    }
    return make_plan(Study.model_validate(fields), str(folder))


@pytest.mark.parametrize(
    ("folder", "limit", "usage"),
    [
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_a_container_has_what_its_limit_leaves(
    folder: str, limit: str, usage: str, tmp_path: Path
) -> None:
    free = psutil.virtual_memory().available
    assert host_memory(tmp_path) == pytest.approx(free - GB, rel=0.5)  # there is no limit
    place = tmp_path / folder
    place.mkdir(parents=True)
    (place / limit).write_text("1900000000\n")
    (place / usage).write_text("800000000\n")
    (place / "memory.stat").write_text("anon 500000000\ninactive_file 200000000\n")
    assert host_memory(tmp_path) == 300_000_000  # a GB is for the driver and Ray
    (place / usage).write_text("1900000000\n")
    assert host_memory(tmp_path) == 0
    if limit == "memory.max":
        (place / limit).write_text("max\n")
        assert host_memory(tmp_path) > 0


def test_what_does_not_fit_is_told_with_parts_and_remedy(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, train={"num_steps": 1, "batch_size": 4096})
    trial = plan.trials[0]
    needed = memory_of(plan, trial).peak_bytes
    assert misfit(plan, plan.trials, Capacity((needed,))) is None
    said = misfit(plan, plan.trials, Capacity((needed - 1,)))
    assert said is not None
    assert said.startswith(f"trial {trial.label} ({trial.trial_id}) would take about ")
    assert "activations " in said
    assert "raise train.gradient_accumulation_steps" in said
    assert len(said.splitlines()) == 1


def test_a_trial_on_a_gpu_must_fit_its_share(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"gpus_per_worker": 0.5})
    needed = memory_of(plan, plan.trials[0]).peak_bytes
    assert needed < 0.2 * GB  # of the device, not of the process
    assert misfit(plan, plan.trials, Capacity((0,), None)) is None  # not known
    assert misfit(plan, plan.trials, Capacity((0,), 2 * needed)) is None
    assert "its share (0.5) of a GPU" in str(misfit(plan, plan.trials, Capacity((0,), needed)))
    assert host_bytes(plan, plan.trials) == GPU_HOST_BYTES + 4 * 856_192


def test_all_workers_of_a_trial_must_find_a_place(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"num_workers": 3}, train={"num_steps": 1, "batch_size": 9})
    needed = memory_of(plan, plan.trials[0]).peak_bytes
    assert misfit(plan, plan.trials, Capacity((needed, 2 * needed))) is None
    said = misfit(plan, plan.trials, Capacity((needed, 2 * needed - 1)))
    assert said is not None
    assert "of memory in each of its 3 workers at its largest" in said


def test_the_dry_run_says_what_a_trial_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path)
    monkeypatch.setattr(capacity, "here", lambda: Capacity((2 * GB,), num_cpus=8))
    print_dry_run(plan)
    said = capsys.readouterr().out
    needed = memory_of(plan, plan.trials[0]).peak_bytes
    assert f"a trial takes up to {needed / GB:.2f} GB of memory by estimate" in said
    assert f"2.0 GB are free here: {2 * GB // needed} trials at once" in said
    assert "fit" not in said
    monkeypatch.setattr(capacity, "here", lambda: Capacity((GB // 2,)))
    print_dry_run(plan)
    said = capsys.readouterr().out
    assert "at once" not in said
    assert "does not fit here: trial sft s0" in said
    assert "or run with --allow-oversize" in said


def test_the_dry_run_counts_cells_trials_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(
        tmp_path,
        {"num_threads": 2, "num_workers": 2},
        {"algorithm.name": ["sft", "dpo"], "algorithm.beta": [0.1, 0.2]},
        task={"num_train_problems": 64, "num_eval_problems": 8},
        train={"num_steps": 3, "batch_size": 64, "precision": "fp32"},
        probe={"snapshots": [1], "step_masks": True},
    )
    monkeypatch.setattr(capacity, "here", lambda: Capacity((64 * GB,), num_cpus=8))
    plan.ledger.finish(plan.trials[3].trial_id)
    print_dry_run(plan)
    said = capsys.readouterr().out
    peaks = [f"{memory_of(plan, trial).peak_bytes / GB:.2f} GB" for trial in plan.trials]
    assert peaks[0] < peaks[2]
    for peak, *seeds in zip(peaks[::2], plan.trials[::2], plan.trials[1::2], strict=True):
        levels = ", ".join(f"{path}={level}" for path, level in seeds[0].cell.items())
        ids = " ".join(trial.trial_id for trial in seeds)
        assert f"  2 x {levels} ({peak}): {ids}\n" in said
    assert f"a trial takes up to {max(peaks)} of memory by estimate" in said
    assert "algorithm.beta does not exist for sft: those cells are one" in said
    num_weights = plan.base(plan.trials[0]).num_weights
    patches, masks = 6 * 2 * 4 * num_weights, 6 * 3 * num_weights / 8
    assert (
        f"3 cells, 6 trials (1 done), about {wall_seconds(plan, 2) / 60:.1f} min on the "
        f"{os.cpu_count()} cores of this machine, at most {patches / 1e6:.1f} MB of patches and "
        f"{masks / 1e6:.1f} MB of step masks; measuring takes "
        f"{(4 + 1 / 8) * num_weights / 1e6:.1f} MB of memory in a trial\n"
    ) in said
    assert said.endswith("64.0 GB are free here: 2 trials at once\n")


def test_the_dry_run_knows_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path, {"gpus_per_worker": 0.5})
    monkeypatch.setattr(capacity, "here", lambda: Capacity((64 * GB,), None, 8, 0))
    print_dry_run(plan)
    said = capsys.readouterr().out
    assert "for a time that is not estimated for GPUs, on this machine" in said
    assert "does not fit here: a trial takes 0.5 GPUs (resources.gpus_per_worker 0.5" in said
    assert "and there are 0;" in said
    assert "at once" not in said
    monkeypatch.setattr(capacity, "here", lambda: Capacity((64 * GB,), 80 * GB, 8, 3))
    print_dry_run(plan)
    assert "80.0 GB are free here: 6 trials at once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"num_threads": 64}, "a trial takes 64 cores (resources.num_threads 64 x num_workers 1)"),
        ({"gpus_per_worker": 1}, "a trial takes 1 GPUs"),
        ({"num_workers": 2, "gpus_per_worker": 1}, "a trial takes 2 GPUs"),
    ],
)
def test_what_no_machine_has_is_refused_and_not_waited_for(
    resources: dict[str, Any], said: str, session: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With an address it is waited for: an autoscaler may add machines."""
    plan = plan_of(tmp_path / "runs", resources)
    monkeypatch.setattr(study.RaySession, "start", lambda self: None)
    with pytest.raises(ConfigError, match=re.escape(said)):
        study.run_study(plan, console=Console(file=io.StringIO()))
    assert not plan.storage.exists("study.json")
    monkeypatch.setattr(study, "_sweep", lambda *_: None)
    output = io.StringIO()
    study.run_study(plan, console=Console(file=output), only="", address="auto")
    assert f"waiting for more machines to join: {said}" in output.getvalue()


VLLM = {"name": "grpo", "generation": {"engine": "vllm"}}


def test_vllm_needs_a_gpu_and_to_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_engines(plan_of(tmp_path))
    with pytest.raises(
        ConfigError, match=r"is vllm, which needs a GPU, but .*gpus_per_worker is 0"
    ):
        check_engines(plan_of(tmp_path, algorithm=VLLM))
    plan = plan_of(tmp_path, {"gpus_per_worker": 1}, algorithm=VLLM)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed; `pip install"):
        check_engines(plan)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_engines(plan)


def test_vllm_takes_its_part_of_the_gpu(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"gpus_per_worker": 1}, algorithm=VLLM)
    needed = memory_of(plan, plan.trials[0]).peak_bytes
    assert misfit(plan, plan.trials, Capacity((0,), int(needed / 0.69))) is None
    assert "its share (0.7) of a GPU" in str(
        misfit(plan, plan.trials, Capacity((0,), int(needed / 0.71)))
    )


class Concurrency:
    """Listener that counts the trials that run at the same time."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.most = 0

    def started(self, trial_id: str) -> None:
        self.running.add(trial_id)
        self.most = max(self.most, len(self.running))

    def stepped(self, trial_id: str, row: dict[str, Any]) -> None: ...

    def retried(self, trial_id: str, attempt: int, reason: str) -> None: ...

    def ended(self, trial_id: str) -> None:
        self.running.remove(trial_id)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """Ray with two cores and memory for one and a half times 2 GB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray sets it, for all later tests
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(
            address="local", num_cpus=2, _memory=3 * GB, include_dashboard=False,
            log_to_driver=False, logging_level="critical",
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.mark.parametrize(("memory_bytes", "most"), [(2 * GB, 1), (GB, 2)])
def test_trials_share_the_memory_of_a_machine(
    memory_bytes: int, most: int, session: None, tmp_path: Path
) -> None:
    plan, listener = plan_of(tmp_path), Concurrency()
    assert num_slots(plan.study.resources, memory_bytes) == most
    run_trials(plan, plan.trials, listener, memory_bytes)
    assert len(plan.finished()) == 2
    assert listener.most == most
    workers = {entry.pid for entry in plan.entries().values()}
    assert len(workers) == most  # one that waits gets the worker of the one before


def test_what_fits_nowhere_is_refused_before_anything_is_written(
    session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path / "runs", train={"num_steps": 1, "batch_size": 8192})
    monkeypatch.setattr(study.RaySession, "start", lambda self: None)
    with pytest.raises(ConfigError, match=r"machines have 3\.00 GB; .*--allow-oversize"):
        study.run_study(plan, console=Console(file=io.StringIO()))
    assert not plan.storage.exists("study.json")
    assert not plan.storage.list("ledger")
    # What is allowed all the same reserves no more than there is, else it would wait for ever.
    machines = capacity.of_session()
    assert (machines.num_cpus, machines.num_gpus) == (2, 0)
    assert admit(plan, plan.trials, machines, allow_oversize=True) == 3 * GB
    small = plan_of(tmp_path / "runs")
    needed = memory_of(small, small.trials[0]).peak_bytes
    assert admit(small, small.trials, machines, allow_oversize=False) == needed
