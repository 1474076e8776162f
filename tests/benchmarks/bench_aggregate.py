"""Time and memory from tables to verdicts and report, for a study of 500 trials.

Run with ``make bench``; takes two minutes. The tables are synthetic and lie on disk as a study
leaves them: 125 cells x 4 seeds, 10 snapshots of 300 tensors each, the overlap of all pairs of
trials overall and in 12 modules. Only the second half is measured, in a process of its own.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from pipelines import record
from pipelines.aggregate import conclude, write_report
from pipelines.storage import Storage
from pipelines.table_files import write_table
from rlsparse import tables
from rlsparse.definitions import DEFINITIONS, NUM_MAGNITUDE_BINS, ULP_BINS
from rlsparse.identity import canonical_json
from rlsparse.schemas import SCHEMAS
from rlsparse.study import Study, Trial, expand

LEVELS = 5  # of each of three factors
SEEDS = 4
SNAPSHOTS = tuple(range(10, 101, 10))
NUM_LAYERS, MODULES = (
    27,
    ("q", "k", "v", "o", "gate", "up", "down", "norm", "bias", "other", "router"),
)
NUM_TENSORS, CHUNK = 300, 1_000_000
BASE = "b" * 64

STUDY = {
    "name": "large",
    "question": "How long does a large study take?",
    "baseline": {
        "algorithm": {"name": "grpo"},
        "train": {"num_steps": SNAPSHOTS[-1]},
        "probe": {"snapshots": list(SNAPSHOTS[:-1])},
    },
    "factors": {
        "algorithm.kl_coef": [0.0, 0.01, 0.02, 0.04, 0.08],
        "train.max_grad_norm": [0.25, 0.5, 1.0, 2.0, 4.0],
        "train.learning_rate": [1e-6, 3e-6, 1e-5, 3e-5, 1e-4],
    },
    "interactions": [["algorithm.kl_coef", "train.learning_rate"]],
    "seeds": list(range(SEEDS)),
    "claims": [
        {"id": "kl", "kind": "equivalent", "factor": "algorithm.kl_coef"},
        {"id": "clip", "kind": "equivalent", "factor": "train.max_grad_norm"},
        {"id": "rate", "kind": "monotone", "factor": "train.learning_rate",
         "direction": "decreasing"},
        {"id": "sparse", "kind": "within", "low": 0.5, "high": 1.0},
        {"id": "score", "kind": "associated", "response": "score_gain", "on": "sparsity.bitwise"},
        {"id": "seeds", "kind": "above_null", "null": ["tensor", "magnitude"]},
        {"id": "rates", "kind": "above_null", "between": "train.learning_rate"},
        {"id": "both", "kind": "interaction", "factor": "algorithm.kl_coef",
         "by": "train.learning_rate"},
    ],
}  # fmt: skip


def make_study(storage: Storage) -> None:
    """Write ``study.json`` and all tables that the stages before leave."""
    study = Study.model_validate(STUDY)
    trials = expand(study, fingerprint=lambda model: BASE, data_version=lambda config: "")
    assert len(trials) == LEVELS**3 * SEEDS
    record.write(storage, study, study.seeds, command="rlsparse run large.yaml",
                 has_begun=False, more={})  # fmt: skip
    rng = np.random.default_rng(0)
    density = {t.trial_id: rng.uniform(0.05, 0.4) for t in trials}
    write_table(storage, trials_table(study, trials, rng), "trials")
    write_table(storage, steps_table(trials, rng), "steps")
    base, place = base_table(rng)
    write_table(storage, base, "base_tensors", BASE[:12])
    for trial in trials:
        deltas = deltas_table(trial.trial_id, density[trial.trial_id], place, rng)
        write_table(storage, deltas, "tensor_deltas", trial.trial_id)
    write_table(storage, overlaps_table(density, rng), "overlaps")
    write_table(storage, consensus_table(trials), "consensus")


def trials_table(study: Study, trials: list[Trial], rng: np.random.Generator) -> pa.Table:
    rows = [
        {
            "trial_id": t.trial_id, "status": "finished", "cell": canonical_json(t.cell),
            "algorithm": t.config.algorithm.name, "seed": t.config.seed, "replicate": 0,
            "role": t.role, "precision": t.config.train.precision,
            "learning_rate": t.config.train.learning_rate, "num_steps": SNAPSHOTS[-1],
            "score_base": 0.4, "score_before": 0.4, "score_after": rng.uniform(0.45, 0.8),
            "num_eval_problems": 512, "gate_ratio": 0.04, "num_clipped_steps": 50,
            "kl_final": rng.uniform(0.01, 0.1), "patch_bytes": 10**6, "wall_s": 60.0,
            "cpu_s": 50.0, "peak_bytes": 10**9, "attempts": 1, "host": "here",
            "versions": "{}", "config": canonical_json(t.config.model_dump(mode="json")),
            "label": t.label, "base": BASE,
            **{f"factor.{path}": t.cell.get(path) for path in study.factors},
        }
        for t in trials
    ]  # fmt: skip
    return tables.from_rows(rows, "trials")


def steps_table(trials: list[Trial], rng: np.random.Generator) -> pa.Table:
    steps = np.arange(SNAPSHOTS[-1] + 1)
    scored = np.isin(steps, (0, *SNAPSHOTS))
    parts = []
    for trial in trials:
        columns = {name: rng.uniform(size=steps.size) for name in ("loss", "reward", "kl")}
        columns |= {
            name: np.where(scored, np.sort(rng.uniform(size=steps.size)), np.nan)
            for name in ("score", "kl_base")
        }
        parts.append(pd.DataFrame({"trial_id": trial.trial_id, "step": steps, **columns}))
    return as_table(pd.concat(parts), "steps")


def base_table(rng: np.random.Generator) -> tuple[pa.Table, pd.DataFrame]:
    """Table base_tensors, and its columns that say where a row is."""
    names = [(f"layers.{layer}.{m}", layer, m) for layer in range(NUM_LAYERS) for m in MODULES]
    names += [("embed", None, "embed"), ("head", None, "head"), ("norm", None, "norm")]
    names = names[:NUM_TENSORS]
    assert len(names) == NUM_TENSORS
    place = pd.DataFrame(names, columns=["tensor", "layer", "module"])
    place = place.assign(layer=place["layer"].astype("Int32"), chunk=0, start=0, num_elements=CHUNK)
    bins = rng.multinomial(CHUNK, magnitudes(), size=NUM_TENSORS)
    frame = place.assign(base=BASE, shape=[[1000, 1000]] * NUM_TENSORS, dtype="bf16", sum_sq=1.0,
                         magnitude_histogram=list(bins))  # fmt: skip
    return as_table(frame, "base_tensors"), place


def magnitudes() -> np.ndarray:
    shares = np.zeros(NUM_MAGNITUDE_BINS)
    shares[25:40] = np.arange(1, 16)
    return shares / shares.sum()


def deltas_table(
    trial_id: str, density: float, place: pd.DataFrame, rng: np.random.Generator
) -> pa.Table:
    parts = []
    for number, step in enumerate(SNAPSHOTS, 1):
        share = density * number / len(SNAPSHOTS)
        changed = rng.binomial(CHUNK, share, NUM_TENSORS)
        columns = {f"num_changed_{name}": changed // (1 + i) for i, name in enumerate(DEFINITIONS)}
        histograms = {
            "magnitude_histogram_changed": list(rng.multinomial(changed, magnitudes())),
            "ulp_histogram": list(rng.multinomial(changed, np.full(len(ULP_BINS), 0.1))),
        }
        parts.append(
            place.assign(step_after=step, sum_sq_delta=changed * 1e-9, **columns, **histograms)
        )
    frame = pd.concat(parts).assign(trial_id=trial_id, step_before=0, view="stored", dtype="bf16",
                                    sum_sq_before=1.0)  # fmt: skip
    return as_table(frame, "tensor_deltas")


def overlaps_table(density: dict[str, float], rng: np.random.Generator) -> pa.Table:
    names = sorted(density)
    a, b = np.triu_indices(len(names), 1)
    ids, shares = np.array(names, object), np.array([density[name] for name in names])
    parts = []
    for module in (None, *MODULES, "embed"):
        n = CHUNK * (NUM_TENSORS if module is None else NUM_LAYERS)
        num_a, num_b = (n * shares[a]).astype(int), (n * shares[b]).astype(int)
        expected = num_a * num_b / n
        lift = rng.uniform(1.0, 1.2, a.size)
        parts.append(
            pd.DataFrame(
                {
                    "trial_a": ids[a], "step_a": SNAPSHOTS[-1], "trial_b": ids[b],
                    "step_b": SNAPSHOTS[-1], "definition": "bitwise", "view": "stored",
                    "tensor": None, "module": module, "num_elements": n, "num_a": num_a,
                    "num_b": num_b, "num_both": (expected * lift).astype(int),
                    "num_both_random": expected.astype(int), "expected_uniform": expected,
                    "expected_tensor": expected * 1.02, "expected_magnitude": expected * 1.05,
                    "expected_update_size": expected * 1.06, "expected_margins": expected * 1.03,
                    "update_size_of": names[0],
                }
            )
        )  # fmt: skip
    return as_table(pd.concat(parts), "overlaps")


def consensus_table(trials: list[Trial]) -> pa.Table:
    cells = dict.fromkeys(canonical_json(t.cell) for t in trials)
    rows = [
        {
            "cell": cell, "algorithm": "grpo", "step": SNAPSHOTS[-1], "view": "stored",
            "module": module, "num_runs": SEEDS, "k": k, "num_elements": CHUNK,
            "num_changed": CHUNK // 5, "expected_uniform": CHUNK / 5, "expected_tensor": CHUNK / 5,
            "expected_magnitude": CHUNK / 5,
        }
        for cell in cells
        for module in (None, *MODULES, "embed")
        for k in range(SEEDS + 1)
    ]  # fmt: skip
    return tables.from_rows(rows, "consensus")


def as_table(frame: pd.DataFrame, name: str) -> pa.Table:
    """Table ``name`` of a frame; columns that it lacks are null."""
    schema = SCHEMAS[name]
    full = frame.reindex(columns=schema.names)
    return tables.check(pa.Table.from_pandas(full, schema=schema, preserve_index=False), name)


def measure(folder: str) -> None:
    """What the benchmark measures, and how much memory it took."""
    storage = Storage(folder)
    study, _ = record.read(storage)
    begin = time.perf_counter()
    registered = record.registration(storage, study, range(SEEDS))
    found = conclude(study, storage, registered, allow_missing=False)
    judged = time.perf_counter()
    write_report(study, storage, found, registered, allow_missing=False)
    end = time.perf_counter()
    status = Path("/proc/self/status").read_text()
    (peak,) = [int(line.split()[1]) / 1e6 for line in status.splitlines() if "VmHWM" in line]
    page = Path(storage.path("report/index.html")).stat().st_size / 1e6
    print(f"effects and verdicts {judged - begin:.1f} s, report {end - judged:.1f} s, peak "
          f"{peak:.2f} GB, page {page:.1f} MB")  # fmt: skip
    for name, table in found.items():
        print(f"  {name:10} {table.num_rows:8} rows")


def main() -> None:
    """Make the tables, and measure in another process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", metavar="DIR", help="just measure; used by itself")
    parser.add_argument("--keep", metavar="DIR", help="make the tables here, and leave them")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    folder = options.keep or tempfile.mkdtemp()
    try:
        if not Path(folder, "study.json").exists():
            make_study(Storage(folder))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        print(f"500 trials, {size / 1e6:.0f} MB of tables", flush=True)
        subprocess.run([sys.executable, __file__, "--measure", folder], check=True)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
