"""A small study file, and ways to vary it."""

from pathlib import Path

from rlsparse.study import Study
from rlsparse.study_file import load_study

STUDY = """\
question: Why?
baseline:
  algorithm: {name: grpo}
  train:
    num_steps: 20
    learning_rate: 1e-5
seeds: [0, 1]
claims:
  - id: first
    kind: exact
  - id: second
    kind: above_null
    null: tensor
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "why.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str = STUDY, *overrides: str) -> Study:
    return load_study(write(folder, text), overrides)


def with_factors(factors: str, controls: str = "") -> str:
    return STUDY.replace("seeds:", f"factors:\n{factors}\n{controls}\nseeds:")
