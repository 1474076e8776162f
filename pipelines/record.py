"""``study.json``: the study itself, what was registered of it, and by what it was made.

With the tables it is all that a report needs, on any machine.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from pipelines.storage import Storage
from rlsparse.claim_config import ExactClaim
from rlsparse.errors import ConfigError
from rlsparse.identity import canonical_json
from rlsparse.study import PairStudy, Study, StudyBase

FILE = "study.json"
_PACKAGES = ("rlsparse", "torch", "transformers", "trl", "ray", "mlflow", "pyarrow", "numpy")
_SETTINGS = {"baseline", "factors", "resources", "reference", "settings"}


def write(
    storage: Storage,
    study: StudyBase,
    seeds: Collection[int],
    *,
    command: str | None,
    has_begun: bool,
    more: Mapping[str, Any],
) -> None:
    """Write ``study.json``; once a run has begun, its registered claims and seeds stay.

    Args:
        storage: of the study.
        study: as it is now.
        seeds: of its runs.
        command: the command that runs it; None keeps the one that is recorded.
        has_begun: whether there are results already.
        more: further entries, plain data.
    """
    frozen = {
        "claims": {claim.id: claim.model_dump(mode="json") for claim in study.claims},
        "seeds": sorted(seeds),
        "settings": settings(study),
    }
    there = storage.read_json(FILE) if storage.exists(FILE) else {}
    if has_begun:  # without a record nothing shows what was registered
        frozen = there.get("registered", frozen | {"claims": {}})
    provenance = {
        "command": command or there.get("provenance", {}).get("command"),
        "git_commit": git_commit(),
        "study_sha256": study_hash(study),
        "claims_sha256": _hash(frozen["claims"]),
    }
    storage.write_json(
        FILE,
        {
            "study": study.model_dump(mode="json"),
            "seeds": sorted(seeds),
            "registered": frozen,
            "registered_sha256": _hash(frozen),
            "provenance": provenance,
            "versions": versions(),
            **more,
        },
    )


def read(storage: Storage) -> tuple[StudyBase, dict[str, Any]]:
    """The study whose folder this is, and all that ``study.json`` says.

    Raises:
        ConfigError: there is none, it is damaged, or of another release.
    """
    if not storage.exists(FILE):
        raise ConfigError(
            f"{storage.url} is no study: no study.json in it; give a study file, or the folder "
            "that `rlsparse run` made"
        )
    try:
        content = storage.read_json(FILE)
        kind = PairStudy if "pairs" in content["study"] else Study
        return kind.model_validate(content["study"]), content
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # pydantic's is a ValueError
        raise ConfigError(
            f"{storage.url}/study.json is damaged or of another release; run the study file again"
        ) from error


@dataclass(frozen=True)
class Registration:
    """How a study's claims stand to those that were frozen when its first run began.

    Attributes:
        standing: claim id -> registered, extended or post hoc.
        dropped: ids of frozen claims that are not there now, or read differently.
        num_dropped: how many of them are tested, all but ``exact`` ones.
        changed: what else changed, for which all claims are post hoc, or "".
    """

    standing: Mapping[str, str]
    dropped: tuple[str, ...] = ()
    num_dropped: int = 0
    changed: str = ""

    def lines(self) -> list[str]:
        """What a person should know of it, or nothing."""
        late = [claim for claim, standing in self.standing.items() if standing == "post hoc"]
        said = []
        if self.changed and late:
            said = [f"all claims are post hoc: {self.changed}; another `name` keeps both studies"]
        elif late:
            said = [f"post hoc, as not registered in these words: {', '.join(late)}"]
        if self.dropped:
            said += [
                f"registered, but not asked in the same words any more: {', '.join(self.dropped)}"
            ]
        return said


def registration(storage: Storage, study: StudyBase, seeds: Collection[int]) -> Registration:
    """How the claims stand to what ``study.json`` froze.

    A claim that was not there, or reads differently now, is post hoc, and so are all claims of a
    study whose baseline or factors were changed, or that lost seeds; those of one that got seeds
    are extended.
    """
    frozen = storage.read_json(FILE)["registered"]
    now = study.model_dump(mode="json")
    late = dict.fromkeys((claim.id for claim in study.claims), "post hoc")
    try:  # what an earlier release froze lacks fields that have their defaults now
        then = type(study).model_validate(
            {**now, **frozen["settings"], "claims": list(frozen["claims"].values())}
        )
    except ValidationError:
        ids = tuple(name for name in frozen["claims"] if name not in late)
        return Registration(late, ids, len(ids), "they were registered under another release")
    gone = [claim for claim in then.claims if claim not in study.claims]
    lost = sorted(set(frozen["seeds"]) - set(seeds))
    changed = ""
    if settings(then) != settings(study):
        changed = f"{_differing(settings(then), settings(study))} were changed"
    elif lost:
        changed = f"registered seeds {', '.join(map(str, lost))} were dropped"
    known = () if changed else then.claims
    standing = "extended" if set(seeds) - set(frozen["seeds"]) else "registered"
    return Registration(
        late | {claim.id: standing for claim in study.claims if claim in known},
        tuple(claim.id for claim in gone),
        sum(not isinstance(claim, ExactClaim) for claim in gone),
        changed,
    )


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return " and ".join(sorted(key for key in now if then.get(key) != now[key]))


def tell(registered: Registration, console: Console) -> None:
    """Print what a person should know of it, before the first run."""
    for line in registered.lines():
        console.print(line, soft_wrap=True, highlight=False)


def provenance(storage: Storage) -> dict[str, Any]:
    """What made a study, for its report; what an earlier release did not record is not there."""
    content = storage.read_json(FILE)
    made = {"versions": content.get("versions", {}), **content.get("provenance", {})}
    return {key: value for key, value in made.items() if value is not None}


def settings(study: StudyBase) -> dict[str, Any]:
    """What is varied and what is held fixed: the part of a study that its claims are about."""
    settings = study.model_dump(mode="json", include=_SETTINGS)
    settings.get("resources", {}).pop("save_interval_s", None)  # changes no result
    return settings


def study_hash(study: StudyBase) -> str:
    """sha256 (hex) of the resolved study."""
    return _hash(study.model_dump(mode="json"))


def _hash(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that decide results, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the working directory, marked if it is dirty; None where there is no git."""
    if shutil.which("git") is None:
        return None
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return commit.stdout.strip() or None
