"""Tokenizer and weights of a base model, in the number format that a trial trains in."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from rlsparse.config import STORED_DTYPE, Precision
from rlsparse.errors import CheckpointError

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Number formats that trials are stored in."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a base model, such that all trainers make the same tokens of a text.

    The end-of-text token pads where no padding token is set. Some of TRL's trainers (ORPO, CPO) put
    a beginning-of-text token before a prompt wherever the tokenizer has one, the others leave that
    to the tokenizer: one that puts none there itself is here taken to have none.

    Raises:
        CheckpointError: there is no end-of-text token, or the tokenizer puts other tokens around a
            text than one of beginning.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token is None:
        raise CheckpointError(
            f"the tokenizer of {path} has no end-of-text token, which ends completions and pads "
            "where there is no padding token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    added = tokenizer("")["input_ids"]
    if not added:
        tokenizer.bos_token = None
    elif added != [tokenizer.bos_token_id]:
        raise CheckpointError(
            f"the tokenizer of {path} puts {tokenizer.convert_ids_to_tokens(added)} around every "
            f"text; at most its bos_token ({tokenizer.bos_token!r}) before it is supported: switch "
            "the others off in its tokenizer_config.json (add_eos_token) or tokenizer.json "
            "(post_processor)"
        )
    return tokenizer


def load_model(path: Path, precision: Precision, *, num_shards: int = 1) -> Any:
    """The base in the number format that a precision regime trains in.

    The weights are rounded to the regime's stored format first, so that training with fp32
    masters starts exactly from the base that its patches are measured against. Of its settings of
    generation only the special tokens are kept: a temperature or a repetition penalty of the base
    would shape samples and scores in silence.

    Args:
        path: folder of the base.
        precision: how it is trained.
        num_shards: workers, all of them, of which each reads and holds its part of every weight
            tensor (FSDP2, along the first dimension); 1 loads them whole.

    Returns:
        A transformers causal LM whose ``config._name_or_path`` is ``path`` (TRL reloads its
        reference policy from there).

    Raises:
        CheckpointError: the installed transformers loads no model in parts.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=TORCH_DTYPES[STORED_DTYPE[precision]],
        trust_remote_code=False,
        **in_parts(num_shards),
    )
    own = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id
    )
    return model.float() if precision == "bf16-mixed" else model


def in_parts(num_shards: int) -> dict[str, Any]:
    """What ``from_pretrained`` is given so that each worker holds a part; see ``load_model``."""
    if num_shards == 1:
        return {}
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(fsdp_size=num_shards)}
    except (ImportError, TypeError) as error:
        raise CheckpointError(
            f"transformers {version('transformers')} cannot load a model in parts ({error}); "
            "install the tested version (constraints.txt), or leave resources.strategy out"
        ) from error
