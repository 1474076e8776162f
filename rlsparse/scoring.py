"""What a trial scores while it trains: greedily on problems of a split, and far from its base.

Measuring leaves torch's random state as it was.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlsparse.algorithms import TrialContext
from rlsparse.config import NUM_DISTANCE_PROBLEMS, TrialConfig
from rlsparse.errors import TrialError
from rlsparse.memory import tells_out_of_memory
from rlsparse.models.loading import load_model
from rlsparse.tasks import Problem, Split, Task, render_prompts
from rlsparse.tasks.generate import Score, evaluate, kl_divergence

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""Those that a trial uses; a task may have more."""


def problems_of(config: TrialConfig, task: Task, tokenizer: Any, split: Split) -> list[Problem]:
    """The problems of a split that a trial uses, as the base reads them.

    Raises:
        ConfigError: the task has fewer.
        TrialError: none has a solution that is short enough for completions.
    """
    sizes: dict[Split, int] = {
        "train": config.task.num_train_problems,
        "validation": config.task.num_validation_problems,
        "test": config.task.num_eval_problems,
    }
    if not sizes[split]:
        return []
    problems = render_prompts(
        task.problems(split, sizes[split]), tokenizer, config.task.prompt_format
    )
    gold = tokenizer([p.completion for p in problems], add_special_tokens=False)["input_ids"]
    shortest = min(map(len, gold)) + 1  # and the end of text
    if shortest > config.task.max_completion_tokens:
        raise TrialError(
            f"task.max_completion_tokens is {config.task.max_completion_tokens}, but the shortest "
            f"{split} solution of {config.task.name} takes {shortest} tokens, so that no "
            "completion could be right; raise it"
        )
    return problems


@tells_out_of_memory("scoring")
def score(context: TrialContext, model: Any, split: Split = "test") -> Score:
    """Greedy score of a model on the problems of a split that the trial uses."""
    problems = problems_of(context.config, context.task, context.tokenizer, split)
    with _forked_random_state():
        return evaluate(model, context.tokenizer, context.task, problems)


def score_validation(context: TrialContext) -> Score | None:
    """Score of the trained model on the validation split; None where no problems are asked for."""
    if not context.config.task.num_validation_problems:
        return None
    return score(context, context.model, "validation")


def validation_columns(found: Score | None) -> dict[str, float]:
    """What table ``trials`` says of the result of ``score_validation``."""
    if found is None:
        return {}
    return {"score_validation": found.fraction, "num_validation_problems": found.num_problems}


def score_stored(context: TrialContext, base_dir: Path) -> Score | None:
    """Score of the base as it is stored, where the trainer's autocast may score it otherwise."""
    if context.config.train.precision != "bf16-mixed":
        return None
    stored = load_model(base_dir, "bf16", num_shards=context.num_shards)
    return score(context, stored.to(context.model.device))


@tells_out_of_memory("measuring the distance to the base")
def distance(context: TrialContext, base_dir: Path) -> float:
    """KL of the model to the base on its own samples.

    The samples are of the first ``NUM_DISTANCE_PROBLEMS`` test problems, drawn under the same seed
    at every snapshot. The base is loaded anew each time, so that training holds no copy of it.
    """
    config, model = context.config, context.model
    precision, was_training = config.train.precision, model.training
    base = load_model(base_dir, precision, num_shards=context.num_shards).to(model.device).eval()
    problems = problems_of(config, context.task, context.tokenizer, "test")
    # The trainer has wrapped the trained model in autocast, but not the base.
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
    with _forked_random_state(), autocast:
        torch.manual_seed(config.sampling_seed)
        found = kl_divergence(
            model.eval(),
            base,
            context.tokenizer,
            [problem.prompt for problem in problems[:NUM_DISTANCE_PROBLEMS]],
            max_new_tokens=context.task.max_completion_tokens,
        )
    model.train(was_training)
    return found


def _forked_random_state() -> contextlib.AbstractContextManager[None]:
    """Within it, torch's random numbers are drawn without effect on those drawn after it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


def eval_rows(
    trial_id: str, scores: Mapping[int, Score], validation: Score | None, last: int
) -> list[dict[str, Any]]:
    """Rows of table ``eval``.

    Args:
        trial_id: the trial.
        scores: on the test split, by step; step 0 is before training.
        validation: result of ``score_validation``.
        last: step after which that was.
    """
    listed = [("test", step, found) for step, found in sorted(scores.items())]
    listed += [("validation", last, validation)] if validation else []
    return [
        {
            "trial_id": trial_id,
            "step": step,
            "split": split,
            "num_correct": found.num_correct,
            "num_problems": found.num_problems,
            "score": found.fraction,
            "gain_se": found.gain_se(scores[0]) if step and split == "test" else None,
        }
        for split, step, found in listed
    ]
