"""The training side: after every so many optimizer steps, what changed since what was last sent.

Weights are compared as they are served: fp32 masters are cast first, so that steps too small for
bf16 send nothing. And they are compared with what was *sent*, not with the step before: all that
happened in between is in the patch, what came back to its old bits is not, and a version that could
not be written costs nothing but time, as the next one has its changes too.

Training waits while weights are compared and what changed comes to the host. Encoding and writing
go on in a thread beside the next steps.
"""

import time
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from rlsparse import distributed
from rlsparse.errors import ConfigError, RlsparseWarning, StorageError, nearest
from rlsparse.patch import Patch, new_patch
from rlsparse.patch.values import CODINGS, Coding
from rlsparse.tensor_file import Bits
from rlsparse.weight_sync import live
from rlsparse.weight_sync.anchors import AnchorPart, Region, write_anchor
from rlsparse.weight_sync.live import PIECE, Found, Held
from rlsparse.weight_sync.versions import Notes, VersionFolder

Changed = dict[str, list[Found]]
"""Of each tensor what changed, by pieces of what the worker holds."""


_TAKEN = "another run has written this or a later one into"


@dataclass(frozen=True)
class Emission:
    """A version that was sent; of several workers, what this one did for it.

    Attributes:
        version: its number.
        step: optimizer steps that had been taken.
        num_changed: weights whose bits are others than in the version before.
        size_bytes: of the patch.
        compare_s: while training waited, for the comparison and the copy to the host.
        encode_s: in which the patch, and the anchor if one was due, were encoded and written.
    """

    version: int
    step: int
    num_changed: int
    size_bytes: int
    compare_s: float
    encode_s: float


@dataclass(frozen=True)
class _Pending:
    """A version on its way; ``done`` gives its patch, or says why it or the anchor failed."""

    notes: Notes
    changed: Changed
    emission: Emission
    writes_anchor: bool
    done: "Future[tuple[Emission, str | None, str | None]]"


class PatchWriter:
    """Sends the weights of a model, as they change, to whoever reads a folder.

    Of several workers that hold the same (DDP), the first writes. Of those that hold parts (FSDP2)
    each writes its own and nothing is gathered; all of them must call everything alike. Version 0
    is the anchor that is written here, before training; in a folder with versions of an earlier
    run, the next number. Buffers are not sent.

    Holds a copy of the weights as they are served on the host, and another beside weights that are
    on a device; besides, until the next version, 6 bytes per bf16 weight that changed.

    Args:
        model: at its weights before training, in place (moved and split). Names are those of
            ``named_parameters``, without what DDP, ``torch.compile`` and activation checkpointing
            put into them.
        folder: made if need be.
        every: steps from version to version, when ``step`` is called after each.
        dtype: the format that is served: bfloat16, float16 or float32.
        anchor_every: versions from anchor to anchor; None writes none but the first.
        keep: anchors to keep; what older ones and the patches before them take is freed. None
            keeps all.
        coding: of values in patches: ``relative`` is smaller, ``absolute`` is applied without
            reading what was there.
        settings_from: folder whose configuration and tokenizer files are copied into anchors.

    Attributes:
        version: the last one that was sent.
        emissions: all that were, apart from the first anchor.

    Raises:
        ConfigError: an argument is out of range, or weights are split or held in another way.
        StorageError: the first anchor cannot be written.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        folder: str | Path,
        *,
        every: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        anchor_every: int | None = None,
        keep: int | None = None,
        coding: Coding = "relative",
        settings_from: str | Path | None = None,
    ) -> None:
        for name, value in (("every", every), ("anchor_every", anchor_every), ("keep", keep)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if keep is not None and anchor_every is None:
            raise ConfigError(
                f"keep is {keep}, but only new anchors free old ones: set anchor_every"
            )
        if dtype not in live.DTYPES:
            raise ConfigError(f"dtype is {dtype}; served are {', '.join(map(str, live.DTYPES))}")
        if coding not in CODINGS:
            raise ConfigError(f"coding is {coding!r}; {nearest(str(coding), CODINGS)}")
        model = live.unwrapped(model)
        self.emissions: list[Emission] = []
        self._model, self._dtype, self._coding = model, dtype, coding
        self._folder = VersionFolder(Path(folder))
        self._every, self._anchor_every, self._keep = every, anchor_every, keep
        self._settings_from = None if settings_from is None else Path(settings_from)
        is_split = live.is_split(model)
        self._part = (distributed.rank() + 1, distributed.num_workers()) if is_split else (1, 1)
        self._is_idle = not is_split and distributed.rank() > 0
        self._steps = self._sent_step = 0
        self._pending: _Pending | None = None
        self._attached: list[Any] = []
        self._is_closed = False
        self._on_device: dict[str, torch.Tensor] = {}
        self.version, self._stream = 0, ""
        if not self._is_idle:
            self._begin_stream()

    # --- what training calls ---------------------------------------------------------------------

    def step(self) -> None:
        """Count an optimizer step; after every so many, send what changed.

        One that could not be written is warned of when the next is due.

        Raises:
            ConfigError: the writer was closed, or the model has other weights than at its begin.
        """
        self._check_open()
        self._steps += 1
        if self._steps % self._every == 0 and not self._is_idle:
            self._begin()

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Have ``step`` called after each step of an optimizer, until ``close``.

        Returns:
            What detaches it before.
        """
        handle = optimizer.register_step_post_hook(lambda *_: self.step())
        self._attached.append(handle)
        return handle

    def emit(self) -> Emission | None:
        """Send what changed now, and wait until it is written; None on workers that do not write.

        Raises:
            StorageError: it cannot be written; the next version will have its changes.
            ConfigError: as ``step``.
        """
        self._check_open()
        if self._is_idle:
            return None
        self._begin()
        return self._finish()

    def close(self) -> None:
        """Wait for what is being written, and send what has changed since; nothing comes after it.

        Raises:
            StorageError: as ``emit``; it is still open then.
        """
        while self._attached:
            self._attached.pop().remove()
        if self._is_closed:
            return
        self._settle()
        if self._sent_step < self._steps:
            self.emit()
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this PatchWriter was closed; make a new one to go on")

    # --- a version -------------------------------------------------------------------------------

    def _begin_stream(self) -> None:
        """Write the first anchor, from which on what was sent is remembered."""
        self._sent: dict[str, Bits] = {}
        self._regions: dict[str, tuple[tuple[int, ...], Region]] = {}
        for name, shape, start, weights in live.held(self._model):
            self._sent[name] = live.to_host(live.served(weights, self._dtype)).copy()
            self._regions[name] = shape, (start, start + weights.numel())
        error = None
        try:
            self._folder.path.mkdir(parents=True, exist_ok=True)
            first = self._folder.last() + 1
        except OSError as problem:
            first, error = 0, str(problem)
        self.version, self._stream = distributed.from_first((first, uuid.uuid4().hex[:12]))
        self._anchored = self.version
        sums = {name: xxhash.xxh3_128_hexdigest(bits.data) for name, bits in self._sent.items()}
        try:
            self._write_anchor(self._notes(self.version), sums, {})
        except OSError as problem:
            error = str(problem)
        if error := self._agreed(error):
            raise StorageError(f"cannot write {self._folder.anchor(self.version)}: {error}")

    def _notes(self, base: int) -> Notes:
        return Notes(self.version, base, self._stream, self._part)

    def _agreed(self, error: str | None) -> str | None:
        """What failed on any worker of those that write parts."""
        return distributed.first_given(error) if self._part[1] > 1 else error

    def _begin(self) -> None:
        """Compare, take what changed to the host, and have it written in a thread."""
        self._settle()
        begun = time.perf_counter()
        weights = {one.name: one for one in live.held(self._model)}
        self._check_same(weights)
        changed = {name: [*self._find(name, one.weights)] for name, one in weights.items()}
        count = sum(found.positions.size for pieces in changed.values() for found in pieces)
        compare_s = time.perf_counter() - begun
        notes = replace(self._notes(self.version), version=self.version + 1)
        emission = Emission(notes.version, self._steps, count, 0, compare_s, 0.0)
        every = self._anchor_every
        anchors = every is not None and notes.version - self._anchored >= every
        pool = ThreadPoolExecutor(1, "rlsparse-weight-sync")
        done = pool.submit(self._write, notes, changed, emission, anchors)
        pool.shutdown(wait=False)
        self._pending = _Pending(notes, changed, emission, anchors, done)

    def _check_same(self, weights: dict[str, Held]) -> None:
        """Refuse other weights than those that were sent first."""
        now = {
            name: (one.shape, (one.start, one.start + one.weights.numel()))
            for name, one in weights.items()
        }
        others = {
            name for name in now.keys() | self._regions if now.get(name) != self._regions.get(name)
        }
        if others:
            name = min(others)
            here, began = (
                str(list(known[name][0])) if name in known else "not there"
                for known in (now, self._regions)
            )
            raise ConfigError(
                f"{len(others)} weights of the model are others than when this PatchWriter was "
                f"made: {name} was {began}, is {here}; make a new one after such changes"
            )

    def _find(self, name: str, weights: torch.Tensor) -> Iterator[Found]:
        if live.is_on_host(weights):
            return live.find_on_host(weights, self._dtype, self._sent[name])
        kept = self._on_device.get(name)
        if kept is None or kept.device != weights.device:
            signed = self._sent[name].view(live.SIGNED[self._sent[name].dtype])
            kept = torch.from_numpy(signed).to(weights.device, copy=True)
            self._on_device[name] = kept
        return live.find_on_device(weights, self._dtype, kept)

    def _settle(self) -> None:
        """Take note of the version on its way; a failure is no reason to stop training."""
        try:
            self._finish()
        except StorageError as error:
            warnings.warn(str(error), RlsparseWarning, stacklevel=4)

    def _finish(self) -> Emission | None:
        """Wait for the version on its way; from now on it is what was sent, if it was written."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        on_device, self._on_device = self._on_device, {}
        emission, failed, anchor_failed = pending.done.result()
        if failed := self._agreed(failed):
            if _TAKEN not in failed:
                self._folder.drop(pending.notes.version, self._part)
            raise StorageError(
                f"version {pending.notes.version} cannot be written: {failed}; the next one will "
                "have its changes"
            )
        self._on_device = on_device
        for name, pieces in pending.changed.items():
            for number, found in enumerate(pieces):
                self._sent[name][number * PIECE :][found.positions] = found.bits
        self.version, self._sent_step = emission.version, emission.step
        self.emissions.append(emission)
        if pending.writes_anchor:
            self._note_anchor(self._agreed(anchor_failed))
        return emission

    def _note_anchor(self, failed: str | None) -> None:
        if failed:
            self._folder.drop_anchor(self.version)
            warnings.warn(
                f"anchor {self.version} cannot be written: {failed}; the next version will have "
                "one", RlsparseWarning, stacklevel=2,
            )  # fmt: skip
            return
        self._anchored = self.version
        if self._keep is not None and self._part[0] == 1:
            self._folder.clean(self._keep)

    # --- in the thread ---------------------------------------------------------------------------

    def _write(
        self, notes: Notes, changed: Changed, emission: Emission, writes_anchor: bool
    ) -> tuple[Emission, str | None, str | None]:
        """Write the patch, and the anchor where one is due; says what failed of each."""
        begun = time.perf_counter()
        file = self._folder.patch_file(notes.version, self._part)
        # Parts of this version may be there already, but of other workers alone.
        is_taken = self._folder.last() >= notes.version if self._part[1] == 1 else file.exists()
        if is_taken:
            return emission, f"{_TAKEN} {self._folder.path}", None
        try:
            patch = self._write_patch(file, notes, changed, emission.step)
        except OSError as error:
            return emission, str(error), None
        failed = None
        if writes_anchor:
            sums = {name: tensor.xxh3_after for name, tensor in patch.tensors.items()}
            try:
                anchor = replace(notes, base_version=notes.version)
                self._write_anchor(anchor, sums, changed)
            except OSError as error:
                failed = str(error)
        encode_s = time.perf_counter() - begun
        return replace(emission, size_bytes=patch.size_bytes, encode_s=encode_s), None, failed

    def _write_patch(self, file: Path, notes: Notes, changed: Changed, step: int) -> Patch:
        with new_patch(
            file,
            base_fingerprint=f"{notes.base_version:06d}-{notes.stream}",
            metadata={**notes.metadata(), "step": str(step)},
            coding=self._coding,
        ) as builder:
            for name, (shape, region) in self._regions.items():
                part = None if self._part[1] == 1 else region
                tensor = builder.tensor(name, live.DTYPES[self._dtype], shape, part)
                for (before, after), found in zip(
                    self._pieces(name, changed), changed[name], strict=True
                ):
                    tensor.add(before, after, found.positions)
                tensor.close()
        return Patch.open(file)

    def _pieces(self, name: str, changed: Changed) -> Iterator[tuple[Bits, Bits]]:
        """Pieces of what was sent, and of what will have been."""
        sent, found = self._sent[name], changed.get(name)
        for number, start in enumerate(range(0, sent.size, PIECE)):
            before = after = sent[start : start + PIECE]
            if found and found[number].positions.size:
                after = before.copy()
                after[found[number].positions] = found[number].bits
            yield before, after

    def _write_anchor(self, notes: Notes, sums: dict[str, str], changed: Changed) -> None:
        tensors = {
            name: AnchorPart(
                live.DTYPES[self._dtype], shape, region, sums[name],
                (after for _, after in self._pieces(name, changed)),
            )
            for name, (shape, region) in self._regions.items()
        }  # fmt: skip
        first = self._settings_from if self._part[0] == 1 else None
        write_anchor(self._folder.anchor_file(notes.version, self._part), notes, tensors, first)
