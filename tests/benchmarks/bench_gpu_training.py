"""What the probe costs while a large model trains: step time with and without it, and memory.

    .venv/bin/python tests/benchmarks/bench_gpu_training.py [MODEL] [--json RESULT.json]

Trains GRPO and DPO on MODEL (a folder or hub id), by default on a random Llama of the dimensions of
Llama-3.2-1B, made on the spot, with the tokenizer of the tiny base and random rewards: it learns
nothing, but costs what a real one costs. Each algorithm trains in a process of its own with the
probe and in one without; the last step's snapshot is not in the step time, which is the median from
the start of a step to that of the next, the first one apart. Peak memory is of the device, on a CPU
of the process; beside it stands the estimate of ``rlsparse.costs``, which also holds for the moment
of the distance to the base that is not taken here. Runs on a CPU at small sizes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback

from rlsparse.algorithms import ALGORITHMS
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import ModelConfig, TrialConfig
from rlsparse.costs import ModelSize, trial_memory
from rlsparse.memory import peak_bytes
from rlsparse.models import TINY, resolve
from rlsparse.probe import Probe
from rlsparse.tasks.generate import Score
from rlsparse.train import _load, _make_deterministic, environment


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the start of each step to that of the next."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.begun.append(time.perf_counter())

    @property
    def median_s(self) -> float:
        times = [after - before for before, after in zip(self.begun, self.begun[1:], strict=False)]
        return statistics.median(times[1:])


def make_base(options: argparse.Namespace, folder: Path) -> None:
    """A random Llama in bf16 with the tokenizer of the tiny base."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden, num_hidden_layers=options.layers,
        intermediate_size=4 * options.hidden, vocab_size=options.vocabulary,
        num_attention_heads=options.hidden // 64, num_key_value_heads=-(-options.hidden // 256),
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)


def configuration(name: str, options: argparse.Namespace) -> TrialConfig:
    """The trial: pairs of gold solutions for DPO, so that nothing has to be sampled right."""
    data = {"data": "gold"} if name == "dpo" else {"reward": options.reward}
    return TrialConfig.model_validate(
        {
            "algorithm": {"name": name, **data},
            "train": {
                "num_steps": options.steps,
                "batch_size": options.batch_size,
                "gradient_accumulation_steps": options.accumulation,
                "precision": options.precision,
            },
        }
    )


def train(config: TrialConfig, base_dir: Path, *, with_probe: bool) -> dict[str, Any]:
    """Train in this process; what came out."""
    with tempfile.TemporaryDirectory() as name:
        folder, clock, checkpoint = Path(name), Clock(), Checkpoint.open(base_dir)
        _make_deterministic(config.sampling_seed, torch.get_num_threads())
        context = _load(config, base_dir, folder / "scratch")
        probe = Probe(
            config,
            context.model,
            trial_id="0" * 12,
            base=checkpoint,
            base_fingerprint=fingerprint(checkpoint),
            out_dir=folder,
            score=lambda: Score((0.0,)),
            distance=lambda: 0.0,
            on_progress=lambda row: None,
        ) if with_probe else None  # fmt: skip
        trainer = ALGORITHMS[config.algorithm.name](context)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        if probe:
            trainer.add_callback(probe)
        transformers.set_seed(config.sampling_seed)
        trainer.train()
        found: dict[str, Any] = {"step_s": clock.median_s, "peak_bytes": peak_bytes()}
        if probe:
            split, size = probe.finish(), ModelSize.of(checkpoint)
            device = "gpu" if torch.cuda.is_available() else "cpu"
            found |= {
                "update_sparsity": 1 - split["num_final"] / size.num_weights,
                "estimated_peak_bytes": trial_memory(config, size, device).peak_bytes,
            }
        return found


def measure(name: str, base_dir: Path) -> dict[str, Any]:
    """One row of the table, from a process with the probe and one without."""
    found = {}
    for probe in ("with", "without"):
        command = [sys.executable, __file__, *sys.argv[1:], "--part", name, probe, str(base_dir)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[probe] = json.loads(done.stdout.splitlines()[-1])
    return {
        "algorithm": name,
        "step_s_with": found["with"]["step_s"],
        "step_s_without": found["without"]["step_s"],
        "ratio": found["with"]["step_s"] / found["without"]["step_s"],
        "peak_bytes_with": found["with"]["peak_bytes"],
        "peak_bytes_without": found["without"]["peak_bytes"],
        "estimated_peak_bytes": found["with"]["estimated_peak_bytes"],
        "update_sparsity": found["with"]["update_sparsity"],
    }


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder or hub id; default: random weights")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "dpo"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--reward", default="random")
    for name, size in (("hidden", 2048), ("layers", 16), ("vocabulary", 128256)):
        parser.add_argument(f"--{name}", type=int, default=size, help="of random weights")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, probe, folder = options.part
        config = configuration(name, options)
        print(json.dumps(train(config, Path(folder), with_probe=probe == "with")))
        return
    with tempfile.TemporaryDirectory() as folder:
        base_dir = Path(folder)
        if options.model:
            base_dir = resolve(ModelConfig(source=options.model))
        else:
            make_base(options, base_dir)
        num_weights = ModelSize.of(Checkpoint.open(base_dir)).num_weights
        versions = environment()
        print(f"{options.model or 'random Llama'}, {num_weights:,} weights, {options.precision}, "
              f"{versions['device']}")  # fmt: skip
        print("        s/step with  without  ratio   GB with  without  estimate   unchanged")
        rows = []
        for name in options.algorithms:
            row = measure(name, base_dir)
            rows.append(row)
            print(
                f"{name:6}  {row['step_s_with']:11.3f}  {row['step_s_without']:7.3f}  "
                f"{row['ratio']:5.3f}  {row['peak_bytes_with'] / 1e9:8.2f}  "
                f"{row['peak_bytes_without'] / 1e9:7.2f}  "
                f"{row['estimated_peak_bytes'] / 1e9:8.2f}  {row['update_sparsity']:9.2%}",
                flush=True,
            )
    if options.json:
        content = {
            "command": sys.argv, "num_weights": num_weights, "versions": versions, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
