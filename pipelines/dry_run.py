"""What ``rlsparse run --dry-run`` prints: trials, time, memory and bytes; nothing is written."""

import os

from pipelines import capacity
from pipelines.capacity import Capacity
from pipelines.plan import Plan, wall_seconds
from rlsparse.costs import patch_bytes, probe_bytes, step_mask_bytes
from rlsparse.study import Trial, collapsed_factors


def print_dry_run(plan: Plan) -> None:
    """Print what would run here, what it would cost, and whether it fits."""
    cells: dict[tuple[str, str], list[Trial]] = {}
    for trial in plan.trials:
        key = (trial.control or "", ", ".join(f"{k}={v}" for k, v in trial.cell.items()))
        cells.setdefault(key, []).append(trial)
    print(f"{plan.study.name}: {plan.study.question}")
    independent = [item for item in cells.items() if not item[1][0].needs]
    dependent = [item for item in cells.items() if item[1][0].needs]
    for number, ((control, cell), trials) in enumerate([*independent, *dependent]):
        if number == len(independent):
            print("  then, under masks of these (memory as if they were of all weights):")
        memory = capacity.memory_of(plan, trials[0])
        print(
            f"  {len(trials)} x {cell or 'baseline'}{f' [{control}]' if control else ''} "
            f"({memory.peak_bytes / 1e9:.2f} GB): {' '.join(trial.trial_id for trial in trials)}"
        )
    for path, algorithms in collapsed_factors(plan.study).items():
        print(f"  {path} does not exist for {', '.join(algorithms)}: those cells are one")
    sized = [(trial.config, plan.base(trial).num_weights) for trial in plan.trials]
    machine = capacity.here()
    num_slots = _slots(plan, machine)
    time = f"about {wall_seconds(plan, num_slots) / 60:.1f} min on the {os.cpu_count()} cores of"
    if plan.study.resources.gpus_per_worker:
        time = "for a time that is not estimated for GPUs, on"
    masks = sum(step_mask_bytes(*one) for one in sized)
    print(
        f"{len(cells)} cells, {len(plan.trials)} trials ({len(plan.finished())} done), {time} "
        f"this machine, at most {sum(patch_bytes(*one) for one in sized) / 1e6:.1f} MB of patches"
        f"{f' and {masks / 1e6:.1f} MB of step masks' if masks else ''}; measuring takes "
        f"{max(probe_bytes(*one) for one in sized) / 1e6:.1f} MB of memory in a trial"
    )
    largest = max(
        (capacity.memory_of(plan, trial) for trial in plan.trials), key=lambda m: m.peak_bytes
    )
    parts = f" ({largest.moment}: {largest})" if str(largest) else ""
    if plan.study.resources.gpus_per_worker:
        place, free = "of a GPU", machine.gpu_bytes or 0
    else:
        place, free = "of memory", machine.host_bytes
    taken = f"a trial takes up to {largest.peak_bytes / 1e9:.2f} GB {place} by estimate{parts}"
    here = f"{free / 1e9:.1f} GB are free here"
    if reason := capacity.shortage(plan, machine):
        print(f"{taken}\ndoes not fit here: {reason}")
    elif reason := capacity.misfit(plan, plan.trials, machine):
        print(f"{taken}; {here}\ndoes not fit here: {reason}; or run with --allow-oversize")
    else:
        print(f"{taken}; {here}: {num_slots} trial{'s' * (num_slots > 1)} at once")


def _slots(plan: Plan, machine: Capacity) -> int:
    """Trials that this machine runs at once, by cores, GPUs and memory; at least 1."""
    resources, share = plan.study.resources, plan.study.resources.gpus_per_worker
    places = [
        machine.num_cpus // resources.num_threads,
        machine.num_places(capacity.host_bytes(plan, plan.trials)),
        *([machine.num_gpus // share] if share else []),
    ]
    return max(1, int(min(places)) // resources.num_workers)
