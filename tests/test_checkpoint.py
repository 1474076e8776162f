import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import tempfile
from pathlib import Path

import numpy as np
import planted
import pytest
import safetensors
import torch
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


ONE = {"w": EXOTIC["cube"]}
OTHER = {"w": Tensor("bf16", (2, 3, 4), np.arange(24, 48, dtype="<u2"))}

FOLDERS = {
    "empty": ([], "in {path}, which holds nothing"),
    "readme": (["README.md"], r"no model\.safetensors.*holds \['README.md'\]; load it with"),
    "fsdp": (["model_world_size_8_rank_0.pt"], "verl.model_merger merge --backend fsdp "
             "--local_dir {path} --target_dir OUT"),
    "inner-fsdp": (["latest_checkpointed_iteration.txt", "global_step_8/data.pt",
                    "global_step_20/actor/model_world_size_8_rank_0.pt",
                    "global_step_20/actor/huggingface/config.json"],
                   "--backend fsdp --local_dir {path}/global_step_20/actor --target"),
    "verl-megatron": (["actor/dist_ckpt/__0_0.distcp"], "megatron --local_dir {path}/actor"),
    "accelerate": (["checkpoint-3/pytorch_model_fsdp_0/__0_0.distcp", "checkpoint-3/optimizer.pt"],
                   "accelerate merge-weights {path}/checkpoint-3/pytorch_model_fsdp_0 OUT"),
    "dcp": (["__0_0.distcp"], "format_utils dcp_to_torch {path} OUT.pt"),
    "dcp-metadata": ([".metadata"], "format_utils dcp_to_torch {path} OUT.pt"),
    "megatron": (["latest_checkpointed_iteration.txt", "iter_0000100/x.pt",
                  "iter_0000020/x.pt"], r"export_ckpt\('{path}/iter_0000100', 'OUT'"),
    "iteration": (["mp_rank_00/model.pt"], r"export_ckpt\('{path}', 'OUT'"),
    "no-iteration": (["latest_checkpointed_iteration.txt"], "give the folder that holds iter_"),
    "zero": (["zero_to_fp32.py", "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
             "deepspeed.utils.zero_to_fp32 {path} OUT --safe_serialization"),
    "run/global_step10": (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
                          "zero_to_fp32 {parent} OUT --safe_serialization --tag global_step10"),
    "lora": (["adapter_config.json", "adapter_model.safetensors"],
             r"from_pretrained\('{path}'\).merge_and_unload\(\)"),
    "gguf": (["a.Q4_K.gguf"], r"from_pretrained\('{path}', gguf_file='a.Q4_K.gguf'\)"),
    "tf": (["tf_model.h5"], "from_tf=True"),
    "flax": (["flax_model.msgpack"], "from_flax=True"),
    "named-pickle": (["consolidated.00.pth"], "give the file {path}/consolidated.00.pth itself"),
    "optimizer": (["optimizer.pt", "training_args.bin"], "no model.safetensors"),
    "two-files": (["a.safetensors", "b.safetensors"], "give one of these files"),
    "lone-shard": (["model-00001-of-00003.safetensors"], "has no model.safetensors.index.json"),
}  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_without_readable_weights(tmp_path, folder):
    path = tmp_path / folder
    path.mkdir(parents=True)
    files, message = FOLDERS[folder]
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).touch()
    pattern = message.replace("{path}", re.escape(str(path)))
    pattern = pattern.replace("{parent}", re.escape(str(path.parent)))
    with pytest.raises(CheckpointError, match=pattern) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)


def test_commands_quote_the_folder(tmp_path):
    path = tmp_path / "my run; x"
    path.mkdir()
    (path / "__0_0.distcp").touch()
    with pytest.raises(CheckpointError, match=r"dcp_to_torch '/.*/my run; x' OUT\.pt"):
        Checkpoint.open(path)


def test_places_that_are_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "a.gguf").touch()
    (tmp_path / "notes.txt").touch()
    cases = {
        tmp_path / "nothing": "no such file or folder; give a path, a hub id",
        tmp_path / "model.safetensors": "is neither a file nor a folder",
        tmp_path / ("a" * 300): "cannot read .*: File name too long",
        tmp_path / "a.gguf": r"a.gguf is not a .safetensors file; .*gguf_file='a.gguf'",
        tmp_path / "notes.txt": "notes.txt is not a .safetensors file; load it with transformers",
        Path("org/model"): "no checkpoint at org/model",  # a hub id is text
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)


TRAINERS = {
    "checkpoint": (["checkpoint-9", "checkpoint-10"], "checkpoint-10"),
    "numbers": (["weight_v000009", "weight_v000100"], "weight_v000100"),
    "verl": (["global_step_2/actor/huggingface", "global_step_10/actor/huggingface"],
             "global_step_10/actor/huggingface"),
    "verl actor": (["global_step_3/actor", "global_step_3/critic"], "global_step_3/actor"),
    "verl whole": (["global_step_3"], "global_step_3"),
    "one actor": (["actor/huggingface", "critic"], "actor/huggingface"),
    "step": (["step_1", "step-2"], "step-2"),
    "epoch": (["epoch_0", "epoch_1"], "epoch_1"),
    "policy": (["policy"], "policy"),
    "first kind": (["epoch_7", "checkpoint-5"], "checkpoint-5"),
    "itself": (["checkpoint-5", "."], "."),
}  # fmt: skip


@pytest.mark.parametrize(("folders", "chosen"), TRAINERS.values(), ids=TRAINERS)
def test_folders_of_trainers(tmp_path, folders, chosen):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        planted.write_file(
            tmp_path / folder / "model.safetensors", OTHER if folder == chosen else ONE
        )
        (tmp_path / folder / "config.json").write_text(json.dumps({"folder": folder}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.path == tmp_path / chosen
    assert checkpoint.config == {"folder": chosen}
    assert same(checkpoint, OTHER)
    assert same(Checkpoint.open(f"file://{tmp_path}"), OTHER)


def test_a_smaller_step_never_stands_in_for_an_unfinished_one(tmp_path):
    planted.write_folder(tmp_path / "checkpoint-100", ONE)
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-200" / "optimizer.pt").touch()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_one_file_of_another_name(tmp_path):
    planted.write_file(tmp_path / "weights.safetensors", ONE)
    planted.write_file(tmp_path / "adapter_model.safetensors", OTHER)
    assert same(Checkpoint.open(tmp_path), ONE)
    assert same(Checkpoint.open(tmp_path / "adapter_model.safetensors"), OTHER)


def test_safetensors_come_before_pickles(tmp_path):
    planted.write_file(tmp_path / "model.safetensors", ONE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    assert same(Checkpoint.open(tmp_path), ONE)


def test_pickled_shards(tmp_path):
    whole = {f"w{n}": torch.arange(n + 1.0) for n in range(4)}
    names = list(whole)
    for number, part in enumerate((names[:2], names[2:])):
        torch.save({name: whole[name] for name in part}, tmp_path / f"part-{number}.bin")
    index = {"weight_map": {name: f"part-{n // 2}.bin" for n, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == names
    for name, tensor in whole.items():
        assert checkpoint.read_bits(name).view("<f4").tolist() == tensor.tolist()


def test_incomplete_shards(tmp_path):
    one, two = "a.safetensors", "b.safetensors"
    tensor = EXOTIC["cube"]
    folder = planted.write_shards(tmp_path / "missing", {one: {"x": tensor}, two: {"y": tensor}})
    (folder / two).unlink()
    with pytest.raises(CheckpointError, match=r"missing lacks the shards \['b.safetensors'\]"):
        Checkpoint.open(folder)
    (folder / two).mkdir()
    with pytest.raises(CheckpointError, match=r"missing lacks the shards \['b.safetensors'\]"):
        Checkpoint.open(folder)
    (folder / two).rmdir()
    planted.write_file(folder / two, {"x": tensor, "y": tensor})
    with pytest.raises(CheckpointError, match=r"b.safetensors stores \['x'\] again"):
        Checkpoint.open(folder)
    planted.write_file(folder / two, {"z": tensor})
    with pytest.raises(CheckpointError, match=r"lack \['y'\]"):
        Checkpoint.open(folder)
    planted.write_file(folder / one, {"y": tensor})
    planted.write_file(folder / two, {"x": tensor})
    with pytest.raises(CheckpointError, match=r"says that x is in a.safetensors, it is in b.safe"):
        Checkpoint.open(folder)


INDEXES = {
    "list": ("[]", "is damaged: not a JSON mapping"),
    "nothing": ("", "is damaged"),
    "no map": ("{}", "lists no tensors"),
    "empty": ('{"weight_map": {}}', "lists no tensors"),
    "map of lists": ('{"weight_map": {"a": ["m.safetensors"]}}', "a tensor is called"),
    "twice": ('{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}', "given twice"),
    "outside": ('{"weight_map": {"a": "../m.safetensors"}}', "not inside its folder; refused"),
    "inside and out": ('{"weight_map": {"a": "x/../../m.safetensors"}}', "not inside its folder"),
    "absolute": ('{"weight_map": {"a": "/etc/m.safetensors"}}', "not inside its folder; refused"),
    "the folder": ('{"weight_map": {"a": "."}}', "not inside its folder; refused"),
    "long": (json.dumps({"weight_map": {"a": "b" * 300}}), "File name too long"),
    "control": ('{"weight_map": {"a": "\\u0000"}}', "control characters"),
    "bomb": ('{"a":' + "[" * 200_000, "nested too deep"),
}


@pytest.mark.parametrize(("text", "message"), INDEXES.values(), ids=INDEXES)
def test_damaged_indexes(tmp_path, text, message):
    planted.write_file(tmp_path / "m.safetensors", ONE)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_shards_in_an_inner_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "parts").mkdir(parents=True)
    planted.write_file(folder / "parts" / "one.safetensors", ONE)
    index = {"weight_map": {"w": "parts/one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(Checkpoint.open(folder), ONE)


def test_config_that_is_no_mapping(tmp_path):
    for text in ("[]", "{", "\xff"):
        folder = planted.write_folder(tmp_path / str(len(list(tmp_path.iterdir()))), ONE)
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"config.json is damaged"):
            Checkpoint.open(folder)
    (folder / "config.json").write_text('{"n": 1, "n": 2}')
    assert Checkpoint.open(folder).config == {"n": 2}


@contextlib.contextmanager
def as_plain_user():
    """Root may read everything: become nobody meanwhile."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_files_without_permission():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = planted.write_folder(Path(place, "base"), ONE)
        for path in (folder / "model.safetensors", folder):
            path.chmod(0)
            with as_plain_user(), pytest.raises(CheckpointError, match=r"cannot read .* denied"):
                Checkpoint.open(folder)
            path.chmod(0o700)


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
        save_checkpoint(tmp_path / "cut", {"cube": ("bf16", (2, 3, 4), EXOTIC["cube"].bits[1:])})
    assert not (tmp_path / "cut").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").write_text("old")
    with contextlib.suppress(KeyError), atomic_write(tmp_path / "kept") as stream:
        stream.write(b"new")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kept", "old")]
