"""Memory of a trial: what the one before it left, its peak, and one clear error when it runs out.

The error says in which phase, how much there was, and what to lower.
"""

import contextlib
import ctypes
import functools
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from rlsparse.algorithm_config import OnlineConfig
from rlsparse.config import TrialConfig
from rlsparse.costs import smaller_passes
from rlsparse.errors import RlsparseError, TrialError

_ON_A_CPU = ("can't allocate memory", "not enough memory")
"""What torch says, as a plain RuntimeError, when the CPU's allocator fails."""

P = ParamSpec("P")
R = TypeVar("R")


class HasConfig(Protocol):
    """What belongs to a trial."""

    @property
    def config(self) -> TrialConfig:
        """The trial's."""


OfTrial = TypeVar("OfTrial", bound=TrialConfig | HasConfig)


def tells_out_of_memory(
    phase: str,
) -> Callable[[Callable[Concatenate[OfTrial, P], R]], Callable[Concatenate[OfTrial, P], R]]:
    """Decorator of what a trial does in a phase; its first argument is, or has, the configuration.

    Memory that runs out in it, on a GPU or a CPU, becomes a ``TrialError``, so that the trial fails
    for good and its worker goes on. The phase of the innermost function is told.
    """

    def decorate(
        function: Callable[Concatenate[OfTrial, P], R],
    ) -> Callable[Concatenate[OfTrial, P], R]:
        @functools.wraps(function)
        def guarded(of_trial: OfTrial, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(of_trial, *args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            # Outside of the handler, so that the error does not keep the frames, and their tensors.
            config = of_trial if isinstance(of_trial, TrialConfig) else of_trial.config
            raise TrialError(
                f"out of memory while {phase} ({_there_was()}): {said}; {_remedy(phase, config)}"
            )

        return guarded

    return decorate


def release() -> None:
    """Give back what a trial before this one, in the same process, has freed or left in cycles.

    glibc keeps freed pieces for itself (of SmolLM2-135M in fp32 2.7 of 3.5 GB), beside which the
    next trial's lie: together more than either trial needs. ``peak_bytes`` counts from here.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Peak memory of the device, or of this process where there is none, since ``release``.

    Where the kernel is not Linux, that of a process is since its start.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the process."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return not isinstance(error, RlsparseError) and any(text in str(error) for text in _ON_A_CPU)


def _there_was() -> str:
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"{torch.cuda.get_device_name()} has {total / 1e9:.1f} GB"
    return f"the process had {peak_bytes() / 1e9:.2f} GB at most"


def _remedy(phase: str, config: TrialConfig) -> str:
    """What to lower, with its value."""
    train, task, algorithm = config.train, config.task, config.algorithm
    if phase == "scoring":
        counts = {n: getattr(task, n) for n in ("num_eval_problems", "num_validation_problems")}
        largest = max(counts, key=counts.__getitem__)
        return f"lower task.{largest} {counts[largest]} (256 are scored at once)"
    if phase == "measuring the distance to the base":
        return (
            f"lower task.num_eval_problems {task.num_eval_problems} (64 are compared at once) or "
            f"task.max_completion_tokens {task.max_completion_tokens}"
        )
    if phase == "loading the base":
        return f"use a smaller model.source, or less than train.precision {train.precision}"
    ways = [
        smaller_passes(config),
        f"use train.optimizer sgd for {train.optimizer}" if train.optimizer != "sgd" else "",
        f"fewer probe.k_steps {list(config.probe.k_steps)}" if config.probe.k_steps else "",
        f"train fewer weights (train.trainable_modules) or in less than {train.precision}",
    ]
    if isinstance(algorithm, OnlineConfig):
        count = train.batch_size * algorithm.steps_per_rollout
        ways.insert(1, f"or sample fewer than {count} completions at once (train.batch_size)")
    return ", ".join(filter(None, ways))
