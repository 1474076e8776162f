"""Trials trained by several worker processes, without Ray: one process group for many trials."""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from rlsparse.config import TrialConfig
from rlsparse.errors import RlsparseError


@dataclass(frozen=True)
class Job:
    """A trial, and how its workers train it."""

    config: TrialConfig
    folder: Path
    """Worker r leaves its files in ``worker-r``, and its weights there, too, by name."""
    strategy: str = "ddp"

    def of(self, rank: int) -> Path:
        return self.folder / f"worker-{rank}"

    def weights(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """Weights that a worker ended with, put together if they were split."""
        return torch.load(self.of(rank) / "weights.pt")

    def progress(self, rank: int = 0) -> list[dict[str, Any]]:
        return json.loads((self.of(rank) / "progress.json").read_text())

    def error(self, rank: int = 0) -> str:
        return (self.of(rank) / "error.txt").read_text()


def train_together(jobs: list[Job], base: Any, num_workers: int = 2) -> None:
    """Train each of ``jobs``, one after the other, by processes that stay for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_worker, (num_workers, port, jobs, base), num_workers)


def _worker(rank: int, num_workers: int, port: int, jobs: list[Job], base: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    distributed.init_process_group("gloo")
    for job in jobs:
        job.of(rank).mkdir(parents=True)
        try:
            _train(job, rank, base)
        except RlsparseError as error:
            (job.of(rank) / "error.txt").write_text(f"{type(error).__name__}: {error}")
    distributed.destroy_process_group()


def _train(job: Job, rank: int, base: Any) -> None:
    from rlsparse import train
    from rlsparse.sharded import split

    contexts, load = [], train._load

    def keeping(*args: Any, **kwargs: Any) -> Any:
        contexts.append(load(*args, **kwargs))
        return contexts[-1]

    train._load = keeping
    progress: list[dict[str, Any]] = []
    try:
        train.train_trial(
            job.config,
            trial_id="0123456789ab",
            base_dir=base.path,
            base_fingerprint=base.fingerprint,
            out_dir=job.of(rank),
            strategy=job.strategy,
            on_progress=progress.append,
        )
    finally:
        train._load = load
    (job.of(rank) / "progress.json").write_text(json.dumps(progress))
    split(contexts[0].model)
    whole = {name: _whole(w) for name, w in contexts[0].model.named_parameters()}
    torch.save(whole, job.of(rank) / "weights.pt")


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
