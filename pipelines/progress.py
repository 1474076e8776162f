"""What a person sees while trials run: a live view on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.ledger import Ledger
from rlsparse.study import Trial


class Progress:
    """Listener of a sweep that shows trials done, running and failed, their reward, and an ETA.

    Args:
        trials: the trials that will run.
        num_done: trials of the study that were done before.
        ledger: says how a trial ended.
        console: where to; standard error by convention.
        num_slots: trials that run at the same time, for the ETA.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        *,
        num_done: int,
        ledger: Ledger,
        console: Console,
        num_slots: int,
    ) -> None:
        self.trials = {trial.trial_id: trial for trial in trials}
        self.num_done = num_done
        self.running: dict[str, dict[str, Any]] = {}
        self.ended_ids: dict[str, str] = {}
        self._total = num_done + len(trials)
        self._ledger = ledger
        self._console = console
        self._num_slots = num_slots
        self._began: dict[str, float] = {}
        self._durations: list[float] = []
        self._live = (
            Live(self._view(), console=console, refresh_per_second=2, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> "Progress":
        """Begin to show."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the live view away."""
        if self._live:
            self._live.stop()

    @property
    def num_failed(self) -> int:
        """Trials that failed in this run."""
        return sum(status == "failed" for status in self.ended_ids.values())

    def started(self, trial_id: str) -> None:
        """A worker begins a trial, or begins it again."""
        self.running[trial_id] = {}
        self._began[trial_id] = time.monotonic()
        self._refresh()

    def stepped(self, trial_id: str, row: dict[str, Any]) -> None:
        """A trial made a step."""
        self.running[trial_id] = row
        self._refresh()

    def retried(self, trial_id: str, attempt: int, reason: str) -> None:
        """A trial's worker died or raised; it will run again."""
        self.running.pop(trial_id, None)
        text = f"attempt {attempt} of {self.trials[trial_id].label} ({trial_id}) ended: {reason}"
        self._say(f"{text}; trying again")

    def noted(self, trial_id: str, text: str) -> None:
        """A trial's worker has something to tell."""
        self._say(f"{self.trials[trial_id].label} ({trial_id}): {text}")

    def ended(self, trial_id: str) -> None:
        """A trial finished or failed."""
        self.running.pop(trial_id, None)
        entry = self._ledger.get(trial_id)
        self.ended_ids[trial_id] = entry.status
        seconds = time.monotonic() - self._began.get(trial_id, time.monotonic())
        self._durations.append(seconds)
        done = self.num_done + len(self.ended_ids)
        label = self.trials[trial_id].label
        text = f"[{done}/{self._total}] {entry.status} {label} ({trial_id}) in {seconds:.0f} s"
        if entry.error:
            text += f": {entry.error}"
        self._say(f"{text}, {self._eta()}")
        self._refresh()

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _eta(self) -> str:
        left = len(self.trials) - len(self.ended_ids)
        if not self._durations or not left:
            return "nothing left" if not left else f"{left} left"
        seconds = sum(self._durations) / len(self._durations) * left / self._num_slots
        return f"{left} left, about {seconds:.0f} s"

    def _view(self) -> Table:
        finished = self.num_done + len(self.ended_ids) - self.num_failed
        table = Table(
            title=f"{finished} done, {len(self.running)} running, {self.num_failed} failed, "
            f"{self._eta()}",
            title_justify="left",
            min_width=72,
        )
        for column in ("trial", "step", "loss", "reward", "score"):
            table.add_column(column, justify="left" if column == "trial" else "right")
        for name, row in self.running.items():
            trial = self.trials[name]
            table.add_row(
                trial.label,
                f"{row.get('step', 0)}/{trial.config.train.num_steps}",
                *(_number(row.get(key)) for key in ("loss", "reward", "score")),
            )
        return table

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self._view())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
