"""What memory the machines have, and whether a study's trials fit: told before anything trains.

Ray starts no more trials on a machine at a time than its ``memory`` has room for, by the estimate
of the largest one (``rlsparse.costs``); a trial that fits nowhere is refused.
"""

import importlib.util
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
    """Memory that trials can have.

    Attributes:
        hosts: bytes of each machine.
        gpu_bytes: of the smallest GPU; None where there is none, or none is known.
    """

    hosts: tuple[int, ...]
    gpu_bytes: int | None = None

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


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU of this machine, None without one. Needs no torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    sizes = [int(line) for line in found.stdout.split() if line.isdecimal()]
    return min(sizes) * 2**20 if found.returncode == 0 and sizes else None


def here() -> Capacity:
    """Memory of this machine."""
    return Capacity((host_memory(),), gpu_memory())


def of_session() -> Capacity:
    """Memory of the machines of the Ray session; what an autoscaler would add is not known."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(gpu_memory)
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
        gpu_bytes=min((size for size in answers if size), default=None),
    )


def memory_of(plan: Plan, trial: Trial) -> Memory:
    """Estimated peak memory of a trial, where it trains: of each of its workers."""
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
        f"{'; '.join(remedies(memory))}"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def admit(plan: Plan, trials: Sequence[Trial], *, allow_oversize: bool) -> int:
    """Bytes of host memory that each worker of a trial is to reserve in the Ray session.

    Raises:
        ConfigError: a trial fits on no machine, and ``allow_oversize`` is not given.
    """
    capacity = of_session()
    reason = misfit(plan, trials, capacity)
    if reason and not allow_oversize:
        raise ConfigError(f"{reason}; or --allow-oversize, as estimates err by up to a half")
    # More than there is would wait for ever.
    num_workers = plan.study.resources.num_workers
    wanted = host_bytes(plan, trials)
    fits = capacity.num_places(wanted) >= num_workers
    return wanted if fits else capacity.host_bytes // num_workers
