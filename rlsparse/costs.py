"""What a trial costs, before it starts: peak memory by part, CPU time, bytes on disk.

Estimates, from the configuration and the dimensions of the base alone. Memory is the largest of
three moments: a step, a rollout or held-out score, and the distance to the base, for which the
base is loaded a second time. Thirteen trials on a CPU, of bases of 26 and 135 million weights, in
all regimes, peaked at 0.80 to 1.06 times the estimate. It was made with them; elsewhere (GPUs, long
sequences, experts, attention that keeps its scores) take it as good to a factor of 1.5.
"""

from dataclasses import dataclass
from typing import Literal

from rlsparse.algorithm_config import (
    KtoConfig,
    OnlineConfig,
    PreferenceConfig,
    SampledDataConfig,
)
from rlsparse.checkpoint import Checkpoint
from rlsparse.config import NUM_DISTANCE_PROBLEMS, STORED_DTYPE, TrainConfig, TrialConfig
from rlsparse.names import layer_and_module
from rlsparse.tensor_file import ITEMSIZE

Device = Literal["cpu", "gpu"]

PROCESS_BYTES = 800_000_000
"""Measured: resident memory of a CPU process once torch, transformers and TRL are imported (0.65
GB), and of one of Ray before it trains (0.8 GB)."""
GPU_HOST_BYTES = 4_000_000_000
"""Rough: the same of a process that drives a GPU, whose libraries are larger."""
_RETAINED = 0.05
"""Freed memory that the allocator does not give back or cannot use again, of all else."""
_SCORE_BATCH, _DISTANCE_BATCH, _DISTANCE_LOGITS = 256, 64, 2**26
"""Prompts of a forward pass in ``tasks.generate``: when scoring, and for the distance; for which
so many logits are computed at once."""
_TILE = (4096, 32768)
"""Tokens and vocabulary of a tile of logits in TRL's losses (``trl.kernels.chunked_logprob``)."""
_WHOLE_LOGITS = ("simpo", "orpo")
"""Algorithms whose loss in TRL holds the logits of a whole micro-batch."""
_REFERENCE_ALWAYS = ("dpo", "kto", "prime")
_COMPANION = {"ppo": "critic", "prime": "reward model"}
"""Algorithms that train a model beside the policy: what it is called."""
_INDEX_BYTES = 4
"""Of each weight in a mask: where it is in its tensor."""
_MOMENTS = {"adamw": 2, "sgd-momentum": 1, "sgd": 0}
_FLOP_PER_S = 2e10
"""Measured for the tiny base on one core; a rough guide, several-fold off on other hardware."""
_PROMPT_TOKENS = {"simple_equations": 24, "dataset": 128}
"""Rough length of a task's prompts, where it is not that of a line of arithmetic."""

_DIMENSIONS = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head": ("head_dim",),
    "vocabulary": ("vocab_size",),
}
"""Dimension -> its names in ``config.json``."""


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a base.

    Attributes:
        tensors: layer (None outside the layers), module and number of elements of each weight;
            tied ones once.
        hidden: width of the residual stream.
        layers: their number.
        intermediate: width of the MLP.
        kv: width of the keys of a token, of all heads together.
        vocabulary: number of tokens.
    """

    tensors: tuple[tuple[int | None, str, int], ...]
    hidden: int
    layers: int
    intermediate: int
    kv: int
    vocabulary: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelSize":
        """Read from headers and ``config.json``; what the latter does not say is taken as small."""
        config = {**checkpoint.config, **checkpoint.config.get("text_config", {})}
        found = {
            ours: next((int(config[name]) for name in names if config.get(name)), 0)
            for ours, names in _DIMENSIONS.items()
        }
        heads = found["heads"] or 1
        hidden = found["hidden"]
        return cls(
            tensors=tuple(
                (*layer_and_module(info.name, info.shape), info.num_elements)
                for info in checkpoint.counted
            ),
            hidden=hidden,
            layers=found["layers"],
            intermediate=found["intermediate"] or 4 * hidden,
            kv=(found["kv_heads"] or heads) * (found["head"] or hidden // heads),
            vocabulary=found["vocabulary"],
        )

    @property
    def num_weights(self) -> int:
        """All of them."""
        return sum(count for _, _, count in self.tensors)

    def num_trained(self, train: TrainConfig) -> int:
        """Weights that ``trainable_modules`` and ``trainable_layers`` leave to train."""
        modules, layers = train.trainable_modules, train.trainable_layers
        return sum(
            count
            for layer, module, count in self.tensors
            if (modules is None or module in modules) and (layers is None or layer in layers)
        )


@dataclass(frozen=True)
class Memory:
    """Peak memory of a trial: of its process on a CPU; on a GPU of the device.

    Attributes:
        moment: when it is reached: ``step``, ``rollout``, ``score`` or ``distance``.
        parts: what takes it, in bytes.
    """

    moment: str
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Parts by size, for people."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in ordered if size > 5e6)


def trial_memory(
    config: TrialConfig,
    size: ModelSize,
    device: Device = "cpu",
    *,
    num_workers: int = 1,
    num_shards: int = 1,
    num_in_mask: int | None = None,
) -> Memory:
    """Estimate the peak memory of a trial; the module says how good it is.

    Args:
        config: the trial.
        size: of its base.
        device: where it trains.
        num_workers: processes that train it together; the estimate is of one of them, and was
            checked for one alone.
        num_shards: parts that they hold the weights in: 1 (ddp) or ``num_workers`` (fsdp).
        num_in_mask: weights that are trained under ``train.mask``. None, where the mask is not
            there yet: all that could be, an upper bound.
    """
    trained = size.num_trained(config.train) // num_shards if num_in_mask is None else num_in_mask
    held = _held(config, size, device, num_shards, trained)
    found = [
        Memory(moment, held | parts)
        for moment, parts in _moments(config, size, num_workers, num_shards, trained).items()
    ]
    worst = max(found, key=lambda memory: memory.peak_bytes)
    return Memory(worst.moment, {**worst.parts, "allocator": int(_RETAINED * worst.peak_bytes)})


_SMALLER_PASSES = "smaller passes"
_REMEDIES = {
    "logits": {
        "step": _SMALLER_PASSES,
        "rollout": "lower train.batch_size or algorithm.steps_per_rollout",
        "score": "lower task.num_eval_problems and num_validation_problems below 256",
        "distance": "lower task.num_eval_problems below 64 or task.max_completion_tokens",
    },
    "activations": {"step": _SMALLER_PASSES},
    "keys and values": {"rollout": "lower train.batch_size or algorithm.steps_per_rollout"},
    "probe": {"": "ask for fewer probe.k_steps"},
    "optimizer": {"": "train.optimizer: sgd-momentum or sgd, or fewer train.trainable_modules"},
    "reference": {"": "algorithm.kl_coef: 0 where the algorithm has it"},
    "weights": {"": "train.precision: bf16-weights, which changes what is measured"},
}
"""Part -> moment, or "" for all -> what makes it smaller."""


def smaller_passes(config: TrialConfig) -> str:
    """How a trial takes fewer tokens at once: no forward pass splits what is compared in it."""
    algorithm = config.algorithm
    whole = 2 if isinstance(algorithm, KtoConfig) else 1
    if isinstance(algorithm, OnlineConfig):
        whole = algorithm.num_generations
    if (micro := config.train.micro_batch_size) > whole:
        return (
            "raise train.gradient_accumulation_steps "
            f"{config.train.gradient_accumulation_steps} (a pass takes {micro} sequences)"
        )
    if isinstance(algorithm, OnlineConfig):
        return f"lower algorithm.num_generations {whole} (a pass takes them all)"
    return f"lower task.max_completion_tokens {config.task.max_completion_tokens}"


def remedies(memory: Memory, config: TrialConfig) -> list[str]:
    """What to change so that a trial takes at least a twentieth less, the most effective first."""
    ordered = sorted(memory.parts, key=lambda part: -memory.parts[part])
    ordered = [part for part in ordered if memory.parts[part] > 0.05 * memory.peak_bytes]
    known = [_REMEDIES.get(part, {}) for part in ordered]
    found = [way.get(memory.moment, way.get("")) for way in known]
    told = [smaller_passes(config) if way == _SMALLER_PASSES else way for way in found]
    return list(dict.fromkeys(text for text in told if text))


def estimates(
    config: TrialConfig,
    checkpoint: Checkpoint,
    device: Device,
    *,
    num_workers: int = 1,
    num_shards: int = 1,
    num_in_mask: int | None = None,
) -> dict[str, float]:
    """What a trial's summary says beside what was measured, in columns of table ``trials``.

    The time is that of one worker's CPU, and left out on a GPU; for the arguments see
    ``trial_memory``.
    """
    size = ModelSize.of(checkpoint)
    memory = trial_memory(
        config,
        size,
        device,
        num_workers=num_workers,
        num_shards=num_shards,
        num_in_mask=num_in_mask,
    )
    found: dict[str, float] = {"estimated_peak_bytes": memory.peak_bytes}
    if device == "cpu":
        found["estimated_cpu_s"] = cpu_seconds(config, size.num_weights) / num_workers
    return found


def _held(
    config: TrialConfig, size: ModelSize, device: Device, num_shards: int, trained: int
) -> dict[str, int]:
    """Bytes of what stays in memory as long as training goes on."""
    train, algorithm = config.train, config.algorithm
    item, moments = _weight_bytes(train), _MOMENTS[train.optimizer]
    moment_bytes = 4 if train.precision == "bf16-weights" else item
    total = size.num_weights // num_shards
    held = {
        "process": PROCESS_BYTES if device == "cpu" else 0,
        "weights": total * item,
        "optimizer": trained * moments * moment_bytes,
        "probe": probe_bytes(config, total),
    }
    if train.mask is not None:
        held["mask"] = _INDEX_BYTES * trained
    if algorithm.name in _REFERENCE_ALWAYS or getattr(algorithm, "kl_coef", 0.0) > 0:
        held["reference"] = total * item
    if algorithm.name in _COMPANION:
        held[_COMPANION[algorithm.name]] = total * (item + moments * moment_bytes)
    return held


def _moments(
    config: TrialConfig, size: ModelSize, num_workers: int, num_shards: int, trained: int
) -> dict[str, dict[str, int]]:
    """Bytes of what is in memory beside that, at each moment at which memory may peak."""
    train, algorithm = config.train, config.algorithm
    item, compute = _weight_bytes(train), 4 if train.precision == "fp32" else 2
    total = size.num_weights // num_shards
    # A gradient is dense until it is packed.
    dense = max(count for *_, count in size.tensors) if train.mask is not None else 0
    length, mixed = sequence_tokens(config), train.precision == "bf16-mixed"
    num_scored = max(config.task.num_eval_problems, config.task.num_validation_problems)
    num_tokens = train.micro_batch_size // num_workers * length
    if isinstance(algorithm, PreferenceConfig) and algorithm.name != "kto":
        num_tokens *= 2  # chosen and rejected
    tile = min(num_tokens, _TILE[0]) * min(size.vocabulary, _TILE[1])
    logits = num_tokens * size.vocabulary if algorithm.name in _WHOLE_LOGITS else tile
    # Per token and layer autograd keeps: three fp32 copies of the residual stream for each of two
    # norms; in the format of matrix products the inputs and outputs of attention, twice the
    # queries (rotated), and four of the MLP's width.
    kept = 24 * size.hidden + compute * (9 * size.hidden + 4 * size.intermediate)
    moments = {
        "step": {
            "gradients": (trained + dense + total * (algorithm.name in _COMPANION)) * item,
            "exchange": _exchanged(size, trained, num_workers, num_shards) * item,
            "autocast": size.num_trained(train) // num_shards * 2 if mixed else 0,  # whole tensors
            "activations": num_tokens * size.layers * kept,
            # Logits, probabilities, their gradient and a product on the way; of the head a copy and
            # its gradient, alone and as tied.
            "logits": 4 * 4 * logits + 3 * 4 * size.vocabulary * size.hidden,
        },
        "score": _generation(size, min(_SCORE_BATCH, num_scored), length, compute),
        "distance": _distance(config, size, length, num_shards),
    }
    if isinstance(algorithm, OnlineConfig):
        count = train.batch_size * algorithm.steps_per_rollout // num_workers
        moments["rollout"] = _generation(size, count, length, compute)
    for name in ("score", "rollout"):
        if name in moments:
            moments[name]["autocast"] = total * 2 if mixed else 0
    return moments


def _generation(size: ModelSize, count: int, length: int, compute: int) -> dict[str, int]:
    """Bytes while ``count`` completions are sampled at once."""
    return {
        "keys and values": count * length * size.layers * 2 * size.kv * compute,
        "activations": count * length * _passing(size, compute),
        "logits": 3 * 4 * count * size.vocabulary,
    }


def _exchanged(size: ModelSize, trained: int, num_workers: int, num_shards: int) -> int:
    """Numbers in hand while workers exchange: a copy of all gradients, or a whole tensor twice."""
    if num_workers == 1:
        return 0
    return trained if num_shards == 1 else 2 * max(count for *_, count in size.tensors)


def _distance(config: TrialConfig, size: ModelSize, length: int, num_shards: int) -> dict[str, int]:
    """Bytes while the divergence to the base is measured: a second model, and whole logits."""
    train, total = config.train, size.num_weights // num_shards
    item, compute = _weight_bytes(train), 4 if train.precision == "fp32" else 2
    mixed = train.precision == "bf16-mixed"
    count = min(_DISTANCE_BATCH, config.task.num_eval_problems, NUM_DISTANCE_PROBLEMS)
    sequence = config.task.max_completion_tokens * size.vocabulary
    answers = min(count * sequence, max(sequence, _DISTANCE_LOGITS))
    return {
        "base": total * item,
        # The bf16 weights of both models; while the base is loaded, those that it is read as.
        "autocast": total * 4 if mixed else 0,
        "activations": count * length * _passing(size, compute),
        # As they are computed, and in fp32 (bf16 products accumulate in it on a CPU, and autocast
        # hands them on in it); then five fp32 copies.
        "logits": answers * ((4 if compute == 4 else 6) + 5 * 4),
    }


def _passing(size: ModelSize, compute: int) -> int:
    """Bytes per token that a layer has in hand while nothing is kept for gradients."""
    return 12 * size.hidden + compute * (3 * size.hidden + 3 * size.intermediate)


def _weight_bytes(train: TrainConfig) -> int:
    return 4 if train.precision in ("fp32", "bf16-mixed") else 2


def probe_bytes(config: TrialConfig, num_weights: int) -> int:
    """Memory that measuring takes in a trial, where it trains: copies of the weights, and bits."""
    num_copies = 1 + len(config.probe.k_steps)
    return num_copies * num_weights * _stored_bytes(config) + -(-num_weights // 8)


def patch_bytes(config: TrialConfig, num_weights: int) -> int:
    """Largest size of the patches that a trial can leave: dense, one per snapshot, or per step."""
    num_patches = len(config.snapshot_steps) + config.probe.step_patches * config.train.num_steps
    return num_patches * num_weights * _stored_bytes(config)


def step_mask_bytes(config: TrialConfig, num_weights: int) -> int:
    """Largest size of the masks of steps that a trial can leave: what does not compress at all."""
    return config.probe.step_masks * config.train.num_steps * -(-num_weights // 8)


def _stored_bytes(config: TrialConfig) -> int:
    return ITEMSIZE[STORED_DTYPE[config.train.precision]]


def sequence_tokens(config: TrialConfig) -> int:
    """Rough length of a prompt with a completion, in tokens."""
    task = config.task
    return _PROMPT_TOKENS.get(task.name, 12) * (1 + task.num_shots) + task.max_completion_tokens


def cpu_seconds(config: TrialConfig, num_weights: int) -> float:
    """Rough CPU time of a trial: floating-point operations over a measured rate."""
    task, algorithm = config.task, config.algorithm
    steps = config.train.num_steps * config.train.batch_size
    work = steps * algorithm.FLOP_PER_WEIGHT_TOKEN
    num_scores = len(config.snapshot_steps) + 1 if config.probe.score_snapshots else 2
    work += 2.0 * (num_scores * task.num_eval_problems + task.num_validation_problems)
    # The divergence to the base: samples, and a pass of both models over them.
    work += 6.0 * (num_scores - 1) * min(task.num_eval_problems, NUM_DISTANCE_PROBLEMS)
    samples_first = getattr(algorithm, "data", "sampled") == "sampled"
    if isinstance(algorithm, SampledDataConfig) and samples_first:
        work += 2.0 * task.num_train_problems * algorithm.num_samples_per_prompt
    return work * sequence_tokens(config) * num_weights / _FLOP_PER_S
