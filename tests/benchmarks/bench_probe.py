"""CPU time of a trial with its probe against the same trial without, by turns in one process.

Run with ``make bench``. Of the quickstart's baseline (``ablations/quickstart.yaml``) and its levels
the part that trains is timed: with the probe it also writes the snapshots as patches, measures the
sparsity of every step and keeps the mask of all that ever changed, and writes that at its end.
Scores and divergences, which cost what their problems cost, are taken in neither. ``--probe`` adds
what else is to be priced. Prints the median of the ratios of the pairs, and their range.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from transformers import PrinterCallback

from rlsparse.algorithms import ALGORITHMS
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.config import TrialConfig
from rlsparse.models import resolve
from rlsparse.probe import Probe
from rlsparse.study_file import load_study
from rlsparse.tasks.generate import Score
from rlsparse.train import _load, _make_deterministic

QUICKSTART = Path(__file__).parents[2] / "ablations" / "quickstart.yaml"


def configuration(name: str, train: dict[str, Any], probe: dict[str, Any]) -> TrialConfig:
    """The quickstart's baseline with this algorithm."""
    baseline = load_study(QUICKSTART, []).baseline.model_dump(mode="json")
    return TrialConfig.model_validate(
        {
            **baseline,
            "algorithm": {"name": name},
            "train": {**baseline["train"], **train},
            "probe": {**baseline["probe"], **probe},
        }
    )


def cpu_seconds(config: TrialConfig, *, probe_with: str | None) -> float:
    """CPU seconds of training, with a probe if the base's fingerprint is given.

    Loading the model and building the trainer are paid before.
    """
    base_dir = resolve(config.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_deterministic(config.sampling_seed, 1)
        context = _load(config, base_dir, folder / "scratch")
        trainer = ALGORITHMS[config.algorithm.name](context)
        trainer.remove_callback(PrinterCallback)
        transformers.set_seed(config.sampling_seed)
        started = time.process_time()
        if probe_with is None:
            trainer.train()
            return time.process_time() - started
        probe = Probe(
            config,
            context.model,
            trial_id="0" * 12,
            base=Checkpoint.open(base_dir),
            base_fingerprint=probe_with,
            out_dir=folder,
            score=lambda: Score(num_correct=0, num_problems=1),
            distance=lambda: 0.0,
            on_progress=lambda row: None,
        )
        trainer.add_callback(probe)
        trainer.train()
        probe.finish()
        return time.process_time() - started


def main() -> None:
    """Print one line per algorithm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "dpo", "sft"])
    parser.add_argument("--train", type=json.loads, default={}, help="fields of train, as JSON")
    parser.add_argument("--probe", type=json.loads, default={}, help="fields of probe, as JSON")
    options = parser.parse_args()
    for name in options.algorithms:
        config = configuration(name, options.train, options.probe)
        base_fingerprint = fingerprint(Checkpoint.open(resolve(config.model)))
        with_probe, without = list[float](), list[float]()
        for _ in range(options.pairs + 1):  # the first pair warms caches up
            with_probe.append(cpu_seconds(config, probe_with=base_fingerprint))
            without.append(cpu_seconds(config, probe_with=None))
        ratios = [a / b for a, b in zip(with_probe[1:], without[1:], strict=True)]
        print(
            f"{name:5}  with {statistics.median(with_probe[1:]):6.2f} s  "
            f"without {statistics.median(without[1:]):6.2f} s  "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
