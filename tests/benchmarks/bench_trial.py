"""CPU time of a trial against the plain TRL script of the same arguments, by turns in one process.

Run with ``make bench``. Both load the base, build the trainer and train; the trial also measures
(the mask of all that ever changed after every step, the last snapshot as a patch, one problem
scored before and after). Imports are paid before, as in a worker that runs many trials. Prints the
median of the ratios of the pairs, and their range.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import plain_trl

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import TrialConfig
from rlsparse.models import TINY
from rlsparse.tasks import load_task
from rlsparse.train import train_trial


def configuration(name: str, num_steps: int) -> TrialConfig:
    """The trial that does what the plain script does."""
    return TrialConfig.model_validate(
        {
            "algorithm": {"name": name, **plain_trl.SETTINGS[name]},
            "task": {"num_eval_problems": 1},
            "train": {
                "num_steps": num_steps,
                "batch_size": 64,
                "learning_rate": 1e-4,
                "weight_decay": 0.01,
                "max_grad_norm": 0.5,
                "precision": "bf16-mixed",
                "data_seed": plain_trl.DATA_SEED,
            },
            "seed": plain_trl.SEED,
        }
    )


def cpu_seconds_of_trial(config: TrialConfig, base_fingerprint: str, folder: Path) -> float:
    """CPU seconds of the whole trial in this process."""
    started = time.process_time()
    train_trial(
        config,
        trial_id="0" * 12,
        base_dir=TINY,
        base_fingerprint=base_fingerprint,
        out_dir=folder,
    )
    return time.process_time() - started


def cpu_seconds_of_script(config: TrialConfig, folder: Path) -> float:
    """CPU seconds of the plain script in this process, its rows included."""
    started = time.process_time()
    problems = load_task(config.task).problems("train", config.task.num_train_problems)
    rows = [
        {"prompt": p.prompt, "answer": p.answer}
        if config.algorithm.name in ("grpo", "rloo")
        else {"prompt": p.prompt, "completion": p.completion}
        for p in problems
    ]
    plain_trl.run_script(
        config.algorithm.name,
        rows,
        folder,
        bf16=True,
        max_steps=config.train.num_steps,
        per_device_train_batch_size=config.train.batch_size,
    )
    return time.process_time() - started


def main() -> None:
    """Print one line per algorithm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--algorithms", nargs="+", default=["sft", "grpo", "rloo"])
    options = parser.parse_args()
    base_fingerprint = fingerprint(Checkpoint.open(TINY))
    print(f"{options.steps} steps of 64 sequences, bf16-mixed, one thread, {options.pairs} pairs")
    for name in options.algorithms:
        config = configuration(name, options.steps)
        trials, scripts = list[float](), list[float]()
        for _ in range(options.pairs + 1):  # the first pair warms caches up
            with (
                tempfile.TemporaryDirectory() as folder,
                contextlib.redirect_stdout(io.StringIO()),  # the script prints its logs
            ):
                trials.append(
                    cpu_seconds_of_trial(config, base_fingerprint, Path(folder) / "trial")
                )
                scripts.append(cpu_seconds_of_script(config, Path(folder) / "script"))
        ratios = [a / b for a, b in zip(trials[1:], scripts[1:], strict=True)]
        print(
            f"{name:5}  trial {statistics.median(trials[1:]):6.2f} s  "
            f"script {statistics.median(scripts[1:]):6.2f} s  "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
