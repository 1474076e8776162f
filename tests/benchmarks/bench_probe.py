"""CPU time of a trial with its probe against the same trial without, by turns in one process.

Run with ``make bench``. Of a study's baseline, that of ``ablations/quickstart.yaml`` unless another
is given, with each algorithm the part that trains is timed: with the probe it also writes the
snapshots as patches, measures the sparsity of every step and keeps the mask of all that ever
changed, and writes that at its end. Scores and divergences, which cost what their problems cost,
are taken in neither. ``--probe`` adds what else is to be priced. Prints the median of the ratios of
the pairs, in which either goes first in turn, and their range, and what the probe says that its
parts took. The rest of the difference is the allocator's, which gives memory back to the system at
other moments (glibc; page faults). A base of 135M weights, in fewer steps than its study:

    python tests/benchmarks/bench_probe.py --study ablations/smollm2_quickstart.yaml --pairs 2 \\
        --algorithms sft grpo --train '{"num_steps": 8}'
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


def configuration(study: Path, name: str, **fields: dict[str, Any]) -> TrialConfig:
    """The study's baseline with this algorithm, and these fields of its parts."""
    baseline = load_study(study, []).baseline.model_dump(mode="json")
    return TrialConfig.model_validate(
        {
            **baseline,
            "algorithm": {"name": name},
            **{part: {**baseline[part], **own} for part, own in fields.items()},
        }
    )


def cpu_seconds(config: TrialConfig, *, probe_with: str | None) -> tuple[float, dict[str, float]]:
    """CPU seconds of training, with a probe if the base's fingerprint is given, and of its parts.

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
            return time.process_time() - started, {}
        probe = Probe(
            config,
            context.model,
            trial_id="0" * 12,
            base=Checkpoint.open(base_dir),
            base_fingerprint=probe_with,
            out_dir=folder,
            score=lambda: Score((0.0,)),
            distance=lambda: 0.0,
            on_progress=lambda row: None,
        )
        trainer.add_callback(probe)
        trainer.train()
        probe.finish()
        return time.process_time() - started, probe.prices.cpu_s


def main() -> None:
    """Print one line per algorithm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "dpo", "sft"])
    parser.add_argument("--study", type=Path, default=QUICKSTART, help="its YAML file")
    for part in ("model", "task", "train", "probe"):
        parser.add_argument(f"--{part}", type=json.loads, default={}, help="its fields, as JSON")
    options = parser.parse_args()
    for name in options.algorithms:
        config = configuration(
            options.study,
            name,
            model=options.model,
            task=options.task,
            train=options.train,
            probe=options.probe,
        )
        base_fingerprint = fingerprint(Checkpoint.open(resolve(config.model)))
        with_probe, without, parts = list[float](), list[float](), dict[str, float]()
        for number in range(options.pairs + 1):  # the first pair warms caches up
            for is_probed in (True, False) if number % 2 else (False, True):
                if is_probed:
                    measured, parts = cpu_seconds(config, probe_with=base_fingerprint)
                    with_probe.append(measured)
                else:
                    without.append(cpu_seconds(config, probe_with=None)[0])
        ratios = [a / b for a, b in zip(with_probe[1:], without[1:], strict=True)]
        print(
            f"{name:5}  with {statistics.median(with_probe[1:]):6.2f} s  "
            f"without {statistics.median(without[1:]):6.2f} s  "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})  "
            + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
