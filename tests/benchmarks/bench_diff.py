"""`rlsparse diff` as a user starts it, against the way of the published script, on one pair.

Run with ``make bench``. Makes a pair of Llama checkpoints in bf16 (1.1 GB each by default) of which
a tenth of the weights moved by 1 to 3 codes, and starts whole processes by turns, page cache warm:

- published: both models loaded with transformers, subtracted in bf16, all differences
  concatenated, ``isclose`` at 1e-5 (what the script published with arXiv 2505.11711 does);
- rlsparse: ``rlsparse diff --json``, all definitions and statistics;
- cat: both files to /dev/null, what reading alone costs.

Prints wall time, its ratios, and peak resident memory; then the memory for a pair ten times larger
(holes in a sparse file: nothing is written), and the cold start with an empty kernel cache.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RLSPARSE = [sys.executable, "-m", "pipelines"]
PUBLISHED = """
import sys, torch
from transformers import AutoModelForCausalLM
load, dtype = AutoModelForCausalLM.from_pretrained, torch.bfloat16
before, after = (load(path, dtype=dtype) for path in sys.argv[1:])
changed, deltas = after.state_dict(), []
with torch.no_grad():
    for name, weight in before.named_parameters():
        delta = changed[name] - weight
        (delta != 0).sum().item()
        deltas.append(delta.view(-1))
deltas = torch.cat(deltas)
zero = torch.zeros_like(deltas)
print(torch.isclose(deltas, zero, atol=1e-5).sum().item() / deltas.numel())
"""


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """A Llama of hidden size 2048: 52 M weights a layer and 131 M in embedding and head."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, 2048),
        "lm_head.weight": (32000, 2048),
        "model.norm.weight": (2048,),
    }
    for layer in range(num_layers):
        name = f"model.layers.{layer}."
        for part in "qkvo":
            found[f"{name}self_attn.{part}_proj.weight"] = (2048, 2048)
        found |= {
            f"{name}mlp.gate_proj.weight": (5632, 2048),
            f"{name}mlp.up_proj.weight": (5632, 2048),
            f"{name}mlp.down_proj.weight": (2048, 5632),
            f"{name}input_layernorm.weight": (2048,),
            f"{name}post_attention_layernorm.weight": (2048,),
        }
    return found


def make_pair(folder: Path, num_layers: int, density: float) -> tuple[Path, Path]:
    """Weights of a normal distribution; after: ``density`` of them 1 to 3 codes away from zero."""
    import numpy as np

    from rlsparse.tensor_file import bits_dtype, save_checkpoint

    def values(size: int, seed: int, is_after: bool) -> "Iterator[np.ndarray]":
        draw = np.random.default_rng(seed)
        block = 2**22
        for start in range(0, size, block):
            n = min(block, size - start)
            weights = (draw.standard_normal(n, np.float32) * np.float32(0.02)).view(np.uint32)
            bits = (weights >> 16).astype(bits_dtype("bf16"))
            moves = (draw.random(n, np.float32) < density) * draw.integers(1, 4, n, np.uint16)
            yield bits + moves if is_after else bits

    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": num_layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    for is_after, name in enumerate(("before", "after")):
        tensors = {
            tensor: ("bf16", shape, values(math.prod(shape), seed, bool(is_after)))
            for seed, (tensor, shape) in enumerate(shapes(num_layers).items())
        }
        save_checkpoint(folder / name, tensors)
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder / "before", folder / "after"


def make_holes(folder: Path, num_layers: int) -> tuple[Path, Path]:
    """A pair of zeros that takes no room on the disk."""
    from rlsparse.tensor_file import header_bytes

    entries = [(name, "bf16", shape) for name, shape in shapes(num_layers).items()]
    size = sum(2 * math.prod(shape) for _, _, shape in entries)
    for name in ("before", "after"):
        (folder / name).mkdir(parents=True)
        with (folder / name / "model.safetensors").open("wb") as stream:
            stream.write(header_bytes(entries, {}))
            stream.truncate(stream.tell() + size)
    return folder / "before", folder / "after"


def run(command: list[str], **environment: str) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of a whole process."""
    start = time.perf_counter()
    child = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    """Make the pair, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="size of the model")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-published", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # Forked, because a child's peak memory counts that of the process it was forked from.
        with ProcessPoolExecutor(1) as maker:
            made = maker.submit(make_pair, Path(scratch), args.layers, args.density).result()
            large = maker.submit(
                make_holes, Path(scratch) / "large", 10 * args.layers + 23
            ).result()
        pair = [str(side) for side in made]
        files = [f"{side}/model.safetensors" for side in pair]
        size = sum(os.path.getsize(file) for file in files)
        commands = {
            "published": [sys.executable, "-c", PUBLISHED, *pair],
            "rlsparse": [*RLSPARSE, "diff", *pair, "--json", "/dev/null"],
            "rlsparse, 1 thread": [
                *RLSPARSE, "diff", *pair, "--json", "/dev/null", "--threads", "1",
            ],
            "imports only": [*RLSPARSE, "diff", "--help"],
            "cat": ["cat", *files],
        }  # fmt: skip
        if args.skip_published:
            del commands["published"]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(args.rounds + 1):
            for name, command in commands.items():
                if name == "published" and turn > 2:
                    continue
                result = run(command)
                if turn:  # the first warms page cache and kernels
                    found[name].append(result)
        wall = {name: statistics.median(s for s, _ in runs) for name, runs in found.items()}
        memory = {name: max(mb for _, mb in runs) for name, runs in found.items()}
        print(f"{size / 1e9:.2f} GB in both files, {args.density:.0%} changed")
        for name in commands:
            times = f", {wall['published'] / wall[name]:.1f} x" if "published" in wall else ""
            print(f"  {name:20} {wall[name]:7.2f} s{times}, peak {memory[name]:.0f} MB")
        streaming = wall["rlsparse"] - wall["imports only"]
        print(f"  streaming part against cat: {wall['cat'] / streaming:.2f} x its speed")
        with tempfile.TemporaryDirectory() as empty:
            cold, _ = run(commands["rlsparse"], RLSPARSE_CACHE_DIR=empty)
        print(f"  first run ever (kernels compiled): {cold:.2f} s")
        _, peak = run([*RLSPARSE, "diff", *map(str, large), "--json", "/dev/null"])
        print(f"  a pair ten times larger: peak {peak:.0f} MB, {peak / memory['rlsparse']:.2f} x")


if __name__ == "__main__":
    main()
