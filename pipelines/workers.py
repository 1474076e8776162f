"""One trial on several workers: a Ray Train worker group, started from inside its Tune trial.

The Tune trial is only the driver and occupies nothing; its workers, which begin anew for each
trial, occupy what the study's resources say. A group gets all of that at once or waits, so that
trials cannot block each other, and no more of them are started than fit.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines.ledger import Ledger
from pipelines.storage import Storage
from rlsparse.resources import Resources

Work = Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]
"""Runs a trial, given as its spec, in one worker, and reports what it does."""


def run_on_workers(work: Work, spec: dict[str, Any], report_interval_s: float) -> None:
    """Run ``work(spec, report)`` on every worker of a trial; to be called in a Tune trial.

    Args:
        work: runs in the process group of all workers. It notes our own errors in the ledger and
            returns; anything else that it raises, like a worker that dies, ends all workers.
        spec: plain data, with the trial's name, storage and ``resources``.
        report_interval_s: what the first worker reports is passed on this often.

    Raises:
        WorkerGroupError: a worker died, or raised; running the trial again may help.
    """
    resources = Resources.model_validate(spec["resources"])
    name, ledger = spec["trial_id"], Ledger(Storage(spec["storage"]))
    num_attempts = ledger.get(name).attempts

    def body() -> None:
        work(spec, ray.train.report)
        if ledger.get(name).status == "failed":
            raise RuntimeError("the trial failed; its other workers wait for this one no longer")

    with tempfile.TemporaryDirectory(prefix="rlsparse-train-") as folder:
        trainer = TorchTrainer(
            body,
            # Data on the host are exchanged as well as those on the devices.
            torch_config=TorchConfig("cpu:gloo,cuda:nccl" if resources.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=occupied(resources, spec["memory_bytes"]),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0),
                callbacks=[_Report(report_interval_s)],
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError:
            entry = ledger.get(name)
            if entry.status != "failed" or entry.attempts == num_attempts:
                raise


def occupied(resources: Resources, memory_bytes: int = 0) -> dict[str, float]:
    """What one worker occupies, in Ray's words, with so much memory of its machine."""
    wanted = {
        "CPU": resources.num_threads,
        "GPU": resources.gpus_per_worker,
        "memory": memory_bytes,
    }
    return {name: count for name, count in wanted.items() if count}


class _Report(TuneReportCallback):  # type: ignore[misc]
    """Passes the first worker's reports on to Tune, but not every step: each costs time there."""

    def __init__(self, interval_s: float) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._last = 0.0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        if "note" in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)
        elif time.monotonic() - self._last >= self._interval_s:
            self._last = time.monotonic()
            super().after_report(run_context, metrics, checkpoint)
