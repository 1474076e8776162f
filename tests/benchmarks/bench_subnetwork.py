"""Bytes and time of the subnetwork optimizer against torch's fused AdamW.

    .venv/bin/python tests/benchmarks/bench_subnetwork.py [--json RESULT.json]
    .venv/bin/python tests/benchmarks/bench_subnetwork.py --device cuda --parameters 1e9

By default on a CPU, on random tensors of the shapes of SmolLM2-135M: gradients, moments and index
are counted; dense AdamW, compaction of the gradients (what the backward hook does) and packed step
take their turn in each round, with gradients that are not in a cache. A process of its own for each
number of threads, pinned to as many cores. Times are CPU time by thread, which other jobs disturb
less than that of the clock, and which ends of work that is split unevenly are not in; ratios are
medians over rounds, and ranges. ``masters`` are bf16 weights with fp32 masters; the dense side then
casts each gradient, steps, and casts back.

With ``--parameters`` a random Llama of that size is trained for some steps, whole and its
subnetwork, each in a process of its own: peak memory (of the device; on a CPU, of the process) and
time per step and of the optimizer in it.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsparse import masks
from rlsparse.memory import peak_bytes
from rlsparse.subnetwork import SubnetworkAdamW, SubnetworkMask
from rlsparse.subnetwork.packed import compact

SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
HIDDEN, INTERMEDIATE, KEYS = 576, 1536, 192
FORMATS = {"fp32": torch.float32, "masters": torch.bfloat16}


class Dense:
    """torch's fused AdamW; of bf16 weights, on fp32 masters."""

    def __init__(self, weights: Iterable[torch.nn.Parameter]) -> None:
        self.weights = list(weights)
        self.masters = [torch.nn.Parameter(w.detach().float()) if w.dtype != torch.float32 else w
                        for w in self.weights]  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.masters, **SETTINGS, fused=True)

    def step(self) -> None:
        """One step, and no gradients any more."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if master is not weight:
                    weight.copy_(master)

    def state_bytes(self) -> int:
        """Gradients in the format of the weights, moments, and masters beside the weights."""
        own = sum(m.nbytes for w, m in zip(self.weights, self.masters, strict=True) if m is not w)
        return sum(w.nbytes + 8 * w.numel() for w in self.weights) + own


def smollm2_shapes(layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Weight tensors of SmolLM2-135M, which has 30 layers and 49152 tokens."""
    square, wide = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN)
    attention = [square, (KEYS, HIDDEN), (KEYS, HIDDEN), square]
    layer = [*attention, wide, wide, (HIDDEN, INTERMEDIATE), (HIDDEN,), (HIDDEN,)]
    return [(vocabulary, HIDDEN), *(layer * layers), (HIDDEN,)]


def make_mask(model: torch.nn.Module, density: float, structure: str) -> SubnetworkMask:
    """Random weights, or rows of matrices and random weights of vectors."""
    draw, bits = np.random.default_rng(0), {}
    for name, weight in model.named_parameters():
        shape = tuple(weight.shape)
        drawn = shape[:1] if structure == "rows" else shape
        chosen = draw.random(drawn, dtype=np.float32) < density
        if len(shape) > len(drawn):
            chosen = np.repeat(chosen[:, None], shape[1], axis=1)
        bits[name] = (shape, masks.pack(chosen))
    return SubnetworkMask(bits)


def busy_s(work: Callable[[], object]) -> float:
    """Seconds of each core that ``work`` takes, all threads together by their number."""
    begun = time.process_time()
    work()
    return (time.process_time() - begun) / torch.get_num_threads()


def compare(options: argparse.Namespace, kind: str) -> Iterable[dict[str, Any]]:
    """Rows of the table, with the threads that this process has."""
    torch.manual_seed(0)
    shapes = smollm2_shapes(options.layers, options.vocabulary)
    make = [torch.randn(shape).mul_(0.02).to(FORMATS[kind]) for shape in shapes]
    model = torch.nn.ParameterList([torch.nn.Parameter(weight) for weight in make])
    dense = Dense([torch.nn.Parameter(weight.clone()) for weight in make])
    gradients = [torch.randn(shape).mul_(1e-3).to(FORMATS[kind]) for shape in shapes]

    def receive(weights: Iterable[torch.nn.Parameter]) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient

    for structure, percent in itertools.product(options.masks, options.densities):
        mask = make_mask(model, percent / 100, structure)
        ours = SubnetworkAdamW(model, mask, **SETTINGS, path=options.path)
        selections = [(w, s) for w, s in ours._selections.items()]
        receiving = [(w, gradients[i]) for i, w in enumerate(model) if w in ours._selections]
        times: dict[str, list[float]] = {"dense": [], "compaction": [], "step": []}
        for turn in range(options.rounds + 1):
            receive(dense.weights)
            dense_s = busy_s(dense.step)
            for weight, gradient in receiving:
                weight.grad = gradient
            compaction_s = busy_s(lambda: [compact(w, s) for w, s in selections])  # noqa: B023
            step_s = busy_s(lambda: (ours.step(), ours.zero_grad()))  # noqa: B023
            if turn:  # the first makes the state
                for name, spent in zip(times, (dense_s, compaction_s, step_s), strict=True):
                    times[name].append(spent)
        sizes = ours.state_bytes()
        ours.release()
        yield {
            "weights": kind,
            "threads": torch.get_num_threads(),
            "mask": structure,
            "density": mask.density,
            "state_bytes": sizes,
            "dense_state_bytes": dense.state_bytes(),
            "state_ratio": sum(sizes.values()) / dense.state_bytes(),
            **{f"{name}_s": statistics.median(each) for name, each in times.items()},
            "step_speedup": spread(times["dense"], times["step"]),
            "total_speedup": spread(
                times["dense"],
                [a + b for a, b in zip(times["compaction"], times["step"], strict=True)],
            ),
        }


def spread(dense: list[float], ours: list[float]) -> dict[str, float]:
    """Ratio of times, round by round."""
    ratios = [a / b for a, b in zip(dense, ours, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def make_llama(size: float, vocabulary: int) -> torch.nn.Module:
    """A random Llama of about ``size`` weights, 128 times as wide as deep."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = max(round((8 * size) ** (1 / 3) / 128), 1) * 128
    layers = max(round((size - vocabulary * hidden) / (16 * hidden**2)), 1)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden,
        vocab_size=vocabulary, num_attention_heads=hidden // 64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(options: argparse.Namespace, kind: str, arm: str) -> dict[str, Any]:
    """Some steps of a Llama, whole or its subnetwork, with bf16 arithmetic."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    with device:
        model = make_llama(options.parameters, options.vocabulary).to(FORMATS[kind])
    model.train()
    if arm == "whole":
        optimizer: Any = Dense(model.parameters())
    else:
        mask = make_mask(model, options.densities[0] / 100, options.masks[0])
        optimizer = SubnetworkAdamW(model, mask, **SETTINGS, path=options.path)
    shape = (options.batch_size, options.tokens)
    ids = torch.randint(0, options.vocabulary, shape, device=device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    steps, updates = [], []
    for _ in range(options.rounds + 1):
        begun = wait()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        computed = wait()
        optimizer.step()
        model.zero_grad()
        ended = wait()
        steps.append(ended - begun)
        updates.append(ended - computed)
    sizes = optimizer.state_bytes()
    return {
        "weights": kind,
        "arm": arm,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "num_weights": sum(weight.numel() for weight in model.parameters()),
        "density": 1.0 if arm == "whole" else mask.density,
        "state_bytes": sizes if isinstance(sizes, int) else sum(sizes.values()),
        "peak_bytes": peak_bytes(),
        "step_s": statistics.median(steps[1:]),
        "optimizer_s": statistics.median(updates[1:]),
        "loss": loss.item(),
    }


def in_process(part: list[str], threads: int) -> Iterable[dict[str, Any]]:
    """Rows that this command finds in a process of its own, with ``threads`` cores."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    command = [sys.executable, __file__, *sys.argv[1:], "--part", *part]
    # Passive: threads that wait for others would spend the time that is measured.
    settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    ) as child:  # fmt: skip
        assert child.stdout is not None
        yield from (json.loads(line) for line in child.stdout)
    if child.returncode:
        raise SystemExit(child.returncode)


def print_comparison(row: dict[str, Any]) -> None:
    """A line of the table."""
    times = [f"{1e3 * row[name]:7.1f}" for name in ("dense_s", "compaction_s", "step_s")]
    speedups = [
        "{median:5.2f} ({min:.2f} .. {max:.2f})".format(**row[name])
        for name in ("step_speedup", "total_speedup")
    ]
    print(
        f"{row['weights']:8} {row['threads']:7} {row['mask']:7} {row['density']:7.1%}  "
        f"{sum(row['state_bytes'].values()) / 1e6:8.1f} {row['state_ratio']:6.3f}  "
        f"{' '.join(times)}   {'   '.join(speedups)}",
        flush=True,
    )


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--densities", nargs="+", type=float, default=[1, 5, 10, 20, 30],
                        help="in percent")  # fmt: skip
    parser.add_argument("--masks", nargs="+", default=["random", "rows"])
    parser.add_argument("--weights", nargs="+", default=list(FORMATS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--path", default="auto", help="of the subnetwork optimizer")
    parser.add_argument("--parameters", type=float, help="train a Llama of this size instead")
    parser.add_argument("--device", default="cpu", help="of the Llama")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        kind, arm = options.part
        found = [train(options, kind, arm)] if options.parameters else compare(options, kind)
        for row in found:
            print(json.dumps(row), flush=True)
        return
    rows = []
    if options.parameters:
        print("weights  arm         weights/1e6  density  state MB    peak MB  s/step  optimizer s")
        for kind, arm in itertools.product(options.weights, ("whole", "subnetwork")):
            for row in in_process([kind, arm], options.threads[-1]):
                rows.append(row)
                print(f"{kind:8} {arm:10} {row['num_weights'] / 1e6:12.1f}  {row['density']:7.1%}  "
                      f"{row['state_bytes'] / 1e6:8.1f}  {row['peak_bytes'] / 1e6:9.1f}  "
                      f"{row['step_s']:6.3f}  {row['optimizer_s']:11.4f}", flush=True)  # fmt: skip
    else:
        print("weights  threads mask    density  state MB  ratio    dense, compaction, step: ms   "
              "step x fused         both x fused")  # fmt: skip
        for threads, kind in itertools.product(options.threads, options.weights):
            for row in in_process([kind, "compare"], threads):
                rows.append(row)
                print_comparison(row)
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
