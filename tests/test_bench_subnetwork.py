"""The benchmark of the subnetwork optimizer, here at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent / "benchmarks" / "bench_subnetwork.py"


def rows_of(result: Path, *options: str) -> tuple[list[dict], str]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *options, "--json", str(result), "--rounds", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())["rows"], done.stdout


def test_the_benchmark_counts_bytes_and_compares_times(tmp_path: Path) -> None:
    small = ("--layers", "1", "--vocabulary", "64", "--densities", "10", "--masks", "rows")
    rows, printed = rows_of(tmp_path / "a.json", *small, "--threads", "1")
    assert [row["weights"] for row in rows] == ["fp32", "masters"]
    count = 64 * 576 + 576 * (2 * 576 + 2 * 192 + 3 * 1536) + 3 * 576
    for row, each in zip(rows, (12, 14), strict=True):
        assert row["dense_state_bytes"] == each * count
        assert sum(row["state_bytes"].values()) == pytest.approx(
            count * (row["density"] * each + 1 / 8), rel=0.02
        )
        assert row["total_speedup"]["median"] < row["step_speedup"]["median"]
        assert 0 < row["compaction_s"] < row["dense_s"] < 1
        assert f"{row['state_ratio']:.3f}" in printed


def test_the_benchmark_trains_a_llama_whole_and_its_subnetwork(tmp_path: Path) -> None:
    small = ("--parameters", "1e5", "--vocabulary", "64", "--tokens", "16", "--densities", "10")
    rows, _ = rows_of(tmp_path / "b.json", *small, "--threads", "1", "--weights", "masters")
    whole, part = rows
    assert (whole["arm"], part["arm"]) == ("whole", "subnetwork")
    assert whole["num_weights"] == part["num_weights"] == 128 * 64 + 16 * 128**2 + 3 * 128
    assert whole["state_bytes"] == 14 * whole["num_weights"]
    assert part["state_bytes"] == pytest.approx((1.4 + 1 / 8) * part["num_weights"], rel=0.03)
    assert 0 < part["optimizer_s"] < part["step_s"] < 10
    assert whole["loss"] == pytest.approx(part["loss"], rel=0.05)
