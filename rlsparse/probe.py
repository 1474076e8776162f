"""Measures a trial while it trains: snapshots as patches, scores, and what ever changed.

The probe only reads. A trial gives the same weights, bit for bit, whatever it measures. It holds no
copy of the base: a snapshot reads the base again from its checkpoint, tensor by tensor. Where the
workers of a trial hold parts of the weights, each has a probe, and the first one's writes.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from rlsparse import distributed, masks, tables
from rlsparse.algorithm_config import OnlineConfig
from rlsparse.cast_changes import cast_changes
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import TrialConfig
from rlsparse.deltas import tensor_mask_rows
from rlsparse.errors import CheckpointError, TrialError
from rlsparse.kernels import cast_bits, popcount
from rlsparse.models.loading import TORCH_DTYPES
from rlsparse.patch import PATCH_FILE, TensorPair, write_patch
from rlsparse.prices import Prices
from rlsparse.sharded import ShardedTrajectory, is_sharded
from rlsparse.subnetwork import SubnetworkOptimizer
from rlsparse.tables import EVER_CHANGED, STEP_PATCHES, snapshot_folder, step_mask_file
from rlsparse.tasks.generate import Score
from rlsparse.tensor_file import Bits
from rlsparse.trajectory import StepChanges, Trajectory
from rlsparse.update_probe import UpdateCounts, count_updates
from rlsparse.weight_sync.versions import Notes, VersionFolder

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

_REMEMBERED = ("rows", "scores", "distances", "changes", "patch_bytes", "_asked", "_num_final")
"""Attributes of the probe that a save of the trial holds."""


class Probe(TrainerCallback):  # type: ignore[misc]
    """Trainer callback that writes the files of a trial.

    Args:
        config: the trial.
        model: the model at its base weights; ``Trajectory`` says what is held of it.
        trial_id: written into the masks of steps.
        base: checkpoint of these weights, in whatever format it is stored.
        base_fingerprint: content hash that each patch names as its base.
        out_dir: folder of the trial; ``snapshots/step-000010/`` and so on are made in it.
        score: greedy held-out score of the model as it is.
        distance: KL divergence of the model as it is to the base.
        on_progress: called after each logged step with the row of table ``steps``.

    Raises:
        CheckpointError: the model has not the weights of ``base``.
    """

    def __init__(
        self,
        config: TrialConfig,
        model: torch.nn.Module,
        *,
        trial_id: str,
        base: Checkpoint,
        base_fingerprint: str,
        out_dir: Path,
        score: Callable[[], Score],
        distance: Callable[[], float],
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config = config
        self.model = model
        self.trial_id = trial_id
        self.base = base
        self.base_fingerprint = base_fingerprint
        self.out_dir = out_dir
        self.rows: dict[int, dict[str, Any]] = {}
        self.scores: dict[int, Score] = {}
        self.distances: dict[int, float] = {}
        self.changes: dict[int, StepChanges] = {}
        self.prices = Prices()
        self.patch_bytes = 0
        self._asked: dict[int, dict[str, Any]] = {}
        self._num_final = 0
        self._score = score
        self._distance = distance
        self._on_progress = on_progress
        with self.prices.of("steps"):
            self._trajectory = self._new_trajectory(TORCH_DTYPES[config.stored_dtype])
            self._check_base()

    def _new_trajectory(self, dtype: torch.dtype) -> Trajectory:
        windows = self.config.probe.k_steps
        if is_sharded(self.model):
            return ShardedTrajectory(self.model, dtype, windows, self.prices, base=self._base)
        return Trajectory(self.model, dtype, windows, self.prices)

    def _check_base(self) -> None:
        found = {name: info.shape for name, info in self.base.tensors.items()}
        shapes = self._trajectory.shapes.items()
        others = (name for name, shape in shapes if found.get(name) != shape)
        name = next(others, None) or next(self._unlike_base(), None)
        if name is not None:
            raise CheckpointError(
                f"the model that transformers loads from {self.base.path} has other weights "
                f"{name} than the files there, so that no patch would fit them; load it and "
                "`save_pretrained` it to another folder, and give that one as model.source"
            )

    def _unlike_base(self) -> Iterator[str]:
        for name, _, bits in self._trajectory.stored():
            if not np.array_equal(self._base(name), bits):
                yield name

    def _base(self, name: str, start: int = 0, stop: int | None = None) -> Bits:
        """Bits of elements of the base, rounded to the stored format as loading rounds them."""
        info = self.base.tensors[name]
        return cast_bits(info.read(start, stop), info.dtype, self.config.stored_dtype)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered between steps, apart from the files and the weights as they are."""
        own = {name: getattr(self, name) for name in _REMEMBERED}
        trajectory = self._trajectory.state_dict()
        return {**own, "cpu_s": self.prices.cpu_s, "trajectory": trajectory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, the model being at the weights of then."""
        for name in _REMEMBERED:
            setattr(self, name, state[name])
        self.prices.cpu_s = state["cpu_s"]
        self._trajectory.load_state_dict(state["trajectory"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score the model before the first step, under the trainer's own autocast."""
        if state.global_step:  # it goes on from a save
            return
        with self.prices.of("scores"):
            self.scores[0], self.distances[0] = self._score(), 0.0
        self.rows[0] = {"step": 0, **self._measured(0)}

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Look at gradients and updates while both are there, at the steps that are asked for."""
        step, interval = state.global_step + 1, self.config.probe.update_interval
        if interval and step % interval == 0:
            with self.prices.of("updates"):
                own = count_updates(self.model, optimizer, self._trajectory.before)
                counts = UpdateCounts(*self._trajectory.totals(astuple(own)))
            self._asked[step] = counts.fractions()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note what changed; at a snapshot, write the patch and score the model.

        Raises:
            TrialError: a weight is not finite in the stored format.
        """
        step = state.global_step
        if self.config.probe.step_patches:
            with self.prices.of("step_patches"):
                self._write_step_patch(step)
        with self.prices.of("steps"):
            if self.config.probe.step_masks:
                self._write_step_mask(step)
            else:
                self.changes[step] = self._trajectory.advance(step)
        if not self.changes[step].is_finite:
            raise TrialError(f"weights are not finite after step {step}; {_TOO_FAST}")
        if step in self.config.snapshot_steps:
            with self.prices.of("snapshots"):
                self._write_snapshot(step)
            if self.config.probe.casts:
                with self.prices.of("casts"):
                    self._asked[step] = self._asked.get(step, {}) | self._cast_changes()
            last = step == self.config.train.num_steps
            if last or self.config.probe.score_snapshots:
                with self.prices.of("scores"):
                    self.scores[step], self.distances[step] = self._score(), self._distance()

    def _cast_changes(self) -> dict[str, float]:
        pairs = (
            (self._base(name, start, start + bits.size), bits)
            for name, start, bits in self._trajectory.trained()
        )
        own = cast_changes(pairs, self.config.stored_dtype, self.config.trained_dtype)
        counts = zip(own, self._trajectory.totals(own.values()), strict=True)
        return {f"changed_fraction_{c}": n / self._trajectory.num_elements for c, n in counts}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
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
        if isinstance(own := getattr(optimizer, "optimizer", optimizer), SubnetworkOptimizer):
            row["grad_norm"] = own.last_grad_norm  # the trainer's is of one worker alone
        limit = self.config.train.max_grad_norm
        norm = row.get("grad_norm")
        row["clipped_fraction"] = float(limit is not None and norm is not None and norm > limit)
        if self.config.algorithm.name in ("sft", "rft"):
            row["data_nll"] = row["loss"]
        if step in self.scores:
            row |= self._measured(step)
        self.rows[step] = {"step": step, **row, **self._changed(step)}
        self._on_progress(self.rows[step])

    def _measured(self, step: int) -> dict[str, float]:
        return {"score": self.scores[step].fraction, "kl_base": self.distances[step]}

    def _changed(self, step: int) -> dict[str, Any]:
        changes, total = self.changes[step], self._trajectory.num_elements
        return {
            **{f"update_sparsity_k{k}": 1 - n / total for k, n in changes.num_changed.items()},
            "ever_changed_fraction": changes.num_ever_changed / total,
            **self._asked.get(step, {}),
        }

    def _write_snapshot(self, step: int) -> None:
        pairs = (
            TensorPair(name, self.config.stored_dtype, shape, self._base(name), bits)
            for name, shape, bits in self._trajectory.stored()
        )
        if distributed.rank() > 0:  # gives its part
            deque(pairs, maxlen=0)
            return
        folder = self.out_dir / snapshot_folder(step)
        folder.mkdir(parents=True)
        file = folder / PATCH_FILE
        patch = write_patch(file, pairs, base_fingerprint=self.base_fingerprint)
        self._num_final = patch.num_changed
        self.patch_bytes += patch.size_bytes

    def _write_step_patch(self, step: int) -> None:
        """Write what the step changed, as a version of a weight sync that starts from the base."""
        pairs = (
            TensorPair(name, self.config.stored_dtype, shape, before, after)
            for name, shape, before, after in self._trajectory.moved()
        )
        file = VersionFolder(self.out_dir / STEP_PATCHES).patch_file(step)
        file.parent.mkdir(exist_ok=True)
        notes = Notes(step, step - 1, self.trial_id, (1, 1))
        first = self.base_fingerprint
        write_patch(
            file,
            pairs,
            base_fingerprint=first if step == 1 else f"{step - 1}-{self.trial_id}",
            metadata=notes.metadata(),
        )

    def _write_step_mask(self, step: int) -> None:
        rows: list[dict[str, Any]] = []

        def add(name: str, mask: masks.Packed) -> None:
            info = self.base.tensors[name]
            with self.prices.of("step_masks"):
                rows.extend(
                    tensor_mask_rows(info, mask, trial_id=self.trial_id, step=step, kind="step")
                )

        self.changes[step] = self._trajectory.advance(step, add)
        if distributed.rank() > 0:
            return
        file = self.out_dir / step_mask_file(step)
        with self.prices.of("step_masks"):
            file.parent.mkdir(exist_ok=True)
            tables.write(tables.from_rows(rows, "masks"), "masks", file)

    def finish(self) -> dict[str, int]:
        """Write the mask of every weight that differed from the base after any step.

        With the masks of steps, the share of each that is outside the final mask is noted, too.

        Returns:
            How all weights are split, under the names of table ``trials``: ``num_untouched`` never
            differed from the base, ``num_cancelled`` did but not after the last step,
            ``num_final`` did then (2505.11711, section 6, which looks at 21 checkpoints; here the
            interval is one step).
        """
        with self.prices.of("steps"):
            ever_changed = {
                name: (self.base.tensors[name].shape, mask)
                for name, mask in self._trajectory.ever_changed()
            }
            if distributed.rank() == 0:
                masks.write_masks(
                    self.out_dir / EVER_CHANGED,
                    ever_changed,
                    base_fingerprint=self.base_fingerprint,
                    metadata={"kind": "ever_changed", "interval_steps": "1"},
                )
        if self.config.probe.step_masks:
            with self.prices.of("step_masks"):
                self._note_outside()
        num_ever = self.changes[self.config.train.num_steps].num_ever_changed
        return {
            "num_untouched": self._trajectory.num_elements - num_ever,
            "num_cancelled": num_ever - self._num_final,
            "num_final": self._num_final,
        }

    def _note_outside(self) -> None:
        final = {
            name: masks.pack(self._base(name) != bits)
            for name, _, bits in self._trajectory.stored()
        }
        if distributed.rank() > 0:
            return
        for step, row in self.rows.items():
            if not step or not (num_changed := self.changes[step].num_changed[1]):
                continue
            num_inside = 0
            for part in tables.read(self.out_dir / step_mask_file(step), "masks").to_pylist():
                mask = np.frombuffer(part["mask"], np.uint8)
                start = part["start"] // 8
                inside = masks.intersection(mask, final[part["tensor"]][start : start + mask.size])
                num_inside += popcount(inside)
            row["outside_final"] = 1 - num_inside / num_changed
