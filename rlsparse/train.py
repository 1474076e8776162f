"""One trial in one process: load the base, train, measure, leave files. Needs no Ray."""

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback

from rlsparse import distributed, scoring, tables
from rlsparse.algorithms import ALGORITHMS, TrialContext
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import TrialConfig
from rlsparse.costs import estimates
from rlsparse.masks import write_masks
from rlsparse.memory import peak_bytes, release, tells_out_of_memory
from rlsparse.models.loading import TORCH_DTYPES, load_model, load_tokenizer
from rlsparse.optim import select_trainable
from rlsparse.probe import Probe
from rlsparse.resources import Strategy
from rlsparse.saves import Saver, Saving, spent
from rlsparse.sharded import is_sharded, spaced
from rlsparse.subnetwork import SubnetworkMask
from rlsparse.subnetwork.trial import columns, keep_unwrapped, others_untouched, trained_mask
from rlsparse.tables import SUBNETWORK, SUMMARY
from rlsparse.tasks import load_reward, load_task
from rlsparse.tasks.generate import Score

_MEDIAN_SAMPLE = 2**22


@tells_out_of_memory("training")
def train_trial(
    config: TrialConfig,
    *,
    trial_id: str,
    base_dir: Path,
    base_fingerprint: str,
    out_dir: Path,
    num_threads: int = 1,
    strategy: Strategy = "ddp",
    on_progress: Callable[[dict[str, Any]], None] = lambda row: None,
    saving: Saving | None = None,
    mask: SubnetworkMask | None = None,
) -> dict[str, Any]:
    """Run one trial and leave its files in ``out_dir``.

    The folder must not hold a trial yet, or, to go on from a save, just the files that it names.

    Where a process group of several workers is there, each of them calls this with a folder of its
    own; they train together, and the first leaves the files.

    Files: ``config.json``, ``steps.parquet``, ``eval.parquet``, ``summary.json`` (written last),
    ``ever_changed.mask.safetensors``, ``snapshots/step-000010/weights.patch.safetensors`` per
    snapshot, ``step_masks/step-000001.parquet`` and
    ``step_patches/version-000001.patch.safetensors`` per step, and ``checkpoint/`` if the
    configuration keeps them, and ``subnetwork.mask.safetensors`` where a mask is trained.

    Args:
        config: the resolved trial.
        trial_id: its name, written into the tables.
        base_dir: local folder of the base model.
        base_fingerprint: content hash of the base model.
        out_dir: folder for the files of the trial; made if missing.
        num_threads: CPU threads; part of what determines the bits.
        strategy: how several workers train together.
        on_progress: called after each step with its row of table ``steps``.
        saving: how the trial is saved meanwhile, and the save that it goes on from; from a save
            it ends with the same bits as if nothing had happened.
        mask: what ``train.mask`` describes; needed there, and nowhere else.

    Returns:
        The summary, as written, empty on workers that write none; of a trial that went on from a
        save, its times include what the trial had taken before it.

    Raises:
        TrialError: training cannot go on (no preference pairs, loss or weights not finite, no
            memory left), or a weight outside the mask has changed.
        CheckpointError: transformers loads other weights than the files of the base hold, or the
            mask is of another model.
        ConfigError: nothing in the mask is trained, or there is no mask where one is needed.
    """
    release()
    before = spent(saving)
    started, cpu_started = time.monotonic(), time.process_time()

    def clock() -> dict[str, float]:
        wall_s, cpu_s = time.monotonic() - started, time.process_time() - cpu_started
        return {"wall_s": before["wall_s"] + wall_s, "cpu_s": before["cpu_s"] + cpu_s}

    out_dir.mkdir(parents=True, exist_ok=True)
    if distributed.rank() == 0:
        _write_json(out_dir / "config.json", config.model_dump(mode="json"))
    _make_deterministic(config.sampling_seed, num_threads)
    num_shards = distributed.num_workers() if strategy == "fsdp" else 1
    context = _load(config, base_dir, out_dir / "scratch", num_shards, mask)
    saver = None
    if saving is not None:
        maker = identity(config, trial_id, base_fingerprint, num_threads, strategy)
        given: dict[str, Any] = {"reward": context.reward, "identity": maker, "clock": clock}
        saver = partial(Saver, out_dir=out_dir, saving=saving, **given)
    if distributed.rank() > 0 and num_shards == 1:
        _train(context, _Follower(on_progress), saver)
        return {}
    if context.mask is not None:
        own = context.mask
        write_masks(out_dir / SUBNETWORK, own.bits, own.base_fingerprint, own.metadata)
    score_base = scoring.score_stored(context, base_dir)
    median = _median_magnitude(context.model)
    probe = Probe(
        config,
        context.model,
        trial_id=trial_id,
        base=Checkpoint.open(base_dir),
        base_fingerprint=base_fingerprint,
        out_dir=out_dir,
        score=lambda: scoring.score(context, context.model),
        distance=lambda: scoring.distance(context, base_dir),
        on_progress=on_progress,
    )
    _train(context, probe, saver)
    with probe.prices.of("scores"):
        validation = scoring.score_validation(context)
    split = probe.finish()
    if distributed.rank() > 0:
        return {}
    if config.keep_checkpoints:
        _save_checkpoint(context, out_dir / "checkpoint")
    _write_tables(probe, validation, trial_id, out_dir)
    last = config.train.num_steps
    clipped = (row.get("clipped_fraction", 0.0) for row in probe.rows.values())
    summary = {
        "trial_id": trial_id,
        "score_base": (score_base or probe.scores[0]).fraction,
        "score_before": probe.scores[0].fraction,
        "score_after": probe.scores[last].fraction,
        "score_gain_se": probe.scores[last].gain_se(probe.scores[0]),
        "num_eval_problems": config.task.num_eval_problems,
        **scoring.validation_columns(validation),
        "gate_ratio": 256 * config.train.learning_rate / median,
        "num_clipped_steps": int(sum(clipped)),
        "kl_final": probe.distances[last],
        "patch_bytes": probe.patch_bytes,
        **columns(context.mask),
        **split,
        **probe.prices.columns(),
        **clock(),
        "peak_bytes": peak_bytes(),
        **estimates(
            config,
            probe.base,
            "gpu" if torch.cuda.is_available() else "cpu",
            num_workers=distributed.num_workers(),
            num_shards=num_shards,
            num_in_mask=None if context.mask is None else context.mask.num_selected,
        ),
    }
    _write_json(out_dir / SUMMARY, summary)
    return summary


def _train(
    context: TrialContext, callback: TrainerCallback, saver: partial[Saver] | None = None
) -> None:
    trainer = ALGORITHMS[context.config.algorithm.name](context)
    if context.mask is not None:
        keep_unwrapped(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    resume_from = None
    if saver is not None:
        saves = saver(trainer, callback)
        trainer.add_callback(saves)
        resume_from = saves.resume_from
    # Building the trainer seeded with the data's seed.
    transformers.set_seed(distributed.worker_seed(context.config.sampling_seed))
    with others_untouched(context.model, context.mask):
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    shutil.rmtree(context.scratch_dir, ignore_errors=True)


class _Follower(TrainerCallback):  # type: ignore[misc]
    """Says that a worker that measures nothing made a step, as the one that measures does."""

    def __init__(self, on_progress: Callable[[dict[str, Any]], None]) -> None:
        self._on_progress = on_progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self._on_progress({"step": state.global_step})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@tells_out_of_memory("loading the base")
def _load(
    config: TrialConfig,
    base_dir: Path,
    scratch_dir: Path,
    num_shards: int = 1,
    mask: SubnetworkMask | None = None,
) -> TrialContext:
    """Model, tokenizer and data of a trial, on the device that it trains on."""
    task = load_task(config.task)
    tokenizer = load_tokenizer(base_dir)
    model = load_model(base_dir, config.train.precision, num_shards=num_shards)
    select_trainable(model, config.train)
    mask = trained_mask(model, config, mask)
    if torch.cuda.is_available():
        model = model.to("cuda")
    # All of them, so that a split with too few is told before training.
    problems = {s: scoring.problems_of(config, task, tokenizer, s) for s in scoring.SPLITS}
    return TrialContext(
        config=config,
        model=model,
        tokenizer=tokenizer,
        task=task,
        problems=problems["train"],
        reward=load_reward(
            getattr(config.algorithm, "reward", "task"),
            task,
            seed=distributed.worker_seed(config.sampling_seed),
        ),
        scratch_dir=scratch_dir,
        num_shards=num_shards,
        mask=mask,
    )


def _write_tables(probe: Probe, validation: Score | None, trial_id: str, out_dir: Path) -> None:
    """Write ``steps.parquet`` and ``eval.parquet``."""
    rows = [{"trial_id": trial_id, **row} for _, row in sorted(probe.rows.items())]
    tables.write(tables.from_rows(rows, "steps"), "steps", out_dir / "steps.parquet")
    last = probe.config.train.num_steps
    scored = scoring.eval_rows(trial_id, probe.scores, validation, last)
    tables.write(tables.from_rows(scored, "eval"), "eval", out_dir / "eval.parquet")


def identity(
    config: TrialConfig,
    trial_id: str,
    base_fingerprint: str,
    num_threads: int,
    strategy: Strategy = "ddp",
) -> dict[str, Any]:
    """All that decides the bits of a trial on this machine: a save of another is not used."""
    return {
        "config": config.model_dump(mode="json"),
        "trial": trial_id,
        "base": base_fingerprint,
        "num_threads": num_threads,
        "num_workers": distributed.num_workers(),
        "strategy": strategy,
        **environment(),
    }


def environment() -> dict[str, str]:
    """Versions and hardware that can change the bits of a trial on this machine."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), cpu)
    packages = ("rlsparse", "torch", "transformers", "trl", "accelerate", "datasets", "numpy")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "cpu": cpu,
    }


def _make_deterministic(seed: int, num_threads: int) -> None:
    """Put all process-wide state that a trial depends on into a known place."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    datasets.disable_progress_bars()
    datasets.disable_caching()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory with NaN costs as much as a training step and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    transformers.set_seed(seed)


def _median_magnitude(model: torch.nn.Module) -> float:
    """Median |w| over at most 2^22 evenly spaced weights."""
    total = sum(weight.numel() for weight in model.parameters())
    stride = max(1, total // _MEDIAN_SAMPLE)
    if is_sharded(model):
        return float(spaced(model, stride).median())
    parts = [w.detach().reshape(-1)[::stride].abs().float().cpu() for w in model.parameters()]
    return float(torch.cat(parts).median())


def _save_checkpoint(context: TrialContext, path: Path) -> None:
    """Save the trained weights in the stored format, for readers other than this project."""
    dtype = TORCH_DTYPES[context.config.stored_dtype]
    context.model.to(dtype).save_pretrained(path)
    context.tokenizer.save_pretrained(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
