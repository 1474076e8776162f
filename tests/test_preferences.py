"""Losses and gradients of the offline algorithms against float64, written out from the papers."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from rlsparse.algorithms import ALGORITHMS, samples
from rlsparse.algorithms.experimental import experimental_classes
from rlsparse.errors import TrialError
from rlsparse.models.loading import load_model, load_tokenizer
from rlsparse.tasks import Problem
from rlsparse.tasks.generate import complete

OFFLINE = ("sft", "rft", "dpo", "simpo", "orpo", "kto")
SETTINGS = {
    "sft": {},
    "rft": {},
    "dpo": {"data": "gold", "beta": 0.3},
    "simpo": {"data": "gold", "beta": 2.5, "gamma": 0.7},
    "orpo": {"data": "gold", "beta": 0.4},
    "kto": {"data": "gold", "beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75},
}
UPWARDS = 10
"""Seed of a step after which KTO's estimate of the KL is positive; after seed 3 it is not."""
WATCHED = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.norm.weight",
)


@dataclass
class Log:
    """Log-probabilities of texts under a model in float64, one forward pass a text, no padding."""

    model: torch.nn.Module
    tokenizer: object

    def tokens(self, prompt: str, completion: str) -> tuple[torch.Tensor, int]:
        """Of every token but the first; and how many of them are completion and end of text."""
        own = [*self.tokenizer(completion)["input_ids"], self.tokenizer.eos_token_id]
        ids = torch.tensor([*self.tokenizer(prompt)["input_ids"], *own])
        logits = self.model(input_ids=ids[None]).logits[0, :-1].double()
        normaliser = (logits - logits.max()).exp().sum(-1).log() + logits.max()
        return logits[torch.arange(len(ids) - 1), ids[1:]] - normaliser, len(own)

    def completion(self, prompt: str, completion: str) -> torch.Tensor:
        values, count = self.tokens(prompt, completion)
        return values[-count:]

    def sum(self, prompt: str, completion: str) -> torch.Tensor:
        return self.completion(prompt, completion).sum()

    def mean(self, prompt: str, completion: str) -> torch.Tensor:
        return self.completion(prompt, completion).mean()


def sft_loss(policy: Log, reference: Log, rows: list[dict], given: dict) -> torch.Tensor:
    return -torch.cat([policy.completion(r["prompt"], r["completion"]) for r in rows]).mean()


def dpo_loss(policy: Log, reference: Log, rows: list[dict], given: dict) -> torch.Tensor:
    def ratio(prompt: str, text: str) -> torch.Tensor:
        return policy.sum(prompt, text) - reference.sum(prompt, text)

    margins = [ratio(r["prompt"], r["chosen"]) - ratio(r["prompt"], r["rejected"]) for r in rows]
    return -logsigmoid(given["beta"] * torch.stack(margins)).mean()


def simpo_loss(policy: Log, reference: Log, rows: list[dict], given: dict) -> torch.Tensor:
    margins = [
        given["beta"] * policy.mean(r["prompt"], r["chosen"])
        - given["beta"] * policy.mean(r["prompt"], r["rejected"])
        - given["gamma"]
        for r in rows
    ]
    return -logsigmoid(torch.stack(margins)).mean()


def orpo_loss(policy: Log, reference: Log, rows: list[dict], given: dict) -> torch.Tensor:
    def odds(prompt: str, text: str) -> torch.Tensor:
        likelihood = policy.mean(prompt, text).exp()
        return likelihood / (1 - likelihood)

    ratios = [odds(r["prompt"], r["chosen"]) / odds(r["prompt"], r["rejected"]) for r in rows]
    everything = torch.cat([policy.tokens(r["prompt"], r["chosen"])[0] for r in rows])
    return -everything.mean() - given["beta"] * logsigmoid(torch.stack(ratios).log()).mean()


def mismatched_ratio(policy: Log, reference: Log, rows: list[dict]) -> float:
    """Mean log-ratio of each prompt's neighbour's completion: KTO's estimate of the KL."""
    pairs = [(row["prompt"], rows[i - 1]["completion"]) for i, row in enumerate(rows)]
    return np.mean([(policy.sum(*pair) - reference.sum(*pair)).item() for pair in pairs])


def kto_loss(policy: Log, reference: Log, rows: list[dict], given: dict) -> torch.Tensor:
    z = max(mismatched_ratio(policy, reference, rows), 0.0)
    losses = []
    for row in rows:
        text = row["prompt"], row["completion"]
        r = policy.sum(*text) - reference.sum(*text)
        if row["label"]:
            weight, value = given["desirable_weight"], torch.sigmoid(given["beta"] * (r - z))
        else:
            weight, value = given["undesirable_weight"], torch.sigmoid(given["beta"] * (z - r))
        losses.append(weight - weight * value)
    return torch.stack(losses).mean()


LOSS: dict[str, Callable[..., torch.Tensor]] = {
    "sft": sft_loss,
    "rft": sft_loss,
    "dpo": dpo_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "kto": kto_loss,
}


def rows_of(trainer) -> list[dict]:
    """Texts that a trainer was given, in its order; TRL writes the end of text into some."""
    columns = ("prompt", "completion", "chosen", "rejected", "label")
    data = trainer.train_dataset
    rows = data.select_columns([c for c in columns if c in data.column_names]).to_list()
    return [
        {key: v.removesuffix("<eos>") if isinstance(v, str) else v for key, v in row.items()}
        for row in rows
    ]


def move(model: torch.nn.Module, seed: int) -> None:
    """Move all weights by a seeded step, so that the policy is not its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_((0.1 * noise * weight.std(correction=0).cpu()).to(weight.device))


@pytest.mark.parametrize(("name", "seed"), [*((name, 3) for name in OFFLINE), ("kto", UPWARDS)])
def test_loss_and_gradient_are_the_papers(context_of, tiny_trial, base, name, seed):
    config = tiny_trial(
        name, precision="fp32", batch_size={"rft": 7, "kto": 16}.get(name, 8),
        algorithm=SETTINGS[name], task={"num_train_problems": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = ALGORITHMS[name](context_of(config, base))
    rows = rows_of(trainer)
    move(trainer.model, seed)
    (batch,) = trainer.get_train_dataloader()  # the whole data
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()

    tokenizer = load_tokenizer(base.path)
    model = load_model(base.path, "fp32")
    model.load_state_dict(trainer.model.state_dict())
    policy = Log(model.double(), tokenizer)
    reference = Log(load_model(base.path, "fp32").double().requires_grad_(False), tokenizer)
    expected = LOSS[name](policy, reference, rows, SETTINGS[name])
    expected.backward()
    if name == "kto":  # of both signs: below 0 it is cut
        assert (mismatched_ratio(policy, reference, rows) > 0.02) == (seed == UPWARDS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=0)
    actual, oracle = (dict(m.named_parameters()) for m in (trainer.model, model))
    for key in WATCHED:
        gap = (actual[key].grad.cpu() - oracle[key].grad).norm() / oracle[key].grad.norm()
        assert gap < 1e-4


def test_dpo_is_the_papers(context_of, tiny_trial, base):
    trainer = ALGORITHMS["dpo"](context_of(tiny_trial("dpo", algorithm={"beta": 0.3}), base))
    assert (trainer.beta, trainer.loss_types, trainer.label_smoothing) == (0.3, ["sigmoid"], 0)
    assert (trainer.f_divergence_type, trainer.use_weighting) == ("reverse_kl", False)
    assert (trainer.ld_alpha, trainer.precompute_ref_logps) == (None, False)
    assert not trainer.args.sync_ref_model


def test_simpo_is_the_papers(context_of, tiny_trial, base):
    settings = {"beta": 2.5, "gamma": 0.7}
    trainer = ALGORITHMS["simpo"](context_of(tiny_trial("simpo", algorithm=settings), base))
    assert (trainer.loss_type, trainer.beta, trainer.simpo_gamma) == ("simpo", 2.5, 0.7)
    assert (trainer.cpo_alpha, trainer.alpha, trainer.label_smoothing) == (0, 0, 0)
    defaults = ALGORITHMS["simpo"](context_of(tiny_trial("simpo"), base))
    assert (defaults.beta, defaults.simpo_gamma) == (2.0, 1.0)


def test_orpo_is_the_papers(context_of, tiny_trial, base):
    trainer = ALGORITHMS["orpo"](context_of(tiny_trial("orpo", algorithm={"beta": 0.4}), base))
    assert trainer.beta == 0.4


def test_kto_is_the_papers(context_of, tiny_trial, base):
    trainer = ALGORITHMS["kto"](context_of(tiny_trial("kto", algorithm=SETTINGS["kto"]), base))
    assert (trainer.loss_type, trainer.beta, trainer.calculate_KL) == ("kto", 0.3, True)
    assert (trainer.desirable_weight, trainer.undesirable_weight) == (1.25, 0.75)
    assert (trainer.precompute_ref_logps, trainer.args.sync_ref_model) == (False, False)


def test_kto_needs_two_sequences(tiny_trial):
    with pytest.raises(ValidationError, match="gradient_accumulation_steps is 1 and must be at"):
        tiny_trial("kto", batch_size=4, gradient_accumulation_steps=4)


@pytest.mark.parametrize("name", ["sft", "rft"])
def test_sft_is_plain(context_of, tiny_trial, base, name):
    args = ALGORITHMS[name](context_of(tiny_trial(name), base)).args
    assert (args.loss_type, args.completion_only_loss, args.packing) == ("nll", True, False)
    assert (args.neftune_noise_alpha, args.label_smoothing_factor) == (None, 0)


def test_dropout_is_off_where_trl_leaves_it_on(context_of, tiny_trial, base):
    context = context_of(tiny_trial("sft"), base)
    context.model.model.layers[0].mlp.act_fn = torch.nn.Dropout(0.5)
    ALGORITHMS["sft"](context)
    assert context.model.model.layers[0].mlp.act_fn.p == 0


def test_the_experimental_import_does_not_warn(monkeypatch):
    for module in ("trl.experimental", "trl.experimental.orpo"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (config_class,) = experimental_classes("orpo", "ORPOConfig")
    assert config_class.__name__ == "ORPOConfig"


def test_a_trl_without_them():
    expected = (
        r"trl [\d.]+ has no trl.experimental.{} with A and B .*; install the tested version: "
        r"pip install 'trl>=1.16,<1.17'"
    )
    for module in ("cpo", "gone"):
        with pytest.raises(TrialError, match=expected.format(module)):
            experimental_classes(module, "A", "B")


# --- tokens ----------------------------------------------------------------------------------

PROBLEMS = [
    Problem("1 + 1 =", " 2", "2"),
    Problem("4 - 9 + 10 =", " 5 =\n5", "5"),
    Problem("2 + 2 =", "", ""),  # a model may end at once
    Problem("6 - 6 =", " 0<eos>", "0"),  # a text that has its end
]


@pytest.fixture(params=["without a beginning", "with one that is not used", "with a beginning"])
def base_with_beginning(request, tmp_path, base):
    """The tiny base, whose ``?`` is a beginning-of-text token in two of three cases."""
    folder = tmp_path / "base"
    shutil.copytree(base.path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = []
    if request.param != "without a beginning":
        tokenizer.add_special_tokens({"bos_token": "?"})
    if request.param == "with a beginning":
        added = [tokenizer.bos_token_id]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="? $A", special_tokens=[("?", tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(folder)
    return replace(base, path=folder), added


def spans(batch: dict, ids: str, learnt: torch.Tensor, mask: str) -> list[tuple[list, list]]:
    """Per sequence of a batch its tokens that are not learnt and those that are, no padding."""
    found = []
    for row, target, real in zip(batch[ids], learnt.bool(), batch[mask].bool(), strict=True):
        found.append((row[real & ~target].tolist(), row[real & target].tolist()))
    return found


def sequences(name: str, batch: dict) -> list[tuple[list, list]]:
    if name in ("sft", "rft"):
        return spans(batch, "input_ids", batch["labels"] != -100, "attention_mask")
    if name in ("dpo", "kto"):
        return spans(batch, "input_ids", batch["completion_mask"], "attention_mask")
    return [
        span
        for side in ("chosen", "rejected")
        for span in spans(
            batch, f"{side}_input_ids", batch[f"{side}_labels"] != -100, f"{side}_attention_mask"
        )
    ]


@pytest.mark.parametrize("name", OFFLINE)
def test_learnt_tokens_are_prompt_completion_end(
    context_of, tiny_trial, base_with_beginning, monkeypatch, name
):
    base, added = base_with_beginning
    gold = {} if name == "rft" else {"data": "gold"}
    config = tiny_trial(name, algorithm=gold, batch_size=8 if name == "kto" else 4)
    context = replace(context_of(config, base), problems=PROBLEMS)
    assert context.tokenizer.bos_token == ("?" if added else None)
    if name == "rft":  # "samples" the gold completions
        texts = [p.completion for p in PROBLEMS for _ in range(8)]
        monkeypatch.setattr(samples, "complete", lambda *_, **__: texts)
        context = replace(context, reward=lambda *, prompts, **_: [1.0] * len(prompts))
    trainer = ALGORITHMS[name](context)
    (batch,) = trainer.get_train_dataloader()

    vocabulary = context.tokenizer.get_vocab()

    def tokens(text: str) -> list[int]:
        return [vocabulary[character] for character in text.removesuffix("<eos>")]

    prompts = {tuple(tokens(p.prompt)) for p in PROBLEMS}
    endings = {(*tokens(p.completion), vocabulary["<eos>"]) for p in PROBLEMS}
    found = sequences(name, batch)
    assert len(found) == (4 if name in ("sft", "rft") else 8)
    for prompt, completion in found:
        assert prompt[: len(added)] == added
        assert tuple(prompt[len(added) :]) in prompts
        assert tuple(completion) in endings
    assert {tuple(prompt[len(added) :]) for prompt, _ in found} == prompts
    assert {tuple(completion) for _, completion in found} == endings
    if name == "kto":
        mismatched = spans(batch, "KL_input_ids", batch["KL_completion_mask"], "KL_attention_mask")
        rotated = [found[i - 1][1] for i in range(len(found))]
        assert mismatched == [(p, other) for (p, _), other in zip(found, rotated, strict=True)]


@pytest.mark.parametrize("name", ["sft", "dpo", "simpo", "orpo", "kto"])
def test_nothing_is_truncated(context_of, tiny_trial, base, name):
    """TRL's defaults cut at 1024 or 512 tokens, some of them silently."""
    config = tiny_trial(name, algorithm={"data": "gold"}, batch_size=4 if name == "kto" else 2)
    long = [Problem("1" * 1100, "2" * 1100, "2"), Problem("3" * 1100, "4" * 1100, "4")]
    trainer = ALGORITHMS[name](replace(context_of(config, base), problems=long))
    (batch,) = trainer.get_train_dataloader()
    for prompt, completion in sequences(name, batch):
        assert (len(prompt), len(completion)) == (1100, 1101)


def test_sampling_reads_what_training_does(base_with_beginning):
    base, added = base_with_beginning
    model, tokenizer = load_model(base.path, "fp32"), load_tokenizer(base.path)
    read = []
    model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"]), with_kwargs=True
    )
    complete(model, tokenizer, ["1 + 1 ="], max_new_tokens=1)
    assert read[0].tolist() == [
        [*added, *tokenizer("1 + 1 =", add_special_tokens=False)["input_ids"]]
    ]
