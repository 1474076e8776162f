"""The command ``rlsparse``. Heavy libraries are imported by the command that needs them."""

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipelines import mask_command, patch_command, preset_command
from pipelines.diff_command import diff
from pipelines.json_option import write_json
from pipelines.overlap_command import overlap
from rlsparse.errors import ConfigError, RlsparseError, RlsparseWarning

if TYPE_CHECKING:
    from pipelines.pair_plan import PairPlan
    from pipelines.plan import Plan
    from rlsparse.study import PairStudy

app = typer.Typer(
    help="How reinforcement learning changes the weights of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
mlflow_app = typer.Typer(help="MLflow as a projection of the files.", no_args_is_help=True)
app.add_typer(mlflow_app, name="mlflow")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", show_default=False)]
StorageUrl = Annotated[str, typer.Option(help="Folder or URL under which studies lie.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="k=v", help="Change a value of the study.")
]
AllowMissing = Annotated[
    bool,
    typer.Option("--allow-missing", help="Judge claims although trials of theirs are missing."),
]


def main() -> None:
    """Entry point: our own errors and warnings become one clear line, errors exit code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _one_line(warnings.showwarning)
    try:
        app()
    except RlsparseError as error:
        print(f"rlsparse: {error}", file=sys.stderr)
        raise SystemExit(1) from error


@app.command()
def run(
    study: StudyFile,
    storage: StorageUrl = "runs",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: Ray on this machine.")
    ] = None,
    overrides: Overrides = None,
    only: Annotated[
        str | None,
        typer.Option(help="Run just this trial (id or prefix), and those that its mask is of."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, time and bytes; write nothing.")
    ] = False,
    allow_missing: AllowMissing = False,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Add to trials of other versions or hardware.")
    ] = False,
    allow_oversize: Annotated[
        bool,
        typer.Option("--allow-oversize", help="Run trials that by estimate do not fit in memory."),
    ] = False,
) -> None:
    """Run a study, all stages. Give the command again to resume: only what is left runs."""
    from rlsparse.study import PairStudy
    from rlsparse.study_file import load_study

    loaded = load_study(study, overrides or [])
    if isinstance(loaded, PairStudy):
        if only or dry_run:
            raise ConfigError(f"{study} is of runs made elsewhere: no --only and no --dry-run")
        _run_pairs(loaded, storage, address, allow_missing=allow_missing)
        return
    from pipelines.capacity import check_engines
    from pipelines.plan import make_plan
    from pipelines.subnetworks import check_mask_files

    plan = make_plan(loaded, storage, only)
    check_engines(plan)
    for note in check_mask_files(plan):
        print(note, file=sys.stdout if dry_run else sys.stderr)
    if dry_run:
        from pipelines.dry_run import print_dry_run

        print_dry_run(plan)
        return
    from pipelines.study import interrupted_says_how_to_resume, run_study

    errors = Console(stderr=True)
    with interrupted_says_how_to_resume(errors):
        tables = run_study(
            plan,
            console=errors,
            command=shlex.join(["rlsparse", *sys.argv[1:]]),
            address=address,
            only=only,
            allow_missing=allow_missing,
            allow_mixed=allow_mixed,
            allow_oversize=allow_oversize,
        )
    if only is None:
        from pipelines import terminal

        terminal.print_results(plan.study, tables)
        terminal.print_places(_places(plan))
    _say_missing(plan, only or "", allow_missing=allow_missing)


def _run_pairs(
    study: "PairStudy", storage: str, address: str | None, *, allow_missing: bool
) -> None:
    """``run`` for a study of runs made elsewhere."""
    from pipelines import terminal
    from pipelines.pair_plan import make_pair_plan
    from pipelines.pair_study import run_pair_study
    from pipelines.study import interrupted_says_how_to_resume

    plan = make_pair_plan(study, storage)
    errors = Console(stderr=True)
    with interrupted_says_how_to_resume(errors):
        tables = run_pair_study(
            plan,
            console=errors,
            command=shlex.join(["rlsparse", *sys.argv[1:]]),
            address=address,
            allow_missing=allow_missing,
        )
    terminal.print_results(study, tables)
    folder = terminal.relative(plan.storage.url)
    terminal.print_places(
        {"tables": f"{folder}/tables", "report": f"xdg-open {folder}/report/index.html"}
    )
    _say_missing(plan, allow_missing=allow_missing)


def _say_missing(plan: "Plan | PairPlan", prefix: str = "", *, allow_missing: bool) -> None:
    """Name the trials, of those whose id begins with ``prefix``, that are not there."""
    entries = plan.entries()
    wanted = [trial for trial in plan.trials if trial.trial_id.startswith(prefix)]
    missing = [trial for trial in wanted if entries[trial.trial_id].status != "finished"]
    for trial in missing:
        entry = entries[trial.trial_id]
        Console(stderr=True).print(
            f"{entry.status}: {trial.label} ({trial.trial_id}): {entry.error or 'not run'}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if missing and not allow_missing:
        raise SystemExit(1)


@app.command()
def status(
    study: Annotated[str, typer.Argument(metavar="STUDY.yaml|DIR", show_default=False)],
    storage: StorageUrl = "runs",
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what is done, running, failed and left, and why trials failed."""
    from pipelines.saves import Saves

    plan = _plan_of(study, storage, overrides)
    at_work = plan.storage.is_locked()
    rows: list[dict[str, Any]] = []
    for trial in plan.trials:
        entry = plan.ledger.get(trial.trial_id)
        saved_step = max(Saves(plan.storage, trial.trial_id).steps(), default=None)
        has_begun = entry.status == "running" or saved_step is not None
        rows.append(
            {
                "trial_id": trial.trial_id,
                "label": trial.label,
                # Whoever ran it is gone; the next run goes on with it.
                "status": "interrupted"
                if has_begun and entry.status in ("running", "planned") and not at_work
                else entry.status,
                "attempts": entry.attempts,
                "error": entry.error,
                "saved_step": saved_step,
            }
        )
    names = ("finished", "running", "interrupted", "failed", "planned")
    counts = {name: sum(row["status"] == name for row in rows) for name in names}
    if as_json:
        print(json.dumps({"study": plan.study.name, "counts": counts, "trials": rows}, indent=1))
        return
    print(
        f"{plan.study.name}: {counts['finished']}/{len(rows)} done, {counts['running']} running, "
        f"{counts['failed']} failed, {counts['planned'] + counts['interrupted']} left"
    )
    for row in rows:
        if row["status"] != "finished":
            saved = f"saved at step {row['saved_step']}" if row["saved_step"] else ""
            more = ", ".join(filter(None, [row["error"], saved]))
            print(f"  {row['status']:11} {row['trial_id']} {row['label']} {more}".rstrip())


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="DIR", show_default=False)],
    json_path: Annotated[
        str | None, typer.Option("--json", help="Also write report.json here; - prints it alone.")
    ] = None,
    allow_missing: AllowMissing = False,
    link: Annotated[
        list[float] | None,
        typer.Option(
            metavar="GBIT_S",
            min=0.001,
            max=1e6,
            show_default="1, 10, 100",
            help="Link to inference servers, for the pauses of weight syncs; may be repeated.",
        ),
    ] = None,
) -> None:
    """Judge a study again and rebuild its report, from its study.json and tables alone."""
    from pipelines import terminal
    from pipelines.aggregate import rebuild
    from pipelines.storage import Storage

    storage = Storage(folder)
    links = {"links": link} if link else {}
    study, tables = rebuild(storage, allow_missing=allow_missing, **links)
    if json_path is not None:
        write_json(json_path, storage.read_bytes("report/report.json").decode().rstrip())
    if json_path == "-":
        return
    terminal.print_results(study, tables)
    place = terminal.relative(storage.url)
    terminal.print_places({"report": f"xdg-open {place}/report/index.html"})


app.command()(diff)
app.command()(overlap)
app.add_typer(mask_command.app, name="mask")
app.add_typer(patch_command.app, name="patch")
app.add_typer(preset_command.app, name="preset")


@app.command("make-base")
def make_base(
    out: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
) -> None:
    """Pretrain the tiny base model that ships with the project again (about two minutes)."""
    from rlsparse.pretrain import PretrainConfig, pretrain

    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new folder")
    errors = Console(stderr=True)
    score = pretrain(
        PretrainConfig(),
        out,
        lambda step, loss: errors.print(f"step {step}: loss {loss:.3f}", highlight=False),
    )
    print(
        f"{out}: {score.num_correct:.0f} of {score.num_problems} held-out problems right (greedy)"
    )


@mlflow_app.command("sync")
def mlflow_sync(folder: Annotated[str, typer.Argument(metavar="DIR", show_default=False)]) -> None:
    """Bring MLflow up to date with the files of a study; may be repeated."""
    from pipelines.plan import Plan
    from pipelines.tracking import Tracker, tracking_uri

    plan = _plan_of(folder, "")
    if not isinstance(plan, Plan):
        raise ConfigError(f"{folder} is of runs made elsewhere, which are not in MLflow")
    Tracker(plan).sync_all()
    print(f"{plan.study.name} is in {tracking_uri(plan)}")


def _one_line(standard: Callable[..., None]) -> Callable[..., None]:
    """Shows our own warnings without the place in the code; all others as ever."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, RlsparseWarning):
            print(f"rlsparse: {message}", file=sys.stderr)
        else:
            standard(message, category, *where)

    return show


# --- helpers of the commands -----------------------------------------------------------------


def _plan_of(place: str, storage: str, overrides: list[str] | None = None) -> "Plan | PairPlan":
    """The plan of a study file, or of the folder of a study that has run, with its own inputs."""
    from pipelines import record
    from pipelines.pair_plan import load_pair_plan, make_pair_plan
    from pipelines.plan import Inputs, make_plan
    from pipelines.storage import Storage
    from rlsparse.study import PairStudy, Study
    from rlsparse.study_file import load_study

    if place.endswith((".yaml", ".yml")):
        loaded = load_study(place, overrides or [])
        if isinstance(loaded, PairStudy):
            return make_pair_plan(loaded, storage)
        return make_plan(loaded, storage)
    folder = Storage(place)
    study, content = record.read(folder)
    if not isinstance(study, Study):
        return load_pair_plan(folder)
    try:
        inputs = Inputs.from_record(content.get("inputs") or {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{place}/study.json is damaged or of another release; run the study file again"
        ) from error
    return make_plan(study, folder.url.rstrip("/").rpartition("/")[0], inputs=inputs)


def _places(plan: "Plan") -> dict[str, str]:
    """Where the results of a study are: what to type to look at them."""
    from pipelines.terminal import relative
    from pipelines.tracking import tracking_uri

    folder, uri = relative(plan.storage.url), tracking_uri(plan)
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{relative(uri.removeprefix('sqlite:///'))}"
    mlflow = relative(str(Path(sys.executable).parent / "mlflow"))
    return {
        "tables": f"{folder}/tables",
        "report": f"xdg-open {folder}/report/index.html",
        "MLflow": f"{mlflow} ui --workers 1 --backend-store-uri {uri}",
    }
