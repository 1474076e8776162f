"""A study in two phases: full trials, then others under masks of what these changed."""

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command, run_study, wait_until
from rich.console import Console
from safetensors.torch import load_file, save_file

from pipelines import study as running
from pipelines import sweep
from pipelines.dry_run import print_dry_run
from pipelines.overlap import measured_runs
from pipelines.plan import Plan, load_base, make_plan
from pipelines.storage import Storage
from pipelines.subnetworks import check_mask_files, load_subnetwork
from pipelines.sweep import _spec, phases, run_trial, run_trials
from rlsparse import masks, tables
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.deltas import measure_patch
from rlsparse.errors import CheckpointError, ConfigError, PatchError, StorageError
from rlsparse.identity import canonical_json
from rlsparse.kernels import popcount
from rlsparse.mask_making import changed
from rlsparse.models import TINY
from rlsparse.overlap import count_masks, overlaps
from rlsparse.overlap.comparison import compare
from rlsparse.overlap.consensus import consensus
from rlsparse.patch import PATCH_FILE, Patch
from rlsparse.patch.side import open_side
from rlsparse.study import Study, Trial
from rlsparse.study_file import load_study
from rlsparse.tables import EVER_CHANGED, SUBNETWORK, snapshot_folder

TEXT = """
question: Is the mask of one trial that of another?
baseline:
  task: {num_train_problems: 16, num_eval_problems: 16}
  algorithm: {name: sft}
  train: {num_steps: 2, batch_size: 8, learning_rate: 1.0e-4}
  probe: {snapshots: [1], score_snapshots: false}
  keep_checkpoints: true
factors:
  train.mask: [null, {from: baseline}, {like: {from: baseline}}]
seeds: [0, 1]
"""
BASE = Checkpoint.open(TINY)
TIED = ("model.embed_tokens.weight", "lm_head.weight")


def plan_of(tmp_path: Path, **train_mask: Any) -> Plan:
    file = tmp_path / "two.yaml"
    file.write_text(TEXT)
    overrides = [f"{key}={value}" for key, value in train_mask.items()]
    return make_plan(load_study(file, overrides), str(tmp_path / "runs"))


def trials(plan: Plan, label: str) -> list[Trial]:
    return [trial for trial in plan.trials if trial.cell["train.mask"] == label]


def bits(file: Path) -> dict[str, np.ndarray]:
    """Masks as booleans."""
    found = masks.read_masks(file)
    return {n: masks.unpack(found.packed(n), int(np.prod(s))) for n, s in found.shapes.items()}


def moved(folder: Path) -> dict[str, np.ndarray]:
    """What differs between the base and the checkpoint that a trial left."""
    before = load_file(TINY / "model.safetensors")
    after = load_file(folder / "checkpoint" / "model.safetensors")
    return {n: before[n].ne(w).flatten().numpy() for n, w in after.items()}


class Listener:
    """Notes how trials end."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def ended(self, trial_id: str) -> None:
        self.ids.append(trial_id)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Trials run here, without Ray; gives their labels by phase."""
    seen: list[list[str]] = []

    def run_phase(plan: Plan, ready: Sequence[Trial], listener: Any, memory_bytes: int) -> None:
        seen.append([trial.label for trial in ready])
        for trial in ready:
            run_trial(_spec(plan, trial))
            listener.ended(trial.trial_id)

    monkeypatch.setattr(sweep, "_run_phase", run_phase)
    return seen


# --- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_local", [True, False])
def test_a_mask_is_read_from_the_storage_of_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    takes = "{from: baseline}, {from: baseline, take: ever_changed}"
    first = "{from: baseline, take: snapshot, step: 1}"
    plan = plan_of(tmp_path, **{"factors.train.mask": f"[null, {takes}, {first}]", "seeds": "[0]"})
    (source,) = trials(plan, "null")
    folder = Path(plan.storage.path(f"trials/{source.trial_id}"))
    base = load_base(source.config.model)
    with pytest.raises(StorageError, match=f"of trial {source.trial_id}, which is not done"):
        load_subnetwork(plan.trials[1].config, plan.trials[1].origins, plan.storage, base)
    run_trial(_spec(plan, source))
    assert not (folder / SUBNETWORK).exists()
    monkeypatch.setattr(Storage, "is_local", is_local)
    storage = Storage(f"file://{plan.storage.url}")

    def found(label: str) -> str:
        (trial,) = trials(plan, label)
        mask = load_subnetwork(trial.config, trial.origins, storage, base)
        assert mask is not None
        told = {"kind": label.partition("(")[0], "source": f"trial {source.trial_id}"}
        assert told.items() <= mask.metadata.items()
        assert mask.metadata.get("step") == {"final": "2", "snapshot(step=1)": "1"}.get(label)
        assert mask.base_fingerprint == base.fingerprint
        return mask.fingerprint

    for label, step in (("final", 2), ("snapshot(step=1)", 1)):
        own = changed(base.path, folder / snapshot_folder(step) / PATCH_FILE)
        assert found(label) == masks.fingerprint(masks.bits_of(own))
    ever = masks.bits_of(masks.read_masks(folder / EVER_CHANGED))
    assert found("ever_changed") == masks.fingerprint(ever)
    assert len({found(level) for level in ("final", "snapshot(step=1)", "ever_changed")}) == 3
    assert load_subnetwork(source.config, (), storage, base) is None

    remedy = f"; delete .*/trials/{source.trial_id} and run the study again: that trial runs again$"
    for label, name, error in (
        ("final", f"{snapshot_folder(2)}/{PATCH_FILE}", PatchError),
        ("ever_changed", EVER_CHANGED, CheckpointError),
    ):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(error, match=f"{name} is damaged.*{remedy}" if is_local else remedy):
            found(label)


def test_a_mask_file_is_of_the_identity_of_a_trial(tmp_path: Path) -> None:
    ones = {i.name: (i.shape, np.full(-(-i.num_elements // 8), 1, np.uint8)) for i in BASE.counted}
    twos = {name: (shape, packed * 2) for name, (shape, packed) in ones.items()}

    def planned(name: str, content: Any) -> Plan:
        masks.write_masks(tmp_path / name, content, fingerprint(BASE))
        level = f"[null, {{file: {tmp_path / name}}}]"
        return plan_of(tmp_path, **{"factors.train.mask": level, "seeds": "[0]"})

    one, again, other = planned("a", ones), planned("b", ones), planned("c", twos)
    assert one.trials[1].trial_id == again.trials[1].trial_id != other.trials[1].trial_id
    assert one.trials[1].needs == ()
    spec = _spec(one, one.trials[1])
    masks.write_masks(tmp_path / "a", twos, fingerprint(BASE))
    run_trial(spec)  # the file is another one by now
    entry = one.ledger.get(one.trials[1].trial_id)
    assert entry.status == "failed"
    assert "the study was planned with" in str(entry.error)


def test_mask_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "own.mask.safetensors"
    given = {i.name: (i.shape, np.full(-(-i.num_elements // 8), 1, np.uint8)) for i in BASE.counted}
    plain = f"{{file: {file}}}"

    def found(level: str, of: str = fingerprint(BASE), **changes: Any) -> list[str]:
        content = {name: pair for name, pair in (given | changes).items() if pair is not None}
        masks.write_masks(file, content, of)
        return check_mask_files(plan_of(tmp_path, **{"factors.train.mask": f"[null, {level}]"}))

    assert found(plain) == []
    assert found(plain, of="") == []  # of several bases
    note = (
        f"mask {file} is of the base {'f' * 12}, trials start from {fingerprint(BASE)[:12]} (tiny)"
    )
    mixed = f"{{union: [{plain}, {{like: {{from: baseline}}}}]}}"
    assert found(plain, "f" * 64) == found(mixed, "f" * 64) == [note]
    first, second = list(given)[:2]
    bits = given[first][1]
    other = {first: None, second: ((1, 9), np.ones(2, np.uint8)), "more": ((8 * bits.size,), bits)}
    shown = rf"it lacks {first}, {second} is \[1, 9\], not \[.*\], only it has more; give"
    with pytest.raises(ConfigError, match=rf"mask=.*: mask {file} is of .* the base tiny: {shown}"):
        found(plain, **other)
    with pytest.raises(ConfigError, match=f"mask {file} has no weight in it"):
        found(plain, **{name: (shape, packed * 0) for name, (shape, packed) in given.items()})
    with pytest.raises(ConfigError, match=r"is of the base ffffffffffff, .*give the checkpoint be"):
        found(f"{{like: {plain}, pick: low_magnitude}}", "f" * 64)


def test_mask_files_are_checked_against_every_base(tmp_path: Path) -> None:
    file, other = tmp_path / "own.mask.safetensors", tmp_path / "other"
    given = {i.name: (i.shape, np.full(-(-i.num_elements // 8), 1, np.uint8)) for i in BASE.counted}
    masks.write_masks(file, given, fingerprint(BASE))
    shutil.copytree(TINY, other)
    weights, embedding, head = load_file(TINY / "model.safetensors"), *TIED
    weights["model.norm.weight"] += 1
    save_file({**weights, head: weights[embedding].clone()}, other / "model.safetensors")
    own = fingerprint(Checkpoint.open(other))
    for sources in (f"[{other}, tiny]", f"[tiny, {other}]"):
        levels = {"factors.train.mask": f"[{{file: {file}}}]", "factors.model.source": sources}
        (note,) = check_mask_files(plan_of(tmp_path, **levels))
        assert note.endswith(f"trials start from {own[:12]} ({other})")
    masks.write_masks(file, {**given, head: given[embedding]}, own)
    levels = {"factors.train.mask": f"[{{file: {file}}}]", "factors.model.source": f"[{other}]"}
    assert check_mask_files(plan_of(tmp_path, **levels)) == []


# --- phases ----------------------------------------------------------------------------------


def test_trials_follow_those_that_their_masks_are_of(
    tmp_path: Path, in_process: list[list[str]]
) -> None:
    plan, listener = plan_of(tmp_path), Listener()
    run_trials(plan, [*reversed(plan.trials)], listener)  # type: ignore[arg-type]
    assert [len(phase) for phase in in_process] == [2, 4]
    assert all("mask=null" in label for label in in_process[0])
    assert {entry.status for entry in plan.entries().values()} == {"finished"}
    cells = [trials(plan, label) for label in ("null", "final", "random(final)")]
    for full, sub, like in zip(*cells, strict=True):
        places = [Path(plan.storage.path(f"trials/{t.trial_id}")) for t in (full, sub, like)]
        found = moved(places[0])
        inside, drawn = bits(places[1] / SUBNETWORK), bits(places[2] / SUBNETWORK)
        made_of = [masks.read_masks(place / SUBNETWORK).metadata for place in places[1:]]
        assert made_of[0]["kind"] == made_of[1]["source"] == "final"
        assert made_of[0]["source"] == f"trial {full.trial_id}"
        assert (made_of[1]["kind"], made_of[1]["seed"]) == ("random", str(like.config.seed))
        for name, differs in found.items():
            assert np.array_equal(inside[name], differs)
            assert drawn[name].sum() == differs.sum()
        for place, mask in zip(places[1:], (inside, drawn), strict=True):
            after = moved(place)
            assert not any((after[name] & ~mask[name]).any() for name in mask)
            assert any(differs.any() for differs in after.values())


def test_overlaps_are_of_the_full_trials_alone(tmp_path: Path, in_process: list[list[str]]) -> None:
    """Both seeds under one file of few weights share most of what they change."""
    few = {i.name: (i.shape, np.full(-(-i.num_elements // 8), 1, np.uint8)) for i in BASE.counted}
    masks.write_masks(tmp_path / "few", few, fingerprint(BASE))
    plan = plan_of(tmp_path, **{"factors.train.mask": f"[null, {{file: {tmp_path / 'few'}}}]"})
    run_trials(plan, plan.trials, Listener())  # type: ignore[arg-type]
    runs, rows = measured_runs(plan), []
    for one, step in ((run, step) for run in runs for step in run.steps):
        rows += measure_patch(
            BASE, Patch.open(Path(one.after[step])), base_fingerprint=one.base,
            trial_id=one.trial_id, step=step, views=("stored",), kind="snapshot",
        )[1]  # fmt: skip
    after = {one.trial_id: open_side(one.after[2], BASE)[0] for one in runs}
    comparison = compare(plan.study, runs, "stored")
    totals = count_masks(comparison, tables.from_rows(rows, "masks"), BASE, after)
    full, masked = ({t.trial_id for t in plan.trials if (t.config.train.mask is None) == is_full}
                    for is_full in (True, False))  # fmt: skip
    pairs = {(row["trial_a"], row["trial_b"]) for row in overlaps(totals).to_pylist()}
    assert {frozenset(pair) for pair in pairs} == {
        frozenset(full), *(frozenset({trial}) for trial in full | masked)
    }  # fmt: skip
    cells = {row["cell"] for row in consensus(totals).to_pylist()}
    assert cells == {canonical_json({"train.mask": "null"})}


def test_a_trial_whose_source_failed_is_a_failed_row_that_names_it(
    tmp_path: Path, in_process: list[list[str]]
) -> None:
    """At a temperature at which all samples of a prompt are alike, dpo finds no pair."""
    dpo = "algorithm={name: dpo, temperature: 1.0e-4, num_samples_per_prompt: 2}"
    file = tmp_path / "two.yaml"
    file.write_text(TEXT)
    plan = make_plan(load_study(file, [dpo, "seeds=[0]"]), str(tmp_path / "runs"))
    listener = Listener()
    run_trials(plan, plan.trials, listener)  # type: ignore[arg-type]
    (source,) = trials(plan, "null")
    assert in_process == [[source.label]]
    assert listener.ids == [trial.trial_id for trial in plan.trials]
    for trial in plan.trials[1:]:
        entry = plan.ledger.get(trial.trial_id)
        assert (entry.status, entry.attempts) == ("failed", 0)
        assert entry.error is not None
        assert entry.error.startswith(
            f"TrialError: not run, its mask is of trial {source.label} ({source.trial_id}), which "
            "is failed: TrialError: dpo found no pair"
        )


def test_the_plan_shows_both_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, seeds="[0]")
    print_dry_run(plan)
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("  then, under masks of these (memory as if they were of all weights):")
    assert "train.mask=null" in lines[place - 1]
    assert "train.mask=final" in lines[place + 1]
    assert "train.mask=random(final)" in lines[place + 2]
    assert [len(phase) for phase in phases(plan.trials)] == [1, 2]
    assert [len(phase) for phase in phases(plan.trials[1:])] == [2]


def test_one_trial_alone_brings_what_its_mask_is_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path)
    (_, wanted), (_, source) = trials(plan, "random(final)"), trials(plan, "null")
    console = Console(width=200)
    todo = running._with_sources(plan, [wanted], plan.entries(), console)
    assert todo == [source, wanted]
    assert f"{source.label} ({source.trial_id}) runs first" in capsys.readouterr().out
    plan.ledger.finish(source.trial_id)
    assert running._with_sources(plan, [wanted], plan.entries(), console) == [wanted]
    every = [*plan.trials]
    assert running._with_sources(plan, every, plan.entries(), console) == every


# --- through the command ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_that_is_killed_between_its_phases_goes_on(tmp_path: Path) -> None:
    command = Command(tmp_path)
    try:
        plan = make_plan(load(tmp_path), str(tmp_path / "runs"))
        (first, second), (_, wanted) = trials(plan, "null"), trials(plan, "random(final)")
        only = run_study(command, TEXT, "--only", wanted.trial_id)
        assert only.result.returncode == 0, only.result.stderr
        done = {trial.trial_id for trial in plan.finished()}
        assert done == {second.trial_id, wanted.trial_id}
        driver = command.start("run", only.yaml, "--storage", only.storage)

        def is_between() -> bool:
            assert driver.poll() is None, driver.communicate()
            return plan.storage.is_done(f"trials/{first.trial_id}")

        wait_until(is_between, 300)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        wait_until(lambda: not command.processes(), 60)
        assert len(plan.finished()) < len(plan.trials)
        again = run_study(command, TEXT)
        assert again.result.returncode == 0, again.result.stderr
        assert len(plan.finished()) == len(plan.trials)
        assert [plan.ledger.get(t.trial_id).attempts for t in (first, second, wanted)] == [1, 1, 1]
        rows = tables.read(again.folder / "tables" / "trials.parquet", "trials").to_pylist()
        for row, trial in zip(rows, plan.trials, strict=True):
            assert row["factor.train.mask"] == trial.cell["train.mask"]
            if not trial.needs:
                assert row["mask_density"] is None
                continue
            folder, (needed,) = again.folder / "trials", trial.needs
            source = moved(folder / needed)
            mask = masks.read_masks(folder / trial.trial_id / SUBNETWORK)
            counts = {name: popcount(mask.packed(name)) for name in mask.shapes}
            assert counts == {name: differs.sum() for name, differs in source.items()}
            assert row["num_in_mask"] == sum(counts.values())
            after, inside = moved(folder / trial.trial_id), bits(mask.path)
            assert not any((after[name] & ~inside[name]).any() for name in inside)
        compared = tables.read(again.folder / "tables" / "overlaps.parquet", "overlaps")
        pairs = {frozenset((row["trial_a"], row["trial_b"])) for row in compared.to_pylist()}
        assert {pair for pair in pairs if len(pair) > 1} == {
            frozenset({first.trial_id, second.trial_id})
        }
        agreed = tables.read(again.folder / "tables" / "agreement.parquet", "agreement").to_pylist()
        relations = {row["trial_id"]: row["relation"] for row in agreed}
        assert relations == {t.trial_id: "subnetwork" if t.needs else "other seed"
                             for t in plan.trials}  # fmt: skip
        page = (again.folder / "report" / "index.html").read_text()
        assert 'id="subnetworks"' in page
        assert "Trials under a mask are left out" in page
    finally:
        command.close()


def load(folder: Path) -> Study:
    file = folder / "study.yaml"
    file.write_text(TEXT)
    found = load_study(file)
    assert isinstance(found, Study)
    return found
