import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Tensor

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError
from rlsparse.matching import Matching, match_tensors

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
EXPERTS = {"num_experts": 3, "moe_intermediate_size": 5, "hidden_size": 8}


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**16, shape, np.uint16)


def write(folder: Path, arrays: dict[str, np.ndarray], config: dict | None = None) -> Checkpoint:
    tensors = {n: Tensor("bf16", a.shape, a.reshape(-1)) for n, a in arrays.items()}
    return Checkpoint.open(planted.write_folder(folder, tensors, config or {"model_type": "x"}))


def match(
    folder: Path, before: dict, after: dict, config: dict | None = None, **arguments
) -> Matching:
    sides = write(folder / "before", before, config), write(folder / "after", after, config)
    return match_tensors(*sides, **arguments)


def attention(rng: np.random.Generator, kind: str = "weight") -> dict[str, np.ndarray]:
    """Rows of 4 query heads and 2 of key and value, 2 each."""
    columns = (8,) if kind == "weight" else ()
    return {
        f"{ATTENTION}{name}_proj.{kind}": random(rng, rows, *columns)
        for name, rows in (("q", 8), ("k", 4), ("v", 4))
    }


def experts(rng: np.random.Generator, num_experts: int = 3) -> dict[str, np.ndarray]:
    return {
        f"{MLP}experts.{e}.{name}_proj.weight": random(rng, *shape)
        for e in range(num_experts)
        for name, shape in (("gate", (5, 8)), ("up", (5, 8)), ("down", (8, 5)))
    }


def fuse_experts(parts: dict[str, np.ndarray], num_experts: int = 3) -> dict[str, np.ndarray]:
    """The layout of transformers 5: [experts, 2 inner, hidden] and [experts, hidden, inner]."""
    of = [[parts[f"{MLP}experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")]
          for e in range(num_experts)]  # fmt: skip
    return {
        f"{MLP}experts.gate_up_proj": np.stack([np.concatenate(e[:2]) for e in of]),
        f"{MLP}experts.down_proj": np.stack([e[2] for e in of]),
    }


# --- any inventory -----------------------------------------------------------------------------

PREFIXES = ("", "model.", "module.model.", "base_model.model.model.", "transformer.",
            "model.language_model.", "language_model.model.", "_orig_mod.model.",
            "_fsdp_wrapped_module.model.")  # fmt: skip


def stored(
    logical: dict[str, np.ndarray], prefix: str, fused: set[str], wrapped: bool
) -> dict[str, np.ndarray]:
    """One side's file: fused as told, names behind a prefix."""
    logical = dict(logical)

    def fuse(whole: str, parts: list[str], join) -> None:
        logical[whole] = join([logical.pop(part) for part in parts])

    for layer in (f"layers.{i}." for i in range(2)):
        for kind in ("weight", "bias"):
            names = [f"{layer}self_attn.{n}_proj.{kind}" for n in "qkv"]
            if "qkv" in fused and names[0] in logical:
                fuse(f"{layer}self_attn.qkv_proj.{kind}", names, np.concatenate)
        names = [f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up")]
        if "mlp" in fused and names[0] in logical:
            fuse(f"{layer}mlp.gate_up_proj.weight", names, np.concatenate)
        if "experts" in fused and f"{layer}mlp.experts.0.up_proj.weight" in logical:
            one = f"{layer}mlp.experts."
            pairs = [f"{one}{e}.{n}_proj.weight" for e in range(3) for n in ("gate", "up")]
            fuse(f"{one}gate_up_proj", pairs, lambda a: np.stack(a).reshape(3, 10, 8))
            fuse(f"{one}down_proj", [f"{one}{e}.down_proj.weight" for e in range(3)], np.stack)
    inner = "_checkpoint_wrapped_module." if wrapped else ""
    full = {name: prefix + name.replace("mlp.", f"mlp.{inner}") for name in logical}
    return {full[name]: array for name, array in logical.items()}


@dataclass(repr=False)
class Case:
    files: list[dict[str, np.ndarray]]
    configs: list[dict]
    logical: list[dict[str, np.ndarray]]
    truth: dict[str, int]
    is_tied: tuple[bool, bool]

    def __repr__(self) -> str:
        return f"Case({[sorted(file) for file in self.files]}, {self.truth}, {self.is_tied})"


@st.composite
def cases(draw) -> Case:
    """Two random checkpoints and the truth: what is compared, and how many elements are what."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logical: list[dict[str, np.ndarray]] = [{}, {}]
    truth = dict.fromkeys(("removed", "added", "reshaped_before", "reshaped_after"), 0)
    common = {"norm.weight": (8,)}
    for layer in (f"layers.{i}." for i in range(2)):
        for kind, columns in (("weight", (8,)), ("bias", ())):
            if kind == "weight" or draw(st.booleans()):
                for name, rows in (("q", 8), ("k", 4), ("v", 4)):
                    common[f"{layer}self_attn.{name}_proj.{kind}"] = (rows, *columns)
        is_mixture = draw(st.booleans())
        for stem in [f"experts.{e}." for e in range(3)] if is_mixture else [""]:
            for name, shape in (("gate", (5, 8)), ("up", (5, 8)), ("down", (8, 5))):
                common[f"{layer}mlp.{stem}{name}_proj.weight"] = shape
    for side in logical:
        side |= {name: random(rng, *shape) for name, shape in common.items()}
    rows = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    tied = draw(st.tuples(st.booleans(), st.booleans()))
    for side, num_rows, category in zip(logical, rows, ("removed", "added"), strict=True):
        side["embed_tokens.weight"] = random(rng, num_rows, 8)
        truth[category] += (num_rows - min(rows)) * 8
        if draw(st.booleans()):
            side["layers.0.self_attn.rotary_emb.inv_freq"] = random(rng, 3)
    for name in ("layers.0.self_attn.rotary_emb.inv_freq",):
        here = [name in side for side in logical]
        if here in ([True, False], [False, True]):
            truth["removed" if here[0] else "added"] += 3
    if draw(st.booleans()):
        for side, columns, category in zip(logical, (3, 4), ("before", "after"), strict=True):
            side["layers.1.odd.weight"] = random(rng, 2, columns)
            truth[f"reshaped_{category}"] += 2 * columns
    files, configs = [], []
    fused = [draw(st.sets(st.sampled_from(["qkv", "mlp", "experts"]))) for _ in range(2)]
    for side, is_tied, chosen in zip(logical, tied, fused, strict=True):
        file = stored(side, draw(st.sampled_from(PREFIXES)), chosen, draw(st.booleans()))
        embed = next(name for name in file if name.endswith("embed_tokens.weight"))
        head = file[embed] if is_tied else random(rng, len(file[embed]), 8)
        files.append(file | {HEAD: head})
        configs.append({**HEADS, **EXPERTS, "tie_word_embeddings": is_tied})
        truth[f"tied_{'after' if len(files) == 2 else 'before'}"] = head.size * is_tied
        side[HEAD] = head
    heads = [file[HEAD].size for file in files]
    if tied == (False, False):
        truth["removed"] += heads[0] - min(heads)
        truth["added"] += heads[1] - min(heads)
    elif tied != (True, True):  # tied on one side only: the separate head is compared with nothing
        truth["added" if tied[0] else "removed"] += heads[tied[0]]
    return Case(files, configs, logical, truth, tied)


def bare(name: str) -> str:
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        if prefix and name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name.replace("_checkpoint_wrapped_module.", "")


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_element_is_in_exactly_one_category(case):
    files, configs = case.files, case.configs
    with tempfile.TemporaryDirectory() as folder:
        opened = [write(Path(folder) / str(i), files[i], configs[i]) for i in range(2)]
        pairs, accounting = (found := match_tensors(*opened)).pairs, found.accounting
        covered = [{n: np.zeros(a.size, int) for n, a in file.items()} for file in files]
        for pair in pairs:
            is_fused = bare(pair.name) not in case.logical[0]  # on both sides: as it is stored
            for info, logical, file, counts, side in zip(
                (pair.before, pair.after), case.logical, files, covered, opened, strict=True
            ):
                array = file[info.name] if is_fused else logical[bare(pair.name)]
                assert info.read().tolist() == array.ravel().tolist()
                first = (info.offset - side.tensors[info.name].offset) // 2
                counts[info.name][first : first + int(np.prod(pair.shape))] += 1
            assert pair.before.shape[1:] == pair.after.shape[1:] == pair.shape[1:]
    compared = [sum(int(c.sum()) for c in counts.values()) for counts in covered]
    assert compared[0] == compared[1] == accounting["compared"]
    assert all(c.max(initial=0) <= 1 for counts in covered for c in counts.values())
    totals = [sum(a.size for a in file.values()) for file in files]
    assert [accounting["total_before"], accounting["total_after"]] == totals
    for part, number in case.truth.items():
        assert accounting[part] == number, part
    for total, *parts in (
        (totals[0], "compared", "tied_before", "removed", "reshaped_before"),
        (totals[1], "compared", "tied_after", "added", "reshaped_after"),
    ):
        assert total == sum(accounting[part] for part in parts)
    names = [pair.name for pair in pairs]
    assert names == sorted(set(names))
    assert accounting["tied_tensors"] == ([HEAD] if any(case.is_tied) else [])
    uncovered = {name for name, counts in covered[0].items() if not counts.any()}
    listed = {*accounting["reshaped_tensors"], *accounting["removed_tensors"]}
    assert uncovered == listed | ({HEAD} if case.is_tied[0] else set())
    json.dumps(accounting)


# --- fused tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_slices_of_a_fused_qkv_are_its_parts(tmp_path, kind):
    rng = np.random.default_rng(0)
    parts, whole = attention(rng, kind), random(rng, 16, *((8,) if kind == "weight" else ()))
    fused = f"{ATTENTION}qkv_proj.{kind}"
    found = match(tmp_path, parts, {fused: whole}, HEADS)
    assert [pair.name for pair in found.pairs] == sorted(parts)
    rows = {"q": whole[:8], "k": whole[8:12], "v": whole[12:]}
    for pair in found.pairs:
        assert pair.before.read().tolist() == parts[pair.name].ravel().tolist()
        expected = rows[pair.name.removeprefix(ATTENTION)[0]]
        assert pair.after.read().tolist() == expected.ravel().tolist()
        assert pair.after.read(2, 4).tolist() == expected.ravel()[2:4].tolist()
    assert found.accounting["mapped_tensors"] == {fused: list(parts)}
    assert found.accounting["compared"] == whole.size
    assert found.accounting["removed_tensors"] == found.accounting["added_tensors"] == []
    other = match_tensors(Checkpoint.open(tmp_path / "after"), Checkpoint.open(tmp_path / "before"))
    assert [(p.name, p.before, p.after) for p in other.pairs] == [
        (p.name, p.after, p.before) for p in found.pairs
    ]


def test_slices_of_fused_experts_are_their_parts(tmp_path):
    rng = np.random.default_rng(0)
    parts = experts(rng)
    gate_up, down = random(rng, 3, 10, 8), random(rng, 3, 8, 5)
    whole = {f"{MLP}experts.gate_up_proj": gate_up, f"{MLP}experts.down_proj": down}
    found = match(tmp_path, whole, parts, EXPERTS)
    assert len(found.pairs) == 9
    for pair in found.pairs:
        expert, name = pair.name.removeprefix(f"{MLP}experts.").split(".")[:2]
        expected = {"gate_proj": gate_up[int(expert), :5], "up_proj": gate_up[int(expert), 5:],
                    "down_proj": down[int(expert)]}[name]  # fmt: skip
        assert pair.before.read().tolist() == expected.ravel().tolist()
        assert pair.after.read().tolist() == parts[pair.name].ravel().tolist()
    assert [len(names) for names in found.accounting["mapped_tensors"].values()] == [3, 6]


def test_mixtral_of_either_version(tmp_path):
    rng = np.random.default_rng(0)
    parts = experts(rng)
    letters = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    old = {}
    for name, array in parts.items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        for new, letter in letters.items():
            name = name.replace(new, letter)
        old[name] = array
    found = match(tmp_path / "fused", old, fuse_experts(parts), {"num_local_experts": 3})
    assert all((p.before.read() == p.after.read()).all() for p in found.pairs)
    assert found.accounting["compared"] == sum(a.size for a in parts.values())
    found = match(tmp_path / "split", old, parts)
    assert set(found.accounting["renamed_tensors"]) == set(parts)
    assert all((p.before.read() == p.after.read()).all() for p in found.pairs)


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_layouts_are_those_of_transformers(tmp_path, kind):
    """What transformers holds in memory against what it saves, which has the experts apart."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = getattr(transformers, kind).config_class(
        hidden_size=16, intermediate_size=12, moe_intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=20, num_experts=3,
        num_local_experts=3, num_experts_per_tok=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "saved")
    memory = tmp_path / "memory"
    memory.mkdir()
    save_file(dict(model.state_dict()), memory / "model.safetensors")
    config.save_pretrained(memory)
    saved = Checkpoint.open(tmp_path / "saved")
    assert any(".experts.2." in name for name in saved.tensors)
    found = match_tensors(saved, Checkpoint.open(memory))
    assert len(found.accounting["mapped_tensors"]) == 2
    assert found.accounting["compared"] == sum(p.numel() for p in model.parameters())
    assert found.accounting["removed"] == found.accounting["added"] == 0
    assert all((pair.before.read() == pair.after.read()).all() for pair in found.pairs)


def test_the_same_fused_name_is_compared_directly(tmp_path):
    rng = np.random.default_rng(0)
    whole = {
        f"{ATTENTION}c_attn.weight": random(rng, 8, 24),
        f"{MLP}gate_up_proj.weight": random(rng, 10, 8),
    }
    found = match(tmp_path, whole, {f"model.{name}": array for name, array in whole.items()})
    assert [pair.shape for pair in found.pairs] == [(10, 8), (8, 24)]
    assert found.accounting["mapped_tensors"] == {}


def refusals():
    rng = np.random.default_rng(0)
    qkv, moe = attention(rng), experts(rng)
    fused_qkv = {f"{ATTENTION}qkv_proj.weight": random(rng, 16, 8)}
    fused_moe = fuse_experts(moe)
    gate_up = f"{MLP}experts.gate_up_proj"
    turned = {name: np.swapaxes(array, 1, 2).copy() for name, array in fused_moe.items()}
    without = {n: a for n, a in moe.items() if ".experts.1.up_proj" not in n}
    dense = {f"{MLP}gate_proj.weight": random(rng, 5, 8), f"{MLP}up_proj.weight": random(rng, 6, 8)}
    skipping = {n.replace(".2.", ".7."): a for n, a in moe.items()}
    return {
        "part missing": (fused_qkv, dict(list(qkv.items())[:2]), HEADS, r"the parts lack v_proj;"),
        "heads": (fused_qkv, qkv, HEADS | {"head_dim": 4}, r"make \[8, 4, 4\] rows of q, k, v"),
        "no config": (fused_qkv, qkv, {}, r"no config.json has num_attention_heads"),
        "rows": ({k: v[:15] for k, v in fused_qkv.items()}, qkv, HEADS, r"parts have the shapes"),
        "columns": ({f"{ATTENTION}c_attn.weight": random(rng, 8, 16)}, qkv, HEADS, "transposed"),
        "interleaved": (
            {f"{ATTENTION}query_key_value.weight": random(rng, 16, 8)}, qkv, HEADS, "interleave",
        ),
        "expert missing": (without, fused_moe, EXPERTS, r"the parts lack up_proj of expert 1;"),
        "expert beyond": (experts(rng, 4), fused_moe, {}, r"3 experts, .* up to expert 3"),
        "expert skipped": (skipping, fused_moe, {}, r"lack down_proj of expert 2;"),
        "transposed": (turned, moe, EXPERTS, r"axes are transposed, .* make \[3, 8, 5\]"),
        "gpt-oss": (fused_moe, moe, {"model_type": "gpt_oss"}, "gpt_oss interleaves"),
        "num experts": (fused_moe, moe, {"text_config": EXPERTS | {"num_experts": 4}}, "says 4"),
        "width": (fused_moe, moe, EXPERTS | {"moe_intermediate_size": 6}, "5 wide, .* says 6"),
        "uneven": ({f"{MLP}gate_up_proj.weight": random(rng, 11, 8)}, dense, {}, "have the shapes"),
        "flat": ({gate_up: random(rng, 240)}, moe, {}, "parts lack|have the shapes"),
        "ambiguous": (
            {"w": random(rng, 2)}, {"model.w": random(rng, 2), "module.w": random(rng, 2)}, {},
            r"model.w and module.w in .* differ only in known prefixes",
        ),
        "little in common": (
            {"a": random(rng, 1000), "b": random(rng, 9)},
            {"c": random(rng, 1000), "b": random(rng, 9)}, {},
            r"almost no weights in common \(9 of 1009\)",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_mapped_is_refused(tmp_path, name):
    before, after, config, message = refusals()[name]
    with pytest.raises(CheckpointError, match=message):
        match(tmp_path / "a", before, after, config)
    with pytest.raises(CheckpointError, match=message):
        match(tmp_path / "b", after, before, config)


def test_fused_tensors_without_any_part_are_removed(tmp_path):
    rng = np.random.default_rng(0)
    norm = {NORM: random(rng, 8)}
    fused = {f"{ATTENTION}c_attn.weight": random(rng, 8, 16)}
    found = match(tmp_path, norm | fused, norm)
    assert found.accounting["removed_tensors"] == list(fused)


# --- names and ties ----------------------------------------------------------------------------


def test_aliases_of_the_user(tmp_path):
    rng = np.random.default_rng(0)
    weight = random(rng, 4, 4)
    before = {"model.layers.0.a.weight": weight, "model.layers.0.b.weight": weight + 1}
    after = {"actor.net.0.a.weight": weight, "actor.other.b.weight": weight + 1}
    aliases = {"actor.": "nothing.", "actor.net.": "model.layers.", "actor.other.": "layers.0."}
    found = match(tmp_path, before, after, aliases=aliases)
    assert found.accounting["renamed_tensors"] == dict(zip(after, before, strict=True))
    assert all((pair.before.read() == pair.after.read()).all() for pair in found.pairs)
    with pytest.raises(CheckpointError, match=r"alias 'critic\.' -> 'model\.': no tensor of .*"):
        match(tmp_path / "none", before, after, aliases={"critic.": "model."})


def test_exact_names_win_over_renamed_ones(tmp_path):
    rng = np.random.default_rng(0)
    before = {"model.w": random(rng, 4), "norm.weight": random(rng, 4)}
    after = {"model.w": random(rng, 4), "w": random(rng, 4), "model.norm.weight": random(rng, 4)}
    found = match(tmp_path, before, after)
    assert [(pair.name, pair.after.name) for pair in found.pairs] == [
        ("model.w", "model.w"), ("norm.weight", "model.norm.weight"),
    ]  # fmt: skip
    assert found.accounting["added_tensors"] == ["w"]


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_head_tied_on_one_side_is_added_whether_its_copy_is_stored_or_not(tmp_path, is_stored):
    rng = np.random.default_rng(0)
    embed = random(rng, 6, 4)
    before = {EMBED: embed} | ({HEAD: embed} if is_stored else {})
    one = write(tmp_path / "a", before, {"tie_word_embeddings": True})
    other = write(tmp_path / "b", {EMBED: embed, HEAD: random(rng, 6, 4)})
    accounting = match_tensors(one, other).accounting
    assert (accounting["compared"], accounting["added"]) == (24, 24)
    assert accounting["tied_before"] == (24 if is_stored else 0)
    assert accounting["added_tensors"] == [HEAD]
    same = match_tensors(one, one).accounting
    assert same["tied_before"] == same["tied_after"] == (24 if is_stored else 0)


def test_buffers_on_one_side_are_no_error(tmp_path):
    rng = np.random.default_rng(0)
    weight = {"h.0.attn.c_attn.weight": random(rng, 4, 12)}
    buffers = {"h.0.attn.bias": random(rng, 1, 1, 9, 9), "h.0.attn.masked_bias": random(rng)}
    found = match(tmp_path, weight | buffers, {f"transformer.{n}": a for n, a in weight.items()})
    assert found.accounting["removed_tensors"] == sorted(buffers)
    assert found.accounting["removed"] == 82
