"""What tensors are called: name -> layer and module."""

import re
from collections.abc import Sequence

_MODULE_NAMES: dict[str, str] = {
    "q": "q_proj q_a_proj q_b_proj wq query",
    "k": "k_proj wk key",
    "v": "v_proj wv value",
    "o": "o_proj wo out_proj",
    # DeepSeek's kv projections hold keys and values of all heads in one matrix.
    "qkv": "qkv qkv_proj query_key_value c_attn Wqkv W_pack kv_a_proj_with_mqa kv_b_proj",
    "gate": "gate_proj w1",
    "up": "up_proj w3 c_fc fc1 fc_in dense_h_to_4h",
    "gate_up": "gate_up_proj",
    "down": "down_proj w2 fc2 fc_out dense_4h_to_h",
    "router": "gate router shared_expert_gate",
    "embed": "embed_tokens wte wpe tok_embeddings word_embeddings embed_positions embed_in",
    "head": "lm_head embed_out output",
}
_MODULE = {name: module for module, names in _MODULE_NAMES.items() for name in names.split()}
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")


def layer_and_module(name: str, shape: Sequence[int] | None = None) -> tuple[int | None, str]:
    """Layer index (None outside the layers) and one of ``definitions.MODULES`` for a tensor's name.

    Args:
        name: as stored, for example ``model.layers.3.self_attn.q_proj.weight``.
        shape: tells GPT-2's causal-mask buffers from biases, and unnamed norms by being vectors.
    """
    parts = name.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), None)
    if parts[-1].endswith("bias"):
        return layer, "bias" if shape is None or len(shape) in (1, 2) else "other"
    is_weight = parts[-1] in ("weight", "scale") and len(parts) > 1
    stem = parts[-2] if is_weight else parts[-1]
    if _NORM.search(stem):
        return layer, "norm"
    if stem in ("c_proj", "dense"):  # GPT-2 and GPT-NeoX use one name in two places
        return layer, "o" if any(
            "attn" in part or "attention" in part for part in parts
        ) else "down"
    is_vector = is_weight and shape is not None and len(shape) == 1
    return layer, _MODULE.get(stem, "norm" if is_vector else "other")
