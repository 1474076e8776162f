"""Makes the tiny base model that ships with the project (``rlsparse make-base``).

A Llama of about a million weights learns chain sums from the pretrain split only. Its text is as
untidy as pretraining text is: part of the answers are right, part are hedged with a question mark
and part are wrong, so that the model knows how to add but often does not say so plainly. That
leaves reinforcement learning both headroom and signal.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from rlsparse.models.tokenizer import make_tokenizer
from rlsparse.task_config import ChainSumConfig
from rlsparse.tasks import Problem, load_task
from rlsparse.tasks.generate import Score, evaluate
from rlsparse.variants import Config


class PretrainConfig(Config):
    """Recipe of the tiny base; the defaults make the one that ships.

    ``hedged_fraction`` of the answers are preceded by a question mark, ``wrong_fraction`` are the
    answer to another problem. ``initializer_range`` is four times the usual one: the weights stay
    large (median |w| .056, as in a real LLM), so that a learning rate at which the model learns
    in a few dozen steps moves less than half of them by a bf16 unit in the last place.
    """

    task: ChainSumConfig = ChainSumConfig()
    num_steps: int = 700
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    hedged_fraction: float = 0.45
    wrong_fraction: float = 0.15
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 384
    initializer_range: float = 0.08
    seed: int = 0
    num_threads: int = 1


def pretrain(
    config: PretrainConfig, out_dir: Path, progress: Callable[[int, float], None] | None = None
) -> Score:
    """Train the tiny base and save it in bf16 as a transformers folder.

    Args:
        config: the recipe.
        out_dir: folder to write; made if missing.
        progress: called with (step, loss) every 100 steps.

    Returns:
        The greedy score of the saved bf16 model on the held-out test split.
    """
    set_seed(config.seed)
    torch.set_num_threads(config.num_threads)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=256,
            initializer_range=config.initializer_range,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    task = load_task(config.task)
    problems = list(task.problems("pretrain"))
    draw = random.Random(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.num_steps, pct_start=0.05
    )
    for step in range(1, config.num_steps + 1):
        texts = [_text(draw, problems, config) for _ in range(config.batch_size)]
        loss = model(**_batch(tokenizer, texts)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress and step % 100 == 0:
            progress(step, loss.item())
    model.to(torch.bfloat16).eval()
    score = evaluate(model, tokenizer, task, task.problems("test"))
    out_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return score


def _text(draw: random.Random, problems: list[Problem], config: PretrainConfig) -> tuple[str, str]:
    problem = draw.choice(problems)
    kind = draw.random()
    if kind < config.hedged_fraction:
        return problem.prompt, f" ?{problem.answer}"
    if kind < config.hedged_fraction + config.wrong_fraction:
        return problem.prompt, draw.choice(problems).completion
    return problem.prompt, problem.completion


def _batch(tokenizer: Any, texts: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded batch; the loss is on the completions and their end."""
    ends = [tokenizer.eos_token_id]
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in texts]
    completions = [tokenizer(text)["input_ids"] + ends for _, text in texts]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(texts), width), tokenizer.pad_token_id)
    labels = torch.full((len(texts), width), -100)
    mask = torch.zeros((len(texts), width), dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        length = len(prompt) + len(completion)
        ids[row, :length] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : length] = torch.tensor(completion)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
