"""A trial's weights are, bit for bit, those of a plain TRL script: we only measure."""

import random

import pytest
import torch
import transformers
from plain_trl import DATA_SEED, SCRIPTS, SEED, SETTINGS, run_script
from transformers import AutoModelForCausalLM

from rlsparse.algorithms import ALGORITHMS, samples
from rlsparse.models import TINY


def rows_for(name: str, context) -> list[dict]:
    """The data, sampled from the base under the trial's seed where they are sampled."""
    transformers.set_seed(SEED)
    if name == "sft":
        return [{"prompt": p.prompt, "completion": p.completion} for p in context.problems]
    if name == "rft":
        return samples.accepted_samples(context)
    if name in ("dpo", "simpo", "orpo"):
        return samples.preference_pairs(context)
    if name == "kto":
        rows = samples.labelled_completions(context)
        random.Random(DATA_SEED).shuffle(rows)
        return rows
    return [{"prompt": p.prompt, "answer": p.answer} for p in context.problems]


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp32"])
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name in ALGORITHMS])
def test_weights_are_those_of_a_plain_script(
    context_of, tiny_trial, run_trial, base, tmp_path, monkeypatch, name, precision
):
    config = tiny_trial(
        name, precision=precision, num_steps=3, max_grad_norm=0.5, weight_decay=0.01, seed=SEED,
        data_seed=DATA_SEED, algorithm=SETTINGS[name], task={"num_train_problems": 20},
        probe={"snapshots": [1]},
    )  # fmt: skip
    rows = rows_for(name, context_of(config, base))
    expected = run_script(name, rows, tmp_path, bf16=precision == "bf16-mixed")
    kept, build = [], ALGORITHMS[name]
    monkeypatch.setitem(ALGORITHMS, name, lambda context: kept.append(build(context)) or kept[-1])
    run_trial(config, base)
    actual = kept[0].model.state_dict()
    before = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).state_dict()
    assert list(actual) == list(expected)
    for key, weight in expected.items():
        assert actual[key].dtype == torch.float32
        assert torch.equal(actual[key].cpu().view(torch.int32), weight.view(torch.int32)), key
        assert not torch.equal(weight, before[key])
