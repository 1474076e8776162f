"""Prompts in a chat template, made up on a copy of the tiny base's tokenizer."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from rlsparse.errors import TrialError
from rlsparse.models import TINY
from rlsparse.models.loading import load_tokenizer
from rlsparse.task_config import ChainSumConfig
from rlsparse.tasks import Problem, load_task, render_prompts

TURN = "({{ messages[0]['content'] }})"
TEMPLATE = TURN + "{% if add_generation_prompt %}*{% endif %}"


@pytest.fixture
def tokenizer():
    made = copy.deepcopy(load_tokenizer(TINY))
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def problems():
    return load_task(ChainSumConfig()).problems("test", 5)


def with_bos(tokenizer, *, by_itself):
    """Makes ``?`` the BOS token, which the tokenizer puts before a text itself, or does not."""
    tokenizer.bos_token = "?"
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    if by_itself:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="? $A", special_tokens=[("?", tokenizer.bos_token_id)]
        )
    return tokenizer


def test_text_is_left_as_it_is(tokenizer, problems):
    assert render_prompts(problems, tokenizer, "text") == problems


def test_chat(tokenizer, problems):
    assert render_prompts(problems, tokenizer, "chat") == [
        Problem(f"({p.prompt})*", p.completion.strip(), p.answer) for p in problems
    ]
    assert render_prompts([], tokenizer, "chat") == []


@pytest.mark.parametrize("by_itself", [True, False])
def test_bos_comes_once(tokenizer, problems, by_itself):
    tokenizer = with_bos(tokenizer, by_itself=by_itself)
    for rendered, problem in zip(
        render_prompts(problems, tokenizer, "chat"), problems, strict=True
    ):
        ids = tokenizer(rendered.prompt)["input_ids"]
        assert tokenizer.decode(ids) == f"?({problem.prompt})*"
        # What the template itself makes of the turns, in tokens:
        turns = [{"role": "user", "content": problem.prompt}]
        own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        assert ids == own["input_ids"]


def test_tokenizer_without_template(tokenizer, problems):
    tokenizer.chat_template = None
    with pytest.raises(TrialError, match=r"no chat template; set task\.prompt_format to text"):
        render_prompts(problems, tokenizer, "chat")
