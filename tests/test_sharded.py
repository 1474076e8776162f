"""Parts of weights on several workers, measured as if they were whole: against whole tensors."""

import numpy as np
import pytest
import torch
from together import SHAPES, Odd, observe, run_together

NUM_STEPS = 4


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("observed")
    run_together(observe, NUM_STEPS, out, num_workers=3)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.fixture(scope="module")
def states():
    return [[w.numpy().view(np.uint32) for w in Odd().at(step)] for step in range(NUM_STEPS + 1)]


def test_all_workers_count_whole_tensors(seen, states):
    ever, expected = [np.zeros(shape, bool) for shape in SHAPES], []
    for step in range(1, NUM_STEPS + 1):
        counts = {
            k: sum(int((a != b).sum()) for a, b in zip(states[step], states[step - k], strict=True))
            for k in (1, 2)
            if step % k == 0
        }
        ever = [e | (a != b) for e, a, b in zip(ever, states[step], states[0], strict=True)]
        expected.append((counts, sum(int(e.sum()) for e in ever)))
    assert all(one["changes"] == expected for one in seen)
    assert all(one["num_elements"] == sum(map(np.prod, SHAPES)) for one in seen)
    final = sum(int((a != b).sum()) for a, b in zip(states[-1], states[0], strict=True))
    assert 0 < final < expected[-1][1]


def test_the_first_worker_gets_whole_masks_and_weights_and_the_others_nothing(seen, states):
    first, *others = seen
    assert all(not any(one["masks"]) and not one["ever"] and not one["stored"] for one in others)
    for number in range(len(SHAPES)):
        name, ever = f"weights.{number}", np.zeros(SHAPES[number], bool)
        for step in range(1, NUM_STEPS + 1):
            changed = states[step][number] != states[step - 1][number]
            ever |= states[step][number] != states[0][number]
            packed = np.packbits(changed, bitorder="little")
            assert np.array_equal(first["masks"][step - 1][name], packed)
        assert np.array_equal(first["ever"][name], np.packbits(ever, bitorder="little"))
        shape, bits = first["stored"][name]
        assert shape == SHAPES[number]
        assert np.array_equal(bits, states[-1][number].reshape(-1))


def test_each_worker_gets_its_own_rows_as_they_are_trained(seen, states):
    for number, state in enumerate(states[-1]):
        whole = np.zeros(state.size, np.uint32)
        for one in seen:
            name, start, bits = one["trained"][number]
            assert name == f"weights.{number}"
            whole[start : start + bits.size] = bits
        assert np.array_equal(whole, state.reshape(-1))
    assert all(one["totals"] == [0 + 1 + 2, 3] for one in seen)


def test_a_sample_of_the_weights_is_that_of_whole_ones(seen):
    whole = torch.cat([w.reshape(-1)[::4].abs() for w in Odd().at(NUM_STEPS)])
    assert torch.equal(seen[0]["spaced"].sort().values, whole.sort().values)


def test_one_worker_with_a_weight_that_is_not_finite_is_enough(seen):
    assert [one["finite"] for one in seen] == [[True, False]] * 3
