"""What a receiver refuses, and that it stays as it was; parts of several workers."""

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
import xxhash
from synced import adam, held, same, served, tiny, train_step
from together import run_together, send_parts

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.models import TINY
from rlsparse.patch import Patch, apply_patch, new_patch, verify_patch
from rlsparse.patch.make import make_patch
from rlsparse.patch.squash import squash
from rlsparse.tensor_file import save_checkpoint
from rlsparse.weight_sync.anchors import AnchorPart, write_anchor
from rlsparse.weight_sync.rebuild import rebuild
from rlsparse.weight_sync.receiver import PatchReceiver
from rlsparse.weight_sync.versions import Notes, VersionFolder
from rlsparse.weight_sync.writer import PatchWriter

NUM_VERSIONS = 4


class Sent:
    """A folder with anchors 0 and 3 and versions to 4, and what was served at each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        model = tiny()
        optimizer, self.seen = adam(model), [served(model)]
        writer = PatchWriter(model, path, anchor_every=3, settings_from=TINY)
        for step in range(NUM_VERSIONS):
            train_step(model, optimizer, step)
            writer.emit()
            self.seen.append(served(model))

    def file(self, version: int) -> Path:
        return VersionFolder(self.path).patch_file(version)


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> Sent:
    return Sent(tmp_path_factory.mktemp("sent"))


@pytest.fixture
def pair_patch(tmp_path) -> Path:
    """A patch that is of no version."""
    pair = planted.make_pair(tmp_path)
    path = tmp_path / "pair.patch.safetensors"
    make_patch(Checkpoint.open(pair.before), Checkpoint.open(pair.after), path)
    return path


def refused(receiver: PatchReceiver, files, match: str) -> None:
    """It is, and nothing has changed."""
    before, version = held(receiver), receiver.version
    with pytest.raises(PatchError, match=match):
        receiver.apply(files)
    assert same(held(receiver), before)
    assert receiver.version == version


def test_versions_are_applied_once_and_in_order(sent):
    receiver = PatchReceiver.open(sent.path, 0)
    refused(receiver, sent.file(2), "starts from version 1, here is 0: apply version 1 first, or")
    refused(receiver, sent.file(4), r"apply version 1 to 3 first, or resynchronise from anchor 3$")
    assert receiver.apply(sent.file(1))
    assert same(held(receiver), sent.seen[1])
    assert not receiver.apply(sent.file(1))
    assert same(held(receiver), sent.seen[1])
    assert receiver.follow() == NUM_VERSIONS
    assert not receiver.apply(sent.file(2))
    assert same(held(receiver), sent.seen[NUM_VERSIONS])
    assert receiver.follow() == NUM_VERSIONS
    receiver.resynchronise(version=0)
    assert same(held(receiver), sent.seen[0])
    receiver.resynchronise()
    assert (receiver.version, same(held(receiver), sent.seen[3])) == (3, True)


def test_versions_squashed_into_one_lead_from_the_first_to_the_last(sent, tmp_path):
    path = tmp_path / "p.patch.safetensors"
    squash([Patch.open(sent.file(version)) for version in (2, 3, 4)], path)
    receiver = PatchReceiver.open(sent.path, 0)
    refused(receiver, path, "starts from version 1, here is 0")
    receiver.apply(sent.file(1))
    assert receiver.apply(path)
    assert (receiver.version, same(held(receiver), sent.seen[4])) == (4, True)


def test_another_run_is_refused(sent, tmp_path):
    other = Sent(tmp_path)
    receiver = PatchReceiver.open(sent.path, 0)
    refused(receiver, other.file(1), "is of run .*, the weights here of .*: resynchronise from")
    receiver.apply(sent.file(1))
    refused(receiver, other.file(1), "is of run ")


def test_from_a_checkpoint_that_is_here_already(sent, tmp_path):
    receiver = PatchReceiver.from_checkpoint(TINY, sent.path)
    assert receiver.follow() == NUM_VERSIONS
    assert same(held(receiver), sent.seen[NUM_VERSIONS])
    shapes = {name: tensor.shape for name, tensor in receiver.tensors.items()}
    other = {name: ("bf16", shapes[name], bits) for name, bits in sent.seen[1].items()}
    save_checkpoint(tmp_path / "other", other)
    refused(
        PatchReceiver.from_checkpoint(tmp_path / "other"), sent.file(1), "starts from other weights"
    )
    with pytest.raises(PatchError, match="give it one as `folder`"):
        PatchReceiver.from_checkpoint(TINY).follow()
    wide = {n: ("fp32", shapes[n], b.astype(np.uint32) << 16) for n, b in sent.seen[0].items()}
    save_checkpoint(tmp_path / "wide", wide)
    refused(
        PatchReceiver.from_checkpoint(tmp_path / "wide"), sent.file(1), r"as bf16 .*, here is fp32"
    )


def test_a_damaged_patch_is_refused_and_nothing_is_changed(sent, tmp_path):
    receiver, content = PatchReceiver.open(sent.path, 0), sent.file(1).read_bytes()
    for place in np.linspace(0, len(content) - 1, 40).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        file = tmp_path / sent.file(1).name
        file.write_bytes(damaged)
        refused(receiver, file, "damaged|not a readable patch|not a patch|is a patch of format")
    (tmp_path / "short").write_bytes(content[:-9])
    refused(receiver, tmp_path / "short", "truncated")
    assert receiver.apply(sent.file(1))
    assert same(held(receiver), sent.seen[1])


def test_what_is_no_version_is_refused(sent, tmp_path, pair_patch):
    receiver = PatchReceiver.open(sent.path, 0)
    refused(receiver, pair_patch, "does not say which version it is of")
    with pytest.raises(CheckpointError, match="there is no folder"):
        PatchReceiver.open(tmp_path / "none")
    with pytest.raises(PatchError, match=r"no whole anchor in .*; the first appears when"):
        PatchReceiver.open(tmp_path)
    with pytest.raises(PatchError, match=r"no whole anchor 1 in .*; anchors there: 0, 3$"):
        PatchReceiver.open(sent.path, 1)
    VersionFolder(tmp_path).anchor(0).mkdir()
    VersionFolder(tmp_path).anchor_file(0).write_bytes(b"no anchor, whatever it is called")
    with pytest.raises(PatchError, match="is no anchor, or damaged"):
        PatchReceiver.open(tmp_path)


def test_a_damaged_anchor_is_refused_and_what_is_here_stays(sent, tmp_path):
    content = bytearray(VersionFolder(sent.path).anchor_file(3).read_bytes())
    content[-1] ^= 1
    VersionFolder(tmp_path).anchor(3).mkdir()
    VersionFolder(tmp_path).anchor_file(3).write_bytes(content)
    receiver = PatchReceiver.from_checkpoint(TINY, tmp_path)
    with pytest.raises(PatchError, match="has another checksum"):
        receiver.follow()
    assert same(held(receiver), sent.seen[0])


def test_every_damaged_byte_of_what_an_anchor_says_is_noticed(tmp_path):
    """Its version, run and formats, too, of which the weights know nothing."""
    bits = np.arange(16, dtype=np.uint32)
    digest = xxhash.xxh3_128_hexdigest(bits.tobytes())
    file, part = (
        VersionFolder(tmp_path).anchor_file(0),
        AnchorPart("fp32", (4, 4), (0, 16), digest, iter([bits])),
    )
    write_anchor(file, Notes(0, 0, "run", (1, 1)), {"w": part}, None)
    content = file.read_bytes()
    for place in range(len(content)):
        for flip in (1, 15, 16):  # F32 becomes I32 by the second
            damaged = bytearray(content)
            damaged[place] ^= flip
            file.write_bytes(damaged)
            with pytest.raises(PatchError):
                PatchReceiver.open(tmp_path)


def write_parts(folder: Path, parts: list[tuple[int, int]], dtypes: list[str]) -> None:
    """Workers' files of anchor 0, of a tensor of which each has all bits as its number."""
    for number, (region, dtype) in enumerate(zip(parts, dtypes, strict=True), 1):
        bits = np.full(region[1] - region[0], number, np.uint16)
        digest = xxhash.xxh3_128_hexdigest(bits.tobytes())
        notes = Notes(0, 0, "run", (number, len(parts)))
        part = AnchorPart(dtype, (10, 10), region, digest, iter([bits]))
        file = VersionFolder(folder).anchor_file(0, notes.part)
        write_anchor(file, notes, {"w": part}, None)


def test_parts_of_an_anchor_that_are_no_whole_are_refused(tmp_path):
    write_parts(tmp_path, [(0, 60), (60, 100), (100, 100), (100, 100)], ["bf16"] * 4)
    assert PatchReceiver.open(tmp_path).tensors["w"].bits.tolist() == [1] * 60 + [2] * 40
    for parts in ([(0, 100), (0, 100)], [(0, 60), (50, 100)], [(0, 60), (60, 90)]):
        shutil.rmtree(VersionFolder(tmp_path).anchor(0))
        write_parts(tmp_path, parts, ["bf16"] * 2)
        with pytest.raises(PatchError, match="give the files of all workers"):
            PatchReceiver.open(tmp_path)
    write_parts(tmp_path, [(0, 60), (60, 100)], ["bf16", "fp16"])
    with pytest.raises(PatchError, match="its parts say that w is of several shapes or formats"):
        PatchReceiver.open(tmp_path)


def test_files_under_the_names_of_others_are_refused(sent, tmp_path):
    """A patch of the version before, taken again and again, would never end."""
    shutil.copy(sent.file(1), tmp_path / sent.file(1).name)
    shutil.copy(sent.file(1), tmp_path / sent.file(2).name)
    receiver = PatchReceiver.from_checkpoint(TINY, tmp_path)
    with pytest.raises(PatchError, match=r"version-000002.* has version 1, not the one of its nam"):
        receiver.follow()
    assert (receiver.version, same(held(receiver), sent.seen[1])) == (1, True)
    shutil.copytree(VersionFolder(sent.path).anchor(0), VersionFolder(tmp_path).anchor(7))
    with pytest.raises(PatchError, match=r"anchor-000007 has version 0, not the one of its name"):
        receiver.resynchronise()
    assert (receiver.version, same(held(receiver), sent.seen[1])) == (1, True)


def test_files_that_were_swapped_are_told_by_their_names(sent, tmp_path):
    """Not as versions that are missing, which are all there."""
    for version, other in ((1, 2), (2, 1), (3, 3)):
        shutil.copy(sent.file(version), tmp_path / sent.file(other).name)
    receiver = PatchReceiver.from_checkpoint(TINY, tmp_path)
    with pytest.raises(PatchError, match=r"version-000001.* has version 2, not the one of its nam"):
        receiver.follow()
    assert (receiver.version, same(held(receiver), sent.seen[0])) == (0, True)


def test_paths_may_be_text(sent, tmp_path):
    receiver = PatchReceiver.open(str(sent.path), 0)
    assert receiver.apply(str(sent.file(1)))
    assert receiver.apply([str(sent.file(2))])
    receiver.save(str(tmp_path / "out"))
    assert same(stored(tmp_path / "out"), sent.seen[2])
    again = PatchReceiver(receiver.tensors, version=2, settings_from=str(TINY))
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").exists()


def stored(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read_bits(name).ravel() for name in checkpoint.tensors}


@pytest.mark.parametrize("version", [0, 2, 3, 4, None])
def test_the_checkpoint_of_any_version(sent, tmp_path, version):
    reached = rebuild(str(sent.path), str(tmp_path / "out"), version)
    assert reached == (NUM_VERSIONS if version is None else version)
    assert same(stored(tmp_path / "out"), sent.seen[reached])
    assert (tmp_path / "out" / "config.json").read_bytes() == (TINY / "config.json").read_bytes()


def test_a_version_that_cannot_be_rebuilt(sent, tmp_path):
    out = tmp_path / "out"
    for version in (5, -1):
        with pytest.raises(PatchError, match=rf"has no way to version {version}; give one from 0"):
            rebuild(sent.path, out, version)
    late = shutil.copytree(sent.path, tmp_path / "late")
    shutil.rmtree(VersionFolder(late).anchor(0))
    with pytest.raises(PatchError, match=r"has no way to version 2; give one from 3 to 4$"):
        rebuild(late, out, 2)
    shutil.rmtree(VersionFolder(late).anchor(3))
    with pytest.raises(PatchError, match="no whole anchor to begin at; give the folder that a Pat"):
        rebuild(late, out)
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    with pytest.raises(PatchError, match="not an empty folder"):
        rebuild(sent.path, out)


def test_what_cannot_be_called_is_refused_before_anything_is_done(sent):
    receiver = PatchReceiver.open(sent.path, 0)
    for attempt in (receiver.follow, receiver.hand_out, receiver.resynchronise):
        with pytest.raises(PatchError, match=r"on_change is 3; give a function"):
            attempt(3)
    with pytest.raises(PatchError, match="on_change is"):
        receiver.apply(sent.file(1), {"w": 1})
    refused(receiver, [], "no patch is given")
    assert (receiver.version, same(held(receiver), sent.seen[0])) == (0, True)


def test_memory_that_fails_is_noticed_and_ends_in_an_anchor(sent):
    """A bit of the copy flips, of which the checksum is known already."""
    receiver = PatchReceiver.open(sent.path, 0)
    name = max(receiver.tensors, key=lambda name: receiver.tensors[name].bits.size)
    receiver.tensors[name].bits[5] ^= 1
    with pytest.raises(PatchError, match=f"the result of .* in {name} has another checksum"):
        receiver.apply(sent.file(1))
    for attempt in (lambda: receiver.apply(sent.file(1)), receiver.follow):
        with pytest.raises(PatchError, match="in an unknown state: resynchronise from anchor 3"):
            attempt()
    with pytest.raises(PatchError, match="of no version"):
        receiver.save(sent.path / "never")
    receiver.resynchronise(version=0)
    assert receiver.follow() == NUM_VERSIONS
    assert same(held(receiver), sent.seen[NUM_VERSIONS])


def test_what_changed_is_handed_out_once_it_is_checked(sent):
    receiver = PatchReceiver.open(sent.path, 0)
    places: dict[str, list[np.ndarray]] = defaultdict(list)

    def note(name, positions, bits) -> None:
        assert np.array_equal(bits, sent.seen[1][name][positions])
        places[name].append(positions)

    receiver.apply(sent.file(1), note)
    for name, before in sent.seen[0].items():
        expected = np.flatnonzero(before != sent.seen[1][name])
        assert np.array_equal(np.concatenate([*places[name], np.empty(0, np.int64)]), expected)
    with pytest.raises(RuntimeError, match="engine"):
        receiver.apply(sent.file(2), lambda *_: (_ for _ in ()).throw(RuntimeError("engine")))
    with pytest.raises(PatchError, match="unknown state"):
        receiver.apply(sent.file(2))


def test_what_was_cleaned_away_without_an_anchor_is_missing(sent, tmp_path):
    for version in (1, 3):
        (tmp_path / sent.file(version).name).write_bytes(sent.file(version).read_bytes())
    receiver = PatchReceiver.from_checkpoint(TINY, tmp_path)
    with pytest.raises(PatchError, match=r"apply version 2 first, or begin again at an anchor"):
        receiver.follow()
    assert receiver.version == 1


def test_what_is_cleaned_away_while_it_is_looked_for(sent, tmp_path, monkeypatch):
    shutil.copytree(sent.path, tmp_path / "sync")
    receiver, opening = PatchReceiver.open(tmp_path / "sync", 0), Patch.open

    def opened(file) -> Patch:
        VersionFolder(tmp_path / "sync").clean(1)
        return opening(file)

    monkeypatch.setattr(Patch, "open", opened)
    assert receiver.follow() == NUM_VERSIONS
    assert same(held(receiver), sent.seen[NUM_VERSIONS])


def test_versions_are_patches_like_any_other(sent, tmp_path):
    apply_patch(TINY, sent.file(1), tmp_path / "after")
    verify_patch(Checkpoint.open(TINY), Patch.open(sent.file(1)))
    with pytest.raises(PatchError, match="belongs to another base"):
        verify_patch(Checkpoint.open(TINY), Patch.open(sent.file(2)))
    receiver = PatchReceiver.from_checkpoint(tmp_path / "after", sent.path, version=1)
    assert receiver.follow() == NUM_VERSIONS


class Planted:
    """Patches of one tensor, whole and in any parts, each of which adds one to all its bits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bits = np.arange(100, dtype=np.uint16)
        save_checkpoint(folder / "base", {"w": ("bf16", (10, 10), self.bits)})

    def version(self, number: int, *parts: tuple[int, int]) -> list[Path]:
        files = []
        for own, (start, stop) in enumerate(parts, 1):
            notes = Notes(number, number - 1, "planted", (own, len(parts)))
            files.append(VersionFolder(self.folder).patch_file(number, notes.part))
            with new_patch(files[-1], base_fingerprint="", metadata=notes.metadata()) as builder:
                tensor = builder.tensor("w", "bf16", (10, 10), (start, stop))
                tensor.compare(self.bits[start:stop], self.bits[start:stop] + np.uint16(1))
                tensor.close()
        return files


def test_workers_may_become_more_or_fewer(tmp_path):
    planted = Planted(tmp_path)
    receiver = PatchReceiver.from_checkpoint(tmp_path / "base")
    for number, parts in enumerate([[(0, 100)], [(0, 30), (30, 100)], [(0, 50), (50, 100)]] * 2, 1):
        assert receiver.apply(planted.version(number, *parts))
        planted.bits += np.uint16(1)
        assert same(held(receiver), {"w": planted.bits})


@pytest.mark.parametrize("parts", [[(0, 30), (40, 100)], [(0, 60), (40, 100)], [(0, 30), (30, 99)]])
def test_parts_that_are_no_whole_are_refused(tmp_path, parts):
    files = Planted(tmp_path).version(1, *parts)
    receiver = PatchReceiver.from_checkpoint(tmp_path / "base")
    refused(receiver, files, "give the files of all workers")


# --- parts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """What two workers sent that held parts of the weights; one failed once to write its part."""
    folder = tmp_path_factory.mktemp("parts")
    run_together(send_parts, folder)
    return folder


def test_parts_of_workers_make_a_whole(parts):
    seen = torch.load(parts / "seen.pt", weights_only=False)
    receiver = PatchReceiver.open(parts / "sync", 0)
    assert same(held(receiver), seen[0])
    for version in (1, 2, 3):
        assert receiver.follow(until=version) == version
        assert same(held(receiver), seen[version])
    assert same(held(PatchReceiver.open(parts / "sync")), seen[2])
    receiver.save(parts / "saved")
    whole = PatchReceiver.from_checkpoint(parts / "saved")
    assert same(held(whole), seen[3])


def test_a_failure_of_one_worker_is_one_of_all(parts):
    for rank in range(2):
        assert "version 2 cannot be written" in (parts / f"said-{rank}.txt").read_text()


def test_parts_are_applied_together_alone(parts):
    files = VersionFolder(parts / "sync").patches()[1]
    assert [file.name for file in files] == [
        f"version-000001.part-{number}-of-2.patch.safetensors" for number in (1, 2)
    ]
    receiver = PatchReceiver.open(parts / "sync", 0)
    refused(receiver, files[:1], "version 1 has 2 parts, given are .*: give each of them once")
    refused(receiver, [files[0]] * 2, "give each of them once")
    assert receiver.apply(files[::-1])
    own = Patch.open(files[1])
    assert any(tensor.part and tensor.part[0] > 0 for tensor in own.tensors.values())


def test_parts_fit_a_checkpoint_that_is_here_already(parts):
    seen = torch.load(parts / "seen.pt", weights_only=False)
    receiver = PatchReceiver.from_checkpoint(TINY, parts / "sync")
    assert receiver.follow() == 3
    assert same(held(receiver), seen[3])


def test_parts_that_are_not_all_there_are_no_version(parts, tmp_path):
    for files in VersionFolder(parts / "sync").patches().values():
        for file in files:
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "version-000003.part-2-of-2.patch.safetensors").unlink()
    receiver = PatchReceiver.from_checkpoint(TINY, tmp_path)
    assert receiver.follow() == 2


def test_split_otherwise_is_refused(parts):
    assert "needs Shard(0)" in (parts / "columns.txt").read_text()
