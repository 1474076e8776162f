"""Time and memory of the report of a study of 500 trials, and the sizes of its files.

125 cells x 4 seeds, 300 parts of a model, 10 snapshots: 1.5 M rows of `changes`, 2 M of `overlaps`.
The tables are made and written first; building the report from them is a process of its own.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from rlsparse import tables
from rlsparse.definitions import DEFINITIONS, NULLS, NUM_MAGNITUDE_BINS, ULP_BINS
from rlsparse.report.study_page import build_report
from rlsparse.schemas import SCHEMAS
from rlsparse.study import Study

MODULES = ("q", "k", "v", "o", "gate", "up", "down", "norm")
NUM_LAYERS = 37
FACTORS = {
    "algorithm.name": ["grpo", "sft", "dpo", "rloo", "kto"],
    "train.learning_rate": [1e-6, 3e-6, 1e-5, 3e-5, 1e-4],
    "train.max_grad_norm": [0.1, 0.3, 1.0, 3.0, None],
}
SIZE = 2**20
LAST = 150


def make_study(num_seeds: int) -> Study:
    """A study with every kind of table."""
    return Study.model_validate(
        {
            "name": "large",
            "question": "What does a report of many trials cost?",
            "baseline": {"algorithm": {"name": "grpo"}, "train": {"precision": "bf16-mixed"}},
            "factors": FACTORS,
            "seeds": list(range(num_seeds)),
        }
    )


def trial_table(num_seeds: int) -> pa.Table:
    """All cells at all seeds, finished."""
    rows = []
    cells = itertools.product(*FACTORS.values())
    for (i, (name, rate, norm)), seed in itertools.product(enumerate(cells), range(num_seeds)):
        cell = dict(zip(FACTORS, (name, str(rate), str(norm)), strict=True))
        rows.append(
            {
                "trial_id": f"{i:08x}{seed:04x}",
                "status": "finished",
                "cell": json.dumps(cell),
                "algorithm": name,
                "seed": seed,
                "replicate": 0,
                "role": "baseline" if i == 0 else "factor",
                "precision": "bf16-mixed",
                "learning_rate": rate,
                "num_steps": LAST,
                "score_before": 0.4,
                "score_after": 0.4 + 0.001 * (i + seed),
                "gate_ratio": rate * 4000,
                "kl_final": 0.001 * i,
                "wall_s": 60.0,
            }
        )
    return tables.from_rows(rows, "trials")


def filled(name: str, columns: dict[str, object], num_rows: int) -> pa.Table:
    """A table of ``columns``; all others are null."""
    return pa.table(
        {
            field.name: columns[field.name]
            if field.name in columns
            else pa.nulls(num_rows, field.type)
            for field in SCHEMAS[name]
        },
        SCHEMAS[name],
    )


def named(names: list[str | None], places: np.ndarray) -> pa.Array:
    """Strings by place."""
    return pa.DictionaryArray.from_arrays(places, pa.array(names, pa.string())).cast(pa.string())


def change_table(ids: list[str], rng: np.random.Generator, num_snapshots: int) -> pa.Table:
    """Per trial, snapshot, layer and module."""
    parts = [(layer, m) for layer in range(NUM_LAYERS) for m in range(len(MODULES))]
    parts += [(-1, len(MODULES)), (-1, len(MODULES) - 1)]
    trial, step, part = (
        axis.ravel()
        for axis in np.meshgrid(
            np.arange(len(ids)), np.arange(1, num_snapshots + 1), np.arange(len(parts)),
            indexing="ij",
        )
    )  # fmt: skip
    layer, module = np.array(parts).T[:, part]
    changed = (SIZE * 0.3 * np.sqrt(step / num_snapshots) * rng.uniform(0.5, 1, part.size)).astype(
        np.int64
    )
    return filled(
        "changes",
        {
            "trial_id": named(ids, trial),
            "step": step * LAST // num_snapshots,
            "view": named(["stored"], np.zeros(part.size, np.int64)),
            "layer": pa.array(layer.astype(np.int32), mask=layer < 0),
            "module": named([*MODULES, "embed"], module),
            "num_elements": np.full(part.size, SIZE),
            **{f"num_changed_{d}": changed >> i for i, d in enumerate(DEFINITIONS)},
        },
        part.size,
    )


def overlap_table(ids: list[str], rng: np.random.Generator, num_snapshots: int) -> pa.Table:
    """All pairs of trials, overall and per module, and the snapshots of each trial."""
    first, second = np.triu_indices(len(ids), 1)
    modules: list[str | None] = [None, *MODULES, "embed", "head", "bias", "qkv", "gate_up", "other"]
    a, b = np.repeat(first, len(modules)), np.repeat(second, len(modules))
    module = np.tile(np.arange(len(modules)), first.size)
    snapshot = np.tile(np.arange(1, num_snapshots), len(ids)) * LAST // num_snapshots
    own = np.repeat(np.arange(len(ids)), num_snapshots - 1)
    step = np.concatenate([np.full(a.size, LAST), snapshot])
    a, b = np.concatenate([a, own]), np.concatenate([b, own])
    module = np.concatenate([module, np.zeros(own.size, np.int64)])
    num = np.full(a.size, int(0.2 * SIZE))
    both = (0.1 * SIZE * rng.uniform(0.8, 1.2, a.size)).astype(np.int64)
    return filled(
        "overlaps",
        {
            "trial_a": named(ids, a), "step_a": step,
            "trial_b": named(ids, b), "step_b": np.full(a.size, LAST),
            "definition": named(["bitwise"], np.zeros(a.size, np.int64)),
            "view": named(["stored"], np.zeros(a.size, np.int64)),
            "module": named(modules, module),
            "num_elements": np.full(a.size, SIZE),
            "num_a": num, "num_b": num, "num_both": both, "num_both_random": both // 3,
            **{f"expected_{null}": 0.04 * SIZE * (1 + 0.3 * i) * rng.uniform(0.95, 1.05, a.size)
               for i, null in enumerate(NULLS)},
        },
        a.size,
    )  # fmt: skip


def step_table(ids: list[str], rng: np.random.Generator) -> pa.Table:
    """A row per step, scored at ten of them."""
    trial, step = np.repeat(np.arange(len(ids)), LAST + 1), np.tile(np.arange(LAST + 1), len(ids))
    loss = 2 / (1 + step / 30) * rng.uniform(0.9, 1.1, step.size)
    columns = {
        "trial_id": named(ids, trial), "step": step, "loss": loss,
        "score": pa.array(0.4 + 0.002 * step, mask=step % (LAST // 10) != 0),
    }  # fmt: skip
    return filled("steps", columns, step.size)


def small_tables(trials: list[dict[str, object]], rng: np.random.Generator) -> dict[str, pa.Table]:
    """Magnitudes, consensus, spectra, effects, terms, means and claims, at random."""
    histogram = np.zeros(NUM_MAGNITUDE_BINS, np.int64)
    histogram[20:40] = 10_000
    share = np.linspace(1, 0, NUM_MAGNITUDE_BINS)
    magnitudes = [
        {"trial_id": t["trial_id"], "step": LAST, "view": "stored",
         "magnitude_histogram": histogram.tolist(),
         "magnitude_histogram_changed": (histogram * share).astype(int).tolist(),
         "ulp_histogram": [1] * len(ULP_BINS)}
        for t in trials
    ]  # fmt: skip
    cells = {t["cell"]: t["algorithm"] for t in trials}
    consensus = [
        {"cell": cell, "algorithm": name, "step": LAST, "view": "stored", "num_runs": 4, "k": k,
         "num_elements": SIZE, "num_changed": SIZE // (k + 2), "expected_uniform": SIZE / 4**k,
         "expected_tensor": SIZE / 3.5**k, "expected_magnitude": SIZE / 3**k}
        for cell, name in cells.items()
        for k in range(5)
    ]  # fmt: skip
    spectra = [
        {"trial_id": t["trial_id"], "step_before": 0, "step_after": LAST, "view": "stored",
         "tensor": f"t{i}", "module": "q", "shape": [64, 64], "kind": kind,
         "energy_rank": int(rng.integers(20, 64)), "rank_share_default": float(rng.uniform(0.9, 1))}
        for t in trials[:40]
        for i in range(20)
        for kind in ("update", "null")
    ]  # fmt: skip
    levels = [(f, str(v), str(vs[0])) for f, vs in FACTORS.items() for v in vs[1:]]
    interval = {"estimate": 0.4, "ci_low": 0.1, "ci_high": 0.7, "ci_level": 0.95}
    common = interval | {"scale": "log_odds", "p_value": 0.125, "p_floor": 0.125, "num_runs": 4}
    effects = [
        common | {"response": response, "factor": factor, "level": level, "reference": reference,
                  "within": json.dumps({"x": str(i)}) if i else "{}", "correlation": 0.5}
        for response in (*(f"sparsity.{d}@stored" for d in DEFINITIONS), "score_after", "kl_final")
        for factor, level, reference in levels
        for i in range(26)
    ]  # fmt: skip
    effects += [
        common | {"response": "sparsity.bitwise@stored", "factor": f, "level": level,
                  "reference": reference, "within": "{}", "p_adjusted": 0.2, part: value,
                  "estimate": float(rng.normal())}
        for f, level, reference in levels
        for part, values in (("layer", range(NUM_LAYERS)), ("module", MODULES))
        for value in values
    ]  # fmt: skip
    terms = [
        {"response": "sparsity.bitwise@stored", "term": term, "df": 4, "df_residual": 400,
         "sum_sq": 3.2, "f_value": 12.3, "p_value": 1e-5, "p_adjusted": 3e-5, "omega_sq": 0.4,
         "num_runs": 500}
        for term in (*FACTORS, "algorithm.name : train.learning_rate", "seed")
    ]  # fmt: skip
    means = [
        common | {"response": "sparsity.bitwise@stored", "factor": factor, "level": str(level)}
        for factor, values in FACTORS.items()
        for level in values
    ]
    claims = [
        {"id": f"claim-{i}", "kind": "greater", "statistic": "odds ratio of sparsity.bitwise@stored"
         ", a over b; t interval over seeds", "scope": "base tiny; task chain_sum; steps 150",
         "registered": "registered" if i else "post hoc", "verdict": verdict,
         "outcome": f"{verdict}: 1.5 times the odds", "estimate": 1.5, "ci_low": 1.2,
         "ci_high": 1.9, "ci_level": 0.99, "margin": 1.0, "p_value": 0.01, "p_floor": 0.125,
         "num_runs": 4, "depends_on_definition": i == 1, "note": "a note",
         "alternatives": json.dumps({"abs_1e-05@stored": "supported", "tensor": "refuted"}),
         "would_decide": "four more seeds" if verdict == "undecided" else None}
        for i, verdict in enumerate(("supported", "refuted", "undecided", "supported"))
    ]  # fmt: skip
    rows = {
        "magnitudes": magnitudes, "consensus": consensus, "spectra": spectra, "effects": effects,
        "terms": terms, "means": means, "claims": claims,
    }  # fmt: skip
    return {name: tables.from_rows(list(part), name) for name, part in rows.items()}


def make_tables(num_seeds: int, num_snapshots: int) -> dict[str, pa.Table]:
    """All tables of the study."""
    rng = np.random.default_rng(0)
    trials = trial_table(num_seeds)
    ids = trials["trial_id"].to_pylist()
    return {
        "trials": trials,
        "steps": step_table(ids, rng),
        "changes": change_table(ids, rng, num_snapshots),
        "overlaps": overlap_table(ids, rng, num_snapshots),
        **small_tables(trials.to_pylist(), rng),
    }


def build(folder: Path, num_seeds: int) -> None:
    """Read the tables in ``folder``, build the report there and print what it cost."""
    start = time.perf_counter()
    found = {file.stem: tables.read(file, file.stem) for file in sorted(folder.glob("*.parquet"))}
    read = time.perf_counter()
    page = build_report(make_study(num_seeds), found, folder, provenance={})
    built = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sizes = {file.name: file.stat().st_size / 1e6 for file in page.parent.glob("*.[hj]*")}
    print(f"reading the tables {read - start:6.1f} s")
    print(f"report             {built - read:6.1f} s, {peak:.2f} GiB at most")
    print(", ".join(f"{name} {size:.1f} MB" for name, size in sorted(sizes.items())))


def main() -> None:
    """Make the tables and build their report in a new process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--snapshots", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="keep tables and report here")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        build(given.folder, given.seeds)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in make_tables(given.seeds, given.snapshots).items():
            tables.write(table, name, folder / f"{name}.parquet")
            print(f"{name:12} {table.num_rows:10,} rows")
        command = [sys.executable, __file__, "--build", "--folder", folder]
        subprocess.run([*command, "--seeds", str(given.seeds)], check=True)


if __name__ == "__main__":
    main()
