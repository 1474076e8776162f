"""What changes from step to step while a model trains, in the format that it is stored in.

Tensors are taken one at a time and in pieces, and compared where they are: of a model on a GPU only
counts, and packed masks that are asked for, come to the host.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlsparse.kernels.compare import compare
from rlsparse.masks import Packed, num_bytes
from rlsparse.prices import Prices

OnMask = Callable[[str, Packed], None]
"""Called with the name of a weight and the packed mask of what the step changed in it."""

_INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_UNSIGNED = {torch.int16: np.uint16, torch.int32: np.uint32}
_INFINITY = {torch.int16: 0x7F80, torch.int32: 0x7F80_0000}
_CPU_PIECE = 2**18
"""Weights of a piece: small enough that what is cast is compared while it is in the cache."""
_GPU_PIECE = 2**24
"""Large enough that starting programs costs little; takes 3 bytes per weight of it for a while."""


@dataclass(frozen=True)
class StepChanges:
    """Changed weights of one step, bitwise.

    Attributes:
        num_changed: k -> weights that differ from those k steps before, for 1 and each k of the
            windows of which one ends with this step.
        num_ever_changed: weights that differed from the base after this step or any before it.
        is_finite: whether all weights, as they are stored, are.
    """

    num_changed: dict[int, int]
    num_ever_changed: int
    is_finite: bool


class Trajectory:
    """Compares the weights after each step with earlier ones, and remembers all that ever changed.

    Holds, on the device of the weights, a copy of them in the stored format: those of the step
    before, not the base. A weight's first change leaves the base, so those that differed from the
    step before after some step are exactly those that differed from the base after some step. A
    window length k costs another copy: that of the start of its window. The windows of a k do not
    overlap: (0, k], (k, 2k] and so on; an unfinished one at the end is not measured. Besides, a bit
    per weight.

    Args:
        model: at its base weights; tied weights count once.
        dtype: the stored format: bfloat16 or float32.
        windows: further lengths k in steps, above 1. Sparsity over windows is S_k of arXiv
            2602.03839, section 3, there over every pair of steps k apart.
        prices: where the time that windows take is kept, apart from the rest.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype,
        windows: Sequence[int] = (),
        prices: Prices | None = None,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self.shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        self._prices = prices or Prices()
        self._copies = {
            k: {name: _bits(weight, dtype).clone() for name, weight in self._weights()}
            for k in (1, *windows)
        }
        self._ever = {
            name: torch.zeros(-(-bits.numel() // 64), dtype=torch.int64, device=bits.device)
            for name, bits in self._copies[1].items()
        }
        self.num_elements = sum(map(math.prod, self.shapes.values()))

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Flat weights as they are trained, tied ones once."""
        for name, weight in self._model.named_parameters():
            yield name, weight.detach().reshape(-1)

    def stored(self) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
        """Name, shape and flat unsigned bits of each weight as it is now, one at a time."""
        for name, weight in self._weights():
            yield name, self.shapes[name], _unsigned(_bits(weight, self._dtype).cpu())

    def moved(self) -> Iterator[tuple[str, tuple[int, ...], np.ndarray, np.ndarray]]:
        """Like ``stored``, with the bits after the last step taken before those of now."""
        for name, shape, bits in self.stored():
            yield name, shape, _unsigned(self._copies[1][name].cpu()), bits

    def trained(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Each weight in the format that is trained, one at a time: its flat unsigned bits.

        Before them its name, and the flat index of the first of them. The bits may be the weight's
        own memory: they hold until the next step.
        """
        for name, weight in self._weights():
            yield name, 0, _unsigned(_bits(weight, weight.dtype).cpu())

    def before(self, name: str) -> torch.Tensor:
        """A weight after the last step taken, flat, in the stored format and on its device."""
        return self._copies[1][name].view(self._dtype)

    def advance(self, step: int, on_mask: OnMask | None = None) -> StepChanges:
        """Take the weights after a step; to be called after every one, in order from 1.

        Args:
            step: its number.
            on_mask: gets, for each weight tensor, what differs from the step before.
        """
        ending = [k for k in self._copies if step % k == 0]
        changed: dict[int, int | torch.Tensor] = dict.fromkeys(ending, 0)
        ever: int | torch.Tensor = 0
        finite: bool | torch.Tensor = True
        for name, weight in self._weights():
            words = {k: torch.empty_like(self._ever[name]) for k in ending}
            size = _CPU_PIECE if weight.device.type == "cpu" else _GPU_PIECE
            for start in range(0, weight.numel(), size):
                bits = _bits(weight[start : start + size], self._dtype)
                finite = finite & all_finite(bits)
                for k in ending:
                    with self._prices.of("windows") if k > 1 else nullcontext():
                        before = self._copies[k][name][start : start + size]
                        part = words[k][start // 64 : -(-(start + bits.numel()) // 64)]
                        changed[k] = changed[k] + compare_bits(before, bits, part)
                        before.copy_(bits)
            self._ever[name] |= words[1]
            ever = ever + count_bits(self._ever[name])
            if on_mask:
                on_mask(name, _packed(words[1], weight.numel()))
        return StepChanges({k: int(n) for k, n in changed.items()}, int(ever), bool(finite))

    def totals(self, counts: Iterable[int]) -> list[int]:
        """Counts over the weights that this trajectory looks at -> those over all of the model."""
        return list(counts)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered between steps, but for the weights as they are now."""
        windows = {k: copies for k, copies in self._copies.items() if k > 1}
        return {"windows": windows, "ever": self._ever}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, the model being at the weights of then."""
        for name, weight in self._weights():
            self._copies[1][name].copy_(_bits(weight, self._dtype))
            self._ever[name].copy_(state["ever"][name])
            for k, copies in state["windows"].items():
                self._copies[k][name].copy_(copies[name])

    def ever_changed(self) -> Iterator[tuple[str, Packed]]:
        """Packed mask of each weight tensor: what differed from the base after any step."""
        for name, words in self._ever.items():
            yield name, _packed(words, self._copies[1][name].numel())


def compare_bits(
    before: torch.Tensor, after: torch.Tensor, words: torch.Tensor
) -> int | torch.Tensor:
    """Fill ``words`` [ceil(n / 64)], int64, with the packed mask of what differs, and count it.

    Args:
        before: integers, shape [n], contiguous.
        after: likewise, on the same device.
        words: on that device, too.

    Returns:
        The count; on a GPU as a tensor, so that nothing waits for it.
    """
    if before.device.type == "cpu":
        return compare(_unsigned(before), _unsigned(after), words.numpy().view(np.uint64))
    return compare_on_device(before, after, words)


def compare_on_device(
    before: torch.Tensor, after: torch.Tensor, words: torch.Tensor
) -> torch.Tensor:
    """``compare_bits`` in torch alone, for any device."""
    differs = before != after
    padded = torch.nn.functional.pad(differs.view(torch.uint8), (0, -differs.numel() % 64))
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=words.device)
    words.view(torch.uint8).copy_((padded.view(-1, 8) * place).sum(-1, dtype=torch.uint8))
    return torch.count_nonzero(differs)


def count_bits(words: torch.Tensor) -> int | torch.Tensor:
    """Set bits of int64 words; on a GPU as a tensor."""
    if words.device.type == "cpu":
        return int(np.bitwise_count(words.numpy().view(np.uint64)).sum(dtype=np.int64))
    return count_bits_on_device(words)


def count_bits_on_device(words: torch.Tensor) -> torch.Tensor:
    """``count_bits`` in torch alone: adds neighbouring fields of 1, 2 and 4 bits, then bytes."""
    fields = words - ((words >> 1) & 0x5555555555555555)
    fields = (fields & 0x3333333333333333) + ((fields >> 2) & 0x3333333333333333)
    fields = (fields + (fields >> 4)) & 0x0F0F0F0F0F0F0F0F
    return fields.view(torch.uint8).sum(dtype=torch.int64)


def all_finite(bits: torch.Tensor) -> bool | torch.Tensor:
    """Whether no weight of a piece is a NaN or an infinity; on a GPU as a tensor.

    Args:
        bits: integers, shape [n], n > 0, of bfloat16 or float32 weights.
    """
    if bits.device.type == "cpu":
        return bool((_unsigned(bits) << 1).max() < 2 * _INFINITY[bits.dtype])  # without the sign
    return all_finite_on_device(bits)


def all_finite_on_device(bits: torch.Tensor) -> torch.Tensor:
    """``all_finite`` in torch alone."""
    return (bits & torch.iinfo(bits.dtype).max).max() < _INFINITY[bits.dtype]


def _bits(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integer view of a weight in the stored format: of itself where that is how it is trained."""
    return weight.to(dtype).view(_INTEGERS[dtype])


def _unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.numpy().view(_UNSIGNED[bits.dtype])


def _packed(words: torch.Tensor, num_elements: int) -> Packed:
    packed: Packed = words.cpu().numpy().view(np.uint8)[: num_bytes(num_elements)]
    return packed
