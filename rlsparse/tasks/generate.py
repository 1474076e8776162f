"""Sampling from a causal LM, its held-out score (greedy, graded by the task), its distance."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlsparse.tasks.problem import Problem, Task


@dataclass(frozen=True)
class Score:
    """Outcome of an evaluation; ``fraction`` is the score in [0, 1]."""

    grades: tuple[float, ...]
    """Of each problem, in [0, 1]."""

    @property
    def num_correct(self) -> float:
        """Sum of the grades."""
        return sum(self.grades)

    @property
    def num_problems(self) -> int:
        """Problems that were graded."""
        return len(self.grades)

    @property
    def fraction(self) -> float:
        """Mean grade."""
        return self.num_correct / self.num_problems

    def gain_se(self, before: "Score") -> float | None:
        """Paired standard error of the gain in score since ``before``, on the same problems.

        That of the mean of the problems' gains, over other problems of the kind; None of one alone.
        It says nothing about other seeds.
        """
        gains = [now - then for now, then in zip(self.grades, before.grades, strict=True)]
        return None if len(gains) < 2 else statistics.stdev(gains) / math.sqrt(len(gains))


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    batch_size: int = 256,
) -> list[str]:
    """Completions of ``prompts``, without the prompts and special tokens.

    Prompts are tokenised as TRL's trainers do, with what the tokenizer adds by itself (BOS).

    Args:
        model: a transformers causal LM; its train/eval mode is restored.
        tokenizer: its tokenizer; prompts are padded on the left.
        max_new_tokens: longest completion, in tokens.
        temperature: None decodes greedily; else samples, from the global generator of torch.
        batch_size: prompts a forward pass.
    """
    was_training = model.training
    model.eval()
    sampling = (
        {"do_sample": False}
        if temperature is None
        else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    )
    texts: list[str] = []
    for batch in _batches(model, tokenizer, prompts, batch_size):
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    model.train(was_training)
    return texts


def _batches(
    model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Token ids and masks of prompts, padded on the left, on the device of ``model``."""
    for first in range(0, len(prompts), batch_size):
        yield tokenizer(
            list(prompts[first : first + batch_size]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(next(model.parameters()).device)


@torch.no_grad()
def kl_divergence(
    model: Any,
    base: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    max_logits: int = 2**26,
) -> float:
    """KL(model || base) per token, over completions sampled from ``model`` at temperature 1.

    Mean over their tokens, end of text included, of sum_v p(v) log(p(v) / q(v)), the exact
    divergence of the next token. Both models are on the device of ``model``, in eval mode.

    Args:
        model: a transformers causal LM.
        base: the same, before training.
        tokenizer: of both.
        prompts: what is completed; padded on the left.
        max_new_tokens: longest completion, in tokens.
        batch_size: prompts that are completed at once.
        max_logits: logits of one model at once, of a sequence at least; five copies are held, in
            fp32 1.3 GB by default.
    """
    total, count = 0.0, 0
    for batch in _batches(model, tokenizer, prompts, batch_size):
        sequences = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        )  # fmt: skip
        start = batch["input_ids"].shape[1]
        ends = torch.isin(
            sequences[:, start:],
            torch.tensor(model.generation_config.eos_token_id, device=sequences.device),
        )
        real = (ends.int().cumsum(1) - ends.int()) == 0  # up to the first end, and it
        mask = torch.cat([batch["attention_mask"], real.to(batch["attention_mask"].dtype)], dim=1)
        given = {
            "input_ids": sequences,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        num_new = real.shape[1]
        num_rows = max(1, max_logits // (num_new * model.config.get_text_config().vocab_size))
        for first in range(0, len(real), num_rows):
            rows = slice(first, first + num_rows)
            part = {name: values[rows] for name, values in given.items()}
            log_p, log_q = (
                one(**part, logits_to_keep=num_new + 1).logits[:, :-1].float().log_softmax(-1)
                for one in (model, base)
            )
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            total += float((divergence * real[rows]).sum())
        count += int(real.sum())
    return total / count


def evaluate(model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem]) -> Score:
    """Greedy score of ``model`` on ``problems``."""
    texts = complete(
        model,
        tokenizer,
        [problem.prompt for problem in problems],
        max_new_tokens=task.max_completion_tokens,
    )
    grades = (task.grade(t, p.answer) for t, p in zip(texts, problems, strict=True))
    return Score(tuple(grades))
