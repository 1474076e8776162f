"""Problems are disjoint and rightly answered; the decoding is what it says."""

import copy
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rlsparse.config import TrialConfig
from rlsparse.errors import ConfigError
from rlsparse.masks import pack, write_masks
from rlsparse.models import TINY
from rlsparse.models.loading import load_model, load_tokenizer
from rlsparse.task_config import ChainSumConfig, TaskConfig
from rlsparse.tasks import TASKS, data_version, load_task
from rlsparse.tasks.generate import complete, evaluate, kl_divergence

SPLITS = ("pretrain", "train", "validation", "test")
DIFFICULTIES = [(3, 1), (2, 1), (4, 1), (2, 2)]


def task_of(num_terms: int = 3, num_digits: int = 1, **other):
    return load_task(ChainSumConfig(num_terms=num_terms, num_digits=num_digits, **other))


@pytest.fixture(scope="module")
def task():
    return task_of()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    return load_model(TINY, "fp32")


def test_splits_are_disjoint_by_text_across_difficulties():
    of_split = {
        split: {p.prompt for n, d in DIFFICULTIES for p in task_of(n, d).problems(split)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not of_split[one] & of_split[other]
        assert of_split[one]
        assert of_split[other]


@pytest.mark.parametrize(("num_terms", "num_digits"), DIFFICULTIES)
def test_answers_are_right_by_another_evaluation(num_terms, num_digits):
    for split in SPLITS:
        for problem in task_of(num_terms, num_digits).problems(split, 50 if num_terms > 2 else 5):
            tokens = problem.prompt.removesuffix(" =").split(" ")
            assert len(tokens) == 2 * num_terms - 1
            numbers, signs = tokens[::2], ["+", *tokens[1::2]]
            assert all(re.fullmatch(rf"\d{{{num_digits}}}", number) for number in numbers)
            total = 0
            for sign, number in zip(signs, numbers, strict=True):
                total = total + int(number) if sign == "+" else total - int(number)
            assert problem.answer == str(total)
            assert problem.completion == f" {total}"
            assert task_of().grade(problem.completion, problem.answer) == 1.0


@pytest.mark.parametrize("split", ["train", "test"])
def test_too_many_problems(split):
    with pytest.raises(ConfigError, match=rf"num_terms 2 and .* {split} problems, 5000 were asked"):
        task_of(2).problems(split, 5000)


def test_shots_come_from_the_pretrain_split(task):
    shown = task_of(num_shots=2)
    shots = "".join(f"{p.prompt}{p.completion}\n" for p in task.problems("pretrain", 2))
    for with_shots, plain in zip(shown.problems("test", 5), task.problems("test", 5), strict=True):
        assert with_shots.prompt == shots + plain.prompt
        assert with_shots.answer == plain.answer


# --- all tasks ---------------------------------------------------------------------------------


def test_every_configuration_has_a_task():
    classes = get_args(get_args(TaskConfig)[0])
    assert {*TASKS} == {each.model_fields["name"].default for each in classes}


def test_importing_tasks_is_cheap():
    heavy = ("torch", "pandas", "pyarrow", "datasets", "math_verify", "sympy", "reasoning_gym")
    code = f"import sys, rlsparse.tasks; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_data_version_is_that_of_the_task_in_the_simple_case(tiny_trial):
    for name in ("sft", "grpo", "dpo"):
        assert data_version(tiny_trial(name)) == "1"
    assert data_version(tiny_trial("dpo", algorithm={"data": "gold"})) == "1"
    assert data_version(tiny_trial("dpo", algorithm={"reward": "random"})) == "1"


def test_data_version_follows_files_and_code(tiny_trial, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, pairs, rows = (tmp_path / name for name in ("my_own_reward.py", "p.jsonl", "r.csv"))
    code.write_text("def score(**_): ...\n")
    pairs.write_text("pairs")
    rows.write_text("rows")
    task = {"name": "dataset", "source": str(rows)}
    configs = [
        TrialConfig.model_validate({"task": task, "algorithm": algorithm})
        for algorithm in (
            {"name": "grpo", "reward": "my_own_reward:score"}, {"name": "dpo", "data": str(pairs)},
        )
    ]  # fmt: skip
    seen = [{data_version(config)} for config in configs]
    for path in (code, pairs, rows):
        path.write_text(path.read_text() + "\n")
        for versions, config in zip(seen, configs, strict=True):
            versions.add(data_version(config))
    assert [len(versions) for versions in seen] == [3, 3]
    del sys.modules["my_own_reward"]
    for missing in ({"reward": "my_none:score"}, {"data": "none.jsonl"}):
        with pytest.raises(ConfigError, match="none"):
            data_version(tiny_trial("dpo", algorithm=missing))


def test_a_mask_file_that_is_not_there_or_damaged_is_told_with_its_place(tiny_trial, tmp_path):
    file = tmp_path / "own.mask.safetensors"
    config = tiny_trial("sft", mask={"like": {"file": str(file)}})
    message = f"train.mask: no mask file {file}: give a path, relative to the working directory"
    with pytest.raises(ConfigError, match=re.escape(f"{message} ({Path.cwd()}), or a URL")):
        data_version(config)
    write_masks(file, {"w": ((8,), pack(np.ones(8, bool)))}, "base")
    assert data_version(config).startswith("1, mask ")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\0")
    with pytest.raises(ConfigError, match=f"train.mask: {file} is damaged: the mask of w has"):
        data_version(config)


# --- decoding --------------------------------------------------------------------------------


def naive_greedy(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """One prompt, no padding, no cache, one argmax a token."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
    return tokenizer.decode(new)


def test_greedy_completion_is_the_argmax(task, model, tokenizer):
    prompts = [p.prompt for p in task.problems("test", 9)] + ["1 =", "2 + 3 - 4 + 5 + 6 ="]
    expected = [naive_greedy(model, tokenizer, prompt, 6) for prompt in prompts]
    for batch_size in (4, 256):
        got = complete(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size)
        assert got == expected
    assert complete(model, tokenizer, prompts, max_new_tokens=2) == [t[:2] for t in expected]
    assert len(set(expected)) > 3


def test_prompts_begin_with_the_bos_that_the_tokenizer_adds(model, tokenizer):
    """As in TRL's trainers, so that a model is scored on what it was trained on."""
    adding = copy.deepcopy(tokenizer)
    adding.bos_token = "?"
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="? $A", special_tokens=[("?", adding.bos_token_id)]
    )
    prompts = ["1 + 2 =", "9 - 4 + 3 =", "5 ="]
    expected = [naive_greedy(model, tokenizer, f"?{prompt}", 6) for prompt in prompts]
    assert complete(model, adding, prompts, max_new_tokens=6) == expected
    assert complete(model, tokenizer, prompts, max_new_tokens=6) != expected


def test_sampling_follows_the_seed_of_torch(task, model, tokenizer):
    prompts = [p.prompt for p in task.problems("test", 32)]

    def sample(seed: int, temperature: float = 1.0) -> list[str]:
        torch.manual_seed(seed)
        return complete(model, tokenizer, prompts, max_new_tokens=4, temperature=temperature)

    greedy = complete(model, tokenizer, prompts, max_new_tokens=4)
    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert sample(0) != greedy
    assert sample(0, temperature=1e-4) == greedy


def test_sampling_is_not_truncated(model, tokenizer):
    """At a high temperature all tokens come up: no top-k, no top-p."""
    torch.manual_seed(0)
    texts = complete(model, tokenizer, ["1 + 1 ="] * 400, max_new_tokens=1, temperature=1e3)
    assert len(set(texts)) >= 20


def test_evaluate_grades_greedy_completions(task, model, tokenizer):
    problems = task.problems("test", 40)
    right = [
        naive_greedy(model, tokenizer, p.prompt, task.max_completion_tokens).strip() == p.answer
        for p in problems
    ]
    score = evaluate(model, tokenizer, task, problems)
    assert (score.num_correct, score.num_problems) == (sum(right), 40)
    assert score.fraction == sum(right) / 40
    assert 0 < score.fraction < 1


@pytest.mark.parametrize("mode", [True, False])
def test_mode_and_generator_are_left_as_they_were(task, model, tokenizer, mode):
    model.train(mode)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    evaluate(model, tokenizer, task, task.problems("test", 4))
    assert model.training is mode
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


@pytest.mark.parametrize(("batch_size", "max_logits"), [(50, 2**26), (5, 2**26), (50, 10_000)])
def test_kl_divergence_is_that_of_the_next_token_on_own_samples(
    task, model, tokenizer, batch_size, max_logits
):
    """Against a sum over the vocabulary in float64, one unpadded sequence at a time."""
    moved = load_model(TINY, "fp32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
    prompts = [p.prompt for p in task.problems("test", 12)] + ["1 + 2 - 3 + 4 ="]
    torch.manual_seed(3)
    found = kl_divergence(
        moved, model, tokenizer, prompts,
        max_new_tokens=4, batch_size=batch_size, max_logits=max_logits,
    )  # fmt: skip
    torch.manual_seed(3)
    sampled: list[list[int]] = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        batch = tokenizer(part, return_tensors="pt", padding=True, padding_side="left")
        rows = moved.generate(
            **batch, max_new_tokens=4, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        sampled += rows[:, batch["input_ids"].shape[1] :].tolist()
    terms: list[float] = []
    lengths = set()
    for prompt, row in zip(prompts, sampled, strict=True):
        ids, end = tokenizer(prompt)["input_ids"], tokenizer.eos_token_id
        new = row[: row.index(end) + 1] if end in row else row
        lengths.add(len(new))
        with torch.no_grad():
            p, q = (
                m(input_ids=torch.tensor([ids + new])).logits[0].double().softmax(-1)
                for m in (moved, model)
            )
        for place in range(len(ids) - 1, len(ids) + len(new) - 1):
            terms.append(float((p[place] * (p[place] / q[place]).log()).sum()))
    assert len(lengths) > 1  # some end before others
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4, abs=0)
