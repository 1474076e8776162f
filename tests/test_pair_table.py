"""Pairs made elsewhere: what a CSV file says, and what is wrong with it."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rlsparse import tables
from rlsparse.errors import ConfigError
from rlsparse.kernels import magnitude_histogram
from rlsparse.pair_runs import median_magnitude, pair_runs, steps_table, trials_table
from rlsparse.pair_table import read_pairs
from rlsparse.schemas import SCHEMAS
from rlsparse.study import PairStudy
from rlsparse.study_file import load_study

CSV = """\
before,after,step,seed,score,score_before,kl,num_eval_problems,algorithm,algorithm.kl_coef,task
base,grpo-0/20,20,0,0.5,0.25,0.1,512,grpo,0.04,sums
base,grpo-0/10,10,0,0.375,0.25,0.05,512,grpo,0.04,sums
base,grpo-1/20,20,1,0.5,0.25,0.1,512,grpo,0.04,sums
base,free-0/20,20,0,0.5,0.25,0.2,512,grpo,0,sums
base,org/name@abc,20,0,,0.25,,512,sft,,sums
"""
STUDY = """\
question: Why?
pairs: pairs.csv
views: [bf16]
settings: {train.learning_rate: 1e-5, train.precision: bf16-mixed}
reference: {algorithm: sft}
claims:
  - {id: denser, kind: greater, a: {algorithm: sft}, b: {algorithm: grpo}}
"""


def load(folder: Path, csv: str = CSV, study: str = STUDY, *overrides: str) -> PairStudy:
    (folder / "pairs.csv").write_text(csv, encoding="utf-8")
    (folder / "why.yaml").write_text(study, encoding="utf-8")
    loaded = load_study(folder / "why.yaml", overrides)
    assert isinstance(loaded, PairStudy)
    return loaded


def runs_of(study: PairStudy):
    return pair_runs(study, read_pairs(Path(study.pairs)))


# --- studies ---------------------------------------------------------------------------------


def test_factors_are_the_columns_that_vary(tmp_path):
    study = load(tmp_path)
    assert study.factors == {"algorithm": ["grpo", "sft"], "algorithm.kl_coef": [0.04, 0.0]}
    assert study.settings == {
        "train.learning_rate": 1e-5, "train.precision": "bf16-mixed", "task": "sums",
    }  # fmt: skip
    assert study.default_view == "bf16"  # the first that the file lists
    assert load(tmp_path, CSV, STUDY.replace("views: [bf16]\n", "")).default_view == "stored"
    assert study.reference_level("algorithm") == "sft"
    assert study.reference_level("algorithm.kl_coef") == "0.04"  # the first that occurs
    assert study.claims[0].note == ""


def test_rows_of_one_cell_and_seed_are_one_run(tmp_path):
    runs = runs_of(load(tmp_path))
    assert [run.steps for run in runs] == [(10, 20), (20,), (20,), (20,)]
    assert [row.after for row in runs[0].rows] == ["grpo-0/10", "grpo-0/20"]
    assert [run.label for run in runs] == [
        "grpo s0 kl_coef=0.04", "grpo s1 kl_coef=0.04", "grpo s0 kl_coef=0.0", "sft s0",
    ]  # fmt: skip
    assert [run.role for run in runs] == ["factor", "factor", "factor", "baseline"]
    assert runs[0].config == {
        "model": {"source": "base"},
        "algorithm": {"name": "grpo", "kl_coef": 0.04},
        "task": {"name": "sums"},
        "train": {"num_steps": 20, "learning_rate": 1e-5, "precision": "bf16-mixed"},
        "seed": 0,
    }
    assert runs[3].cell == {"algorithm": "sft"}  # an empty value: no such factor
    assert "kl_coef" not in runs[3].config["algorithm"]


def test_the_name_of_a_run_is_of_its_row_alone(tmp_path):
    runs = {run.label: run.trial_id for run in runs_of(load(tmp_path))}
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in runs.values())
    assert len(set(runs.values())) == 4
    again = CSV.replace("grpo-1/20", "grpo-1b/20").replace("0.375", "0.25")
    other = {run.label: run.trial_id for run in runs_of(load(tmp_path, again))}
    changed = {label for label in runs if runs[label] != other[label]}
    assert changed == {"grpo s1 kl_coef=0.04"}  # neither scores nor order name a run


def test_without_seeds_no_runs_are_matched(tmp_path):
    csv = "before,after,step,algorithm\nbase,a,5,grpo\nbase,b,5,grpo\nbase,c,5,sft\nbase,d,9,sft\n"
    study = load(tmp_path, csv, STUDY.replace("b: {", "note: once, b: {"))
    assert [run.seed for run in runs_of(study)] == [0, 1, 2, 3]  # no seed twice: nothing to match
    assert study.claims[0].note == "once; no column seed: runs are not matched"
    named = "before,after,step,algorithm,run\nb,a,5,grpo,x\nb,c,9,grpo,x\nb,d,5,sft,y\n"
    assert [(r.seed, r.steps) for r in runs_of(load(tmp_path, named))] == [(0, (5, 9)), (1, (5,))]


def test_roles_of_controls_and_surrogates(tmp_path):
    csv = (
        "before,after,step,seed,algorithm,algorithm.reward,train.learning_rate,control\n"
        "b,p,5,0,grpo,task,1e-5,\nb,q,5,0,grpo,random,1e-5,\nb,r,5,0,grpo,task,3e-5,lr_times_3\n"
        "b,s,5,0,grpo,task,1e-5,same_seed\nb,t,5,0,sft,,1e-5,\n"
    )
    study = load(tmp_path, csv, STUDY.replace("train.learning_rate: 1e-5, ", ""))
    assert study.factors == {"algorithm": ["grpo", "sft"], "algorithm.reward": ["task", "random"]}
    assert study.settings["train.learning_rate"] == 1e-5  # a control has no say in what varies
    runs = runs_of(study)
    assert [run.role for run in runs] == ["factor", "surrogate", "control", "control", "baseline"]
    assert [run.replicate for run in runs] == [0, 0, 0, 1, 0]
    assert runs[2].config["train"]["learning_rate"] == 3e-5
    assert len({run.trial_id for run in runs}) == 5
    shuffled = load(tmp_path, csv, STUDY.replace("train.learning_rate: 1e-5, ", "").replace(
        "algorithm: sft}\nc", "algorithm.reward: random}\nc"))  # fmt: skip
    assert [run.role for run in runs_of(shuffled)][:2] == ["factor", "baseline"]


def test_a_value_that_some_runs_do_not_have_is_no_setting(tmp_path):
    csv = "before,after,step,algorithm,algorithm.kl_coef\nb,p,5,grpo,0.04\nb,q,5,sft,\n"
    study = load(tmp_path, csv)
    assert study.factors == {"algorithm": ["grpo", "sft"]}
    assert "algorithm.kl_coef" not in study.settings
    grpo, sft = runs_of(study)
    assert grpo.config["algorithm"] == {"name": "grpo", "kl_coef": 0.04}
    assert sft.config["algorithm"] == {"name": "sft"}


def test_values_are_scalars_of_yaml(tmp_path):
    values = ["1e-5", "true", "null", "no", "'0.1'", "2024-01-01", "a b"]
    rows = "\n".join(f'b,{n},1,{n},grpo,"{value}"' for n, value in enumerate(values))
    study = load(tmp_path, f"before,after,step,seed,algorithm,data.x\n{rows}\n",
                 STUDY.replace("reference: {algorithm: sft}", "").split("claims")[0])  # fmt: skip
    assert study.factors["data.x"] == [1e-5, True, None, "no", "0.1", "2024-01-01", "a b"]
    mixed = "before,after,step,seed,algorithm,data.x\nb,p,1,0,grpo,0\nb,q,1,1,grpo,0.0\n"
    mixed += "b,r,1,2,grpo,1\n"
    factors = load(tmp_path, mixed, "question: Why?\npairs: pairs.csv\n").factors
    assert factors == {"data.x": [0.0, 1.0]}
    assert [type(level) for level in factors["data.x"]] == [float, float]


def test_a_file_as_spreadsheets_write_it(tmp_path):
    (tmp_path / "pairs.csv").write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n\r\n").encode())
    (tmp_path / "why.yaml").write_text(STUDY)
    plain = load_study(tmp_path / "why.yaml")
    assert plain == load(tmp_path, CSV.replace(",", ", "))


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("after,step", "aftr,step", 1, "column after is missing; needed: before, after, step; the"),
        ("seed,score,", "sede,score,", 1, "unknown column 'sede'; did you mean seed?"),
        (",task\n", ",algorithm.name\n", 1, "columns algorithm and algorithm.name say the same"),
        (",task\n", ",algorithm\n", 1, "columns algorithm and algorithm say the same thing"),
        (",task\n", ",task.\n", 1, "unknown column 'task.'"),
        (",task\n", ",train.num_steps\n", 1, "train.num_steps has no place here: column step"),
        ("10,0,0.375", "ten,0,0.375", 3, "column step: 'ten' is not allowed; give the whole numb"),
        ("10,0,0.375", "0,0,0.375", 3, "column step: '0' is not allowed"),
        ("10,0,0.375", "10,,0.375", 3, "column seed: '' is not allowed; give a whole number, or"),
        ("10,0,0.375", "10,0,37.5", 3, r"column score: '37.5' is not allowed; give a fraction in"),
        ("10,0,0.375", "10,0,nan", 3, "column score: 'nan' is not allowed"),
        ("0.05,512", "inf,512", 3, "column kl: 'inf' is not allowed; give a number, or empty"),
        ("base,grpo-0/10", ",grpo-0/10", 3, "column before: '' is not allowed; give a folder, fi"),
        ("0.05,512,grpo,0.04", "0.05,512,grpo,[1]", 3, r"column algorithm.kl_coef: '\[1\]' is not"),
        ("0.05,512,grpo,0.04", "0.05,512,grpo,.nan", 3, "'.nan' is not allowed; give a finite"),
        ("0.05,512,grpo,0.04", "0.05,512,grpo,@x", 3, "'@x' is not allowed; give a number, true"),
        ("sft,,sums", "sft,sums", 6, "not as many cells as columns; quote values"),
        ("sft,,sums", "sft,,sums,", 6, "not as many cells as columns"),
        ("grpo-0/10,10", "grpo-0/10,20", 3, "column step: 20 is there already for this run, in li"),
        ("grpo-0/10", "grpo-0/20", 3, "column after: 'grpo-0/20' is in line 2 too"),
        ("base,grpo-1", "other,grpo-1", 4, "column before: 'other', in line 2 'base'; a cell has"),
        ("0.375,0.25", "0.375,0.5", 3, "column score_before: 0.5, in line 2 0.25; rows with"),
        ("0.05,512", "0.05,256", 3, "column num_eval_problems: 256, in line 2 512"),
    ],
)  # fmt: skip
def test_errors_name_line_and_column(tmp_path, old, new, line, message):
    assert CSV.count(old) == 1
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, CSV.replace(old, new))
    assert str(caught.value).startswith(f"{tmp_path / 'pairs.csv'}:{line}: ")


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("", "column before is missing"),
        ("before,after,step\n", "has no rows"),
        ('before,after,step\n"a,b,1\n', "not CSV in UTF-8"),
        ("before,after,step\nb,a,1\n", "pairs.csv:2: no algorithm; add a column algorithm"),
        ("before,after,step,algorithm,run\nb,p,1,sft,x\nb,q,2,grpo,x\n",
         "pairs.csv:3: column run: 'x' has other factors or another seed in line 2"),
        ("before,after,step,algorithm,run,seed\nb,p,1,sft,x,0\nb,q,2,sft,y,0\n",
         "pairs.csv:3: column run: 'y', in line 2 'x'; rows with the same factors and seed are"),
        ("before,after,step,algorithm,control\nb,p,1,sft,lr\n",
         "pairs.csv:2: column control: 'lr' is not allowed; give empty or one of lr_zero, same_"),
        ("before,after,step,algorithm,train.learning_rate\nb,p,1,sft,fast\n",
         "pairs.csv:2: train.learning_rate 'fast' is not a number"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(tmp_path, csv, message):
    study = "question: Why?\npairs: pairs.csv\n"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, csv, study)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("pairs: pairs.csv", "pairs: pairs.csv\nseeds: [0]", 3, "unknown key seeds"),
        ("pairs: pairs.csv", "pairs: pairs.csv\nbaseline: {}", 3, "unknown key baseline"),
        ("pairs: pairs.csv", "pairs: pairs.csv\nfactors: {}", 3, "factors has no place beside pa"),
        ("settings: {", "settings: {algorithm: grpo, ", 4, "settings: algorithm has no place here"),
        ("settings: {", "settings: {seed: 3, ", 4, "settings: seed has no place here"),
        ("algorithm: sft}\nc", "algorithm: dpo}\nc", 5, "reference: algorithm dpo is no level of"),
        ("{algorithm: sft}\nc", "{task: sums}\nc", 5, "reference: task sums is no level of a fac"),
        ("b: {algorithm: grpo}", "b: {algorithm: dpo}", 7, "no planned trial has algorithm dpo"),
        ("views: [bf16]", "views: [bf17]", 3, "unknown views.0 bf17; did you mean bf16?"),
    ],
)  # fmt: skip
def test_errors_of_the_study_file(tmp_path, old, new, line, message):
    assert STUDY.count(old) == 1
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, CSV, STUDY.replace(old, new))
    assert str(caught.value).startswith(f"{tmp_path / 'why.yaml'}:{line}: ")


def test_a_csv_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the pairs .*none.csv: No such file"):
        load(tmp_path, CSV, STUDY, "pairs=none.csv")
    assert load(tmp_path, CSV, STUDY, "settings.train.precision=fp32").settings[
        "train.precision"
    ] == "fp32"  # fmt: skip


# --- tables ----------------------------------------------------------------------------------


def test_tables(tmp_path):
    study = load(tmp_path)
    runs = runs_of(study)
    first, *others = [run.trial_id for run in runs]
    status = dict.fromkeys(others, ("finished", None)) | {first: ("failed", "no weights")}
    table = trials_table(study, runs, status, dict.fromkeys(others, "f1"), {"f1": 0.05})
    assert table.schema.names[: len(SCHEMAS["trials"])] == SCHEMAS["trials"].names
    failed, *_, last = table.to_pylist()
    assert (failed["status"], failed["error"], failed["base"]) == ("failed", "no weights", None)
    assert failed["gate_ratio"] is None
    assert failed["num_steps"] == 20
    assert failed["score_after"] == 0.5  # of the last step, though its row comes first
    assert failed["kl_final"] == 0.1
    assert failed["cell"] == '{"algorithm":"grpo","algorithm.kl_coef":"0.04"}'
    assert json.loads(failed["config"]) == runs[0].config
    assert last["gate_ratio"] == pytest.approx(256 * 1e-5 / 0.05, rel=1e-12, abs=0)
    assert (last["factor.algorithm"], last["factor.algorithm.kl_coef"]) == ("sft", None)
    assert (last["score_before"], last["score_after"], last["num_eval_problems"]) == (
        0.25, None, 512,
    )  # fmt: skip
    assert (last["precision"], last["learning_rate"]) == ("bf16-mixed", 1e-5)
    steps = steps_table(runs).select(["trial_id", "step", "score", "kl_base"]).to_pylist()
    assert [tuple(row.values()) for row in steps if row["trial_id"] == first] == [
        (first, 0, 0.25, 0.0), (first, 10, 0.375, 0.05), (first, 20, 0.5, 0.1),
    ]  # fmt: skip
    sft = [tuple(row.values())[1:] for row in steps if row["trial_id"] == others[-1]]
    assert sft == [(0, 0.25, None), (20, None, None)]  # nothing is known of its KL


@pytest.mark.parametrize("num_zeros", [0, 300])
def test_median_magnitude(num_zeros):
    generator = np.random.default_rng(0)
    weights = generator.normal(0, 0.03, 20_000).astype(np.float32)
    weights[:num_zeros] = 0
    weights[num_zeros : num_zeros + 500] = 0.015625  # exact powers of two have bins of their own
    rows = [
        {"magnitude_histogram": magnitude_histogram(part.view("<u4"), "fp32")[0].tolist()}
        for part in np.split(weights, 2)
    ]
    expected = float(np.median(np.abs(weights)))
    found = median_magnitude(tables.from_rows(rows, "base_tensors"))
    assert found == pytest.approx(expected, rel=0.05, abs=0)
    assert math.isnan(median_magnitude(pa.table(SCHEMAS["base_tensors"].empty_table())))
