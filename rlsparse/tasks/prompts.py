"""Prompts as a base reads them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from rlsparse.errors import TrialError
from rlsparse.tasks.problem import Problem


def render_prompts(
    problems: Sequence[Problem], tokenizer: Any, prompt_format: Literal["text", "chat"]
) -> list[Problem]:
    """The problems with their prompts in the format that a trial asks for.

    Done once, as text, so that training and evaluation of every algorithm read the same. ``text``
    leaves problems as they are. ``chat`` puts the prompt into the turn of a user and opens that of
    the assistant; gold completions lose the space that they begin with. Where both the template and
    the tokenizer begin a text with BOS, that of the template is left out.

    Raises:
        TrialError: the tokenizer has no chat template.
    """
    if prompt_format == "text":
        return list(problems)
    if not getattr(tokenizer, "chat_template", None):
        raise TrialError(
            f"task.prompt_format is chat, but the tokenizer {tokenizer.name_or_path} has no chat "
            "template; set task.prompt_format to text, or use a chat model"
        )
    texts = [_in_chat(problem.prompt, tokenizer) for problem in problems]
    ids = tokenizer(texts[0])["input_ids"] if texts else []
    doubled = tokenizer.bos_token if ids[:2] == [tokenizer.bos_token_id] * 2 else ""
    return [
        replace(
            problem,
            prompt=text.removeprefix(doubled),
            completion=problem.completion.lstrip(" "),
        )
        for problem, text in zip(problems, texts, strict=True)
    ]


def _in_chat(prompt: str, tokenizer: Any) -> str:
    turns = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text
