"""Runs of plain TRL scripts, listed in a CSV file, through tables, claims and report."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from command import Command
from datasets import Dataset
from plain_trl import COMMON, SCRIPTS
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.pair_plan import make_pair_plan, measured_runs
from rlsparse import tables
from rlsparse.models import TINY
from rlsparse.study import PairStudy
from rlsparse.study_file import load_study

ALGORITHMS, RATES, SEEDS, STEPS = ("sft", "dpo"), (3e-6, 1e-5), (0, 1, 2, 3), (2, 4)

RUNS = [(name, rate, seed) for name in ALGORITHMS for rate in RATES for seed in SEEDS]

STUDY = """\
question: Do the updates of plain TRL scripts differ in density?
pairs: pairs.csv
views: [bf16]
settings: {train.precision: bf16-mixed, task: sums}
reference: {train.learning_rate: 1e-5}
claims:
  - {id: slow-is-sparser, kind: greater,
     a: {train.learning_rate: 3e-6}, b: {train.learning_rate: 1e-5}}
  - {id: faster-is-sparser, kind: monotone, factor: train.learning_rate, direction: increasing}
  - {id: sft-is-dense, kind: within, where: {algorithm: sft}, low: 0.0, high: 0.5}
  - {id: dpo-recurs, kind: above_null, null: [tensor, magnitude],
     where: {algorithm: dpo, train.learning_rate: 3e-6}}
  - {id: at-equal-kl, kind: greater, a: {algorithm: dpo}, b: {algorithm: sft}, at: {kl: common}}
  - {id: score-gained, kind: within, response: score_gain, where: {algorithm: sft}, low: 0, high: 1}
"""


def train(algorithm: str, rate: float, seed: int, folder: Path) -> None:
    """A plain TRL script: fp32 weights under bf16 autocast, a checkpoint every other step."""
    rows = []
    for a, b in np.random.default_rng(seed).integers(1, 50, (32, 2)):
        row = {"prompt": f"{a}+{b}=", "completion": f" {a + b}\n"}
        if algorithm == "dpo":
            row = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" {a}\n"}
        rows.append(row)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    common = {
        **COMMON, "output_dir": str(folder), "bf16": True, "max_steps": STEPS[-1], "seed": seed,
        "data_seed": seed, "save_strategy": "steps", "save_steps": 2, "save_only_model": True,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    trainer = SCRIPTS[algorithm](model, tokenizer, Dataset.from_list(rows), optimizer, common)
    transformers.set_seed(seed)
    trainer.train()


@dataclass(frozen=True)
class Ran:
    """Checkpoints made by plain scripts, their study, and what the command printed."""

    folder: Path
    command: Command
    out: str = ""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.command.run(
            "run", self.folder / "trl.yaml", "--storage", self.folder / "runs", *arguments
        )

    @property
    def storage(self) -> Path:
        return self.folder / "runs" / "trl"

    def table(self, name: str) -> pa.Table:
        return tables.read(self.storage / "tables" / f"{name}.parquet", name)

    def trial(self, algorithm: str, rate: float, seed: int) -> dict:
        """The row of one run."""
        (found,) = [
            row
            for row in self.table("trials").to_pylist()
            if (row["algorithm"], row["learning_rate"], row["seed"]) == (algorithm, rate, seed)
        ]
        return found

    def changed(self, algorithm: str, rate: float, seed: int, step: int) -> np.ndarray:
        """Which weights changed in bf16, in one row; plain numpy."""
        before = load_file(self.folder / "base" / "model.safetensors")
        after = load_file(self.folder / out(algorithm, rate, seed, step) / "model.safetensors")
        return np.concatenate(
            [
                (old.view("<u2") != after[name].astype(ml_dtypes.bfloat16).view("<u2")).ravel()
                for name, old in sorted(before.items())
                if name in after
            ]
        )


def out(algorithm: str, rate: float, seed: int, step: int) -> str:
    return f"out/{algorithm}-{rate}-{seed}/checkpoint-{step}"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """A study of 16 runs of plain scripts. Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    torch.set_num_threads(1)
    shutil.copytree(TINY, folder / "base")
    lines = ["before,after,step,seed,score,algorithm,train.learning_rate"]
    for algorithm, rate, seed in RUNS:
        train(algorithm, rate, seed, (folder / out(algorithm, rate, seed, 0)).parent)
        lines += [
            f"base,{out(algorithm, rate, seed, step)},{step},{seed},0.5,{algorithm},{rate}"
            for step in STEPS
        ]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "trl.yaml").write_text(STUDY)
    command = Command(tmp_path_factory.mktemp("cwd"))
    try:
        result = Ran(folder, command).run()
        assert result.returncode == 0, result.stderr
        yield Ran(folder, command, result.stdout)
    finally:
        command.close()


def test_sparsity_is_that_of_an_independent_count(ran):
    changes = ran.table("changes").to_pandas()
    assert set(changes["view"]) == {"bf16"}
    sums = changes.groupby(["trial_id", "step"])[["num_elements", "num_changed_bitwise"]].sum()
    assert len(sums) == len(RUNS) * len(STEPS)
    for run in RUNS:
        for step in STEPS:
            expected = ran.changed(*run, step)
            found = sums.loc[ran.trial(*run)["trial_id"], step]
            assert tuple(found) == (expected.size, expected.sum())
            assert expected.any()


def test_trials_and_steps(ran):
    trials = ran.table("trials").to_pylist()
    assert {row["status"] for row in trials} == {"finished"}
    first = ran.trial("sft", 1e-5, 0)
    assert {row["role"] for row in trials if row["cell"] == first["cell"]} == {"baseline"}
    assert sum(row["role"] == "baseline" for row in trials) == len(SEEDS)
    base = load_file(ran.folder / "base" / "model.safetensors")
    weights = np.concatenate([w.astype(np.float32).ravel() for w in base.values()])
    expected = 256 * 1e-5 / float(np.median(np.abs(weights)))
    assert first["gate_ratio"] == pytest.approx(expected, rel=0.05, abs=0)
    config = json.loads(first["config"])
    assert config["train"] == {"learning_rate": 1e-5, "num_steps": 4, "precision": "bf16-mixed"}
    assert (config["task"], config["model"]) == ({"name": "sums"}, {"source": "base"})
    assert first["cell"] == '{"algorithm":"sft","train.learning_rate":"1e-05"}'
    steps = [s for s in ran.table("steps").to_pylist() if s["trial_id"] == first["trial_id"]]
    assert [(s["step"], s["score"]) for s in steps] == [(0, None), (2, 0.5), (4, 0.5)]


def test_overlaps_are_those_of_the_checkpoints(ran):
    pair = [("dpo", 3e-6, 0), ("sft", 1e-5, 2)]
    a, b = (ran.changed(*run, 4) for run in pair)
    expected = {
        ran.trial(*run)["trial_id"]: int(m.sum()) for run, m in zip(pair, (a, b), strict=True)
    }
    (row,) = [
        row
        for row in ran.table("overlaps").to_pylist()
        if {row["trial_a"], row["trial_b"]} == expected.keys()
        and (row["module"], row["tensor"], row["view"]) == (None, None, "bf16")
    ]
    assert (row["step_a"], row["step_b"], row["num_elements"]) == (4, 4, a.size)
    assert {row["trial_a"]: row["num_a"], row["trial_b"]: row["num_b"]} == expected
    assert row["num_both"] == int((a & b).sum())
    assert row["expected_uniform"] == pytest.approx(a.mean() * b.sum(), rel=1e-9, abs=0)


def test_claims(ran):
    claims = {row["id"]: row for row in ran.table("claims").to_pylist()}
    assert {row["registered"] for row in claims.values()} == {"registered"}
    odds = {
        run: np.log((mask.size - mask.sum() + 0.5) / (mask.sum() + 0.5))
        for run in RUNS
        for mask in [ran.changed(*run, 4)]
    }
    slow, fast = (np.mean([odds[run] for run in RUNS if run[1] == rate]) for rate in RATES)
    sparser = claims["slow-is-sparser"]
    assert sparser["estimate"] == pytest.approx(np.exp(slow - fast), rel=1e-6, abs=0)
    assert (sparser["verdict"], sparser["num_runs"]) == ("supported", 4)
    assert "learning rate" in sparser["scope"]
    assert claims["faster-is-sparser"]["verdict"] == "refuted"
    assert claims["sft-is-dense"]["verdict"] == "refuted"
    assert claims["dpo-recurs"]["num_runs"] == 4
    for name, missing in (("at-equal-kl", "kl"), ("score-gained", "score")):
        assert claims[name]["verdict"] == "undecided"
        assert missing in claims[name]["note"].lower()


def test_effects_and_report(ran):
    effects = ran.table("effects").to_pandas()
    assert {"algorithm", "train.learning_rate"} <= set(effects["factor"])
    rates = effects[effects["response"].str.startswith("sparsity.")]
    rates = rates[rates["factor"] == "train.learning_rate"]
    assert set(rates["reference"]) == {"1e-05"}  # as the study says, not the first that occurs
    terms = ran.table("terms").to_pandas()
    assert {"algorithm", "train.learning_rate", "seed"} <= set(terms["term"])
    page = (ran.storage / "report" / "index.html").read_text()
    assert "Do the updates of plain TRL scripts differ in density?" in page
    assert json.loads((ran.storage / "report" / "report.json").read_text())
    assert "slow-is-sparser" in ran.out
    recorded = json.loads((ran.storage / "study.json").read_text())
    assert set(recorded["registered"]["claims"]) == set(claims_of(ran))
    assert str(ran.folder) not in json.dumps(recorded["registered"])  # a study may be moved


def claims_of(ran: Ran) -> list[str]:
    return ran.table("claims")["id"].to_pylist()


# --- again -----------------------------------------------------------------------------------


def test_again_does_nothing_again(ran):
    def parts() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (ran.storage / "tables").rglob("*.parquet")}

    before = parts()
    command = Command(ran.command.cwd / "again")
    command.cwd.mkdir()
    again = Ran(ran.folder, command).run()
    command.close()
    assert (again.returncode, parts()) == (0, before)
    assert "diffing" not in again.stderr


def test_a_claim_that_comes_late_is_judged_without_counting_again(ran, tmp_path):
    shutil.copytree(ran.folder, tmp_path / "late", copy_function=shutil.copy2)
    command = Command(tmp_path)
    late = Ran(tmp_path / "late", command)
    overlaps = late.storage / "tables" / "overlaps.parquet"
    before, yaml = overlaps.stat().st_mtime_ns, late.folder / "trl.yaml"
    yaml.write_text(f"{yaml.read_text()}  - {{id: late, kind: above_null}}\n")
    done = late.run()
    assert (done.returncode, overlaps.stat().st_mtime_ns) == (0, before)
    assert late.table("claims").to_pylist()[-1]["registered"] == "post hoc"
    yaml.write_text(f"{yaml.read_text()}  - {{id: early, kind: above_null, at: {{step: 2}}}}\n")
    done = late.run()
    command.close()
    assert done.returncode == 0
    assert overlaps.stat().st_mtime_ns > before
    assert late.table("claims").to_pylist()[-1]["estimate"] is not None


@pytest.mark.slow
def test_what_is_wrong_with_some_runs(ran, tmp_path):
    """Only they are measured again; the others stay, and are judged from their tables alone."""
    shutil.copytree(ran.folder, tmp_path / "moved", copy_function=shutil.copy2)
    command = Command(tmp_path)
    moved = Ran(tmp_path / "moved", command)
    cut, lacking, copied = (
        moved.folder / out(*run, 4) / "model.safetensors"
        for run in (("sft", 1e-5, 3), ("sft", 1e-5, 2), ("dpo", 1e-5, 1))
    )
    cut.write_bytes(cut.read_bytes()[:-100])
    weights = load_file(lacking)
    del weights["model.norm.weight"]
    save_file(weights, lacking)
    shutil.copy(moved.folder / out("dpo", 1e-5, 0, 4) / "model.safetensors", copied)
    interrupted = ran.trial("dpo", 3e-6, 0)["trial_id"]  # before the ledger was told
    (moved.storage / "ledger" / f"{interrupted}.json").unlink()
    parts = moved.storage / "tables" / "tensor_deltas.parquet"
    before = {path.stem: path.stat().st_mtime_ns for path in parts.iterdir()}
    try:
        found = moved.run()
        assert found.returncode == 1
        assert "diffing 6 pairs of checkpoints" in found.stderr
        for part in ("alike: dpo s0 learning_rate=1e-05", "dpo-1e-05-0", "dpo-1e-05-1", "copies"):
            assert part in found.stderr
        after = {path.stem: path.stat().st_mtime_ns for path in parts.iterdir()}
        changed = {name for name in before if after[name] != before[name]}
        assert changed == {ran.trial("dpo", 1e-5, 1)["trial_id"]}
        errors = {row["label"]: row["error"] for row in moved.table("trials").to_pylist()}
        labels = [label for label, error in errors.items() if error]
        assert labels == ["sft s2 learning_rate=1e-05", "sft s3 learning_rate=1e-05"]
        assert "model.norm.weight is compared not at all, in other checkpoints" in errors[labels[0]]
        assert str(cut) in errors[labels[1]]
        for folder in ("out", "base"):
            shutil.rmtree(moved.folder / folder)
        status = command.run("status", moved.storage)
        assert status.stdout.startswith("trl: 14/16 done, 0 running, 2 failed")
        report = command.run("report", moved.storage, "--allow-missing")
        assert report.returncode == 0, report.stderr
        assert "slow-is-sparser" in report.stdout
        gone = moved.run()
        assert gone.returncode == 1
        lines = [line for line in gone.stderr.splitlines() if ": column " in line]
        assert len(lines) == 2 * 2 * 2  # both sides of both snapshots of the runs not measured
        assert "column before: 'base': no file or folder" in lines[0]
    finally:
        command.close()


@pytest.mark.slow
def test_views_and_spectra(ran, tmp_path):
    """A base that is a single file, in two views."""
    runs = [("sft", 1e-5, 0), ("sft", 1e-5, 1)]
    rows = [f"../pairs/base/model.safetensors,../pairs/{out(*run, 4)},4,{run[2]}" for run in runs]
    (tmp_path / "pairs").symlink_to(ran.folder)
    (tmp_path / "csv").mkdir()
    csv = tmp_path / "csv" / "pairs.csv"
    csv.write_text("\n".join(["before,after,step,seed,score", *(f"{row},0.5" for row in rows), ""]))
    (tmp_path / "trl.yaml").write_text(
        "question: Why?\npairs: csv/pairs.csv\nviews: [stored, bf16]\nspectrum: exact\n"
        "settings: {algorithm: sft}\n"
    )
    command = Command(tmp_path)
    small = Ran(tmp_path, command)
    try:
        found = small.run()
        csv.write_text(csv.read_text().replace("0.5", "0.75"))
        corrected = small.run()
    finally:
        command.close()
    assert found.returncode == 0, found.stderr
    assert corrected.stderr == "judging claims, drawing the report\n"
    assert [row["score_after"] for row in small.table("trials").to_pylist()] == [0.75, 0.75]
    names = {row["seed"]: row["trial_id"] for row in small.table("trials").to_pylist()}
    assert {row["gate_ratio"] for row in small.table("trials").to_pylist()} == {None}
    sums = (
        small.table("changes").to_pandas().groupby(["trial_id", "view"]).num_changed_bitwise.sum()
    )
    assert len(sums) == 4
    base = load_file(ran.folder / "base" / "model.safetensors")
    spectra = small.table("spectra").to_pandas().query("kind == 'update'")
    for run in runs:
        after = load_file(ran.folder / out(*run, 4) / "model.safetensors")
        exact = {n: old.astype(np.float32) != after[n] for n, old in base.items() if n in after}
        assert sums[names[run[2]], "stored"] == sum(int(one.sum()) for one in exact.values())
        assert sums[names[run[2]], "bf16"] == ran.changed(*run, 4).sum()
        ours = spectra[spectra["trial_id"] == names[run[2]]].set_index("tensor")
        matrices = {name: int(one.sum()) for name, one in exact.items() if one.ndim == 2}
        assert ours["num_changed"].to_dict() == matrices
        assert set(ours["step_after"]) == {4}


def test_places_of_checkpoints(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "pairs.csv").write_text(
        "before,after,step,algorithm\ntiny,here,1,sft\ntiny,org/name@v1,2,sft\n"
        "tiny,here/none,3,sft\ntiny,s3://bucket/x,4,sft\ntiny,/abs/x,5,sft\n"
        "tiny,no/such/x,6,sft\ntiny,../x,7,sft\n"
    )
    (tmp_path / "why.yaml").write_text("question: Why?\npairs: pairs.csv\n")
    study = load_study(tmp_path / "why.yaml")
    assert isinstance(study, PairStudy)
    plan = make_pair_plan(study, str(tmp_path / "runs"))
    assert plan.place("tiny") == "tiny"
    assert [plan.place(run.rows[0].after) for run in plan.trials] == [
        str(tmp_path / "here"), "org/name@v1", str(tmp_path / "here/none"), "s3://bucket/x",
        "/abs/x", str(tmp_path / "no/such/x"), str(tmp_path / "../x"),
    ]  # fmt: skip


def test_runs_whose_masks_are_compared(tmp_path):
    (tmp_path / "pairs.csv").write_text(
        "before,after,step,seed,algorithm\ntiny,b,9,0,sft\ntiny,a,5,0,sft\ntiny,c,9,1,dpo\n"
    )
    (tmp_path / "why.yaml").write_text("question: Why?\npairs: pairs.csv\n")
    study = load_study(tmp_path / "why.yaml")
    assert isinstance(study, PairStudy)
    plan = make_pair_plan(study, str(tmp_path / "runs"))
    first, second = plan.trials
    (found,) = measured_runs(plan, {first.trial_id: "f1"})
    assert (found.trial_id, found.base, found.source) == (first.trial_id, "f1", "tiny")
    assert found.after == {5: str(tmp_path / "a"), 9: str(tmp_path / "b")}
    assert (found.steps, found.num_steps, found.role) == ((5, 9), 9, "baseline")
    assert measured_runs(plan, {second.trial_id: "f1"})[0].role == "factor"
