"""One small study, run once by the real command; most tests of the pipeline look at its files."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from command import Command, StudyRun, run_study
from typer.testing import CliRunner

from pipelines import cli, parts
from pipelines.plan import make_plan
from rlsparse.errors import PatchError

E2E = """
question: Does every stage of the pipeline work?
baseline:
  task: {num_train_problems: 64, num_eval_problems: 32}
  algorithm: {name: grpo}
  train: {num_steps: 2, batch_size: 16, learning_rate: 1.0e-5}
  probe: {snapshots: [1]}
  keep_checkpoints: true
factors:
  algorithm.name: [grpo, dpo, sft]
seeds: [0, 1]
controls: [lr_zero, same_seed]
claims:
  - {id: lr-zero-changes-nothing, kind: exact, where: {control: lr_zero}, value: 1.0}
  - {id: same-seed-is-bit-identical, kind: exact, response: identical_replicates, value: 1.0}
"""


@pytest.fixture
def invoke() -> Callable[..., str]:
    """Runs ``rlsparse`` with arguments in this process; gives what it printed."""

    def call(*arguments: object) -> str:
        result = CliRunner().invoke(cli.app, [*map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


@pytest.fixture(scope="session")
def study_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyRun]:
    """The end-to-end study. Read only: a test that changes files does so in a copy."""
    command = Command(tmp_path_factory.mktemp("e2e"))
    try:
        run = run_study(command, E2E)
        assert run.result.returncode == 0, run.result.stderr
        yield run
    finally:
        command.close()


@pytest.fixture
def study_copy(study_run: StudyRun, tmp_path: Path) -> StudyRun:
    """The end-to-end study in a place of its own, to break."""
    storage = tmp_path / "runs"
    shutil.copytree(study_run.storage, storage)
    plan = make_plan(study_run.plan.study, str(storage))
    return StudyRun(study_run.yaml, storage, plan, study_run.result, study_run.command)


@pytest.fixture
def tasks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that make parts of tables run in this process, without Ray."""

    def run(measure: object, items: Sequence[parts.Item]) -> None:
        errors = [parts._try_measure(item, measure)["error"] for item in items]  # type: ignore[arg-type]
        if any(errors):
            raise PatchError("\n".join(filter(None, errors)))

    monkeypatch.setattr(parts, "run", run)
