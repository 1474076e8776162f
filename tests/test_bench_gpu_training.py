"""The benchmark of training with and without the probe runs, here at a small size on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent / "benchmarks" / "bench_gpu_training.py"


@pytest.mark.parametrize("name", ["grpo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_the_benchmark_measures_an_algorithm(name: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    sizes = ("--hidden", "64", "--layers", "1", "--vocabulary", "64")
    few = ("--steps", "4", "--batch-size", "8", "--precision", "fp32", "--algorithms", name)
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *sizes, *few, "--json", str(result)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(result.read_text())
    assert content["num_weights"] == 64 * 64 + 64 * (2 * 64 + 2 * 64 + 3 * 256) + 3 * 64
    (row,) = content["rows"]
    assert row["algorithm"] == name
    assert row["ratio"] == pytest.approx(row["step_s_with"] / row["step_s_without"])
    assert 0 < row["step_s_without"] < 10
    assert 5e8 < row["peak_bytes_without"] < 3e9
    assert 0 <= row["update_sparsity"] < 0.9  # it learns something
    assert f"{row['update_sparsity']:.2%}" in done.stdout
