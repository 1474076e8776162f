"""A small quantized GGUF file with known content, installed like the packages that ship real ones.

``expected_weights`` is the oracle of the conversion: the gguf package's own dequantization, and
rounding to bf16 by integer arithmetic.
"""

from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, CONTEXT = 64, 2, 1, 96, 2, 128
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
_Q4, _F32 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.F32

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def vocabulary() -> list[str]:
    """Three special tokens, then every byte as GPT-2 writes it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    written = {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}
    return ["<unk>", "<begin>", "<end>", *(written[byte] for byte in range(256)), "Ġ1"]


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of two layers with Q4_1 matrices, its head tied to the embedding."""
    rng = np.random.default_rng(seed)
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("planted")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ 1"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    key_value = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_q": (HIDDEN, HIDDEN),
                "attn_k": (key_value, HIDDEN),
                "attn_v": (key_value, HIDDEN),
                "attn_output": (HIDDEN, HIDDEN),
                "ffn_gate": (FFN, HIDDEN),
                "ffn_up": (FFN, HIDDEN),
                "ffn_down": (HIDDEN, FFN),
                "attn_norm": (HIDDEN,),
                "ffn_norm": (HIDDEN,),
            }.items()
        }
    shapes["output_norm"] = (HIDDEN,)
    for name, shape in shapes.items():
        values = rng.normal(0 if len(shape) == 2 else 1, 0.05, shape).astype(np.float32)
        kind = _Q4 if len(shape) == 2 else _F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def install(site: Path, name: str, files: dict[str, bytes], version: str = "9.8.7") -> None:
    """Put a package into a folder of packages, as pip does."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)


def dequantized(path: Path, num_heads: int, num_kv_heads: int) -> dict[str, np.ndarray]:
    """Name in transformers -> weights in fp32, of a GGUF file of a Llama.

    The rows of q and k lie in pairs there, one of either half of a head.
    """
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        *block, stem, _ = tensor.name.split(".")
        if heads := {"attn_q": num_heads, "attn_k": num_kv_heads}.get(stem):
            per_head = len(values) // heads
            rows = np.arange(len(values)).reshape(heads, per_head // 2, 2)
            values = values[np.concatenate([rows[..., 0], rows[..., 1]], axis=1).ravel()]
        prefix = f"model.layers.{block[1]}." if block else ""
        found[f"{prefix}{_NAMES[stem]}.weight"] = values
    return found


def rounded(values: np.ndarray) -> np.ndarray:
    """Bits in bf16, to nearest, ties to even, of finite fp32 values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def share_of_ties(weights: dict[str, np.ndarray]) -> float:
    """Share of fp32 weights exactly midway between two bf16 values."""
    ties = sum(int(((w.view(np.uint32) & 0xFFFF) == 0x8000).sum()) for w in weights.values())
    return ties / sum(w.size for w in weights.values())
