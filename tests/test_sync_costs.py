"""What syncs of a trained trial would have taken; counts are held against those of training."""

import shutil
from pathlib import Path

import pytest

from rlsparse import sync_costs, tables
from rlsparse.checkpoint import Checkpoint
from rlsparse.definitions import SYNC_INTERVAL
from rlsparse.errors import PatchError
from rlsparse.models import TINY
from rlsparse.patch import Patch
from rlsparse.sync_costs import WAYS, sync_rows
from rlsparse.tables import STEP_PATCHES
from rlsparse.weight_sync.receiver import PatchReceiver
from rlsparse.weight_sync.versions import VersionFolder

NUM_STEPS = 9


@pytest.fixture(scope="module")
def kept(trained, tiny_trial, base):
    """A trial that kept its steps, and counted what windows of 2 and 4 changed."""
    probe = {"step_patches": True, "k_steps": [2, 4], "score_snapshots": False}
    return trained(tiny_trial(probe=probe, num_steps=NUM_STEPS, learning_rate=1e-5), base)


@pytest.fixture(scope="module")
def rows(kept, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    found = [*costs(kept.folder / STEP_PATCHES, scratch)]
    assert not [*scratch.iterdir()]
    return found


def costs(folder: Path, scratch: Path):
    return sync_rows(
        Checkpoint.open(TINY), folder, num_steps=NUM_STEPS, dtype="bf16", scratch=scratch
    )


def test_every_window_is_sent_and_some_in_all_ways(rows):
    found = {(row["k"], row["step_before"], row["step_after"]) for row in rows}
    assert found == {
        (k, stop - k, stop) for k in (1, 2, 4, 8) for stop in range(k, NUM_STEPS + 1, k)
    }
    for k in (1, 2, 4, 8):
        ends = {row["step_after"] for row in rows if row["k"] == k and row["way"] == "dense_zstd"}
        assert ends == {k, SYNC_INTERVAL}
    tables.from_rows([{"trial_id": "t", "host": "h"} | row for row in rows], "syncs")


def test_changes_are_those_that_training_counted(kept, rows):
    read = tables.read(kept.folder / "steps.parquet", "steps").to_pylist()
    steps = {row["step"]: row for row in read}
    for row in rows:
        if row["way"] in sync_costs.PATCHES and row["k"] in (1, 2, 4):
            unchanged = steps[row["step_after"]][f"update_sparsity_k{row['k']}"]
            assert row["num_changed"] == round((1 - unchanged) * row["num_elements"]) > 0


def test_sizes_are_those_of_the_files(kept, rows):
    by = {(row["k"], row["step_after"], row["way"]): row for row in rows}
    folder = VersionFolder(kept.folder / STEP_PATCHES)
    for step in range(1, NUM_STEPS + 1):
        own = Patch.open(folder.patch_file(step))
        assert by[1, step, "relative"]["num_changed"] == own.num_changed
        # Notes and fingerprints are of other lengths.
        assert by[1, step, "relative"]["size_bytes"] == pytest.approx(own.size_bytes, abs=200)
    dense = 2 * sum(info.num_elements for info in Checkpoint.open(TINY).counted)
    for k in (1, 2, 4, 8):
        sizes = {way: by[k, 8, way]["size_bytes"] for way in WAYS}
        assert sizes["relative"] < sizes["absolute"] < sizes["indices"] < sizes["dense"] == dense
        assert sizes["dense_zstd"] < dense
        assert sizes["indices"] > 6 * by[k, 8, "indices"]["num_changed"]
    assert all(row["encode_s"] > 0 and row["apply_s"] > 0 for row in rows)


def test_a_receiver_follows_the_steps_of_a_trial_from_its_base(kept):
    receiver = PatchReceiver.from_checkpoint(TINY, kept.folder / STEP_PATCHES)
    assert receiver.follow() == NUM_STEPS
    last = Patch.open(kept.folder / f"snapshots/step-{NUM_STEPS:06d}/weights.patch.safetensors")
    for name, tensor in receiver.tensors.items():
        assert tensor.checksum((0, tensor.bits.size)) == last.tensors[name].xxh3_after


def test_a_missing_or_damaged_step_is_told(kept, tmp_path):
    folder = tmp_path / STEP_PATCHES
    shutil.copytree(kept.folder / STEP_PATCHES, folder)
    file = VersionFolder(folder).patch_file(NUM_STEPS)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(PatchError, match=r"version-000009.*damaged"):
        [*costs(folder, tmp_path)]
    file.unlink()
    with pytest.raises(PatchError, match=r"lacks the patch of step 9$"):
        [*costs(folder, tmp_path)]
    VersionFolder(folder).patch_file(3).unlink()
    with pytest.raises(PatchError, match=r"lacks the patch of step 3$"):
        [*costs(folder, tmp_path)]
