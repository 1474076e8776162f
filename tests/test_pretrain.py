"""The tiny base can be made again, bit for bit, and has seen the pretrain split only."""

import random
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsparse import pretrain as module
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.pretrain import PretrainConfig, pretrain
from rlsparse.task_config import ChainSumConfig
from rlsparse.tasks import load_task

RECIPE = PretrainConfig(
    task=ChainSumConfig(num_terms=2),
    num_steps=3,
    batch_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain") / "new" / "base"
    return folder, pretrain(RECIPE, folder)


def test_made_again_it_has_the_same_bytes(made, tmp_path):
    torch.manual_seed(99)
    random.seed(99)
    score = pretrain(RECIPE, tmp_path)
    assert score == made[1]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in made[0].iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (made[0] / file.name).read_bytes()
    pretrain(RECIPE.model_copy(update={"seed": 1}), tmp_path)
    assert fingerprint(Checkpoint.open(tmp_path)) != fingerprint(Checkpoint.open(made[0]))


def test_it_loads_like_any_model(made):
    folder, score = made
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    assert score.num_problems == len(load_task(RECIPE.task).problems("test"))


def test_it_trains_on_the_pretrain_split_only(monkeypatch, tmp_path):
    seen: list[tuple[str, str]] = []
    batch = module._batch
    monkeypatch.setattr(
        module, "_batch", lambda tok, texts: seen.extend(texts) or batch(tok, texts)
    )
    losses: list[int] = []
    recipe = RECIPE.model_copy(update={"num_steps": 100, "batch_size": 4})
    pretrain(recipe, tmp_path, lambda step, loss: losses.append(step))
    assert len(seen) == 400
    assert losses == [100]
    task = load_task(RECIPE.task)
    assert {prompt for prompt, _ in seen} <= {p.prompt for p in task.problems("pretrain")}
    for split in ("train", "validation", "test"):
        assert not {p.prompt for p in task.problems(split)} & {prompt for prompt, _ in seen}


def test_texts_are_as_untidy_as_the_recipe_says():
    problems = list(load_task(RECIPE.task).problems("pretrain"))
    answers = {p.prompt: p.answer for p in problems}
    draw = random.Random(0)
    kinds: Counter[str] = Counter()
    for _ in range(8000):
        prompt, text = module._text(draw, problems, RECIPE)
        answer = answers[prompt]
        kinds[{f" {answer}": "right", f" ?{answer}": "hedged"}.get(text, "wrong")] += 1
    assert kinds["hedged"] / 8000 == pytest.approx(0.45, abs=0.02)
    assert kinds["wrong"] / 8000 == pytest.approx(0.15, abs=0.03)  # some other answers agree


def test_loss_is_on_completions_and_their_end():
    tokenizer = module.make_tokenizer()
    batch = module._batch(tokenizer, [("1 + 2 =", " 3"), ("4 =", " -14")])
    rows = [
        "".join(tokenizer.decode([t]) if t >= 0 else "_" for t in row)
        for row in batch["labels"].tolist()
    ]
    assert rows == ["_______ 3<eos>", "___ -14<eos>__"]
    texts = [tokenizer.decode(row[mask.bool()]) for row, mask in
             zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert texts == ["1 + 2 = 3<eos>", "4 = -14<eos>"]


@pytest.mark.slow
def test_the_default_recipe_makes_the_base_that_ships(base, tmp_path):
    score = pretrain(PretrainConfig(), tmp_path)
    assert fingerprint(Checkpoint.open(tmp_path)) == base.fingerprint
    assert 0.2 < score.fraction < 0.8
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (base.path / name).read_bytes()
