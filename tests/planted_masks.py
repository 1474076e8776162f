"""Known truth for overlaps: a small base, masks of runs, and runs that moved known weights."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from planted import FLOATS, Tensor, unsigned, write_folder

from rlsparse import tables
from rlsparse.overlap.comparison import MeasuredRun

SHAPES = {
    "model.layers.0.self_attn.k_proj.weight": (12, 16),
    "model.layers.0.self_attn.q_proj.weight": (20, 16),
    "model.layers.1.self_attn.q_proj.weight": (8, 5, 2),
    "model.norm.weight": (70,),
}
MODULES = dict(zip(SHAPES, ("k", "q", "q", "norm"), strict=True))
BASE = "b" * 64


@dataclass(frozen=True)
class Planted:
    """A base, its weights, and for each run the weights after and, per step, what changed."""

    path: Path
    weights: dict[str, Tensor]
    runs: list[MeasuredRun]
    masks: dict[tuple[str, int], dict[str, np.ndarray]]
    after: dict[str, dict[str, Tensor]]

    def table(self, views: tuple[str, ...] = ("stored",)) -> pa.Table:
        rows: list[dict[str, object]] = []
        for (trial, step), mask in self.masks.items():
            for name, changed in mask.items():
                row = {"trial_id": trial, "step": step, "kind": "snapshot", "tensor": name}
                row |= {"module": MODULES[name], "chunk": 0, "start": 0}
                row |= {"num_elements": changed.size}
                packed = np.packbits(changed, bitorder="little").tobytes()
                rows += [row | {"view": view, "mask": packed} for view in views]
                rows.append(row | {"view": "stored", "kind": "ever_changed", "mask": b"\xff"})
        return tables.from_rows(rows, "masks")


def plant_runs(folder: Path, runs: list[MeasuredRun], dtype: str = "bf16") -> Planted:
    """A run moves each weight that its last mask holds by some representable values.

    Densities differ between runs and tensors, and follow |w|, rows and columns.
    """
    rng = np.random.default_rng(5)
    weights = {name: _tensor(rng, dtype, shape) for name, shape in SHAPES.items()}
    base = write_folder(folder / "base", weights)
    masks, after, placed = {}, {}, []
    for run in runs:
        level = rng.uniform(0.15, 0.6)
        for step in run.steps:
            masks[run.trial_id, step] = {
                name: rng.random(t.bits.size) < np.clip(level * _shape_of_density(t), 0, 1)
                for name, t in weights.items()
            }
        last = masks[run.trial_id, run.steps[-1]]
        after[run.trial_id] = {
            name: Tensor(
                dtype,
                tensor.shape,
                tensor.bits
                + rng.integers(1, 40, tensor.bits.size).astype(tensor.bits.dtype) * last[name],
            )
            for name, tensor in weights.items()
        }
        path = write_folder(folder / run.trial_id, after[run.trial_id])
        placed.append(MeasuredRun(**{**vars(run), "after": {run.steps[-1]: str(path)}}))
    return Planted(base, weights, placed, masks, after)


def a_run(trial: str, seed: int, **given: object) -> MeasuredRun:
    """A finished run; the baseline's, unless told otherwise."""
    fields: dict[str, object] = {
        "trial_id": trial, "base": BASE, "source": "tiny", "cell": {"algorithm.name": "grpo"},
        "algorithm": "grpo", "seed": seed, "replicate": 0, "role": "baseline", "control": None,
        "num_steps": 9, "steps": (9,), "after": {9: f"/runs/{trial}"},
    }  # fmt: skip
    return MeasuredRun(**{**fields, **given})


def _tensor(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Tensor:
    size = int(np.prod(shape))
    values = rng.choice([0.5, 1.0, 1.25, 1.5, 2.0, 2.75, 3.5, -1.75, -3.0], size)
    values[rng.random(size) < 0.05] = 0.0
    values[0] = np.inf
    return Tensor(dtype, shape, values.astype(FLOATS[dtype]).view(unsigned(dtype)))


def _shape_of_density(tensor: Tensor) -> np.ndarray:
    values = np.abs(tensor.bits.view(FLOATS[tensor.dtype]).astype(np.float64))
    rows = tensor.bits.size // max(int(np.prod(tensor.shape[1:])), 1)
    by_row = np.repeat(np.linspace(0.4, 1.6, rows), tensor.bits.size // rows)
    return np.where(values < 2, 1.4, 0.6) * by_row
