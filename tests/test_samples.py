"""Data that is made before training: sampled, gold, or a user's own."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from rlsparse.algorithms import ALGORITHMS, samples
from rlsparse.errors import ConfigError, TrialError
from rlsparse.tasks import Problem


@pytest.fixture
def scripted(context_of, tiny_trial, base, monkeypatch):
    """Context whose base "samples" the given completions, rewarded as given, of two prompts."""

    def make(name: str, texts: list[str], rewards: list[float]):
        config = tiny_trial(
            name,
            algorithm={"num_samples_per_prompt": len(texts) // 2},
            task={"num_train_problems": 2},
        )
        context = context_of(config, base)
        monkeypatch.setattr(samples, "complete", lambda *_, **__: texts)
        return replace(context, reward=lambda **_: rewards)

    return make


def test_samples_are_the_bases_own(context_of, tiny_trial, base):
    """Sampled anew by hand: the same draws of torch's global generator, prompt after prompt."""
    config = tiny_trial("dpo", algorithm={"num_samples_per_prompt": 4, "temperature": 0.7})
    context = context_of(config, base)
    asked: dict[str, list[str]] = {}

    def reward(*, prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        asked.update(prompts=prompts, completions=completions, answers=answers)
        return [float(i) for i in range(len(prompts))]

    torch.manual_seed(5)
    found = samples.graded_samples(replace(context, reward=reward))
    torch.manual_seed(5)
    ids = [context.tokenizer(p.prompt)["input_ids"] for p in context.problems for _ in range(4)]
    width = max(map(len, ids))
    output = context.model.eval().generate(
        input_ids=torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        max_new_tokens=6, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
    )  # fmt: skip
    texts = context.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    assert [text for sample in found for text in sample.completions] == texts
    assert asked["completions"] == texts
    assert asked["answers"] == [p.answer for p in context.problems for _ in range(4)]
    assert asked["prompts"] == [p.prompt for p in context.problems for _ in range(4)]
    assert [sample.prompt for sample in found] == [p.prompt for p in context.problems]
    assert [sample.rewards for sample in found] == [
        [4.0 * i + j for j in range(4)] for i in range(16)
    ]


def test_sampled_pairs_are_right_and_wrong(context_of, tiny_trial, base):
    context = context_of(tiny_trial("dpo"), base)
    torch.manual_seed(0)
    pairs = samples.preference_pairs(context)
    answers = {p.prompt: p.answer for p in context.problems}
    assert 4 <= len(pairs) <= 16
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert context.task.grade(pair["chosen"], answers[pair["prompt"]]) == 1
        assert context.task.grade(pair["rejected"], answers[pair["prompt"]]) == 0


def test_the_first_best_against_the_first_worst(scripted):
    context = scripted("dpo", ["a", "b", "c", "d", "e", "f"], [0.5, 0.9, 0.9, -1.0, 0.0, -1.0])
    first, second = (p.prompt for p in context.problems)
    assert samples.preference_pairs(context) == [
        {"prompt": first, "chosen": "b", "rejected": "a"},
        {"prompt": second, "chosen": "e", "rejected": "d"},
    ]
    assert samples.labelled_completions(context) == [
        {"prompt": first, "completion": "b", "label": True},
        {"prompt": first, "completion": "a", "label": False},
        {"prompt": second, "completion": "e", "label": True},
        {"prompt": second, "completion": "d", "label": False},
    ]


def test_a_prompt_whose_rewards_are_equal_gives_no_pair(scripted):
    context = scripted("simpo", ["a", "b", "c", "d"], [0.3, 0.3, 0.0, 1.0])
    (pair,) = samples.preference_pairs(context)
    assert pair == {"prompt": context.problems[1].prompt, "chosen": "d", "rejected": "c"}


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo", "kto"])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_no_pair_at_all(context_of, tiny_trial, base, name, reward):
    context = context_of(tiny_trial(name, task={"num_train_problems": 2}), base)
    context = replace(context, reward=lambda *, prompts, **_: [reward] * len(prompts))
    expected = rf"{name} found no pair of a better and a worse completion in 8 samples .* 2 prompts"
    with pytest.raises(TrialError, match=expected):
        ALGORITHMS[name](context)


def test_gold_pairs(context_of, tiny_trial, base):
    context = context_of(tiny_trial("dpo", algorithm={"data": "gold", "sampling_seed": 4}), base)
    state = torch.get_rng_state()
    pairs = samples.preference_pairs(context)
    assert torch.equal(state, torch.get_rng_state())
    answers = {p.prompt: p.answer for p in context.problems}
    gold = {p.completion for p in context.problems}
    assert [pair["prompt"] for pair in pairs] == [p.prompt for p in context.problems]
    for pair in pairs:
        assert context.task.grade(pair["chosen"], answers[pair["prompt"]]) == 1
        assert context.task.grade(pair["rejected"], answers[pair["prompt"]]) == 0
        assert pair["rejected"] in gold
    assert samples.preference_pairs(context) == pairs
    other = context_of(tiny_trial("dpo", algorithm={"data": "gold", "sampling_seed": 5}), base)
    assert samples.preference_pairs(other) != pairs
    labelled = context_of(tiny_trial("kto", algorithm={"data": "gold", "sampling_seed": 4}), base)
    rows = samples.labelled_completions(labelled)
    assert [r["completion"] for r in rows if r["label"]] == [pair["chosen"] for pair in pairs]
    assert [r["completion"] for r in rows if not r["label"]] == [p["rejected"] for p in pairs]


def test_gold_pairs_need_two_answers(context_of, tiny_trial, base):
    context = context_of(tiny_trial("orpo", algorithm={"data": "gold"}), base)
    same = [Problem("1 + 1 =", " 2", "2"), Problem("3 - 1 =", " 2", "2")]
    with pytest.raises(TrialError, match="at least two different answers, and all 2 have the same"):
        samples.preference_pairs(replace(context, problems=same))


@pytest.mark.parametrize(
    ("rewards", "accepted"),
    [
        ([1, 0, 1, 0], ["a", "c"]),  # a grader of 0 and 1: the right ones
        ([1, 1, 1, 1], ["a", "b", "c"]),  # all are right
        ([0.5, 0.25, 0.5, -1], ["a", "c"]),  # graded: the best
        ([0, 0, -1, 0], []),  # all are equally bad
        ([-0.5, -1, -2, -3], []),
    ],
)
def test_accepted_samples(scripted, rewards, accepted):
    context = scripted("rft", ["a", "b", "c", "a", "x", "x", "y", "x"], [*rewards, 0, 1, 0, 1])
    first, second = (p.prompt for p in context.problems)
    assert samples.accepted_samples(context) == [
        *({"prompt": first, "completion": text} for text in accepted),
        {"prompt": second, "completion": "x"},
    ]


def test_nothing_accepted(scripted):
    context = scripted("rft", ["a", "b", "c", "d"], [0.0, -1.0, 0.0, 0.0])
    expected = r"rft found no completion with a positive reward in 2 samples for each of 2 prompts"
    with pytest.raises(TrialError, match=expected):
        ALGORITHMS["rft"](context)


def test_rft_learns_right_completions(context_of, tiny_trial, base):
    context = context_of(tiny_trial("rft"), base)
    torch.manual_seed(0)
    rows = samples.accepted_samples(context)
    answers = {p.prompt: p.answer for p in context.problems}
    assert len(rows) >= 8
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    assert all(context.task.grade(row["completion"], answers[row["prompt"]]) == 1 for row in rows)


# --- a user's own files ----------------------------------------------------------------------

PAIRS = [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3", "source": "me"}] * 2
LABELLED = [
    {"prompt": "1 + 1 =", "completion": " 2", "label": 1},
    {"prompt": " 1 + 1 =\n", "completion": " 3 ", "label": False},
]


@pytest.fixture
def with_file(context_of, tiny_trial, base, tmp_path):
    def make(name: str, rows: list[dict]):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return context_of(tiny_trial(name, algorithm={"data": str(path)}, batch_size=2), base)

    return make


def test_own_rows_are_used_as_they_are(with_file):
    pair = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
    assert samples.preference_pairs(with_file("dpo", PAIRS)) == [pair, pair]
    labelled = samples.labelled_completions(with_file("kto", LABELLED))
    assert labelled == [{**LABELLED[0], "label": True}, LABELLED[1]]
    assert type(labelled[0]["label"]) is bool
    bare = [{"prompt": row["prompt"], "completion": row["completion"]} for row in LABELLED]
    assert samples.demonstrations(with_file("sft", LABELLED)) == bare


@pytest.mark.parametrize("name", ["sft", "dpo", "simpo", "orpo", "kto"])
def test_trains_on_own_rows(with_file, name):
    rows = [{**pair, **row} for pair, row in zip(PAIRS, LABELLED, strict=True)]
    trainer = ALGORITHMS[name](with_file(name, rows))
    assert len(trainer.train_dataset) == 2
    trainer.train()


def test_own_prompts_are_read_in_the_format_of_the_trial(with_file):
    context = with_file("dpo", PAIRS)
    task = context.config.task.model_copy(update={"prompt_format": "chat"})
    context.tokenizer.chat_template = "?{{ messages[0]['content'] }}?"
    chat = replace(context, config=context.config.model_copy(update={"task": task}))
    assert [pair["prompt"] for pair in samples.preference_pairs(chat)] == ["?1 + 1 =?"] * 2
    assert [pair["chosen"] for pair in samples.preference_pairs(chat)] == [" 2"] * 2


def test_pairs_that_prefer_nothing(with_file):
    rows = [PAIRS[0], {**PAIRS[0], "rejected": " 2"}]
    with pytest.raises(TrialError, match=r"row 2 of .* chosen and rejected are both ' 2'"):
        samples.preference_pairs(with_file("simpo", rows))


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind(with_file, label):
    rows = [{**row, "label": label} for row in LABELLED]
    with pytest.raises(TrialError, match=f"all 2 labels are {label}; kto learns from right and"):
        samples.labelled_completions(with_file("kto", rows))


def test_fewer_examples_than_a_batch(context_of, tiny_trial, base):
    context = context_of(tiny_trial("sft", task={"num_train_problems": 7}), base)
    with pytest.raises(TrialError, match=r"sft has 7 examples, fewer than train\.batch_size 8"):
        ALGORITHMS["sft"](context)


@pytest.mark.parametrize(
    ("name", "change", "error", "expected"),
    [
        ("sft", {"completion": ""}, ConfigError, "row 2 of .* has nothing in column 'completion'"),
        ("dpo", {"chosen": 3}, TrialError, "row 2 of algorithm.data .*: chosen is 3, not a text"),
        ("kto", {"prompt": ["x"]}, TrialError, r"row 2 of .*: prompt is \['x'\], not a text"),
        ("kto", {"label": 2}, TrialError, "row 2 of .*: label is 2; it must be true or false"),
        ("kto", {"label": 1.0}, TrialError, "label is 1.0; it must be true or false, or 1 or 0"),
        ("kto", {"label": "yes"}, TrialError, "label is 'yes'; it must be"),
    ],
)
def test_a_row_that_cannot_be_used(with_file, name, change, error, expected):
    rows = [{**pair, **row} for pair, row in zip(PAIRS, LABELLED, strict=True)]
    rows[1] |= change
    with pytest.raises(error, match=expected):
        ALGORITHMS[name](with_file(name, rows))


def test_labels_of_a_csv_are_texts(context_of, tiny_trial, base, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("label,prompt,completion\n1,a,b\nFalse,a,c\ntrue,a,d\n0,a,e\n")
    context = context_of(tiny_trial("kto", algorithm={"data": str(path)}), base)
    labels = [row["label"] for row in samples.labelled_completions(context)]
    assert labels == [True, False, True, False]


def test_kto_shuffles_its_rows(context_of, tiny_trial, base):
    """TRL reads them in order, and a pair's two rows would follow each other in every batch."""

    def order(seed: int) -> list[tuple[str, bool]]:
        config = tiny_trial("kto", algorithm={"data": "gold"}, data_seed=seed)
        trainer = ALGORITHMS["kto"](context_of(config, base))
        return [(row["prompt"], row["label"]) for row in trainer.train_dataset]

    first = order(1)
    assert order(1) == first
    assert order(2) != first
    assert sorted(order(2)) == sorted(first)
    neighbours = sum(one[0] == other[0] for one, other in itertools.pairwise(first))
    assert neighbours < 5  # 16 were they left in order
