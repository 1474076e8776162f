"""``study.json`` freezes what was registered, and says what made the study."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines import record
from pipelines.storage import Storage
from rlsparse.errors import ConfigError
from rlsparse.study import Study

COMMAND = "rlsparse run s.yaml"
FIELDS: dict[str, Any] = {
    "name": "s",
    "question": "?",
    "baseline": {"algorithm": {"name": "grpo"}, "train": {"num_steps": 2}},
    "factors": {"algorithm.kl_coef": [0.0, 0.04]},
    "seeds": [1, 0],
    "claims": [
        {"id": "zero", "kind": "exact", "where": {"algorithm.kl_coef": 0.0}},
        {"id": "seeds", "kind": "above_null", "null": "tensor"},
    ],
}


def study(**changes: Any) -> Study:
    return Study.model_validate({**FIELDS, **changes})


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Of a study that has begun."""
    found = Storage(str(tmp_path))
    write(found, study())
    return found


def write(
    storage: Storage, given: Study, *, has_begun: bool = False, command: str | None = COMMAND
) -> None:
    record.write(storage, given, given.seeds, command=command, has_begun=has_begun, more={})


def standing(storage: Storage, given: Study) -> dict[str, str]:
    return dict(record.registration(storage, given, given.seeds).standing)


def test_claims_are_registered_until_they_read_differently(storage: Storage) -> None:
    assert standing(storage, study()) == {"zero": "registered", "seeds": "registered"}
    edited = [{**FIELDS["claims"][0], "value": 0.5}, FIELDS["claims"][1]]
    new = {"id": "new", "kind": "exact"}
    assert standing(storage, study(claims=[*edited, new])) == {
        "zero": "post hoc", "seeds": "registered", "new": "post hoc"
    }  # fmt: skip


def test_what_was_registered_and_dropped_is_told(storage: Storage) -> None:
    edited = [FIELDS["claims"][0], {**FIELDS["claims"][1], "margin": 1.5}]
    found = record.registration(storage, study(claims=edited), [0, 1])
    assert (found.dropped, found.num_dropped, found.changed) == (("seeds",), 1, "")
    assert found.lines() == [
        "post hoc, as not registered in these words: seeds",
        "registered, but not asked in the same words any more: seeds",
    ]
    found = record.registration(storage, study(claims=[]), [0, 1])
    assert (found.standing, found.dropped, found.num_dropped) == ({}, ("zero", "seeds"), 1)
    assert record.registration(storage, study(), [0, 1]).lines() == []


def test_factors_keep_their_order(storage: Storage) -> None:
    """A report that is built again lists cells as the first one did."""
    factors = {"train.learning_rate": [1e-5, 1e-4], "algorithm.kl_coef": [0.0, 0.04]}
    write(storage, study(factors=factors), has_begun=False)
    found, _ = record.read(storage)
    assert isinstance(found, Study)
    assert [*found.factors] == [*factors]


def test_more_seeds_extend_and_fewer_are_post_hoc(storage: Storage) -> None:
    assert set(standing(storage, study(seeds=[0, 1, 2])).values()) == {"extended"}
    for fewer in ([0], [0, 2]):
        found = record.registration(storage, study(seeds=fewer), fewer)
        assert set(found.standing.values()) == {"post hoc"}
        assert found.lines() == [
            "all claims are post hoc: registered seeds 1 were dropped; another `name` keeps both "
            "studies"
        ]


def test_a_study_that_lost_its_record_goes_on_and_is_post_hoc(
    storage: Storage, tmp_path: Path
) -> None:
    (tmp_path / "study.json").unlink()
    write(storage, study(), has_begun=True)
    assert standing(storage, study()) == {"zero": "post hoc", "seeds": "post hoc"}


@pytest.mark.parametrize(
    "other",
    [
        {"baseline": {**FIELDS["baseline"], "train": {"num_steps": 3}}},
        {"factors": {"algorithm.kl_coef": [0.0, 0.08]}},
        {"resources": {"num_threads": 2}},
    ],
)
def test_claims_under_other_settings_are_post_hoc(storage: Storage, other: dict[str, Any]) -> None:
    assert set(standing(storage, study(**other)).values()) == {"post hoc"}
    assert set(standing(storage, study(question="Why?")).values()) == {"registered"}


def test_how_often_trials_are_saved_is_no_setting_of_claims(storage: Storage) -> None:
    other = study(resources={"save_interval_s": 1.0})
    assert set(standing(storage, other).values()) == {"registered"}


def test_what_an_earlier_release_froze_is_read_with_its_defaults(storage: Storage) -> None:
    content = storage.read_json("study.json")
    frozen = content["registered"]
    for claim in frozen["claims"].values():
        del claim["note"]
    del frozen["claims"]["seeds"]["tensor"]
    del frozen["settings"]["baseline"]["train"]["weight_decay"]
    for key in ("pairs", "reference"):
        assert key not in frozen["settings"]
    storage.write_json("study.json", content)
    assert set(standing(storage, study()).values()) == {"registered"}
    frozen["claims"]["seeds"]["kind"] = "gone_since"
    storage.write_json("study.json", content)
    assert set(standing(storage, study()).values()) == {"post hoc"}


def test_once_runs_have_begun_the_registration_stays(storage: Storage) -> None:
    before = storage.read_json("study.json")
    later = study(claims=[], seeds=[0, 1, 2])
    write(storage, later, has_begun=True)
    content = storage.read_json("study.json")
    assert content["registered"] == before["registered"]
    assert content["registered_sha256"] == before["registered_sha256"]
    assert (content["seeds"], before["registered"]["seeds"]) == ([0, 1, 2], [0, 1])
    assert record.read(storage)[0] == later
    write(storage, later)
    assert storage.read_json("study.json")["registered"]["claims"] == {}


def test_provenance_says_what_made_the_study(storage: Storage, monkeypatch: Any) -> None:
    made = record.provenance(storage)
    resolved = study().model_dump(mode="json")
    claims = {claim["id"]: claim for claim in resolved["claims"]}

    def sha256(value: object) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    assert made["command"] == COMMAND
    assert made["study_sha256"] == sha256(resolved)
    assert made["claims_sha256"] == sha256(claims)
    assert {"torch", "trl", "ray", "mlflow", "rlsparse"} <= made["versions"].keys()
    write(storage, study(), command=None)
    assert record.provenance(storage)["command"] == COMMAND
    write(storage, study(), command="rlsparse run t.yaml")
    assert record.provenance(storage)["command"] == "rlsparse run t.yaml"
    content = storage.read_json("study.json")
    del content["provenance"]  # as an earlier release left it
    storage.write_json("study.json", content)
    assert record.provenance(storage).keys() == {"versions"}


def test_the_commit_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.git_commit() is None

    def git(*arguments: str) -> str:
        whom = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *whom, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-qm", "a")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert record.git_commit() == commit
    (tmp_path / "a").write_text("b")
    assert record.git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert record.git_commit() is None


def test_a_folder_without_a_study_is_told(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing is no study: no study\.json"):
        record.read(Storage(str(tmp_path / "nothing")))
    for text in ("{}", '{"study": 3}', "[", json.dumps({"study": {"pairs": "a.csv"}})):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises((ConfigError, OSError), match=r"study\.json is damaged"):
            record.read(storage)
