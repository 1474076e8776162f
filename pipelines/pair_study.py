"""Runs a study of pairs: checkpoints made elsewhere, through the same tables, claims and report.

Stages: diff and overlap (``tables/``), aggregate (``tables/``, ``report/``). A run whose parts were
made of the files that are there now is not diffed again, nor is one whose files are gone since.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines import aggregate, record
from pipelines.aggregate import Tables
from pipelines.pair_plan import PAIRS_FILE, PairPlan, measured_runs
from pipelines.session import RaySession
from pipelines.stages import conclude_study
from pipelines.storage import Storage
from pipelines.table_files import read_table, table_file, write_table
from rlsparse import tables
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.diff import Diff
from rlsparse.errors import CheckpointError, ConfigError, RlsparseError, TrialError
from rlsparse.identity import canonical_json
from rlsparse.matching import TensorPair
from rlsparse.pair_runs import PairRun, median_magnitude, steps_table, trials_table
from rlsparse.schemas import SCHEMA_VERSION
from rlsparse.spectrum import spectrum_rows
from rlsparse.study import PairStudy

Row = dict[str, Any]

_PARTS = ("tensor_deltas", "masks", "spectra")
_SIZES = ("num_changed_bitwise", "sum_sq_delta", "sum_abs_delta", "max_abs_delta")
_NUM_OPENERS = 16  # threads that wait for the headers of remote files


def run_pair_study(
    plan: PairPlan,
    *,
    console: Console,
    command: str | None = None,
    address: str | None = None,
    allow_missing: bool = False,
) -> Tables:
    """Measure what is not measured yet, and bring tables and report up to date.

    Args:
        plan: the study.
        console: for progress; standard error by convention.
        command: what the user typed, for the record; None keeps what is recorded.
        address: a Ray cluster; None starts Ray on this machine.
        allow_missing: judge claims although runs of theirs could not be measured.

    Returns:
        All tables.

    Raises:
        ConfigError: files of the CSV are not there.
        StorageError: the storage is not writable, or another driver is at work on the study.
        TrialError: runs of different seeds are alike; tables and report are there all the same.
    """
    plan.storage.check_writable()
    with plan.storage.lock(), RaySession(address) as session:
        todo = _pending(plan)
        _check_places(plan, [run for run, _ in todo])
        if todo:
            session.start()
        plan.storage.write_bytes(PAIRS_FILE, Path(plan.study.pairs).read_bytes())
        seeds = [run.seed for run in plan.trials]
        record.write(
            plan.storage,
            plan.study,
            seeds,
            command=command,
            has_begun=bool(plan.storage.list("ledger")),
            more={"trials": {run.trial_id: run.label for run in plan.trials}},
        )
        record.tell(record.registration(plan.storage, plan.study, seeds), console)
        _drop_stale(plan, [run for run, _ in todo])
        if todo:
            num_pairs = sum(len(run.rows) for run, _ in todo)
            console.print(f"diffing {num_pairs} pairs of checkpoints", highlight=False)
            _measure(plan, todo)
        found = _conclude(plan, session, console, allow_missing=allow_missing)
    _check_seeds(plan)
    return found


def _conclude(
    plan: PairPlan, session: RaySession, console: Console, *, allow_missing: bool
) -> Tables:
    made = {run.trial_id: _marker(plan, run) for run in plan.finished()}
    bases = {trial_id: str(marker["base"]) for trial_id, marker in made.items()}
    status = {name: (entry.status, entry.error) for name, entry in plan.entries().items()}

    def collect() -> None:
        medians = {
            base: median_magnitude(read_table(plan.storage, "base_tensors", base[:12]))
            for base in set(bases.values())
        }
        trials = trials_table(plan.study, plan.trials, status, bases, medians)
        write_table(plan.storage, trials, "trials")
        write_table(plan.storage, steps_table(plan.finished()), "steps")

    conclude_study(
        plan.study,
        plan.storage,
        session,
        console,
        states={
            run.trial_id: [*status[run.trial_id], made.get(run.trial_id), run.control]
            for run in plan.trials
        },
        seeds=[run.seed for run in plan.trials],
        measured=lambda: measured_runs(plan, bases),
        collect=collect,
        allow_missing=allow_missing,
        told={run.trial_id: [row._replace(line=0) for row in run.rows] for run in plan.trials},
    )
    return aggregate.load(plan.storage)


# --- what is to be measured ------------------------------------------------------------------


def _pending(plan: PairPlan) -> list[tuple[PairRun, Row]]:
    """Runs to measure, with what their parts will be made of; the others are noted as finished."""
    with ThreadPoolExecutor(_NUM_OPENERS) as pool:
        inputs = list(pool.map(lambda run: _inputs(plan, run), plan.trials))
    todo = []
    for run, made_of in zip(plan.trials, inputs, strict=True):
        if not _is_done(plan, run, made_of):
            todo.append((run, made_of))
        elif plan.ledger.get(run.trial_id).status != "finished":
            plan.ledger.finish(run.trial_id)
    return todo


def _inputs(plan: PairPlan, run: PairRun) -> Row:
    """What the parts of a run depend on; checkpoints that are out of reach now are None."""
    return {
        "schema": SCHEMA_VERSION,
        "views": list(plan.study.measured_views),
        "spectrum": plan.study.spectrum,
        "before": _files(plan.place(run.before)),
        "after": {str(row.step): _files(plan.place(row.after)) for row in run.rows},
    }


def _files(place: str) -> dict[str, list[int]] | None:
    """Files of a checkpoint, by folder and name (of hub models, the revision): size, time."""
    try:
        opened = Checkpoint.open(place)
    except CheckpointError:
        return {} if Path(place).exists() else None  # damaged, or gone
    found = {}
    for file in {info.file for info in opened.tensors.values()}:
        if isinstance(file, Path):
            about = file.stat()
            found[f"{file.parent.name}/{file.name}"] = [about.st_size, about.st_mtime_ns]
        else:
            found[str(file)] = [file.size_bytes]
    return found


def _is_done(plan: PairPlan, run: PairRun, inputs: Row) -> bool:
    if not plan.storage.exists(_marker_file(run)):
        return False
    marker = _marker(plan, run)
    names = _PARTS if _has_spectra(plan.study, run) else _PARTS[:2]
    parts = [table_file(name, run.trial_id) for name in names]
    parts.append(table_file("base_tensors", marker["base"][:12]))
    return all(map(plan.storage.exists, parts)) and _fits(inputs, marker["inputs"])


def _fits(now: Row, then: Row) -> bool:
    """Whether nothing changed; checkpoints that are out of reach have not."""
    sides = [(now["before"], then["before"])]
    sides += [(files, then["after"][step]) for step, files in now["after"].items()]
    rest = ("schema", "views", "spectrum")
    return all(now[name] == then[name] for name in rest) and all(
        files is None or files == before for files, before in sides
    )


def _has_spectra(study: PairStudy, run: PairRun) -> bool:
    return study.spectrum != "off" and run.role != "control"


def _marker_file(run: PairRun) -> str:
    return f"stages/diff/{run.trial_id}.json"


def _marker(plan: PairPlan, run: PairRun) -> Row:
    """What is known of the parts of a run: inputs, fingerprint of the base, hash of the change."""
    found: Row = plan.storage.read_json(_marker_file(run))
    return found


def _check_places(plan: PairPlan, runs: Iterable[PairRun]) -> None:
    """Raise one ConfigError that names every path that is not there."""
    lines = [
        f"{plan.study.pairs}:{row.line}: column {column}: {text!r}: no file or folder {place}; "
        "paths are relative to the CSV file"
        for run in runs
        for row in run.rows
        for column, text in (("before", row.before), ("after", row.after))
        for place in [plan.place(text)]
        if Path(place).is_absolute() and not Path(place).exists()
    ]
    if lines:
        raise ConfigError("\n".join(lines))


# --- measuring -------------------------------------------------------------------------------


def _measure(plan: PairPlan, todo: Sequence[tuple[PairRun, Row]]) -> None:
    """Diff the runs on all nodes; one that fails does so alone."""
    import ray

    from pipelines.pairs import diff_pairs

    task = ray.remote(num_cpus=1)(_attempt)
    bases = list(dict.fromkeys(plan.place(run.before) for run, _ in todo))
    hashes = dict(zip(bases, ray.get([task.remote(_hash, base) for base in bases]), strict=True))
    found = diff_pairs(
        [(plan.place(row.before), plan.place(row.after)) for run, _ in todo for row in run.rows],
        casts=[] if plan.study.measured_views == ("stored",) else plan.study.measured_views,
        extra_tables=("base_tensors", "masks"),
    )
    measured = []
    for run, inputs in todo:
        outcomes = list(islice(found, len(run.rows)))
        try:
            base = _known(hashes[plan.place(run.before)])
            diffs = [_known(outcome) for outcome in outcomes]
            _write_parts(plan, run, diffs, base)
        except RlsparseError as error:
            _fail(plan, run, error)
            continue
        marker = {"inputs": inputs, "base": base, "content": _content(diffs[-1])}
        spectra = None
        if _has_spectra(plan.study, run):
            spectra = task.remote(_spectra, diffs[-1].pairs, plan.study)
        measured.append((run, marker, spectra))
    for run, marker, spectra in measured:
        try:
            if spectra is not None:
                _write_spectra(plan, run, _known(ray.get(spectra)))
        except RlsparseError as error:
            _fail(plan, run, error)
            continue
        plan.storage.write_json(_marker_file(run), marker)
        plan.ledger.finish(run.trial_id)


def _attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """One task; an error is handed back, because Ray would wrap it in tracebacks."""
    try:
        return work(*arguments)
    except RlsparseError as error:
        return error


def _known(outcome: Any) -> Any:
    """What was asked for, unless it is the error that stands for it."""
    if isinstance(outcome, RlsparseError):
        raise outcome
    return outcome


def _hash(place: str) -> str:
    return fingerprint(Checkpoint.open(place))


def _spectra(pairs: list[TensorPair], study: PairStudy) -> list[Row]:
    """Rows of ``spectra`` in the default view; fp32 holds two stored formats exactly."""
    rows: list[Row] = []
    for pair in pairs:
        is_mixed = pair.before.dtype != pair.after.dtype
        view = "fp32" if is_mixed and study.default_view == "stored" else study.default_view
        rows += spectrum_rows([pair], view=view, method=study.spectrum)
    return [{**row, "view": study.default_view} for row in rows]


def _fail(plan: PairPlan, run: PairRun, error: RlsparseError) -> None:
    remedy = " (in a study: `views: [FORMAT]`)" if "--cast" in str(error) else ""
    plan.storage.delete(_marker_file(run))
    plan.ledger.fail(run.trial_id, f"{error}{remedy}")


def _write_parts(plan: PairPlan, run: PairRun, diffs: Sequence[Diff], base: str) -> None:
    views = plan.study.measured_views
    deltas: list[Row] = []
    masks: list[Row] = []
    for row, diff in zip(run.rows, diffs, strict=True):
        steps = {"step_before": 0, "step_after": row.step}
        deltas += [{**one, **steps} for one in diff.tables["tensor_deltas"]]
        masks += [{**one, "step": row.step, "kind": "snapshot"} for one in diff.tables["masks"]]
        _write_base(plan.storage, base, diff.tables["base_tensors"])
    parts = {"tensor_deltas": deltas, "masks": masks}
    for name, rows in parts.items():
        ours = [{**row, "trial_id": run.trial_id} for row in rows if row["view"] in views]
        write_table(plan.storage, tables.from_rows(ours, name), name, run.trial_id)


def _write_spectra(plan: PairPlan, run: PairRun, rows: Iterable[Row]) -> None:
    place = {"trial_id": run.trial_id, "step_before": 0, "step_after": run.steps[-1]}
    ours = tables.from_rows([{**row, **place} for row in rows], "spectra")
    write_table(plan.storage, ours, "spectra", run.trial_id)


def _write_base(storage: Storage, base: str, rows: Sequence[Row]) -> None:
    """The chunks of a base, once for all checkpoints that are compared with it.

    Raises:
        CheckpointError: another one was compared in other tensors, or rows of them.
    """
    part = base[:12]
    if not storage.exists(table_file("base_tensors", part)):
        table = tables.from_rows([{**row, "base": base} for row in rows], "base_tensors")
        write_table(storage, table, "base_tensors", part)
    known = read_table(storage, "base_tensors", part, ["tensor", "shape"]).to_pylist()
    ours, theirs = ({row["tensor"]: row["shape"] for row in side} for side in (rows, known))
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = (side.get(name, "not at all") for side in (ours, theirs))
        if one != other:
            raise CheckpointError(
                f"{name} is compared {one}, in other checkpoints of this base {other}: save all "
                "with the same tensors and vocabulary, or study them apart"
            )


def _content(diff: Diff) -> str:
    """Hash of what changed, bits and sizes; empty where nothing did."""
    deltas = [row for row in diff.tables["tensor_deltas"] if row["view"] == diff.views[0]]
    if not any(row["num_changed_bitwise"] for row in deltas):
        return ""
    digest = hashlib.sha256()
    for row in deltas:
        digest.update(repr([row[name] for name in ("tensor", "chunk", *_SIZES)]).encode())
    for row in diff.tables["masks"]:
        digest.update(row["mask"])
    return digest.hexdigest()


def _drop_stale(plan: PairPlan, todo: Iterable[PairRun]) -> None:
    """Delete parts of runs and bases that no run of this study stands for any more."""
    waiting = {run.trial_id for run in todo}
    done = [run for run in plan.trials if run.trial_id not in waiting]
    of_trials = {run.trial_id for run in plan.trials}
    of_bases = {_marker(plan, run)["base"][:12] for run in done}
    for name in (*_PARTS, "base_tensors"):
        there = {file.removesuffix(".parquet") for file in plan.storage.list(table_file(name))}
        for part in there - (of_trials if name in _PARTS else of_bases):
            plan.storage.delete(table_file(name, part))


def _check_seeds(plan: PairPlan) -> None:
    """Refuse runs that differ in the seed alone and changed the same weights alike.

    Raises:
        TrialError: there are such runs; names them.
    """
    alike: dict[str, list[PairRun]] = {}
    for run in plan.finished():
        if content := _marker(plan, run)["content"]:
            key = canonical_json([content, run.config | {"seed": 0}, run.control])
            alike.setdefault(key, []).append(run)
    groups = [group for group in alike.values() if len(group) > 1]
    if groups:
        named = "; ".join(" = ".join(f"{run.label} ({run.rows[-1].after})" for run in group)
                          for group in groups)  # fmt: skip
        raise TrialError(
            f"runs of different seeds changed the same weights alike: {named}; they are copies, or "
            "their seed does not reach training: list only one of them"
        )
