"""Scores on the validation split: of other problems, of the trained model, and without effect."""

import itertools
import json

import numpy as np
import pytest
import torch

from rlsparse import scoring, tables, train
from rlsparse.errors import ConfigError
from rlsparse.models.loading import load_model, load_tokenizer
from rlsparse.task_config import (
    BasicArithmeticConfig,
    ChainSumConfig,
    DatasetConfig,
    ProductsConfig,
    SimpleEquationsConfig,
)
from rlsparse.tasks import TASKS, load_task
from rlsparse.tasks.generate import complete

NUM = 24
VALIDATED = {"num_validation_problems": NUM}


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def validated(request, trained, tiny_trial, base):
    """A trial that moves far enough for its scores to differ from those of the base."""
    given = {"precision": request.param, "learning_rate": 1e-3, "num_steps": 4}
    return trained(tiny_trial("sft", task=VALIDATED, keep_checkpoints=True, **given), base)


def graded(folder, config, split, count) -> np.ndarray:
    task, tokenizer = load_task(config.task), load_tokenizer(folder)
    problems = task.problems(split, count)
    texts = complete(
        load_model(folder, config.stored_dtype), tokenizer, [p.prompt for p in problems],
        max_new_tokens=task.max_completion_tokens,
    )  # fmt: skip
    return np.array([task.grade(t, p.answer) for t, p in zip(texts, problems, strict=True)])


def test_the_trained_model_is_scored_on_the_validation_split(validated, base):
    grades = graded(validated.folder / "checkpoint", validated.config, "validation", NUM)
    assert 0 < grades.sum() < NUM
    assert grades.sum() != graded(base.path, validated.config, "validation", NUM).sum()
    summary = json.loads((validated.folder / "summary.json").read_text())
    assert (summary["score_validation"], summary["num_validation_problems"]) == (grades.mean(), NUM)
    *tests, row = tables.read(validated.folder / "eval.parquet", "eval").to_pylist()
    assert [(one["split"], one["step"]) for one in tests] == [("test", 0), ("test", 4)]
    assert row == {
        "trial_id": "0123456789ab", "step": 4, "split": "validation", "num_correct": grades.sum(),
        "num_problems": NUM, "score": grades.mean(), "gain_se": None,
    }  # fmt: skip


def test_validation_moves_no_weight_and_no_other_number(validated, run_trial, base):
    task = validated.config.task.model_copy(update={"num_validation_problems": 0})
    plain = run_trial(validated.config.model_copy(update={"task": task}), base)
    assert plain.patch().read_bytes() == validated.patch().read_bytes()
    read = [tables.read(one.folder / "steps.parquet", "steps") for one in (plain, validated)]
    assert read[0].equals(read[1])
    same = ("score_before", "score_after", "score_gain_se", "kl_final")
    assert all(plain.summary[name] == validated.summary[name] for name in same)
    assert not {"score_validation", "num_validation_problems"} & plain.summary.keys()


@pytest.mark.parametrize("name", ["sft", "grpo", "ppo"])
def test_the_model_computes_as_for_the_test_score(run_trial, tiny_trial, base, monkeypatch, name):
    """In bf16-mixed under the trainer's autocast; fp32 masters alone would give other logits."""
    logits, evaluate = [], scoring.evaluate

    def watched(model, tokenizer, task, problems):
        ids = tokenizer("1 + 2 + 3 =", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits.append((len(problems), model(ids).logits.clone()))
        return evaluate(model, tokenizer, task, problems)

    monkeypatch.setattr(scoring, "evaluate", watched)
    run_trial(tiny_trial(name, task=VALIDATED, precision="bf16-mixed", learning_rate=1e-3), base)
    assert [count for count, _ in logits] == [16, 16, 16, NUM]  # stored base, before, after
    (_, before), (_, test), (_, validation) = logits[1:]
    assert torch.equal(validation, test)
    assert not torch.equal(before, test)


# --- the split ---------------------------------------------------------------------------------


@pytest.fixture
def problems_file(tmp_path):
    def write(first: int, last: int, name: str = "data") -> str:
        rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(first, last)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_every_task_has_a_validation_split_of_its_own(problems_file):
    configs = [
        ChainSumConfig(), ProductsConfig(), BasicArithmeticConfig(), SimpleEquationsConfig(),
        DatasetConfig(source=problems_file(0, 800)),
    ]  # fmt: skip
    assert {config.name for config in configs} == set(TASKS)
    for config in configs:
        task = load_task(config)
        of_split = {
            split: {problem.prompt for problem in task.problems(split)}
            for split in ("pretrain", "train", "validation", "test")
        }
        assert len(of_split["validation"]) >= 32, config.name
        for one, other in itertools.combinations(of_split.values(), 2):
            assert not one & other


@pytest.fixture
def untrained(monkeypatch):
    """No trial gets as far as to train."""
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("it trains"))


@pytest.mark.usefixtures("untrained")
def test_too_few_problems_are_told_before_training(run_trial, tiny_trial, base, problems_file):
    def run(**task):
        return run_trial(tiny_trial("sft", task={"name": "dataset", **task}), base)

    def refused(said: str, **task) -> None:
        with pytest.raises(ConfigError, match=said):
            run(num_train_problems=8, num_eval_problems=8, max_completion_tokens=8, **task)

    source = problems_file(0, 100)
    refused("distinct validation problems, 40 were asked for; add rows, or set .*validation_pro",
            source=source, num_validation_problems=40)  # fmt: skip
    refused("has 0 distinct validation problems, 4 were asked for; none are set apart where "
            "task.test_source", source=source, test_source=problems_file(200, 220, "test"),
            num_validation_problems=4)  # fmt: skip


@pytest.mark.usefixtures("untrained")
def test_a_task_of_reasoning_gym_with_too_few_says_so(run_trial, tiny_trial, base):
    task = {"num_terms": 2, "num_validation_problems": 500}
    with pytest.raises(ConfigError, match="distinct validation problems, 500 were asked for; rai"):
        run_trial(tiny_trial("sft", task=task), base)
