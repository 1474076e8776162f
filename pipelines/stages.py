"""The stages that every study ends with, whoever trained its runs.

Each is kept while its inputs are as before.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipelines import aggregate, record
from pipelines.aggregate import CONCLUDED, GIVEN, REPORT_FILES
from pipelines.session import RaySession
from pipelines.storage import Storage
from pipelines.table_files import table_file, write_table
from rlsparse.identity import canonical_json
from rlsparse.overlap.comparison import RULES, asked
from rlsparse.schemas import SCHEMA_VERSION
from rlsparse.study import StudyBase

if TYPE_CHECKING:
    from pipelines.overlap import MeasuredRun

Inputs = dict[str, Any]


def conclude_study(
    study: StudyBase,
    storage: Storage,
    session: RaySession,
    console: Console,
    *,
    states: Mapping[str, Any],
    seeds: Collection[int],
    measured: "Callable[[], list[MeasuredRun]]",
    collect: Callable[[], None],
    allow_missing: bool,
    told: Mapping[str, Any] | None = None,
) -> Inputs:
    """Count overlaps, judge claims and write the report of runs that have been diffed.

    Args:
        study: the study.
        storage: its folder, with the parts of its runs.
        session: started if overlaps are to be counted.
        console: for progress.
        states: trial_id -> what its results depend on, plain data.
        seeds: of all runs.
        measured: gives the runs to compare.
        collect: writes the tables ``trials`` and ``steps``.
        allow_missing: judge claims although runs of theirs are missing.
        told: trial_id -> what ``collect`` writes that does not depend on ``states``, plain data.

    Returns:
        What the results depend on, for stages that follow.
    """
    shared: Inputs = {
        "trials": dict(states),
        "rlsparse": version("rlsparse"),
        "schema": SCHEMA_VERSION,
    }

    def overlap() -> None:
        from pipelines import overlap as stage

        session.start()
        console.print("counting overlaps", highlight=False)
        found = stage.run(storage, study, measured())
        for name, table in zip(("overlaps", "consensus"), found, strict=True):
            write_table(storage, table, name)

    made = [table_file(name) for name in ("overlaps", "consensus")]
    # What tells cells, and what is asked; a claim that comes late makes nothing be counted anew.
    cells = study.model_dump(mode="json", include={"factors", "baseline", "controls", "settings"})
    inputs = shared | {"study": cells, "asked": asked(study), "rules": RULES}
    run_stage(storage, "overlap", inputs, made, overlap)
    registered = record.registration(storage, study, seeds)

    def conclude() -> None:
        console.print("judging claims, drawing the report", highlight=False)
        collect()
        tables = aggregate.conclude(study, storage, registered, allow_missing=allow_missing)
        aggregate.write_report(study, storage, tables, registered, allow_missing=allow_missing)

    inputs = shared | {
        "study": study.model_dump(mode="json"),
        "registered": asdict(registered),
        "provenance": record.provenance(storage),
        "allow_missing": allow_missing,
        "told": dict(told or {}),
    }
    made = [table_file(name) for name in (*GIVEN, *CONCLUDED)]
    made += [f"report/{name}" for name in REPORT_FILES]
    run_stage(storage, "aggregate", inputs, made, conclude)
    return inputs


def run_stage(
    storage: Storage, name: str, inputs: Inputs, made: list[str], work: Callable[[], None]
) -> None:
    """Do ``work`` unless the marker of this stage has the same inputs and its files are there."""
    marker = f"stages/{name}.json"
    digest = hashlib.sha256(canonical_json(inputs).encode()).hexdigest()
    there = all(storage.exists(file) for file in made)
    if there and storage.exists(marker) and storage.read_json(marker) == digest:
        return
    work()
    storage.write_json(marker, digest)
