"""Known truth: small checkpoint pairs whose changes are planted, written without the product.

Only the names of the definitions come from it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from rlsparse.definitions import DEFINITIONS

FLOATS = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
TAGS = {
    "bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64", "fp8_e4m3": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2", "i64": "I64", "u8": "U8", "bool": "BOOL",
}  # fmt: skip

LLAMA_SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (37, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.layers.1.self_attn.v_proj.weight": (8, 16),
    "model.norm.weight": (16,),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor: short name of its format, shape, flat bits."""

    dtype: str
    shape: tuple[int, ...]
    bits: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two checkpoint folders, and what is in them."""

    before: Path
    after: Path
    tensors_before: dict[str, Tensor]
    tensors_after: dict[str, Tensor]
    changed: dict[str, np.ndarray]


def unsigned(dtype: str) -> np.dtype:
    """Unsigned integer type of a format's width."""
    widths = {"i64": 8, "u8": 1, "bool": 1}
    return np.dtype(f"<u{FLOATS[dtype].itemsize if dtype in FLOATS else widths[dtype]}")


def random_tensor(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of a normal distribution of scale 0.02, rounded to the format."""
    weights = (rng.standard_normal(shape) * 0.02).astype(np.float32).astype(FLOATS[dtype])
    return Tensor(dtype, shape, weights.reshape(-1).view(unsigned(dtype)))


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict | None = None) -> None:
    """Write one safetensors file, byte by byte after its specification."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.bits.tobytes()
        header[name] = {
            "dtype": TAGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(path: Path, tensors: Mapping[str, Tensor], config: dict | None = None) -> Path:
    """Write a checkpoint folder of one file, with a config.json."""
    path.mkdir(parents=True)
    write_file(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return path


def write_shards(path: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a checkpoint folder of several files with their index."""
    path.mkdir(parents=True)
    for file, tensors in shards.items():
        write_file(path / file, tensors)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def plant(
    rng: np.random.Generator, tensor: Tensor, density: float, max_steps: int = 3
) -> tuple[Tensor, np.ndarray]:
    """Move round(density * n) weights by 1 ... max_steps representable values, away from zero."""
    n = tensor.bits.size
    changed = np.zeros(n, bool)
    changed[rng.choice(n, round(density * n), replace=False)] = True
    steps = rng.integers(1, max_steps + 1, n).astype(tensor.bits.dtype)
    return Tensor(tensor.dtype, tensor.shape, tensor.bits + steps * changed), changed


def make_pair(
    folder: Path,
    dtype: str = "bf16",
    density: float = 0.1,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] = LLAMA_SHAPES,
) -> Pair:
    """A small Llama before and after; norms do not change, all else at ``density``."""
    rng = np.random.default_rng(seed)
    before = {name: random_tensor(rng, dtype, shape) for name, shape in shapes.items()}
    planted = {
        name: plant(rng, tensor, 0.0 if "norm" in name else density)
        for name, tensor in before.items()
    }
    after = {name: tensor for name, (tensor, _) in planted.items()}
    return Pair(
        write_folder(folder / "before", before),
        write_folder(folder / "after", after),
        before,
        after,
        {name: changed for name, (_, changed) in planted.items()},
    )


# --- oracles ---------------------------------------------------------------------------------


def weights(tensor: Tensor) -> np.ndarray:
    """Values of a tensor, flat, in float64."""
    return tensor.bits.view(FLOATS[tensor.dtype]).astype(np.float64)


def naive_changed(before: Tensor, after: Tensor) -> dict[str, np.ndarray]:
    """Which weights changed, by definition; finite weights only."""
    a, b = weights(before), weights(after)
    delta = np.abs(b - a)
    changed = {"bitwise": before.bits != after.bits}
    for name in DEFINITIONS[1:]:
        kind, tolerance = name.split("_")
        scale = np.maximum(np.abs(a), np.abs(b)) if kind == "rel" else 1
        changed[name] = delta > float(tolerance) * scale
    return changed


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor rounded to another format."""
    values = weights(tensor).astype(np.float32).astype(FLOATS[dtype])
    return Tensor(dtype, tensor.shape, values.view(unsigned(dtype)))
