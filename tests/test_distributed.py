"""Two workers do what one does: the same trajectory where nothing is sampled, equal weights always.

Tolerances are relative to the change that training made: |two - one| / |one - base|, Euclidean over
all weights, in fp32. Measured after 4 steps: SFT 5e-6, DPO 3e-5, under either strategy; sums are
rounded in another order. Workers that saw other data would be off by more than 0.1.
"""

import json
from functools import cache

import numpy as np
import pytest
import torch
from test_subnetwork import bools, mask_of, written
from together import Job, average_gradients, in_turn, run_together, train, train_all, whiten

from rlsparse import masks, tables
from rlsparse.algorithms import ppo
from rlsparse.config import TrialConfig
from rlsparse.models import TINY
from rlsparse.models.loading import load_model
from rlsparse.patch import PATCH_FILE, apply_patch
from rlsparse.subnetwork import load_mask
from rlsparse.tables import EVER_CHANGED, SUBNETWORK, snapshot_folder, step_mask_file

TOLERANCE = 1e-4
NUM_STEPS = 4
TRAIN = {"num_steps": NUM_STEPS, "batch_size": 16, "learning_rate": 1e-4, "precision": "fp32"}
PROBE = {
    "snapshots": [2], "k_steps": [2], "step_masks": True, "score_snapshots": False, "casts": True,
    "update_interval": 1,
}  # fmt: skip


def config(name: str, mask: object = None, **algorithm: object) -> TrialConfig:
    task = {"num_train_problems": 32, "num_eval_problems": 16, "num_validation_problems": 8}
    probe = PROBE if name == "sft" else {}
    return TrialConfig.model_validate(
        {
            "algorithm": {"name": name, **algorithm},
            "task": task,
            "train": {**TRAIN, "mask": mask},
            "probe": probe,
        }
    )


def tokens() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Values and mask of two completions for one worker, and of four for the other."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([[5], [3], [1], [4], [2], [5]])).double()
    return [(values[:2], mask[:2]), (values[2:], mask[2:])]


TOKENS = tokens()


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory):
    mask = mask_of(load_model(TINY, "bf16"), 0.1)
    return written(mask, tmp_path_factory.mktemp("mask") / "a.mask.safetensors")


@pytest.fixture(scope="module")
def together(tmp_path_factory, base, mask_file):
    folder = tmp_path_factory.mktemp("together")
    jobs = {
        (strategy, name): Job(config(name), folder / f"{strategy}-{name}", strategy)
        for strategy, names in (
            ("ddp", ("sft", "dpo", "grpo", "rloo", "ppo", "prime")),
            ("fsdp", ("sft", "dpo", "grpo", "rloo")),
        )
        for name in names
    }
    jobs |= {
        ("mask", name): Job(
            config(name, mask={"file": "a"}), folder / f"mask-{name}", mask_file=mask_file
        )
        for name in ("sft", "grpo")
    }
    calls = [
        (average_gradients, (folder,)), (whiten, (TOKENS, folder)),
        (train_all, (list(jobs.values()), base)),
    ]  # fmt: skip
    run_together(in_turn, calls)
    return jobs


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base, mask_file):
    @cache
    def get(name: str, mask: str = "") -> Job:
        given = config(name, mask={"file": mask} if mask else None)
        job = Job(given, tmp_path_factory.mktemp("alone"), mask_file=mask_file if mask else None)
        train(job, base)
        return job

    return get


def apart(one: Job, other: Job) -> float:
    """Distance of the last weights, as a fraction of how far ``one`` went."""
    start, *_, last = one.weights()
    found = other.weights()[-1]
    sums = [
        sum(float((a[name] - b[name]).square().sum()) for name in start)
        for a, b in ((last, found), (last, start))
    ]
    return (sums[0] / sums[1]) ** 0.5


BOTH = [("ddp", "sft"), ("ddp", "dpo"), ("fsdp", "sft"), ("fsdp", "dpo"), ("mask", "sft")]


@pytest.mark.parametrize(("strategy", "name"), BOTH)
def test_two_workers_follow_the_trajectory_of_one(together, alone, strategy, name):
    one, two = alone(name, strategy * (strategy == "mask")), together[strategy, name]
    assert 0 < apart(one, two) < TOLERANCE
    table = {}
    for job in (one, two):
        read = tables.read(job.of(0) / "steps.parquet", "steps").to_pylist()
        table[job] = [{k: v for k, v in row.items() if k != "trial_id"} for row in read]
    for mine, theirs in zip(table[one], table[two], strict=True):
        assert theirs["num_tokens"] == mine["num_tokens"]
        for column, value in mine.items():
            near = None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)
            assert theirs[column] == near, column
    scores = [
        tables.read(j.of(0) / "eval.parquet", "eval").column("score").to_pylist()
        for j in (one, two)
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 3  # before, after, on validation
    summaries = [json.loads((j.of(0) / "summary.json").read_text()) for j in (one, two)]
    assert summaries[0]["gate_ratio"] == summaries[1]["gate_ratio"]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_both_strategies_agree_where_the_same_is_sampled(together, name):
    """Each worker draws from its own generator, whatever the strategy."""
    ddp, fsdp = together["ddp", name], together["fsdp", name]
    rows = [job.progress() for job in (ddp, fsdp)]
    assert rows[0][0]["reward"] == rows[1][0]["reward"]
    assert rows[0][0]["grad_norm"] == pytest.approx(rows[1][0]["grad_norm"], rel=1e-4)
    second = [row[1]["kl"] for row in rows]  # to a reference in parts, under fsdp
    assert second[0] != 0
    assert second[0] == pytest.approx(second[1], rel=1e-3)
    first = [job.weights()[1] for job in (ddp, fsdp)]
    for name, weight in first[0].items():
        torch.testing.assert_close(first[1][name], weight, rtol=0, atol=2e-6)


TOGETHER = [
    *(("ddp", name) for name in ("sft", "dpo", "grpo", "rloo", "ppo", "prime")),
    ("mask", "sft"), ("mask", "grpo"),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "name"), TOGETHER)
def test_all_workers_hold_the_same_bits(together, strategy, name):
    job = together[strategy, name]
    start, *_, last = job.weights(0)
    for mine, theirs in zip(job.weights(0), job.weights(1), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert any(not torch.equal(start[key], last[key]) for key in start)


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_workers_train_the_weights_in_a_mask_alone(together, mask_file, name):
    job, mask = together["mask", name], load_mask(mask_file)
    assert load_mask(job.of(0) / SUBNETWORK).fingerprint == mask.fingerprint
    start, *_, last = job.weights()
    for key in start:
        assert not ((start[key] != last[key]) & ~bools(mask, key)).any()


@pytest.mark.parametrize("name", ["ppo", "prime"])
def test_what_is_trained_beside_the_policy_is_the_same_on_all_workers(together, base, name):
    job = together["ddp", name]
    mine, theirs = job.companion(0), job.companion(1)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    start = job.weights()[0]
    names = {key: key.replace("backbone.", "model.") for key in mine}
    moved = [k for k, own in names.items() if own in start and not mine[k].equal(start[own])]
    assert len(moved) > 30


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "prime"])
def test_rewards_are_those_of_all_workers(together, name):
    rewards = [row["reward"] for row in together["ddp", name].progress() if row.get("reward")]
    assert rewards
    assert all(0 < reward < 1 for reward in rewards)
    size = 16 * (8 if name == "ppo" else 1)  # of a rollout, of both workers
    assert all((reward * size).is_integer() for reward in rewards)


@pytest.mark.parametrize("job", [("ddp", "sft"), ("fsdp", "sft")])
def test_only_the_first_worker_writes_files(together, job):
    kept = {path.name for path in together[job].of(1).iterdir()}
    assert kept == {"progress.json", "weights.pt"}  # by the test itself


# --- parts of weights, measured ------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(together):
    """Bits of the whole weights of the FSDP trial at each step, gathered by torch."""
    return [
        {name: w.view(torch.int32).numpy().view(np.uint32).ravel() for name, w in weights.items()}
        for weights in together["fsdp", "sft"].weights()
    ]


@pytest.mark.parametrize("step", [2, NUM_STEPS])
def test_patches_put_together_are_the_gathered_weights(together, states, base, tmp_path, step):
    folder = together["fsdp", "sft"].of(0) / snapshot_folder(step)
    apply_patch(base.path, folder / PATCH_FILE, tmp_path / "out")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, bits in states[step].items():
        assert np.array_equal(found[name].view(torch.int32).numpy().view(np.uint32).ravel(), bits)


def test_counts_and_masks_are_those_of_the_gathered_weights(together, states):
    folder = together["fsdp", "sft"].of(0)
    rows = tables.read(folder / "steps.parquet", "steps").to_pylist()
    total = sum(bits.size for bits in states[0].values())
    ever = {name: np.zeros(bits.size, bool) for name, bits in states[0].items()}
    final = {name: bits != states[0][name] for name, bits in states[-1].items()}
    for step in range(1, NUM_STEPS + 1):
        now = states[step]
        changed = {name: now[name] != states[step - 1][name] for name in now}
        ever = {name: ever[name] | (now[name] != states[0][name]) for name in now}
        num = sum(int(c.sum()) for c in changed.values())
        row = rows[step]
        assert row["update_sparsity_k1"] == 1 - num / total
        assert row["ever_changed_fraction"] == sum(int(e.sum()) for e in ever.values()) / total
        inside = sum(int((changed[name] & final[name]).sum()) for name in now)
        assert row["outside_final"] == 1 - inside / num
        if step % 2 == 0:
            two = sum(int((now[name] != states[step - 2][name]).sum()) for name in now)
            assert row["update_sparsity_k2"] == 1 - two / total
        for part in tables.read(folder / step_mask_file(step), "masks").to_pylist():
            mine = changed[part["tensor"]][part["start"] :][: part["num_elements"]]
            assert part["mask"] == masks.pack(mine).tobytes()
    written = masks.read_masks(folder / EVER_CHANGED)
    for name, expected in ever.items():
        assert np.array_equal(written.packed(name), masks.pack(expected))
    summary = json.loads((folder / "summary.json").read_text())
    num_ever = sum(int(e.sum()) for e in ever.values())
    num_final = sum(int(f.sum()) for f in final.values())
    split = [summary[key] for key in ("num_untouched", "num_cancelled", "num_final")]
    assert split == [total - num_ever, num_ever - num_final, num_final]


# --- what workers agree on -----------------------------------------------------------------------


def test_gradients_are_averaged_and_seeds_differ(together):
    out = together["ddp", "sft"].folder.parent
    first, second = (json.loads((out / f"{rank}.json").read_text()) for rank in range(2))
    assert first["gradients"] == second["gradients"] == [[1.5] * 3, [0.5] * 3]
    assert first["seed"] == 7
    assert second["seed"] not in (7, 8)


def test_advantages_are_whitened_over_all_workers(together):
    out = together["ddp", "sft"].folder.parent
    values, mask = (torch.cat(parts) for parts in zip(*TOKENS, strict=True))
    found = torch.cat([torch.load(out / f"{rank}.pt") for rank in range(2)])
    tokens = values[mask.bool()]
    scaled = (tokens - tokens.mean()) / (tokens.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(found[mask.bool()], scaled)
    assert not found[~mask.bool()].any()
    torch.testing.assert_close(found, ppo.whiten(values, mask))
