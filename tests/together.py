"""Several worker processes without Ray: one process group, in which trials are trained."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed, multiprocessing

from rlsparse.config import TrialConfig


def run_together(function: Callable[..., None], *arguments: Any, num_workers: int = 2) -> None:
    """Call ``function(rank, *arguments)`` in processes of their own; one that raises fails all.

    The function must be one of this module: pytest's own cannot be imported elsewhere.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_enter, (num_workers, port, function, arguments), num_workers)


def _enter(rank: int, num_workers: int, port: int, function: Any, arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    function(rank, *arguments)
    distributed.destroy_process_group()


def in_turn(rank: int, calls: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """Call several functions, with their arguments; to be run together."""
    for function, arguments in calls:
        function(rank, *arguments)


# --- trials ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A trial, how its workers train it, and what they left."""

    config: TrialConfig
    folder: Path
    strategy: str = "ddp"
    mask_file: Path | None = None

    def of(self, rank: int) -> Path:
        """Folder of a worker's files."""
        return self.folder / f"worker-{rank}"

    def weights(self, rank: int = 0) -> list[dict[str, torch.Tensor]]:
        """Whole weights before the first step and after each, as a worker has them."""
        return torch.load(self.of(rank) / "weights.pt")

    def companion(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """Weights that PPO's critic or PRIME's reward model ended with."""
        return torch.load(self.of(rank) / "companion.pt")

    def progress(self, rank: int = 0) -> list[dict[str, Any]]:
        return json.loads((self.of(rank) / "progress.json").read_text())


def train_all(rank: int, jobs: list[Job], base: Any) -> None:
    """Train ``jobs``, one after the other; to be run together."""
    for job in jobs:
        train(job, base, rank)


def train(job: Job, base: Any, rank: int = 0) -> None:
    """Train a trial in this process, alone or with others, and keep what ``Job`` reads."""
    from transformers import TrainerCallback

    from rlsparse.algorithms import ALGORITHMS, rollouts
    from rlsparse.sharded import is_sharded
    from rlsparse.subnetwork import load_mask
    from rlsparse.train import train_trial

    build, original = ALGORITHMS[job.config.algorithm.name], rollouts.Companion
    weights: list[dict[str, torch.Tensor]] = []
    companions: list[Any] = []
    progress: list[dict[str, Any]] = []

    class Keep(TrainerCallback):
        def __init__(self, model: Any) -> None:
            self.model = model

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            weights.append(whole_weights(self.model))

        on_step_end = on_train_begin

    def building(context: Any) -> Any:
        trainer = build(context)
        trainer.add_callback(Keep(context.model))
        if (reference := getattr(trainer, "ref_model", None)) is not None:
            assert is_sharded(reference) == is_sharded(context.model)
        return trainer

    def companion(*given: Any) -> Any:
        companions.append(original(*given))
        return companions[-1]

    ALGORITHMS[job.config.algorithm.name], rollouts.Companion = building, companion
    try:
        train_trial(
            job.config,
            trial_id="0123456789ab",
            base_dir=base.path,
            base_fingerprint=base.fingerprint,
            out_dir=job.of(rank),
            strategy=job.strategy,
            mask=None if job.mask_file is None else load_mask(job.mask_file),
            on_progress=progress.append,
        )
    finally:
        ALGORITHMS[job.config.algorithm.name], rollouts.Companion = build, original
    (job.of(rank) / "progress.json").write_text(json.dumps(progress))
    torch.save(weights, job.of(rank) / "weights.pt")
    for one in companions:
        torch.save(one.model.state_dict(), job.of(rank) / "companion.pt")


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights, gathered by torch where they are in parts."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {
        name: (w.full_tensor() if hasattr(w, "full_tensor") else w).detach().clone()
        for name, w in model.named_parameters()
    }


class Killed(BaseException):
    """Ends a worker in the midst of a step."""


def kill_and_go_on(rank: int, spec: dict[str, Any], out: Path) -> None:
    """Both workers end after step 4 of a trial of a study, and begin it again.

    The second one's first save fails, and its third is damaged; what was reported is kept.
    """
    from pipelines.storage import Storage
    from pipelines.sweep import run_trial
    from rlsparse.errors import StorageError

    reports: list[list[dict[str, Any]]] = [[], []]
    put = Storage.put

    def put_or_fail(storage: Storage, file: Path, name: str) -> None:
        if rank == 1 and "step-000001" in name:
            raise StorageError("cannot write: No space left on device")
        put(storage, file, name)

    def die(row: dict[str, Any]) -> None:
        reports[0].append(row)
        if row.get("step") == 4:
            raise Killed

    with (
        patch.object(Storage, "put", put_or_fail),
        patch.object(Storage, "delete_folder"),  # so that there is more than one save
        suppress(Killed),
    ):
        run_trial(spec, die)
    if rank == 1:
        storage, name = Storage(spec["storage"]), f"saves/{spec['trial_id']}/step-000003/worker-1"
        content = bytearray(storage.read_bytes(f"{name}/rlsparse.pt"))
        content[len(content) // 2] ^= 1
        storage.write_bytes(f"{name}/rlsparse.pt", content)
    distributed.barrier()
    run_trial(spec, reports[1].append)
    (out / f"{rank}.json").write_text(json.dumps(reports))


def run_whole(rank: int, spec: dict[str, Any]) -> None:
    """Run a trial of a study that nothing disturbs."""
    from pipelines.sweep import run_trial

    run_trial(spec)


# --- other things that workers do together ---------------------------------------------------


def average_gradients(rank: int, out: Path) -> None:
    """Worker r has gradient r + 1 on one weight; on another, only the first has one."""
    from rlsparse.distributed import average_gradients, worker_seed

    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    weights[0].grad = torch.full((3,), rank + 1.0)
    if rank == 0:
        weights[1].grad = torch.ones(3)
    average_gradients(weights)
    found = [[*w.grad.tolist()] for w in weights]
    (out / f"{rank}.json").write_text(json.dumps({"gradients": found, "seed": worker_seed(7)}))


def whiten(rank: int, rows: list[tuple[torch.Tensor, torch.Tensor]], out: Path) -> None:
    """Each worker whitens its own completions."""
    from rlsparse.algorithms.ppo import whiten

    torch.save(whiten(*rows[rank]), out / f"{rank}.pt")


SHAPES = [(5, 7), (5,), (2, 5), (2,), (130, 3), (130,)]
"""Over three workers: parts that begin within a byte, and some without a row."""


class Odd(torch.nn.Module):
    """Weights of odd shapes, and what each step makes of them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.nn.ParameterList(torch.randn(s, generator=generator) for s in SHAPES)

    def at(self, step: int) -> list[torch.Tensor]:
        """The weights after a step: each changes a third of its elements, or sets them back."""
        generator = torch.Generator().manual_seed(1)
        now = start = [weight.detach().clone() for weight in Odd().weights]
        for number in range(step):
            touched = [torch.rand(s, generator=generator) < 0.3 for s in SHAPES]
            pairs = zip(touched, now, start, strict=True)
            now = [torch.where(t, s if number == 2 else n + 0.5, n) for t, n, s in pairs]
        return now


def observe(rank: int, num_steps: int, out: Path) -> None:
    """A sharded trajectory of ``Odd``, and what it says on each worker."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    from rlsparse.prices import Prices
    from rlsparse.sharded import ShardedTrajectory, spaced

    model, before = Odd(), [weight.detach().numpy().copy() for weight in Odd().weights]
    named = {f"weights.{i}": values.reshape(-1) for i, values in enumerate(before)}
    fully_shard(model)
    trajectory = ShardedTrajectory(
        model,
        torch.float32,
        (2,),
        Prices(),
        base=lambda name, a, b: named[name][a:b].copy().view("uint32"),
    )
    changes, masks_of = [], []
    for step in range(1, num_steps + 1):
        for weight, values in zip(model.parameters(), model.at(step), strict=True):
            part = distribute_tensor(values, weight.device_mesh, weight.placements)
            weight.detach().to_local().copy_(part.to_local())
        found: dict[str, Any] = {}
        changes.append(trajectory.advance(step, found.__setitem__))
        masks_of.append(found)
    kept = {
        "num_elements": trajectory.num_elements,
        "changes": [(c.num_changed, c.num_ever_changed) for c in changes],
        "masks": masks_of,
        "ever": dict(trajectory.ever_changed()),
        "stored": {name: (shape, bits) for name, shape, bits in trajectory.stored()},
        "spaced": spaced(model, 4),
        "trained": [(name, start, bits.copy()) for name, start, bits in trajectory.trained()],
        "totals": trajectory.totals([rank, 1]),
        "finite": [changes[-1].is_finite],
    }
    if rank == 2:
        next(iter(model.parameters())).detach().to_local().fill_(float("nan"))
    kept["finite"].append(trajectory.advance(num_steps + 1).is_finite)
    torch.save(kept, out / f"{rank}.pt")


def train_subnetwork(rank: int, mask_file: Path, batches: torch.Tensor, out: Path) -> None:
    """Train a subnetwork of the tiny base; each worker takes its share of the rows of a batch."""
    from rlsparse.models import TINY
    from rlsparse.models.loading import load_model
    from rlsparse.subnetwork import SubnetworkAdamW, load_mask

    workers = distributed.get_world_size() if distributed.is_initialized() else 1
    model = load_model(TINY, "fp32")
    optimizer = SubnetworkAdamW(model, load_mask(mask_file), lr=1e-3, max_grad_norm=0.5)
    for batch in batches:
        rows = batch.chunk(workers)[rank]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save((whole_weights(model), optimizer.last_grad_norm), out / f"{workers}-{rank}.pt")


def refuse_on_workers(rank: int, out: Path) -> None:
    """What each worker is told: of models wrapped, wrapped later, in parts, and of two masks."""
    import numpy as np
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from rlsparse.errors import RlsparseError
    from rlsparse.subnetwork import SubnetworkMask, SubnetworkSGD

    said = []
    model = torch.nn.Linear(4, 4, bias=False)

    def attempt(mask: int, trained: Any, wrapped: Any) -> None:
        bits = {"weight": ((4, 4), np.array([mask, 0], np.uint8))}
        try:
            optimizer = SubnetworkSGD(trained, SubnetworkMask(bits), lr=0.1)
            wrapped(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        except RlsparseError as error:
            said.append(str(error))

    attempt(3, DistributedDataParallel(model), model)
    attempt(3, model, DistributedDataParallel(model))
    parts = fully_shard(torch.nn.Linear(4, 4, bias=False))
    attempt(3, parts, parts)
    model.weight.grad = None
    attempt(3 + rank, model, model)
    (out / f"{rank}.txt").write_text("\n".join(said))


def send_parts(rank: int, out: Path) -> None:
    """Train the tiny base in parts, send versions 1 to 3, and keep what was served at each.

    One weight tensor is whole on both workers. Worker 1 has no room for its first attempt at
    version 2.
    """
    from synced import adam, bits_of, tiny, train_step
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    from rlsparse.errors import RlsparseError
    from rlsparse.weight_sync.writer import PatchWriter

    model = tiny()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model, ignored_params={model.model.norm.weight})
    optimizer, seen = adam(model), []
    writer = PatchWriter(model, out / "sync", anchor_every=2)

    def note() -> None:
        whole = whole_weights(model)
        seen.append({name: bits_of(weight.bfloat16()) for name, weight in whole.items()})

    note()
    for step in range(3):
        train_step(model, optimizer, step)
        if step == 1:
            failing = OSError(28, "No space left on device")
            with patch("os.replace", side_effect=failing) if rank else nullcontext():
                try:
                    writer.emit()
                except RlsparseError as error:
                    (out / f"said-{rank}.txt").write_text(str(error))
                    left = list((out / "sync").glob(f"version-000002.part-{rank + 1}*"))
                    assert not left
        writer.emit()
        note()
    if rank == 0:
        torch.save(seen, out / "seen.pt")
    columns = fully_shard(torch.nn.Linear(4, 4), shard_placement_fn=lambda w: Shard(w.ndim - 1))
    try:
        PatchWriter(columns, out / "columns")
    except RlsparseError as error:
        (out / "columns.txt").write_text(str(error))
