"""From tables to verdicts: effects, claims and the report of a study, from its tables alone.

Neither trials, nor base models, nor Ray, nor torch are needed. Large tables are read one trial at a
time, and of these only the columns that are summed.
"""

import tempfile
from collections.abc import Sequence, Set
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import record
from pipelines.record import Registration
from pipelines.storage import Storage
from pipelines.table_files import read_parts, read_table, table_file, write_table
from rlsparse.claims import judge
from rlsparse.effects import effects
from rlsparse.effects.changes import (
    CHANGES_COLUMNS,
    MAGNITUDES_COLUMNS,
    sum_changes,
    sum_magnitudes,
)
from rlsparse.effects.factorial import factorial
from rlsparse.effects.overlap_effects import overlap_effects
from rlsparse.effects.responses import responses
from rlsparse.errors import TableError
from rlsparse.report.study_page import build_report
from rlsparse.report.sync_rows import LINKS_GBIT_S
from rlsparse.schemas import SCHEMAS
from rlsparse.study import StudyBase

Tables = dict[str, pa.Table]

GIVEN = ("trials", "steps", "overlaps", "consensus")
"""Tables of one file that must be there."""
CONCLUDED = ("changes", "magnitudes", "effects", "terms", "means", "claims")
"""Tables that ``conclude`` makes."""
OPTIONAL = ("agreement", "spectra", "syncs")
"""Tables with a part per trial that not every study has."""
REPORT_FILES = ("index.html", "report.json")


def rebuild(
    storage: Storage, *, allow_missing: bool, links: Sequence[float] = LINKS_GBIT_S
) -> tuple[StudyBase, Tables]:
    """Judge a study again and write its report, from ``study.json`` and its tables alone.

    Args:
        storage: its folder.
        allow_missing: as of ``conclude``.
        links: as of ``write_report``.

    Raises:
        ConfigError: the folder holds no study.
        TableError: tables are missing.
    """
    study, content = record.read(storage)
    seeds = content.get("seeds", content["registered"]["seeds"])
    registered = record.registration(storage, study, seeds)
    with storage.lock():
        forget_conclusions(storage)
        tables = conclude(study, storage, registered, allow_missing=allow_missing)
        write_report(study, storage, tables, registered, allow_missing=allow_missing, links=links)
    return study, tables


def forget_conclusions(storage: Storage) -> None:
    """Let the last stages run again: their results are not those of their inputs any more."""
    for stage in ("aggregate", "mlflow"):
        storage.delete(f"stages/{stage}.json")


def conclude(
    study: StudyBase, storage: Storage, registered: Registration, *, allow_missing: bool
) -> Tables:
    """Make the tables ``CONCLUDED`` of those that the stages before left, and write them.

    Args:
        study: the study.
        storage: its folder. It holds ``GIVEN`` (``trials`` with the columns config, label, and
            base: fingerprint), parts of ``tensor_deltas`` by trial and of ``base_tensors`` by the
            first 12 digits of their fingerprint, and those of ``OPTIONAL`` if it has any.
        registered: how its claims stand to those that were frozen.
        allow_missing: judge claims although trials of theirs are missing.

    Returns:
        All tables that the report shows.

    Raises:
        TableError: tables are missing; names them and the remedy.
    """
    _check_there(storage)
    result = {name: read_table(storage, name) for name in GIVEN}
    trials, steps, overlaps = (result[name] for name in ("trials", "steps", "overlaps"))
    changes, result["magnitudes"] = sum_parts(storage, trials)
    frame = responses(trials, steps, changes, study.default_view)
    result["changes"] = changes
    of_runs, of_pairs = (
        effects(study, trials, frame, changes),
        overlap_effects(study, trials, overlaps),
    )
    result["effects"] = pa.concat_tables([of_runs, of_pairs], promote_options="default")
    result["terms"], result["means"] = factorial(study, trials, frame)
    result["claims"] = judge(
        study,
        registered.standing,
        trials,
        steps,
        changes,
        overlaps,
        allow_missing=allow_missing,
        num_dropped=registered.num_dropped,
    )
    for name in CONCLUDED:
        write_table(storage, result[name], name)
    return result | _optional(storage, set(_finished(trials)))


def _optional(storage: Storage, finished: Set[str]) -> Tables:
    """Those of ``OPTIONAL`` that the study has."""
    there = {name: sorted(_parts(storage, name) & finished) for name in OPTIONAL}
    return {name: read_parts(storage, name, parts) for name, parts in there.items() if parts}


def sum_parts(storage: Storage, trials: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Tables ``changes`` and ``magnitudes`` of all finished trials, read one by one.

    Raises:
        TableError: a part is missing.
    """
    bases: Tables = {}
    changes = [SCHEMAS["changes"].empty_table()]
    magnitudes = [SCHEMAS["magnitudes"].empty_table()]
    for trial, base in _finished(trials).items():
        if base not in bases:
            bases[base] = read_table(storage, "base_tensors", base[:12])
        deltas = read_table(storage, "tensor_deltas", trial, CHANGES_COLUMNS)
        changes.append(sum_changes(deltas))
        is_last = pc.field("step_after") == pc.max(deltas["step_after"])
        last = read_table(storage, "tensor_deltas", trial, MAGNITUDES_COLUMNS, is_last)
        magnitudes.append(sum_magnitudes(last, bases[base]))
    return pa.concat_tables(changes), pa.concat_tables(magnitudes)


def load(storage: Storage) -> Tables:
    """The tables that ``conclude`` returned, as they were written, but for ``OPTIONAL``."""
    return {name: read_table(storage, name) for name in (*GIVEN, *CONCLUDED)}


def write_report(
    study: StudyBase,
    storage: Storage,
    tables: Tables,
    registered: Registration,
    *,
    allow_missing: bool,
    links: Sequence[float] = LINKS_GBIT_S,
) -> None:
    """Write the report of a study.

    Args:
        study: the study.
        storage: its folder, with its ``study.json``.
        tables: result of ``conclude``.
        registered: as given there.
        allow_missing: as given there.
        links: Gbit/s for which the pauses of weight syncs are given.
    """
    trials = tables["trials"]
    sums = {name: pc.sum(trials[name]).as_py() for name in ("wall_s", "cpu_s")}
    hosts = sorted(set(trials["host"].drop_null().to_pylist()))
    provenance = {
        **record.provenance(storage),
        **{name: value for name, value in sums.items() if value is not None},
        **_costs(trials),
        "hosts": hosts,
        "allow_missing": allow_missing,
        "dropped_claims": list(registered.dropped),
    }
    with tempfile.TemporaryDirectory() as folder:
        build_report(study, tables, Path(folder), provenance=provenance, links=links)
        for name in REPORT_FILES:
            storage.write_bytes(f"report/{name}", (Path(folder) / name).read_bytes())


def _costs(trials: pa.Table) -> dict[str, str]:
    """What trials took against what was expected of them, as one line; none of earlier releases."""
    lines = []
    for name, measured, expected in (
        ("peak memory", "peak_bytes", "estimated_peak_bytes"),
        ("CPU time", "cpu_s", "estimated_cpu_s"),
    ):
        ratios = pc.divide(pc.cast(trials[measured], pa.float64()), trials[expected]).drop_null()
        if len(ratios):
            least, most = pc.min_max(ratios).as_py().values()
            lines.append(f"{name} {least:.2g} to {most:.2g} times the estimate")
    if not lines:
        return {}
    largest = pc.max(trials["peak_bytes"]).as_py()
    return {"costs": f"largest trial {largest / 1e9:.2f} GB; {', '.join(lines)}"}


def _finished(trials: pa.Table) -> dict[str, str]:
    """Finished trial -> fingerprint of its base."""
    if "base" not in trials.column_names:
        raise TableError(
            "table trials lacks the column base (fingerprint of the base of each trial), an "
            "earlier release wrote it; `rlsparse run` makes it again"
        )
    done = trials.filter(pc.equal(trials["status"], "finished"))
    return dict(zip(done["trial_id"].to_pylist(), done["base"].to_pylist(), strict=True))


def _check_there(storage: Storage) -> None:
    """Raise one TableError that names every table that is missing."""
    missing = [table_file(name) for name in GIVEN if not storage.exists(table_file(name))]
    if not missing:
        finished = _finished(read_table(storage, "trials"))
        needed = {
            "tensor_deltas": set(finished),
            "base_tensors": {base[:12] for base in finished.values()},
        }
        missing = [
            table_file(name, part)
            for name, parts in needed.items()
            for part in sorted(parts - _parts(storage, name))
        ]
    if not missing:
        return
    shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    remedy = (
        "`rlsparse run` with its study file makes what is missing from trials/"
        if storage.exists("trials")
        else "copy the whole folder tables/ of the study"
    )
    raise TableError(f"{storage.url} lacks {shown}: {remedy}")


def _parts(storage: Storage, name: str) -> set[str]:
    return {file.removesuffix(".parquet") for file in storage.list(table_file(name))}
