"""A user's own problems: split, cut and graded as configured, never trained on and tested."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from rlsparse.errors import ConfigError, RlsparseWarning, TrialError
from rlsparse.task_config import DatasetConfig
from rlsparse.tasks import load_task


@pytest.fixture
def write(tmp_path):
    def make(rows, name="data"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def numbered(first, last):
    return [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(first, last)]


def task_of(source, **options):
    return load_task(DatasetConfig(source=source, **options))


def prompts(task, split):
    return [problem.prompt for problem in task.problems(split)]


def test_problems(write):
    task = task_of(write([{"prompt": "Say {a} 2", "answer": 7}]), test_source=write([{
        "prompt": "3", "answer": " x y "}], "test"), prompt_template="Q: {prompt}\nA:")  # fmt: skip
    (train,), (test,) = task.problems("train"), task.problems("test")
    assert (train.prompt, train.completion, train.answer) == ("Q: Say {a} 2\nA:", " 7", "7")
    assert (test.prompt, test.completion, test.answer) == ("Q: 3\nA:", " x y", "x y")
    assert task.max_completion_tokens == 256


def test_columns_and_the_end_of_an_answer(write):
    rows = [{"question": "q", "solution": "so #### 3, or #### 1/2 ", "why": " so it is 1/2"}]
    options = {"prompt_column": "question", "answer_column": "solution", "answer_after": "####"}
    source, test = write(rows), write([{**rows[0], "question": "other"}], "test")
    (problem,) = task_of(source, test_source=test, **options).problems("train")
    assert (problem.prompt, problem.completion, problem.answer) == ("q", " 1/2", "1/2")
    task = task_of(source, test_source=test, completion_column="why", **options)
    assert task.problems("train")[0].completion == " so it is 1/2"


def test_split_by_hash(write):
    source = write(numbered(0, 2000))
    task = task_of(source)
    of_split = {s: prompts(task, s) for s in ("train", "validation", "test", "pretrain")}
    assert of_split["pretrain"] == []
    everything = [prompt for split in of_split.values() for prompt in split]
    assert sorted(everything) == sorted(row["prompt"] for row in numbered(0, 2000))
    for split, share in (("train", 0.75), ("validation", 0.08), ("test", 0.17)):
        assert len(of_split[split]) / 2000 == pytest.approx(share, rel=0, abs=0.03)
    assert of_split["train"] != sorted(of_split["train"])
    assert prompts(task, "train")[:5] == [p.prompt for p in task.problems("train", 5)]
    # A prompt is in the same split whatever else is in the file, and in whichever order.
    again = task_of(write(numbered(500, 3000)[::-1], "other"))
    for split in ("train", "validation", "test"):
        kept = [p for p in of_split[split] if int(p.split()[0]) >= 500]
        assert [p for p in prompts(again, split) if int(p.split()[0]) < 2000] == kept


def test_repeats_are_dropped(write):
    rows = [*numbered(0, 9), *numbered(0, 9), {"prompt": " 3 + 1 =\n", "answer": "other"}]
    task = task_of(write(rows))
    problems = [p for split in ("train", "validation", "test") for p in task.problems(split)]
    assert sorted((p.prompt, p.answer) for p in problems) == sorted(
        (row["prompt"], row["answer"]) for row in numbered(0, 9)
    )


def test_test_source(write):
    task = task_of(write(numbered(0, 30)), test_source=write(numbered(30, 40), "test"))
    assert {*prompts(task, "train")} == {row["prompt"] for row in numbered(0, 30)}
    assert {*prompts(task, "test")} == {row["prompt"] for row in numbered(30, 40)}
    assert task.problems("validation") == []


def test_what_is_tested_is_not_trained_on(write):
    test = write([*numbered(25, 40), {"prompt": " 0 + 1 = ", "answer": "1"}], "test")
    task = task_of(write(numbered(0, 30)), test_source=test)
    with pytest.warns(RlsparseWarning, match=r"^6 of 30 prompts of .* were left out of train"):
        trained = prompts(task, "train")
    assert {*trained} == {row["prompt"] for row in numbered(1, 25)}
    assert len(prompts(task, "test")) == 16
    task = task_of(write(numbered(26, 30), "inner"), test_source=test)
    with pytest.raises(ConfigError, match=r"^4 of 4 prompts of .* none is left to train on"):
        task.problems("train")


@pytest.mark.parametrize("given", [True, False])
def test_shots_are_not_trained_on(write, given):
    test = {"test_source": write(numbered(100, 110), "test")} if given else {}
    plain = task_of(write(numbered(0, 60)), **test)
    shown = task_of(write(numbered(0, 60)), num_shots=3, **test)
    assert {p.prompt for p in plain.problems("train")[-3:]} == {
        p.prompt.splitlines()[-1] for p in shown.problems("pretrain")
    }
    shots = "".join(f"{p.prompt}{p.completion}\n" for p in plain.problems("train")[-3:])
    assert prompts(shown, "train") == [shots + p for p in prompts(plain, "train")[:-3]]
    assert prompts(shown, "test") == [shots + p for p in prompts(plain, "test")]


def test_fewer_rows_than_asked(write):
    task = task_of(write(numbered(0, 20)), test_source=write(numbered(30, 40), "test"))
    assert len(task.problems("train", 20)) == 20
    message = r"data.jsonl has 20 distinct train problems, 21 were asked for; add rows, or"
    with pytest.raises(ConfigError, match=message):
        task.problems("train", 21)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": ["a"], "answer": "1"}, {}, "row 2 of .* has a list in column 'prompt'; text"),
        ({"prompt": "a", "answer": {"b": 1}}, {}, "row 2 of .* has a dict in column 'answer'"),
        ({"prompt": "a", "answer": ""}, {}, "row 2 of .* has nothing in column 'answer'"),
        ({"answer": "1"}, {}, "row 2 of .* has nothing in column 'prompt'"),
        ({"prompt": "a", "answer": "1"}, {"prompt_column": "promt"}, "no column 'promt': did you"),
        ({"prompt": "a", "answer": "1"}, {"completion_column": "gold"}, "has no column 'gold'"),
        ({"prompt": "a", "answer": "1"}, {"answer_after": "="}, r"row 2 .* no '=' \(task.answer_"),
        ({"prompt": "a", "answer": "1 = "}, {"answer_after": "="}, "row 2 .* no answer after '='"),
        ({"prompt": "a", "answer": "1\n2"}, {}, "row 2 of .* answer of several lines"),
    ],
)
def test_rows_that_are_no_problems(write, row, options, message):
    first = {"prompt": "b", "answer": "0 = 1" if "answer_after" in options else "1"}
    with pytest.raises(ConfigError, match=message):
        task_of(write([first, row]), **options).problems("train")


def test_splits_of_a_hub(write, monkeypatch):
    import datasets

    rows = {"train": numbered(0, 5), "test": numbered(5, 9)}

    def load_dataset(repo, subset, *, revision, split):
        assert (repo, subset, revision) == ("org/name", "main", "abc")
        return datasets.Dataset.from_list(rows[split])

    def load_dataset_builder(repo, subset, *, revision):
        return SimpleNamespace(hash=f"commit of {repo} {subset} {revision}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    task = task_of("org/name@abc", subset="main", test_split="test")
    assert {*prompts(task, "train")} == {row["prompt"] for row in rows["train"]}
    assert {*prompts(task, "test")} == {row["prompt"] for row in rows["test"]}
    assert task.version == "1, data commit of org/name main abc"
    with pytest.raises(ConfigError, match=r"task\.test_split 'test' is for a data set of a hub"):
        task_of(write(numbered(0, 9)), test_split="test")


# --- grades and version ------------------------------------------------------------------------


def test_graders(write):
    source = write(numbered(0, 9))
    assert task_of(source).grade(" 5\nso", "5") == 1
    assert task_of(source).grade("x = 5", "5") == 0
    assert task_of(source, grader="math").grade("x = 5", "5") == 1
    assert task_of(source, grader="math").grade("x = 6", "5") == 0


@pytest.fixture
def user_grader(write, monkeypatch):
    def make(grade):
        module = ModuleType("my_grades")
        module.grade = grade
        monkeypatch.setitem(sys.modules, "my_grades", module)
        return task_of(write(numbered(0, 9)), grader="my_grades:grade").grade

    return make


def test_own_grader(user_grader):
    grade = user_grader(lambda completion, answer: (completion == answer) / 2)
    assert grade("a", "a") == 0.5
    assert grade("a", "b") == 0


@pytest.mark.parametrize("result", [1.5, -0.1, float("nan"), float("inf"), None, "1"])
def test_grades_that_are_none(user_grader, result):
    with pytest.raises(TrialError, match=r"grader my_grades:grade returned .*in \[0, 1\]"):
        user_grader(lambda *_: result)("a", "b")


def test_grader_that_raises(user_grader):
    with pytest.raises(TrialError, match="grader my_grades:grade raised ZeroDivisionError: div"):
        user_grader(lambda *_: 1 / 0)("a", "b")


def test_version_follows_what_the_files_hold(write):
    one, test = write(numbered(0, 9)), write(numbered(9, 12), "test")
    versions = [
        task_of(one).version,
        task_of(write(numbered(0, 10), "longer")).version,
        task_of(one, test_source=test).version,
        task_of(one, grader="json:dumps").version,
    ]
    assert len({*versions}) == 4
    assert task_of(write(numbered(0, 9), "copy")).version == versions[0]
    write(numbered(0, 11))
    assert task_of(one).version != versions[0]


def test_changed_files_are_read_again(write):
    task = task_of(write(numbered(0, 50)), test_source=write(numbered(60, 70), "test"))
    assert len(task.problems("train")) == 50
    write(numbered(0, 55))
    assert len(task.problems("train")) == 55
