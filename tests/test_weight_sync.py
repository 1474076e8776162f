"""A trainer that sends its weights: what arrives is what it serves, bit for bit, always."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from synced import adam, bits_of, held, num_different, same, served, tiny, train_step
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import ConfigError, PatchError, RlsparseWarning, StorageError
from rlsparse.models import TINY
from rlsparse.patch import Patch
from rlsparse.weight_sync import live
from rlsparse.weight_sync.callback import PatchWriterCallback
from rlsparse.weight_sync.receiver import PatchReceiver
from rlsparse.weight_sync.scatter import scatter
from rlsparse.weight_sync.versions import VersionFolder
from rlsparse.weight_sync.writer import PatchWriter

CPU = torch.device("cpu")


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
@pytest.mark.parametrize("coding", ["relative", "absolute"])
def test_a_receiver_has_what_is_served_after_every_version(tmp_path, precision, coding):
    model = tiny(precision)
    optimizer, start = adam(model), served(model)
    writer = PatchWriter(model, tmp_path, coding=coding)
    receiver, seen = PatchReceiver.open(tmp_path), [served(model)]
    assert same(held(receiver), start)
    for step in range(3):
        train_step(model, optimizer, step)
        emission = writer.emit()
        assert receiver.follow() == emission.version == writer.version == step + 1
        seen.append(served(model))
        assert same(held(receiver), seen[-1])
        assert 0 < emission.num_changed == num_different(*seen[-2:])
        file = VersionFolder(tmp_path).patch_file(step + 1)
        assert emission.size_bytes == file.stat().st_size
        assert emission.compare_s > 0 < emission.encode_s
    assert writer.emissions[-1] == emission


def test_fp32_masters_are_compared_as_they_are_served(tmp_path):
    """A step moves nearly all of them, and few of the weights that are served."""
    model = tiny()
    before = served(model, torch.float32)
    writer = PatchWriter(model, tmp_path)
    train_step(model, adam(model, 1e-6), 0)
    emission = writer.emit()
    moved = num_different(before, served(model, torch.float32))
    assert emission.num_changed < 0.1 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_formats_are_served(tmp_path, dtype):
    model = tiny()
    writer = PatchWriter(model, tmp_path, dtype=dtype)
    train_step(model, adam(model), 0)
    writer.emit()
    receiver = PatchReceiver.open(tmp_path)
    receiver.follow()
    assert same(held(receiver), served(model, dtype))


def test_hooked_to_an_optimizer_every_third_step_and_the_rest_at_the_end(tmp_path):
    """What several steps changed is sent together; what came back to its bits is not."""
    model = tiny()
    optimizer, start = adam(model), served(model)
    writer = PatchWriter(model, tmp_path, every=3)
    hook = writer.attach(optimizer)
    after = []
    for step in range(5):
        train_step(model, optimizer, step)
        after.append(served(model))
    writer.close()
    hook.remove()
    train_step(model, optimizer, 5)
    writer.close()
    assert [(one.version, one.step) for one in writer.emissions] == [(1, 3), (2, 5)]
    assert [one.num_changed for one in writer.emissions] == [
        num_different(start, after[2]),
        num_different(after[2], after[4]),
    ]
    steps = [start, *after[:3]]
    touched = {n: sum((a[n] != b[n]) for a, b in itertools.pairwise(steps)) for n in start}
    last = {n: after[2][n] != after[1][n] for n in start}
    sent = {n: after[2][n] != start[n] for n in start}
    assert any((sent[n] & ~last[n]).any() for n in start)  # the last step's changes are too few
    assert any(((touched[n] > 0) & ~sent[n]).any() for n in start)  # the union of all too many
    receiver = PatchReceiver.open(tmp_path)
    assert receiver.follow(until=1) == 1
    assert same(held(receiver), after[2])
    assert receiver.follow() == 2
    assert same(held(receiver), after[4])
    assert Patch.open(tmp_path / "version-000002.patch.safetensors").metadata["step"] == "5"


def test_signs_of_zero_and_payloads_of_nan_are_sent(tmp_path):
    model = torch.nn.Linear(8, 8, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.zero_()
    writer = PatchWriter(model, tmp_path)
    bits = model.weight.detach().view(-1).view(torch.int16)
    bits[3], bits[5] = -0x8000, 0x7FC1
    assert writer.emit().num_changed == 2
    bits[5] = 0x7FC2
    assert writer.emit().num_changed == 1
    receiver = PatchReceiver.open(tmp_path)
    receiver.follow()
    assert same(held(receiver), {"weight": bits_of(model.weight)})


def test_nothing_changed_is_a_version_too(tmp_path):
    model = tiny()
    writer = PatchWriter(model, tmp_path)
    assert writer.emit().num_changed == 0
    receiver = PatchReceiver.open(tmp_path)
    assert receiver.follow() == 1
    assert same(held(receiver), served(model))


def test_tied_weights_are_sent_once_and_the_checkpoint_loads(tmp_path):
    model = tiny()
    assert model.config.tie_word_embeddings
    writer = PatchWriter(model, tmp_path / "sync", anchor_every=1, settings_from=TINY)
    train_step(model, adam(model), 0)
    writer.emit()
    receiver = PatchReceiver.open(tmp_path / "sync", version=0)
    receiver.follow()
    receiver.save(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "sync" / "anchor-000001"):
        assert same(
            {n: i.read() for n, i in Checkpoint.open(folder).tensors.items()}, served(model)
        )
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert same(served(loaded), served(model))
    with pytest.raises(PatchError, match="not an empty folder"):
        receiver.save(tmp_path / "saved")


def test_an_engine_follows_in_place(tmp_path):
    model, engine = tiny(), tiny("bf16")
    optimizer = adam(model)
    with torch.no_grad():
        for weight in engine.parameters():
            weight.zero_()
    places = {name: weight.data_ptr() for name, weight in engine.named_parameters()}
    writer = PatchWriter(model, tmp_path)
    receiver, weights = PatchReceiver.open(tmp_path), scatter(dict(engine.named_parameters()))
    receiver.hand_out(weights)
    assert same(served(engine), served(model))
    for step in range(2):
        train_step(model, optimizer, step)
        writer.emit()
        receiver.follow(weights)
        assert same(served(engine), served(model))
    assert places == {name: weight.data_ptr() for name, weight in engine.named_parameters()}
    for wrong in ({}, {n: w.float() for n, w in engine.named_parameters()}):
        with pytest.raises(PatchError, match="all weights under the names, in the format"):
            receiver.hand_out(scatter(wrong))


def test_another_engine_is_refused_before_any_weight_is_written(tmp_path):
    """Of another format of the same size, another shape, without a name, or in another order."""
    model, engine = tiny(), tiny("bf16")
    PatchWriter(model, tmp_path)
    receiver, own = PatchReceiver.open(tmp_path), dict(engine.named_parameters())
    last, (rows, columns) = "model.norm.weight", own["model.embed_tokens.weight"].shape
    embed = "model.embed_tokens.weight"
    wrongs = [
        own | {last: own[last].to(torch.float16)},
        own | {embed: torch.zeros(rows + 8, columns + 32, dtype=torch.bfloat16)},
        own | {embed: own[embed].detach().flatten()},
        own | {embed: torch.zeros(columns, rows, dtype=torch.bfloat16).T},
        {name: weight for name, weight in own.items() if name != last},
    ]
    for wrong in wrongs:
        before = {name: bits_of(weight) for name, weight in wrong.items()}
        for use in (receiver.hand_out, receiver.follow):
            PatchWriter(model, tmp_path)  # another run: its anchor is to be taken
            with pytest.raises(PatchError, match="give all weights under the names"):
                use(scatter(wrong))
        assert same({name: bits_of(weight) for name, weight in wrong.items()}, before)
    assert receiver.version == 0  # so that the right engine gets what was refused by the wrong ones


def test_nothing_is_sent_after_the_end(tmp_path):
    model = tiny()
    optimizer, writer = adam(model), PatchWriter(model, tmp_path)
    writer.attach(optimizer)
    train_step(model, optimizer, 0)
    writer.close()
    train_step(model, optimizer, 1)
    assert sorted(VersionFolder(tmp_path).patches()) == [1]
    for use in (writer.step, writer.emit):
        with pytest.raises(ConfigError, match=r"closed; make a new one"):
            use()
    writer.close()


def test_a_run_that_was_overtaken_writes_no_more(tmp_path):
    """Of a job that still runs beside its successor."""
    model = tiny()
    optimizer, old = adam(model), PatchWriter(model, tmp_path)
    receiver = PatchReceiver.open(tmp_path)
    new = PatchWriter(model, tmp_path)
    train_step(model, optimizer, 0)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    with pytest.raises(StorageError, match=r"version 1 cannot be written: another run has written"):
        old.emit()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == before
    new.emit()
    assert receiver.follow() == 2
    assert same(held(receiver), served(model))


def test_a_new_run_in_a_folder_that_was_emptied_is_taken(tmp_path):
    model = tiny()
    optimizer, old = adam(model), PatchWriter(model, tmp_path / "sync")
    receiver = PatchReceiver.open(tmp_path / "sync")
    train_step(model, optimizer, 0)
    old.emit()
    assert receiver.follow() == 1
    shutil.rmtree(tmp_path / "sync")
    train_step(model, optimizer, 1)
    PatchWriter(model, tmp_path / "sync")
    assert receiver.follow() == 0
    assert same(held(receiver), served(model))


def test_a_trainer_ends_although_the_last_version_cannot_be_written(tmp_path, monkeypatch):
    model = tiny()
    callback = PatchWriterCallback(tmp_path)
    callback.on_train_begin(None, None, None, model=model)
    train_step(model, adam(model), 0)
    monkeypatch.setattr(callback.writer, "_sent_step", -1)

    def fail(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(callback.writer, "_write_patch", fail)
    with pytest.warns(RlsparseWarning, match=r"lacks the last changes: version 1 .*No space"):
        callback.on_train_end(None, None, None)


def test_a_trainer_sends_by_callback(tmp_path):
    """TRL's own trainer, on bf16 weights; the last step is sent at the end."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    seen = []

    class Recording(PatchWriterCallback):
        def on_step_end(self, args, state, control, model, **rest) -> None:
            super().on_step_end(args, state, control, **rest)
            seen.append(served(model))

    callback = Recording(tmp_path / "sync", every=2, anchor_every=1)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2,
        learning_rate=1e-4, lr_scheduler_type="constant", report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=None,
        activation_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny("bf16"),
        arguments,
        train_dataset=Dataset.from_list([{"text": f"1 + {i} = {i + 1}"} for i in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        callbacks=[callback],
    )
    trainer.train()
    assert [(one.version, one.step) for one in callback.writer.emissions] == [(1, 2), (2, 3)]
    receiver = PatchReceiver.open(tmp_path / "sync", version=0)
    for version, step in ((1, 2), (2, 3)):
        receiver.follow(until=version)
        assert same(held(receiver), seen[step - 1])
    assert same(held(PatchReceiver.open(tmp_path / "sync")), seen[-1])


# --- what goes wrong -------------------------------------------------------------------------


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are compared by torch and kept twice, as those on a GPU are."""
    monkeypatch.setattr(live, "is_on_host", lambda weights: False)


def full(monkeypatch: pytest.MonkeyPatch, is_hit: Callable[[str], bool]) -> None:
    """The disk is full for files of some names: writing them through ends in an error."""
    real = os.replace

    def replace(source, target) -> None:
        if is_hit(str(target)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("path", ["host", "device"])
def test_the_next_version_has_the_changes_of_one_that_could_not_be_written(
    tmp_path, monkeypatch, path
):
    if path == "device":
        as_on_a_device(monkeypatch)
    model = tiny()
    optimizer, start = adam(model), served(model)
    writer = PatchWriter(model, tmp_path)
    with monkeypatch.context() as patching:
        full(patching, lambda name: "version" in name)
        train_step(model, optimizer, 0)
        with pytest.raises(StorageError, match=r"version 1 cannot be written: .*No space left"):
            writer.emit()
        train_step(model, optimizer, 1)
        writer.step()
        with (
            pytest.warns(RlsparseWarning, match="the next one will have its changes"),
            pytest.raises(StorageError),
        ):
            writer.close()
    assert (files(tmp_path), writer.version, writer.emissions) == (["anchor-000000"], 0, [])
    train_step(model, optimizer, 2)
    writer.step()
    sent = num_different(start, served(model))
    train_step(model, optimizer, 3)
    writer.step()
    writer.close()
    assert [one.version for one in writer.emissions] == [1, 2]
    assert writer.emissions[0].num_changed == sent
    receiver = PatchReceiver.open(tmp_path)
    receiver.follow()
    assert same(held(receiver), served(model))


def test_an_anchor_that_cannot_be_written_comes_with_the_next_version(tmp_path, monkeypatch):
    model = tiny()
    optimizer = adam(model)
    writer = PatchWriter(model, tmp_path, anchor_every=2)
    with monkeypatch.context() as patching:
        full(patching, lambda name: name.endswith("model.safetensors"))
        for step in range(2):
            train_step(model, optimizer, step)
            with pytest.warns(RlsparseWarning, match="anchor 2 ") if step else nullcontext():
                writer.emit()
    assert [*VersionFolder(tmp_path).anchors()] == [0]
    assert not VersionFolder(tmp_path).anchor(2).exists()
    train_step(model, optimizer, 2)
    writer.emit()
    assert [*VersionFolder(tmp_path).anchors()] == [0, 3]
    receiver = PatchReceiver.open(tmp_path)
    assert (receiver.version, same(held(receiver), served(model))) == (3, True)


def test_a_first_anchor_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*anchor-000000"):
        PatchWriter(torch.nn.Linear(2, 2), tmp_path / "file")


def test_old_versions_are_cleaned_away(tmp_path):
    model = tiny()
    optimizer = adam(model)
    writer = PatchWriter(model, tmp_path, anchor_every=2, keep=2)
    late = PatchReceiver.open(tmp_path)
    (tmp_path / "notes.txt").touch()
    for step in range(6):
        train_step(model, optimizer, step)
        writer.emit()
    assert files(tmp_path) == [
        "anchor-000004", "anchor-000006", "notes.txt", "version-000005.patch.safetensors",
        "version-000006.patch.safetensors",
    ]  # fmt: skip
    assert late.follow() == 6
    assert same(held(late), served(model))
    early = PatchReceiver.open(tmp_path, 4)
    assert early.follow() == 6
    assert same(held(early), served(model))


def test_a_run_that_begins_again_goes_on_in_the_folder(tmp_path):
    model = tiny()
    optimizer = adam(model)
    first = PatchWriter(model, tmp_path)
    receiver, engine = PatchReceiver.open(tmp_path), tiny("bf16")
    for step in range(2):
        train_step(model, optimizer, step)
        first.emit()
    model = tiny()  # back at the start
    second = PatchWriter(model, tmp_path)
    assert second.version == 3
    train_step(model, adam(model), 5)
    second.emit()
    assert receiver.follow(scatter(dict(engine.named_parameters()))) == 4
    assert same(held(receiver), served(model))
    assert same(served(engine), served(model))


def test_arguments_out_of_range():
    model = torch.nn.Linear(2, 2)
    for name in ("every", "anchor_every", "keep"):
        with pytest.raises(ConfigError, match=f"^{name} is 0; it must be at least 1"):
            PatchWriter(model, "unused", **{name: 0})
    with pytest.raises(ConfigError, match="set anchor_every"):
        PatchWriter(model, "unused", keep=1)
    with pytest.raises(ConfigError, match=r"served are torch\.bfloat16"):
        PatchWriter(model, "unused", dtype=torch.float64)
    with pytest.raises(ConfigError, match="coding is 'relativ'; did you mean relative"):
        PatchWriter(model, "unused", coding="relativ")


def test_weights_that_became_others_are_refused(tmp_path):
    model = torch.nn.Linear(2, 3)
    writer = PatchWriter(model, str(tmp_path), settings_from=str(TINY))
    start = PatchReceiver.open(tmp_path)
    model.weight = torch.nn.Parameter(torch.zeros(3, 3))
    message = r"1 weights .* weight was \[3, 2\], is \[3, 3\]; make a new"
    for attempt in (writer.step, writer.emit):
        with pytest.raises(ConfigError, match=message):
            attempt()
    model.weight, model.more = None, torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match=r"2 weights .* more was not there, is \[1\]"):
        writer.emit()
    assert start.follow() == 0


@pytest.fixture
def alone():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_names_are_those_of_the_model_whatever_wraps_it(tmp_path, alone):
    model = tiny()
    layers = model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1] = torch.compile(layers[1])
    for number, wrapped in enumerate(
        (
            model,
            torch.compile(model),
            DistributedDataParallel(model),
            torch.compile(DistributedDataParallel(model)),
            DistributedDataParallel(torch.compile(model)),
        )
    ):
        PatchWriter(wrapped, tmp_path / str(number)).close()
        assert same(held(PatchReceiver.open(tmp_path / str(number))), served(tiny()))


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
def test_weights_that_are_held_elsewhere_are_refused(tmp_path, alone):
    model = torch.nn.Sequential(FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=CPU))
    with pytest.raises(ConfigError, match=r"held by FullyShardedDataParallel, .* fully_shard"):
        PatchWriter(model, tmp_path / "sync")
    model = torch.nn.Linear(4, 4)
    model.weight.ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(ConfigError, match="held by DeepSpeed's ZeRO stage 3"):
        PatchWriter(model, tmp_path / "sync")
    assert not (tmp_path / "sync").exists()


# --- the same where weights are on a device --------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0, 1, live.PIECE, 2 * live.PIECE + 77])
def test_torch_alone_finds_what_the_kernels_find(monkeypatch, dtype, size):
    monkeypatch.setattr(live, "_DEVICE_PIECE", 2 * live.PIECE)
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(size, generator=generator)
    after = torch.where(torch.rand(size, generator=generator) < 0.1, -before, before)
    sent = live.served(before, dtype).clone()
    on_host = [*live.find_on_host(after, dtype, live.to_host(sent).copy())]
    on_device = [*live.find_on_device(after, dtype, sent)]
    assert torch.equal(sent, live.served(after, dtype))
    for one, other in zip(on_host, on_device, strict=True):
        assert one.positions.dtype == other.positions.dtype
        assert np.array_equal(one.positions, other.positions)
        assert one.bits.dtype == other.bits.dtype
        assert np.array_equal(one.bits, other.bits)
    assert sum(one.positions.size for one in on_host) >= size // 20


def check_following(model, folder) -> None:
    optimizer, engine = adam(model), tiny("bf16").to(model.device)
    writer = PatchWriter(model, folder, anchor_every=2)
    receiver, weights = PatchReceiver.open(folder), scatter(dict(engine.named_parameters()))
    for step in range(3):
        train_step(model, optimizer, step)
        writer.emit()
        receiver.follow(weights)
        assert same(held(receiver), served(model))
        assert same(served(engine), served(model))


def test_the_path_of_a_device_sends_the_same(tmp_path, monkeypatch):
    as_on_a_device(monkeypatch)
    check_following(tiny(), tmp_path)


@pytest.mark.gpu
def test_a_model_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_following(tiny().cuda(), tmp_path)
