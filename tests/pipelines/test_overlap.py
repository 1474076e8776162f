"""The distributed overlap gives the tables of the serial one, on real Ray."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from command import StudyRun
from planted import Tensor, random_tensor, write_folder
from planted_masks import a_run

from pipelines import overlap
from pipelines.ledger import Ledger
from pipelines.overlap import MeasuredRun, measured_runs, run
from pipelines.plan import Plan, make_plan
from pipelines.storage import Storage
from pipelines.table_files import write_table
from rlsparse import tables
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.claim_config import AboveNullClaim, At
from rlsparse.deltas import measure_patch
from rlsparse.errors import TableError
from rlsparse.models import TINY
from rlsparse.overlap import count_masks, overlaps
from rlsparse.overlap.comparison import compare
from rlsparse.overlap.consensus import consensus
from rlsparse.patch import PATCH_FILE, TensorPair, write_patch
from rlsparse.patch.side import open_side
from rlsparse.study import Study, StudyBase

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

SHAPES = {
    "model.embed_tokens.weight": (2**16 + 8, 64),  # two chunks
    "model.layers.0.self_attn.q_proj.weight": (20, 16),
    "model.norm.weight": (70,),
}
VIEWS = ("stored", "fp8_e4m3")
STUDY = StudyBase(
    name="study",
    question="?",
    views=("fp8_e4m3",),
    claims=(
        AboveNullClaim(id="early", kind="above_null", at=At(step=3)),
        AboveNullClaim(id="one", kind="above_null", tensor="model.norm.weight"),
    ),
)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="rls")  # not tmp_path: paths of sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray sets it, for all later tests
        try:
            ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False,
                     logging_level="critical")  # fmt: skip
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def measured(folder: Path, storage: Storage, planned: list[MeasuredRun]) -> list[MeasuredRun]:
    """Runs with a patch per snapshot, and their masks in the storage."""
    rng = np.random.default_rng(planned[0].seed)
    shapes = [one for one in SHAPES.items() if planned[0].base == "one" or "embed" not in one[0]]
    weights = {name: random_tensor(rng, "bf16", shape) for name, shape in shapes}
    base = Checkpoint.open(write_folder(folder / planned[0].base, weights))
    whole = fingerprint(base)
    return [_measured(one, base, whole, weights, folder, storage, rng) for one in planned]


def _measured(
    one: MeasuredRun,
    base: Checkpoint,
    whole: str,
    weights: dict[str, Tensor],
    folder: Path,
    storage: Storage,
    rng: np.random.Generator,
) -> MeasuredRun:
    rows, after = [], {}
    for step in one.steps:
        place = folder / "trials" / one.trial_id / f"step-{step}" / PATCH_FILE
        place.parent.mkdir(parents=True)
        pairs = []
        for name, tensor in weights.items():
            num_moved = round(0.004 * step * tensor.bits.size) + 9
            places = rng.integers(0, tensor.bits.size, num_moved)
            after_bits = tensor.bits.copy()
            after_bits[places] += rng.integers(1, 20, num_moved).astype(np.uint16)
            pairs.append(TensorPair(name, "bf16", tensor.shape, tensor.bits, after_bits))
        patch = write_patch(place, pairs, base_fingerprint=whole)
        rows += measure_patch(
            base, patch, base_fingerprint=whole, trial_id=one.trial_id, step=step, views=VIEWS,
            kind="snapshot",
        )[1]  # fmt: skip
        after[step] = str(place)
    write_table(storage, tables.from_rows(rows, "masks"), "masks", one.trial_id)
    return replace(one, base=whole, source=str(base.path), after=after)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, list[MeasuredRun]]:
    """Four runs of one base and two of another."""
    folder = tmp_path_factory.mktemp("runs")
    storage = Storage(str(folder))
    mine = [
        a_run("r0", 0, base="one", steps=(3, 9)), a_run("r1", 1, base="one", steps=(3, 9)),
        a_run("s2", 2, base="one", role="surrogate", control="random_reward"),
        a_run("r2", 2, base="one"),
    ]  # fmt: skip
    other = [a_run("o1", 1, base="other"), a_run("o2", 2, base="other")]
    return storage, [*measured(folder, storage, mine), *measured(folder, storage, other)]


def serial(storage: Storage, runs: list[MeasuredRun]) -> tuple[list, list]:
    """The rows of one base, without Ray."""
    base = Checkpoint.open(runs[0].source)
    after = {one.trial_id: open_side(one.after[9], base)[0] for one in runs}
    masks = tables.read(Path(storage.path("tables/masks.parquet")), "masks")
    found: tuple[list, list] = [], []
    for view in VIEWS:
        totals = count_masks(compare(STUDY, runs, view), masks, base, after)
        found[0].extend(overlaps(totals).to_pylist())
        found[1].extend(consensus(totals).to_pylist())
    return found


def test_tables_equal_the_serial_reference(
    session: None, study: tuple[Storage, list[MeasuredRun]]
) -> None:
    storage, runs = study
    together, agreeing = run(storage, STUDY, runs)
    assert together.schema.equals(tables.SCHEMAS["overlaps"], check_metadata=True)
    assert agreeing.schema.equals(tables.SCHEMAS["consensus"], check_metadata=True)
    bases = [runs[:4], runs[4:]]
    parts = [serial(storage, same) for same in sorted(bases, key=lambda same: same[0].base)]
    assert together.to_pylist() == [row for rows, _ in parts for row in rows]
    assert agreeing.to_pylist() == [row for _, rows in parts for row in rows]
    frame = together.to_pandas()
    sides = [frame[side].str.startswith("o") for side in ("trial_a", "trial_b")]
    assert (sides[0] == sides[1]).all()
    assert sides[0].any()
    assert set(frame["view"]) == set(VIEWS)
    # The surrogate, of another seed, gives the sizes of updates where it can.
    chosen = frame.groupby(["trial_a", "trial_b"])["update_size_of"].first()
    assert chosen["r0", "r1"] == "s2"
    assert chosen["r0", "r2"] == "r1"
    assert agreeing.num_rows == 2 * (4 * 4 + 3 * 3)  # views, of each base modules and k


def test_a_study_has_the_tables_of_the_serial_reference(study_run: StudyRun) -> None:
    plan = study_run.plan
    runs = measured_runs(plan)
    base = Checkpoint.open(TINY)
    comparison = compare(plan.study, runs, "stored")
    of_trial = {one.trial_id: one for one in runs}
    after = {trial: open_side(of_trial[trial].after[2], base)[0] for trial in comparison.references}
    masks = tables.read(study_run.folder / "tables" / "masks.parquet", "masks")
    totals = count_masks(comparison, masks, base, after)
    for name, expected in (("overlaps", overlaps(totals)), ("consensus", consensus(totals))):
        found = tables.read(study_run.folder / "tables" / f"{name}.parquet", name)
        assert found.equals(expected)
        assert found.num_rows > 20


def test_missing_masks_are_told_in_one_line(
    session: None, study: tuple[Storage, list[MeasuredRun]]
) -> None:
    storage, runs = study
    longer = replace(runs[0], steps=(3, 6, 9))
    with pytest.raises(TableError, match=r"^trial r0 step 6 has no mask of .*; run the diff stage"):
        run(storage, STUDY, [longer, *runs[1:4]])


def test_nothing_to_compare_needs_no_ray(tmp_path: Path) -> None:
    alone = [a_run("a", 0), a_run("b", 0, base="other")]
    for table, name in zip(
        run(Storage(str(tmp_path)), STUDY, alone), ("overlaps", "consensus"), strict=True
    ):
        assert table.equals(tables.SCHEMAS[name].empty_table())


def test_a_patch_behind_a_url_is_copied_once(tmp_path: Path) -> None:
    (tmp_path / PATCH_FILE).write_bytes(b"weights")
    url = f"file://{tmp_path}/{PATCH_FILE}"
    place = overlap._local(url)
    assert Path(place).read_bytes() == b"weights"
    assert Path(place).parent != tmp_path
    assert overlap._local(url) == place
    assert overlap._local("s3://bucket/folder") == "s3://bucket/folder"
    assert overlap._local(str(tmp_path / PATCH_FILE)) == str(tmp_path / PATCH_FILE)


def test_measured_runs_are_the_finished_trials(tmp_path: Path, monkeypatch) -> None:
    fields = {
        "name": "study",
        "question": "?",
        "baseline": {
            "algorithm": {"name": "grpo"},
            "train": {"num_steps": 4},
            "probe": {"snapshots": [2]},
        },
        "seeds": [0, 1],
        "controls": ["same_seed", "random_reward"],
    }
    plan = make_plan(Study.model_validate(fields), str(tmp_path))
    assert measured_runs(plan) == []
    assert isinstance(plan.ledger, Ledger)
    monkeypatch.setattr(Plan, "finished", lambda self: list(self.trials))
    runs = measured_runs(plan)
    about = [(one.algorithm, one.seed, one.replicate, one.role, one.control) for one in runs]
    assert about == [
        ("grpo", 0, 0, "baseline", None), ("grpo", 1, 0, "baseline", None),
        ("grpo", 0, 1, "control", "same_seed"), ("grpo", 0, 0, "surrogate", "random_reward"),
        ("grpo", 1, 0, "surrogate", "random_reward"),
    ]  # fmt: skip
    first = runs[0]
    assert (first.source, first.num_steps, first.steps) == ("tiny", 4, (2, 4))
    assert first.base == plan.base(plan.trials[0]).fingerprint
    name = f"trials/{first.trial_id}/snapshots/step-000002/{PATCH_FILE}"
    assert first.after[2] == str(tmp_path / "study" / name)
