"""What the machines have, and whether a study's trials fit: told before anything trains.

Ray starts no more trials on a machine at a time than its ``memory`` has room for, by the estimate
of the largest one (``rlsparse.costs``); a trial that fits nowhere is refused.
"""

import importlib.util
import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.plan import Plan, model_size
from rlsparse.algorithm_config import EngineConfig, OnlineConfig
from rlsparse.costs import GPU_HOST_BYTES, Device, Memory, remedies, trial_memory
from rlsparse.errors import ConfigError
from rlsparse.study import Trial

_RESERVED_BYTES = 1_000_000_000
"""For the driver and Ray."""
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, usage and statistics of a container's memory, of both versions of cgroups."""


@dataclass(frozen=True)
class Capacity:
    """What trials can have.

    Attributes:
        hosts: bytes of memory of each machine.
        gpu_bytes: of the smallest GPU; None where there is none, or none is known.
        num_cpus: cores of all machines.
        num_gpus: GPUs of all machines.
    """

    hosts: tuple[int, ...]
    gpu_bytes: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0

    @property
    def host_bytes(self) -> int:
        """Of the machine that has most."""
        return max(self.hosts)

    def num_places(self, size_bytes: int) -> int:
        """Workers of this size that fit on the machines together."""
        return sum(host // size_bytes for host in self.hosts)


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that trials can take on this machine now; in a container, within its limit.

    Args:
        root: under which ``sys/fs/cgroup`` lies.
    """
    free: int = psutil.virtual_memory().available
    for files in _CGROUPS:
        limit, usage, statistics = (root / file.lstrip("/") for file in files)
        try:
            most, used = limit.read_text().strip(), int(usage.read_text())
            lines = dict(line.split() for line in statistics.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            free = min(free, int(most) - used + int(lines.get("inactive_file", 0)))
    return max(0, free - _RESERVED_BYTES)


def gpus() -> list[int]:
    """Bytes of each GPU of this machine. Needs no torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    sizes = [int(line) * 2**20 for line in found.stdout.split() if line.isdecimal()]
    return sizes if found.returncode == 0 else []


def here() -> Capacity:
    """What this machine has."""
    own = gpus()
    return Capacity((host_memory(),), min(own, default=None), os.cpu_count() or 1, len(own))


def of_session() -> Capacity:
    """What the Ray session's machines have; what an autoscaler would add is not known."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(gpus)
    answers = ray.get(
        [
            ask.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote()
            for node in nodes
            if node["Resources"].get("GPU")
        ]
    )
    return Capacity(
        hosts=tuple(int(node["Resources"].get("memory", 0)) for node in nodes),
        gpu_bytes=min(itertools.chain(*answers), default=None),
        num_cpus=sum(node["Resources"].get("CPU", 0) for node in nodes),
        num_gpus=sum(node["Resources"].get("GPU", 0) for node in nodes),
    )


def memory_of(plan: Plan, trial: Trial) -> Memory:
    """Estimated peak memory of a trial, where it trains: of each of its workers.

    How large a mask will be is not known yet: it is taken to have all weights, an upper bound.
    """
    resources = plan.study.resources
    device: Device = "gpu" if resources.gpus_per_worker else "cpu"
    num_shards = resources.num_workers if resources.strategy == "fsdp" else 1
    size = model_size(plan.base(trial).path)
    return trial_memory(
        trial.config, size, device, num_workers=resources.num_workers, num_shards=num_shards
    )


def host_bytes(plan: Plan, trials: Sequence[Trial]) -> int:
    """Memory that Ray sets aside for a worker of ``trials``: what the largest takes of a host."""
    if not plan.study.resources.gpus_per_worker:
        return max(memory_of(plan, trial).peak_bytes for trial in trials)
    weights = max(plan.base(trial).num_weights for trial in trials)
    return GPU_HOST_BYTES + 4 * weights  # loading goes through the host


def check_engines(plan: Plan) -> None:
    """Refuse trials whose completions vLLM is to sample where it cannot run.

    Raises:
        ConfigError: no GPU is asked for, or vLLM is not installed.
    """
    trial = next((one for one in plan.trials if _engine(one).engine == "vllm"), None)
    if trial is None:
        return
    what = f"algorithm.generation.engine of trial {trial.label} ({trial.trial_id}) is vllm"
    if not plan.study.resources.gpus_per_worker:
        raise ConfigError(
            f"{what}, which needs a GPU, but resources.gpus_per_worker is 0; set it to 1, or the "
            "engine to transformers"
        )
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{what}, but vLLM is not installed; `pip install 'trl[vllm]'` on every node, or set "
            "the engine to transformers"
        )


def _engine(trial: Trial) -> EngineConfig:
    algorithm = trial.config.algorithm
    return algorithm.generation if isinstance(algorithm, OnlineConfig) else EngineConfig()


def shortage(plan: Plan, capacity: Capacity) -> str | None:
    """Why no trial could ever start: more cores or GPUs asked for than there are; else None."""
    resources = plan.study.resources
    for what, name, each, there in (
        ("GPUs", "gpus_per_worker", resources.gpus_per_worker, capacity.num_gpus),
        ("cores", "num_threads", resources.num_threads, capacity.num_cpus),
    ):
        if (wanted := each * resources.num_workers) > there:
            return (
                f"a trial takes {wanted:g} {what} (resources.{name} {each:g} x num_workers "
                f"{resources.num_workers}) and there are {there:g}; lower them, or give the "
                "--address of a cluster that has as many"
            )
    return None


def misfit(plan: Plan, trials: Sequence[Trial], capacity: Capacity) -> str | None:
    """Why the largest of ``trials`` does not fit, with what to lower; None if it does."""
    resources = plan.study.resources
    share, several = resources.gpus_per_worker, resources.num_workers > 1
    largest = max(trials, key=lambda trial: memory_of(plan, trial).peak_bytes)
    memory = memory_of(plan, largest)
    if share:
        if capacity.gpu_bytes is None:
            return None
        engine = _engine(largest)
        own = share - engine.gpu_memory_utilization * engine.is_colocated
        most = int(own * capacity.gpu_bytes)
        fits, there = memory.peak_bytes <= most, f"its share ({own:g}) of a GPU is {_gb(most)}"
    else:
        fits = capacity.num_places(memory.peak_bytes) >= resources.num_workers
        there = f"the machines have {', '.join(map(_gb, capacity.hosts))}"
    if fits:
        return None
    of_each = f" in each of its {resources.num_workers} workers" * several
    return (
        f"trial {largest.label} ({largest.trial_id}) would take about {_gb(memory.peak_bytes)} of "
        f"memory{of_each} at its largest ({memory.moment}: {memory}), but {there}; "
        f"{'; '.join(remedies(memory, largest.config))}"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def admit(plan: Plan, trials: Sequence[Trial], capacity: Capacity, *, allow_oversize: bool) -> int:
    """Bytes of host memory that each worker of a trial is to reserve.

    Raises:
        ConfigError: a trial fits on no machine, and ``allow_oversize`` is not given.
    """
    reason = misfit(plan, trials, capacity)
    if reason and not allow_oversize:
        raise ConfigError(f"{reason}; or --allow-oversize, as estimates err by up to a half")
    # More than there is would wait for ever.
    num_workers = plan.study.resources.num_workers
    wanted = host_bytes(plan, trials)
    fits = capacity.num_places(wanted) >= num_workers
    return wanted if fits else capacity.host_bytes // num_workers
