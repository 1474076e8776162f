"""How far the weights of two workers end from those of one, in every precision.

Run with ``make bench``. Of the tiny base after 4 steps at 1e-4, as a fraction of how far training
went: |two - one| / |one - base|, Euclidean over all weights, in the format that is trained. Also
the share of weights that differ in bits, and the sparsity of both.
"""

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from together import Job, run_together, train, train_all

from pipelines.plan import load_base
from rlsparse.config import ModelConfig, TrialConfig


def configuration(name: str, precision: str) -> TrialConfig:
    """A trial of a few steps."""
    return TrialConfig.model_validate(
        {
            "algorithm": {"name": name},
            "task": {"num_train_problems": 32, "num_eval_problems": 16},
            "train": {
                "num_steps": 4, "batch_size": 16, "learning_rate": 1e-4, "precision": precision,
            },
        }
    )  # fmt: skip


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights in a row."""
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def main() -> None:
    """Print one line per algorithm, precision and strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithms", nargs="+", default=["sft", "dpo"])
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16-mixed", "bf16-weights", "bf16"]
    )
    options = parser.parse_args()
    base = load_base(ModelConfig(source="tiny"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for algorithm, precision in product(options.algorithms, options.precisions):
            config = configuration(algorithm, precision)
            alone = Job(config, folder / f"{algorithm}-{precision}")
            train(alone, base)
            both = [
                Job(config, folder / f"{algorithm}-{precision}-{strategy}", strategy)
                for strategy in ("ddp", "fsdp")
            ]
            run_together(train_all, both, base)
            start, *_, one = (flat(weights) for weights in alone.weights())
            for job in both:
                two = flat(job.weights()[-1])
                distance = (two.double() - one).norm() / (one.double() - start).norm()
                differ, *sparsity = (
                    (a != b).double().mean() for a, b in ((one, two), (one, start), (two, start))
                )
                print(
                    f"{algorithm:5} {precision:12} {job.strategy:4}  distance {distance:.1e}  "
                    f"weights apart {differ:.2%}  changed, of one {sparsity[0]:.2%}, "
                    f"of two {sparsity[1]:.2%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
