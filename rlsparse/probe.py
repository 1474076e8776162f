"""Measures a trial while it trains: snapshots as patches, scores, and what ever changed.

The probe only reads. A trial gives the same weights, bit for bit, whatever its snapshots are.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from rlsparse import masks
from rlsparse.config import OnlineConfig, TrialConfig
from rlsparse.errors import TrialError
from rlsparse.models.loading import TORCH_DTYPES
from rlsparse.patch import PATCH_FILE, TensorPair, write_patch
from rlsparse.tables import EVER_CHANGED, snapshot_folder
from rlsparse.tasks.generate import Score

_INTEGER_VIEW = {torch.bfloat16: torch.int16, torch.float32: torch.int32}

_TOO_FAST = "lower train.learning_rate or set train.max_grad_norm"

_LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "num_tokens": "num_tokens",
}
"""Names in TRL's logs -> columns of table ``steps``."""


class Probe(TrainerCallback):  # type: ignore[misc]
    """Trainer callback that writes the files of a trial.

    Args:
        config: the trial.
        model: the model at its base weights; one copy in the stored format is kept, on its device.
        base_fingerprint: content hash that each patch names as its base.
        out_dir: folder of the trial; ``snapshots/step-000010/`` and so on are made in it.
        score: greedy held-out score of the model as it is.
        distance: KL divergence of the model as it is to the base.
        on_progress: called after each logged step with the row of table ``steps``.
    """

    def __init__(
        self,
        config: TrialConfig,
        model: torch.nn.Module,
        *,
        base_fingerprint: str,
        out_dir: Path,
        score: Callable[[], Score],
        distance: Callable[[], float],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config = config
        self.model = model
        self.base_fingerprint = base_fingerprint
        self.out_dir = out_dir
        self.rows: dict[int, dict[str, Any]] = {}
        self.scores: dict[int, Score] = {}
        self.distances: dict[int, float] = {}
        self.patch_bytes = 0
        self._score = score
        self._distance = distance
        self._on_progress = on_progress
        self._base = {name: bits.clone() for name, bits in self._stored_bits()}
        self._ever = {name: torch.zeros_like(b, dtype=torch.bool) for name, b in self._base.items()}

    def _stored_bits(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Integer view of each weight, tied weights once, as the trial stores it."""
        dtype = TORCH_DTYPES[self.config.stored_dtype]
        for name, weight in self.model.named_parameters():
            yield name, weight.detach().to(dtype).view(_INTEGER_VIEW[dtype])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score the model before the first step, under the trainer's own autocast."""
        self.scores[0], self.distances[0] = self._score(), 0.0
        self.rows[0] = {"step": 0, **self._measured(0)}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note what changed; at a snapshot, write the patch and score the model.

        Raises:
            TrialError: a weight is not finite.
        """
        step = state.global_step
        finite = [torch.isfinite(weight.detach()).all() for weight in self.model.parameters()]
        if not torch.stack(finite).all():
            raise TrialError(f"weights are not finite after step {step}; {_TOO_FAST}")
        for name, bits in self._stored_bits():
            self._ever[name] |= bits != self._base[name]
        if step in self.config.snapshot_steps:
            self._write_snapshot(step)
            last = step == self.config.train.num_steps
            if last or self.config.probe.score_snapshots:
                self.scores[step], self.distances[step] = self._score(), self._distance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep one row of table ``steps``.

        Raises:
            TrialError: the loss is not finite.
        """
        if "loss" not in logs:
            return
        step = state.global_step
        if not math.isfinite(logs["loss"]):
            raise TrialError(f"loss is {logs['loss']} at step {step}; {_TOO_FAST}")
        row = {column: logs[key] for key, column in _LOGGED.items() if key in logs}
        if not isinstance(self.config.algorithm, OnlineConfig):
            row.pop("kl", None)  # KTO logs another quantity under this name
        limit = self.config.train.max_grad_norm
        norm = row.get("grad_norm")
        row["clipped_fraction"] = float(limit is not None and norm is not None and norm > limit)
        if self.config.algorithm.name in ("sft", "rft"):
            row["data_nll"] = row["loss"]
        if step in self.scores:
            row |= self._measured(step)
        self.rows[step] = {"step": step, **row}
        self._on_progress(self.rows[step])

    def _measured(self, step: int) -> dict[str, float]:
        return {"score": self.scores[step].fraction, "kl_base": self.distances[step]}

    def _write_snapshot(self, step: int) -> None:
        folder = self.out_dir / snapshot_folder(step)
        folder.mkdir(parents=True)
        pairs = (
            TensorPair(
                name=name,
                dtype=self.config.stored_dtype,
                shape=tuple(bits.shape),
                before_bits=_numpy_bits(self._base[name]),
                after_bits=_numpy_bits(bits),
            )
            for name, bits in self._stored_bits()
        )
        write_patch(folder / PATCH_FILE, pairs, base_fingerprint=self.base_fingerprint)
        self.patch_bytes += (folder / PATCH_FILE).stat().st_size

    def write_ever_changed(self) -> None:
        """Write the mask of every weight that differed from the base after any step."""
        masks.write_masks(
            self.out_dir / EVER_CHANGED,
            {
                name: (tuple(mask.shape), masks.pack(mask.cpu().numpy()))
                for name, mask in self._ever.items()
            },
            base_fingerprint=self.base_fingerprint,
            metadata={"kind": "ever_changed", "interval_steps": "1"},
        )


def _numpy_bits(bits: torch.Tensor) -> np.ndarray:
    """Flat unsigned integers on the CPU."""
    flat = bits.reshape(-1).cpu().numpy()
    return flat.view({2: np.uint16, 4: np.uint32}[flat.itemsize])
