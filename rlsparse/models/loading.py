"""Tokenizer and weights of a base model, in the number format that a trial trains in."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlsparse.config import STORED_DTYPE, Precision

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Number formats that trials are stored in."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a base model; the end-of-text token pads where no padding token is set."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: Path, precision: Precision) -> Any:
    """The base in the number format that a precision regime trains in.

    The weights are rounded to the regime's stored format first, so that training with fp32
    masters starts exactly from the base that its patches are measured against.

    Returns:
        A transformers causal LM whose ``config._name_or_path`` is ``path`` (TRL reloads its
        reference policy from there).
    """
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=TORCH_DTYPES[STORED_DTYPE[precision]], trust_remote_code=False
    )
    return model.float() if precision == "bf16-mixed" else model
