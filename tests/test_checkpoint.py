import contextlib
import hashlib
import itertools
import json
import math
import pickle

import numpy as np
import planted
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Tensor

from rlsparse.checkpoint import Checkpoint, chunks, fingerprint
from rlsparse.definitions import MODULES
from rlsparse.errors import CheckpointError
from rlsparse.names import layer_and_module
from rlsparse.tensor_file import atomic_write, save_checkpoint

EXOTIC = {
    "scalar": Tensor("fp32", (), np.array([7], "<u4")),
    "empty": Tensor("bf16", (0, 4), np.array([], "<u2")),
    "cube": Tensor("bf16", (2, 3, 4), np.arange(24, dtype="<u2")),
    "ids": Tensor("i64", (3,), np.array([1, 2**63, 5], "<u8")),
    "flags": Tensor("bool", (2,), np.array([0, 1], "u1")),
    "eight": Tensor("fp8_e4m3", (5,), np.array([0, 127, 255, 128, 1], "u1")),
}


def same(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> bool:
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tensor.shape)
        bits = checkpoint.read_bits(name)
        assert bits.dtype == tensor.bits.dtype
        assert bits.tobytes() == tensor.bits.tobytes()
    return True


def test_reads_every_format_and_shape(tmp_path):
    folder = planted.write_folder(tmp_path / "base", EXOTIC)
    checkpoint = Checkpoint.open(folder)
    assert same(checkpoint, EXOTIC)
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.tensors["scalar"].num_elements == 1
    assert same(Checkpoint.open(folder / "model.safetensors"), EXOTIC)
    assert same(pickle.loads(pickle.dumps(checkpoint)), EXOTIC)


def test_reads_slices(tmp_path):
    checkpoint = Checkpoint.open(planted.write_folder(tmp_path / "base", EXOTIC))
    for start, stop in itertools.combinations_with_replacement(range(25), 2):
        assert checkpoint.read_bits("cube", start, stop).tolist() == list(range(start, stop))
    assert checkpoint.read_bits("cube", 20).tolist() == [20, 21, 22, 23]
    for start, stop in [(-1, 3), (3, 2), (0, 25)]:
        with pytest.raises(CheckpointError, match="24 elements"):
            checkpoint.read_bits("cube", start, stop)


def test_shards_read_as_one_file(tmp_path):
    names = sorted(EXOTIC)
    parts = {
        "model-00001-of-00002.safetensors": {n: EXOTIC[n] for n in names[:3]},
        "model-00002-of-00002.safetensors": {n: EXOTIC[n] for n in names[3:]},
    }
    sharded = Checkpoint.open(planted.write_shards(tmp_path / "shards", parts))
    assert same(sharded, EXOTIC)
    single = Checkpoint.open(planted.write_folder(tmp_path / "single", EXOTIC))
    assert fingerprint(sharded) == fingerprint(single)


def test_folders_that_are_no_checkpoint(tmp_path):
    cases = {
        "nothing": "no such file or folder",
        "empty": r"no model\.safetensors",
        "torch": r"PyTorch \.bin",
        "fsdp": r"verl\.model_merger merge .*/fsdp",
        "dcp": "dcp_to_torch",
        "lora": "LoRA adapter",
    }
    files = {
        "empty": "README.md",
        "torch": "pytorch_model.bin",
        "fsdp": "model_world_size_8_rank_0.pt",
        "dcp": "__0_0.distcp",
        "lora": "adapter_model.safetensors",
    }
    for folder, file in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    for folder, message in cases.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint.open(tmp_path / folder)
        assert str(tmp_path / folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_incomplete_shards(tmp_path):
    one, two = "a.safetensors", "b.safetensors"
    tensor = EXOTIC["cube"]
    missing = planted.write_shards(tmp_path / "missing", {one: {"x": tensor}, two: {"y": tensor}})
    (missing / two).unlink()
    with pytest.raises(CheckpointError, match=r"missing lacks the shards \['b.safetensors'\]"):
        Checkpoint.open(missing)
    planted.write_file(missing / two, {"x": tensor, "y": tensor})
    with pytest.raises(CheckpointError, match=r"b.safetensors stores \['x'\] again"):
        Checkpoint.open(missing)
    planted.write_file(missing / two, {"z": tensor})
    with pytest.raises(CheckpointError, match=r"lack \['y'\]"):
        Checkpoint.open(missing)


def test_every_truncation_is_noticed(tmp_path):
    file = tmp_path / "t.safetensors"
    planted.write_file(file, {"a": EXOTIC["cube"], "b": EXOTIC["scalar"]})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"t\.safetensors"):
            Checkpoint.open(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "damaged"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}', "damaged"),
        ('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "damaged"),
        ('{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}', "number format F4; known: F64"),
        ('{"a":{"shape":[1],"data_offsets":[0,4]}}', "damaged"),
        ('{"a":7}', "damaged"),
        ('["a"]', "damaged"),
        ("{", "damaged"),
        ('{"__metadata__":[1]}', "damaged"),
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            '"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
            "a and b overlap",
        ),
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            '"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            "given twice",
        ),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    file = tmp_path / "d.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(file)


def test_tied_head_counts_once(tmp_path):
    embedding = Tensor("bf16", (3, 2), np.arange(6, dtype="<u2"))
    tensors = {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding}
    folder = planted.write_folder(tmp_path / "tied", tensors, {"tie_word_embeddings": True})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [info.name for info in checkpoint.counted] == ["model.embed_tokens.weight"]
    loose = planted.write_folder(tmp_path / "loose", tensors, {"tie_word_embeddings": False})
    assert Checkpoint.open(loose).tied == {}
    assert len(Checkpoint.open(loose).counted) == 2


def test_fingerprint_sees_every_part(tmp_path):
    base = {"a": Tensor("bf16", (4,), np.arange(4, dtype="<u2"))}
    bits = base["a"].bits
    variants = [
        base,
        {"b": base["a"]},
        {"a": Tensor("fp16", (4,), bits)},
        {"a": Tensor("bf16", (2, 2), bits)},
        {"a": Tensor("bf16", (4,), bits ^ np.uint16([0, 0, 0, 1]))},
        {**base, "z": Tensor("bf16", (0,), bits[:0])},
    ]
    seen = set()
    for number, tensors in enumerate(variants):
        folder = planted.write_folder(tmp_path / str(number), tensors, {"n": number})
        seen.add(fingerprint(Checkpoint.open(folder)))
    assert len(seen) == len(variants)
    again = planted.write_folder(tmp_path / "again", base, {"other": "config"})
    assert fingerprint(Checkpoint.open(again)) in seen
    header = b'["a", "bf16", [4]]\n'
    assert hashlib.sha256(header + bits.tobytes()).hexdigest() in seen


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 40), min_size=0, max_size=3), st.sampled_from([64, 128, 1000, 2**22])
)
def test_chunks_are_the_largest_legal_runs_of_rows(shape, max_elements):
    total, row = math.prod(shape), math.prod(shape[1:])
    found = list(chunks(shape, max_elements))
    assert sum(chunk.num_elements for chunk in found) == total
    position = 0
    for index, chunk in enumerate(found):
        assert (chunk.index, chunk.start) == (index, position)
        assert chunk.start % 64 == 0
        assert chunk.num_elements > 0
        assert chunk.start % row == chunk.num_elements % row == 0
        position = chunk.stop
        if chunk.stop < total:  # one more legal step would be too large
            legal = [n for n in range(row, chunk.num_elements + 64 * row + 1, row) if n % 64 == 0]
            assert chunk.num_elements == max(
                (n for n in legal if n <= max_elements), default=legal[0]
            )


def test_chunks_by_default_hold_four_million_elements():
    assert [c.num_elements for c in chunks((10_000, 1000))] == [4_192_000, 4_192_000, 1_616_000]
    assert [c.num_elements for c in chunks((3, 2**23 + 64))] == [2**23 + 64] * 3


NAMES = {
    # Llama, Qwen, Mistral, Gemma
    "model.embed_tokens.weight": (None, "embed"),
    "model.layers.11.self_attn.q_proj.weight": (11, "q"),
    "model.layers.11.self_attn.k_proj.weight": (11, "k"),
    "model.layers.11.self_attn.v_proj.weight": (11, "v"),
    "model.layers.11.self_attn.o_proj.weight": (11, "o"),
    "model.layers.0.self_attn.q_proj.bias": (0, "bias"),
    "model.layers.0.self_attn.q_norm.weight": (0, "norm"),
    "model.layers.0.self_attn.k_norm.weight": (0, "norm"),
    "model.layers.0.mlp.gate_proj.weight": (0, "gate"),
    "model.layers.0.mlp.up_proj.weight": (0, "up"),
    "model.layers.0.mlp.down_proj.weight": (0, "down"),
    "model.layers.0.input_layernorm.weight": (0, "norm"),
    "model.layers.0.pre_feedforward_layernorm.weight": (0, "norm"),
    "model.norm.weight": (None, "norm"),
    "lm_head.weight": (None, "head"),
    "language_model.model.layers.3.mlp.up_proj.weight": (3, "up"),
    # Mistral's own format
    "layers.4.attention.wq.weight": (4, "q"),
    "layers.4.feed_forward.w1.weight": (4, "gate"),
    "layers.4.feed_forward.w2.weight": (4, "down"),
    "layers.4.feed_forward.w3.weight": (4, "up"),
    "layers.4.attention_norm.weight": (4, "norm"),
    "tok_embeddings.weight": (None, "embed"),
    "output.weight": (None, "head"),
    # experts
    "model.layers.2.block_sparse_moe.experts.7.w3.weight": (2, "up"),
    "model.layers.2.block_sparse_moe.gate.weight": (2, "router"),
    "model.layers.2.mlp.experts.63.down_proj.weight": (2, "down"),
    "model.layers.2.mlp.experts.63.gate_proj.weight": (2, "gate"),
    "model.layers.2.mlp.experts.gate_up_proj": (2, "gate_up"),
    "model.layers.2.mlp.experts.gate_up_proj_bias": (2, "bias"),
    "model.layers.2.mlp.experts.down_proj": (2, "down"),
    "model.layers.2.mlp.gate.weight": (2, "router"),
    "model.layers.2.mlp.router.weight": (2, "router"),
    "model.layers.2.mlp.shared_expert_gate.weight": (2, "router"),
    "model.layers.2.mlp.shared_experts.up_proj.weight": (2, "up"),
    # DeepSeek
    "model.layers.5.self_attn.q_a_proj.weight": (5, "q"),
    "model.layers.5.self_attn.q_a_layernorm.weight": (5, "norm"),
    "model.layers.5.self_attn.q_b_proj.weight": (5, "q"),
    "model.layers.5.self_attn.kv_a_proj_with_mqa.weight": (5, "qkv"),
    "model.layers.5.self_attn.kv_a_layernorm.weight": (5, "norm"),
    "model.layers.5.self_attn.kv_b_proj.weight": (5, "qkv"),
    "model.layers.5.mlp.gate.e_score_correction_bias": (5, "bias"),
    "model.layers.5.mlp.down_proj.weight_scale_inv": (5, "other"),
    # GPT-2
    "transformer.wte.weight": (None, "embed"),
    "wpe.weight": (None, "embed"),
    "transformer.h.9.attn.c_attn.weight": (9, "qkv"),
    "transformer.h.9.attn.c_attn.bias": (9, "bias"),
    "h.9.attn.c_proj.weight": (9, "o"),
    "h.9.mlp.c_fc.weight": (9, "up"),
    "h.9.mlp.c_proj.weight": (9, "down"),
    "h.9.ln_1.weight": (9, "norm"),
    "h.9.ln_2.bias": (9, "bias"),
    "transformer.ln_f.weight": (None, "norm"),
    # fused, other
    "model.layers.0.self_attn.qkv_proj.weight": (0, "qkv"),
    "model.layers.0.mlp.gate_up_proj.weight": (0, "gate_up"),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (0, "other"),
}


def test_names_of_model_families():
    assert {name: layer_and_module(name) for name in NAMES} == NAMES
    assert {module for _, module in NAMES.values()} == set(MODULES)


def test_shape_tells_buffers_and_unnamed_norms():
    assert layer_and_module("h.0.attn.bias", (1, 1, 8, 8)) == (0, "other")
    assert layer_and_module("h.0.attn.c_attn.bias", (24,)) == (0, "bias")
    assert layer_and_module("model.layers.0.strange.weight", (24,)) == (0, "norm")
    assert layer_and_module("model.layers.0.strange.weight", (24, 2)) == (0, "other")


def test_save_round_trip_also_for_the_safetensors_library(tmp_path):
    source = planted.write_folder(tmp_path / "source", EXOTIC)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").touch()
    (source / "model.safetensors.index.json").write_text("{}")
    out = tmp_path / "deep" / "out"
    save_checkpoint(
        out, {n: (t.dtype, t.shape, t.bits) for n, t in EXOTIC.items()}, {"k": "v"}, source
    )
    assert same(Checkpoint.open(out), EXOTIC)
    assert Checkpoint.open(out).metadata == {"k": "v"}
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    with safetensors.safe_open(out / "model.safetensors", "numpy") as official:
        assert set(official.keys()) == set(EXOTIC)
        assert official.get_tensor("ids").tolist() == EXOTIC["ids"].bits.view("<i8").tolist()
        assert official.get_tensor("scalar").shape == ()
    pieces = {"cube": ("bf16", (2, 3, 4), iter(np.split(EXOTIC["cube"].bits, 3)))}
    save_checkpoint(tmp_path / "pieces", pieces)
    assert same(Checkpoint.open(tmp_path / "pieces"), {"cube": EXOTIC["cube"]})


def test_save_leaves_nothing_half_written(tmp_path):
    with pytest.raises(CheckpointError, match="46 bytes given for cube"):
        save_checkpoint(tmp_path, {"cube": ("bf16", (2, 3, 4), EXOTIC["cube"].bits[1:])})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").write_text("old")
    with contextlib.suppress(KeyError), atomic_write(tmp_path / "kept") as stream:
        stream.write(b"new")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kept", "old")]


def test_file_that_shrinks_after_opening(tmp_path):
    folder = planted.write_folder(tmp_path / "base", EXOTIC)
    checkpoint = Checkpoint.open(folder)
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.read_bits(last.name)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.read_bits(last.name)


def test_index_that_is_not_json(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Checkpoint.open(tmp_path)
