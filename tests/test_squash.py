"""One patch of many: it does what they do in turn, and is refused where they make no chain."""

import itertools
from pathlib import Path

import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Tensor

from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.errors import PatchError
from rlsparse.patch import Changes, Patch, TensorPair, apply_patch, new_patch, write_patch
from rlsparse.patch.squash import squash
from rlsparse.patch.values import CODINGS

SHAPES = [(), (0,), (1,), (7, 9), (2, 3, 5), (300,)]
Weights = dict[str, Tensor]


def patch_of(before: Weights, after: Weights, path: Path, coding="relative", base="f") -> Patch:
    pairs = [
        TensorPair(name, one.dtype, one.shape, one.bits, after[name].bits)
        for name, one in before.items()
    ]
    notes = {"file": path.name}
    return write_patch(path, pairs, base_fingerprint=base, metadata=notes, coding=coding)


def chain_of(states: list[Weights], folder: Path, coding="relative") -> list[Patch]:
    base = fingerprint(Checkpoint.open(planted.write_folder(folder / "base", states[0])))
    return [
        patch_of(one, other, folder / f"p{number}", coding, base)
        for number, (one, other) in enumerate(itertools.pairwise(states))
    ]


def step(rng: np.random.Generator, weights: Weights, density: float, history: list) -> Weights:
    """Some weights become any bits, and some what they once were."""
    found = {}
    for name, one in weights.items():
        top = np.iinfo(one.bits.dtype).max
        drawn = rng.integers(0, top, one.bits.size, one.bits.dtype, endpoint=True)
        if history and rng.random() < 0.5:
            drawn = history[rng.integers(len(history))][name].bits
        bits = np.where(rng.random(one.bits.size) < density, drawn, one.bits)
        found[name] = Tensor(one.dtype, one.shape, bits)
    return found


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_squash_does_what_the_chain_does(tmp_path_factory, data):
    """Any bits, shapes, formats, lengths, densities; weights that come back; small pieces."""
    folder = tmp_path_factory.mktemp("squash")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    coding = data.draw(st.sampled_from(CODINGS))
    kinds = {
        name: (data.draw(st.sampled_from([*planted.TAGS])), data.draw(st.sampled_from(SHAPES)))
        for name in "ab"
    }
    empty = {
        n: Tensor(t, s, np.zeros(s, planted.unsigned(t)).ravel()) for n, (t, s) in kinds.items()
    }
    states = [step(rng, empty, 1, [])]
    density = data.draw(st.sampled_from([0, 0.02, 0.3, 1]))
    for _ in range(data.draw(st.integers(1, 5))):
        states.append(step(rng, states[-1], density, states))
    with pytest.MonkeyPatch.context() as patched:
        for module in ("write", "squash"):
            patched.setattr(f"rlsparse.patch.{module}.PIECE", 64)
        patched.setattr("rlsparse.patch.write.BLOCK_CHANGES", 50)
        chain = chain_of(states, folder, coding)
        made = squash(chain, folder / "one")
        direct = patch_of(states[0], states[-1], folder / "direct", coding)
    apply_patch(folder / "base", made.path, folder / "out")
    out = Checkpoint.open(folder / "out")
    assert all(np.array_equal(out.read_bits(n), one.bits) for n, one in states[-1].items())
    assert made.base_fingerprint == chain[0].base_fingerprint
    assert made.metadata == chain[-1].metadata
    if coding == "relative":
        assert made.tensors == direct.tensors
        assert all(np.array_equal(made.data[k].read(), direct.data[k].read()) for k in made.tensors)


@pytest.mark.parametrize("coding", CODINGS)
def test_one_patch_of_a_hundred(tmp_path, coding):
    rng = np.random.default_rng(0)
    states = [{"w": planted.random_tensor(rng, "bf16", (100, 70))}]
    for _ in range(100):
        states.append({"w": planted.plant(rng, states[-1]["w"], 0.01)[0]})
    made = squash(chain_of(states, tmp_path, coding), tmp_path / "one")
    assert made.num_changed == np.count_nonzero(states[0]["w"].bits != states[-1]["w"].bits)
    apply_patch(tmp_path / "base", made.path, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out").read_bits("w")
    assert np.array_equal(found, states[-1]["w"].bits)


def bf16(*bits: int) -> Tensor:
    return Tensor("bf16", (len(bits),), np.array(bits, np.uint16))


def test_what_came_back(tmp_path):
    """Steps that cancel vanish; absolute values stay, unless the whole tensor came back."""
    states = [
        {"part": bf16(1, 2, 3), "whole": bf16(7, 8)},
        {"part": bf16(5, 6, 3), "whole": bf16(9, 8)},
        {"part": bf16(1, 4, 3), "whole": bf16(7, 8)},
    ]
    for coding, num_changed in (("relative", 1), ("absolute", 2)):
        folder = tmp_path / coding
        made = squash(chain_of(states, folder, coding), folder / "one")
        assert [made.tensors[n].num_changed for n in ("part", "whole")] == [num_changed, 0]


def test_tensors_that_some_do_not_list(tmp_path):
    """A squashed patch may take the place of one of its own."""
    a, b = [{"a": bf16(n, 1)} for n in (1, 2, 3)], [{"b": bf16(4, n)} for n in (1, 2)]
    chain = [
        patch_of(a[0], a[1], tmp_path / "0"),
        patch_of({**a[1], **b[0]}, {**a[2], **b[1]}, tmp_path / "1"),
    ]
    made = squash([*chain, patch_of(b[1], b[0], tmp_path / "2")], tmp_path / "1")
    assert {name: one.num_changed for name, one in made.tensors.items()} == {"a": 1, "b": 0}
    assert (made.path.name, made.metadata) == ("1", {"file": "2"})


def test_parts_of_a_tensor(tmp_path):
    states = [np.array(bits, np.uint16) for bits in ([1, 2], [1, 9], [3, 9])]
    chain = []
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        with new_patch(tmp_path / str(number), base_fingerprint="f") as builder:
            tensor = builder.tensor("t", "bf16", (4, 2), (4, 6))
            tensor.compare(before, after)
            tensor.close()
        chain.append(Patch.open(tmp_path / str(number)))
    made = squash(chain, tmp_path / "one")
    assert (made.tensors["t"].part, made.num_changed) == ((4, 6), 2)
    bits = states[0].copy()
    Changes(made, "t").apply(bits, 0)
    assert np.array_equal(bits, states[2])
    with new_patch(tmp_path / "whole", base_fingerprint="f") as builder:
        builder.tensor("t", "bf16", (4, 2)).close()
    with pytest.raises(PatchError, match=r"t is bf16 \[4, 2\] part \(4, 6\) in .*0, bf16 \[4, 2\]"):
        squash([chain[0], Patch.open(tmp_path / "whole")], tmp_path / "out")


@pytest.mark.parametrize(
    ("heads", "remedy"),
    [
        # What follows the embedding in one patch and has values of its own in the other.
        ([None, (3, 9)], "0 does not list head"),
        ([(5, 6), None], "1 does not list head"),
    ],
)
def test_a_head_that_is_tied_at_times_only_is_refused(tmp_path, heads, remedy):
    embeddings = [(1, 2), (3, 4), (5, 7)] if heads[1] else [(1, 2), (5, 6), (5, 7)]
    chain = []
    for number, head in enumerate(heads):
        before, after = ({"embed": bf16(*embeddings[number + k])} for k in (0, 1))
        if head:
            before["head"], after["head"] = (
                bf16(*(embeddings[1] if number else (8, 8))),
                bf16(*head),
            )
        chain.append(patch_of(before, after, tmp_path / str(number)))
    with pytest.raises(PatchError, match=f"{remedy}, and changes a tensor of the same bits"):
        squash(chain, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_what_makes_no_chain_is_refused_and_nothing_is_written(tmp_path):
    rng = np.random.default_rng(1)
    states = [{"v": planted.random_tensor(rng, "bf16", (4,)), "w": bf16(0, 1)}]
    for _ in range(3):
        states.append({n: planted.plant(rng, one, 0.5)[0] for n, one in states[-1].items()})
    one, two, three = chain_of(states, tmp_path)
    absolute = patch_of(states[1], states[2], tmp_path / "absolute", "absolute")
    other = patch_of({"x": bf16(1)}, {"x": bf16(2)}, tmp_path / "other")
    wide = Tensor("fp16", (2,), states[1]["w"].bits)
    cast = patch_of({"w": wide}, {"w": wide}, tmp_path / "cast")
    damaged = patch_of(states[1], states[2], tmp_path / "damaged")
    content = bytearray(damaged.path.read_bytes())
    content[-1] ^= 1
    damaged.path.write_bytes(content)
    files = {file.name for file in tmp_path.iterdir()}
    for patches, message in (
        ([], "no patch to squash"),
        ([two, one], "p1 and .*p0 do not meet at tensor v.*in the order.*none missing"),
        ([one, three], "p0 and .*p2 do not meet at tensor v"),
        ([one, absolute], "p0 has relative values, .*absolute has absolute ones.*--values"),
        ([one, other], "other has no tensor that the patches before it have"),
        ([one, cast], r"w is bf16 \[2\] in .*p0, fp16 \[2\] in .*cast"),
        ([one, damaged], "damaged at tensor w: the bytes of a block have another checksum"),
    ):
        with pytest.raises(PatchError, match=message):
            squash(patches, tmp_path / "out")
        assert {file.name for file in tmp_path.iterdir()} == files
