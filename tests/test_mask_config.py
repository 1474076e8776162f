"""Masks are read, named and refused as a study file has them."""

import pytest
from pydantic import ValidationError

from rlsparse.config import TrialConfig
from rlsparse.levels import at_level, level_label
from rlsparse.mask_config import FileMask, TrialMask, leaves, resolved
from rlsparse.variants import explain


def trial(mask: object) -> TrialConfig:
    return TrialConfig.model_validate({"algorithm": {"name": "sft"}, "train": {"mask": mask}})


BASELINE = {"from": "baseline"}
LABELS = [
    ({"file": "a/b.mask.safetensors"}, "a/b"),
    ({"file": "s3://a/b.safetensors"}, "s3://a/b.safetensors"),
    (BASELINE, "final"),
    ({"from": "baseline", "take": "final", "seed": "same", "where": {}}, "final"),
    ({"from": "cell", "take": "ever_changed"}, "ever_changed(cell)"),
    ({"from": "baseline", "take": "snapshot", "step": 12}, "snapshot(step=12)"),
    ({"from": "baseline", "take": "snapshot", "fraction": 0.1}, "snapshot(fraction=0.1)"),
    ({"from": "baseline", "seed": "other"}, "final(seed=other)"),
    ({"from": "baseline", "seed": 3}, "final(seed=3)"),
    (
        {"from": "baseline", "where": {"train.trainable_layers": [0, 1], "algorithm.name": "dpo"}},
        "final(algorithm.name=dpo, train.trainable_layers=[0, 1])",
    ),
    ({"like": BASELINE}, "random(final)"),
    ({"like": {"file": "a"}, "pick": "random", "mask_seed": 0}, "random(a, mask_seed=0)"),
    (
        {"union": [BASELINE, {"like": {"intersection": [BASELINE, {"file": "x"}]}}]},
        "union(final, random(intersection(final, x)))",
    ),
]


@pytest.mark.parametrize(("mask", "label"), LABELS)
def test_a_mask_has_a_short_name_and_survives_json(mask, label):
    config = trial(mask)
    dumped = config.model_dump(mode="json")
    assert level_label(mask) == level_label(dumped["train"]["mask"]) == label
    assert trial(dumped["train"]["mask"]) == config
    assert TrialConfig.model_validate_json(config.model_dump_json()) == config
    assert hash(config) == hash(trial(mask))  # trials are keys


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("final", "train.mask: must be a mapping with one of the keys file, from, like, union"),
        ({"form": "baseline"}, "must be a mapping with one of the keys file, from, like"),
        ({"file": "a", "from": "baseline"}, "must be a mapping with one of the keys"),
        ({"from": "basline"}, "unknown train.mask.from basline; did you mean baseline"),
        ({"from": "baseline", "sede": 1}, "unknown key train.mask.sede; did you mean seed? known: "
         "fraction, from, seed, step, take, where"),
        ({"like": {"from": "baseline", "take": "last"}}, "unknown train.mask.like.take last"),
        ({"union": [{"from": "cell"}, {"fom": "cell"}]}, "train.mask.union.1: must be a mapping"),
        ({"union": [BASELINE]}, "train.mask.union: must have at least 2 items"),
        ({"from": "baseline", "step": 3}, "take final has step; a snapshot needs one of"),
        ({"from": "baseline", "take": "snapshot"}, "take snapshot has neither step nor fraction"),
        ({"from": "baseline", "where": {"seed": 1}}, "where changes seed, but"),
        ({"from": "baseline", "where": {"train.mask": None}}, "where changes train.mask, but"),
        ({"like": BASELINE, "pick": "principal", "mask_seed": 1}, "mask_seed 1 belongs to random"),
        ({"from": "cell", "seed": -1}, "train.mask.seed: must be same, other or a seed, 0 or more"),
        ({"from": "cell", "seed": "foo"}, "must be same, other or a seed, 0 or more and "
         "below 2**31 (got 'foo')"),
        ({"like": BASELINE, "pick": "best"}, "unknown train.mask.pick best; "),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_told(mask, said):
    raw = {"algorithm": {"name": "sft"}, "train": {"mask": mask}}
    with pytest.raises(ValidationError) as caught:
        trial(mask)
    assert any(said in explain(TrialConfig, raw, error) for error in caught.value.errors())


def test_leaves_come_in_order_and_can_be_replaced():
    mask = trial(
        {"union": [{"from": "cell"}, {"like": {"file": "a"}, "mask_seed": 3}, {"file": "b"}]}
    ).train.mask
    assert [type(leaf) for leaf in leaves(mask)] == [TrialMask, FileMask, FileMask]
    assert list(leaves(None)) == []
    names = iter("xyz")
    assert resolved(mask, lambda leaf: {"is": next(names)}) == {
        "union": [
            {"is": "x"}, {"like": {"is": "y"}, "pick": "random", "mask_seed": 3}, {"is": "z"}
        ]
    }  # fmt: skip


def test_a_level_replaces_a_mask_as_a_whole():
    config = trial({"file": "a"}).model_dump(mode="json")
    assert at_level(config, "train.mask", BASELINE)["train"]["mask"] == BASELINE
    assert at_level(config, "train.mask", None)["train"]["mask"] is None
