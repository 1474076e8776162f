"""The command ``rlsparse`` in processes that a test can find and end, and the studies it ran."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines.plan import Plan, make_plan
from rlsparse.study import Trial
from rlsparse.study_file import load_study


@dataclass
class Command:
    """The command ``rlsparse`` in processes of its own, which can all be found and ended."""

    cwd: Path
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    ray_folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rls")))

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
        self.temporary.mkdir(exist_ok=True)
        ours = {
            "RLSPARSE_TEST": self.tag,
            "TMPDIR": str(self.temporary),
            "RAY_TMPDIR": str(self.ray_folder),  # apart, because paths of sockets must be short
        }
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.cwd,
            env={**clean, **ours, "OMP_NUM_THREADS": "1", **environment},
            # A test run in the background of a shell hands on that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        try:
            out, err = process.communicate(timeout=500)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def temporary(self) -> Path:
        """Where these processes keep temporary files."""
        return self.cwd / "tmp"

    @property
    def ray_has_run(self) -> bool:
        return any(self.ray_folder.iterdir())

    def processes(self) -> list[psutil.Process]:
        """All living processes that descend from our commands, orphans too."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and process.environ().get("RLSPARSE_TEST") == self.tag
        except psutil.Error:
            return False

    def close(self) -> None:
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.ray_folder, ignore_errors=True)


@dataclass(frozen=True)
class StudyRun:
    """A study that the command has run: what it printed, and what it left."""

    yaml: Path
    storage: Path
    plan: Plan
    result: subprocess.CompletedProcess[str]
    command: Command

    @property
    def folder(self) -> Path:
        return self.storage / self.plan.study.name

    def trial(self, label: str) -> Trial:
        (found,) = [trial for trial in self.plan.trials if trial.label == label]
        return found

    def trial_folder(self, label: str) -> Path:
        return self.folder / "trials" / self.trial(label).trial_id


def run_study(command: Command, text: str, *arguments: str) -> StudyRun:
    """Write a study file into the command's folder and run it."""
    yaml, storage = command.cwd / "study.yaml", command.cwd / "runs"
    yaml.write_text(text)
    result = command.run("run", yaml, "--storage", storage, *arguments)
    return StudyRun(yaml, storage, make_plan(load_study(yaml), str(storage)), result, command)


def wait_until(condition: Callable[[], object], timeout_s: float) -> None:
    """Poll until ``condition`` holds; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not hold within {timeout_s} s"
        time.sleep(0.05)
