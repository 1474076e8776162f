"""Optimizers that keep nothing for weights outside a mask.

On path ``torch`` the updates are torch's own (or those of ``fp32_moments``) on packed tensors: with
a mask of all weights they are those of ``torch.optim`` (neither foreach nor fused), bit for bit.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch

from rlsparse import distributed
from rlsparse.errors import CheckpointError, ConfigError, TrialError
from rlsparse.fp32_moments import Fp32MomentAdamW, Fp32MomentSgd, restore_formats
from rlsparse.kernels import parallel
from rlsparse.subnetwork.compiled import MASTER, Calls, Rule, adamw, kind_of, sgd
from rlsparse.subnetwork.mask import SubnetworkMask, check, check_model, check_trainable
from rlsparse.subnetwork.packed import PackedGradient, compact, packed_gradient
from rlsparse.subnetwork.selection import Selection

InFp32 = Literal["masters", "moments", "nothing"]
"""What is held in fp32 of weights in a narrower format; fp32 weights are their own masters."""

UpdatePath = Literal["auto", "torch", "compiled"]
"""Who computes updates: torch; compiled kernels (``compiled``); these where they can."""


class SubnetworkOptimizer(torch.optim.Optimizer):
    """Optimizer of the weights of a model that are in a mask; see its two subclasses.

    Its ``param_groups`` hold the model's own parameters, so that learning-rate schedules,
    accelerate and ``transformers.Trainer`` work with it; its ``state`` is packed. Tensors without
    any weight in the mask are frozen (no gradient is computed for them), until ``release``.

    Each ``param.grad`` is a ``packed.PackedGradient`` from the moment autograd has it, with the
    semantics of any gradient: it accumulates over backward passes until it is set to zero or None,
    by whomever. Where there are several workers, ``step`` averages gradients over them, packed; one
    that some of them lack counts as zero. A tensor without a gradient is left as it is, as in
    torch, but must have had one before the first step. Gradients are clipped here and nowhere else,
    by their global norm over the mask, as ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        model: not wrapped; it may be moved to another device later.
        mask: of its weights.
        plain: rule for weights that keep all in their own format.
        wide: rule that keeps fp32 moments of narrower weights.
        compiled: the rule in compiled kernels.
        in_fp32: of weights in a narrower format. ``masters``: the values of those in the mask, and
            their moments; the model then holds them rounded. ``moments``: these alone; every step
            rounds. ``nothing``: everything is in the format of the weights.
        max_grad_norm: largest global norm of the gradients; None does not clip.
        path: who computes the updates. ``torch``; ``compiled``, kernels of this project, for fp32
            weights, and bf16 weights with masters or moments in fp32, on a CPU; ``auto``, these
            where they can. Both give the same bits every time, on any number of threads, but not
            each other's: they stay within 2 fp32 ULP a step (``compiled`` says of what). State of
            one may be continued with the other.

    Attributes:
        release: ends it: the model trains as before, whole. Also happens when the optimizer dies.

    Raises:
        CheckpointError: the mask is of another model.
        ConfigError: the model is wrapped or sharded, a weight in the mask is frozen or not
            contiguous, the limit is not positive, or there is no such ``in_fp32`` or ``path``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mask: SubnetworkMask,
        *,
        plain: torch.optim.Optimizer,
        wide: torch.optim.Optimizer,
        compiled: Rule,
        in_fp32: InFp32,
        max_grad_norm: float | None,
        path: UpdatePath,
    ) -> None:
        for name, given, allowed in (("in_fp32", in_fp32, InFp32), ("path", path, UpdatePath)):
            if given not in get_args(allowed):
                raise ConfigError(
                    f"{name} is {given!r}; give one of {', '.join(get_args(allowed))}"
                )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm is {max_grad_norm}; give a positive one, or None")
        check_model(model)
        if not isinstance(mask, SubnetworkMask):
            raise ConfigError(
                f"the mask is a {type(mask).__name__}; give a SubnetworkMask, as of load_mask(PATH)"
            )
        check(model, mask)
        self._selections = {
            weight: selection
            for name, weight in model.named_parameters()
            if (selection := mask.selection(name)) is not None
        }
        self._names = {w: n for n, w in model.named_parameters() if w in self._selections}
        check_trainable(self._names)
        self._plain, self._wide, self._in_fp32 = plain, wide, in_fp32
        self._compiled, self._path = compiled, path
        self._max_grad_norm = max_grad_norm
        self._identity = {
            "mask": mask.fingerprint, "in_fp32": in_fp32, "rule": type(self).__name__,
        }  # fmt: skip
        self._norm: torch.Tensor | None = None
        self._has_stepped = False
        self._waiting = set(self._names.values())  # for a first gradient
        super().__init__(list(self._names), dict(plain.defaults))
        frozen = [w for w in model.parameters() if w not in self._names and w.requires_grad]
        for weight in frozen:
            weight.requires_grad_(False)
        hooks = [
            weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(_receive, self._waiting, self._names[weight], selection)
            )
            for weight, selection in self._selections.items()
        ]
        self.release = weakref.finalize(self, _release, hooks, list(self._names), frozen)
        self.release.atexit = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the mask says what is trained.

        Raises:
            ConfigError: always.
        """
        if hasattr(self, "release"):
            raise ConfigError(
                "a subnetwork optimizer trains the weights in its mask and takes no further "
                "parameters; give those an optimizer of their own, or a mask that has them"
            )
        super().add_param_group(param_group)

    @property
    def last_grad_norm(self) -> float | None:
        """Global norm of the gradients of the last step, before clipping; None before the first."""
        return None if self._norm is None else self._norm.item()

    def state_bytes(self) -> dict[str, int]:
        """Bytes that it holds: ``gradients`` (between a backward pass and ``zero_grad``),
        ``moments`` and ``masters`` (from the first step on), ``index``.
        """
        kept = [(k, v) for state in self.state.values() for k, v in state.items()]
        sizes = {"gradients": 0, "moments": 0, "masters": 0, "index": 0}
        for weight, selection in self._selections.items():
            sizes["gradients"] += selection.size * weight.element_size()
            sizes["index"] += selection.size_bytes
        for name, value in kept:
            if isinstance(value, torch.Tensor):
                sizes["masters" if name == MASTER else "moments"] += value.nbytes
        return sizes

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Average the gradients over workers, clip, and update the weights in the mask.

        Raises:
            TrialError: at the first step, a tensor in the mask has had no gradient on this worker,
                or workers have different masks.
            ConfigError: the path is ``compiled``, and a weight is not one for kernels.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = self._with_gradients()
        gradients = [packed_gradient(weight).elements for weight in weights]
        distributed.average(gradients)
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self._max_grad_norm is not None:
            # As clip_grad_norm_ has it, which takes no gradients but those of parameters.
            scale = torch.clamp(self._max_grad_norm / (self._norm + 1e-6), max=1.0)
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.device))
        wanted, calls = set(weights), list[Callable[[], None]]()
        for group in self.param_groups:
            for weight in (one for one in group["params"] if one in wanted):
                if (more := self._calls(weight, group)) is None:
                    self._update(weight, group)
                else:
                    calls += more
        parallel.run(calls, torch.get_num_threads())
        self._has_stepped = True
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As in torch, packed; with whose state it is."""
        return {**super().state_dict(), "subnetwork": dict(self._identity)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            CheckpointError: it is the state of another mask, ``in_fp32`` or kind of optimizer.
        """
        saved = state_dict.get("subnetwork", {})
        if others := [key for key, value in self._identity.items() if saved.get(key) != value]:
            raise CheckpointError(
                f"this optimizer state has another {' and '.join(others)} "
                f"({', '.join(str(saved.get(key)) for key in others)}) than this optimizer "
                f"({', '.join(self._identity[key] for key in others)}): packed state fits its own "
                "mask and rule alone; load the state of this run, or begin anew"
            )
        super().load_state_dict(state_dict)
        restore_formats(self, state_dict)

    def _with_gradients(self) -> list[torch.nn.Parameter]:
        """The weights that have a gradient on any worker: packed, and zero where it has none."""
        if not self._has_stepped:
            self._check_first_step()
        counts = distributed.total_counts(weight.grad is not None for weight in self._names)
        weights = [weight for weight, count in zip(self._names, counts, strict=True) if count]
        for weight in weights:
            selection = self._selections[weight]
            if weight.grad is None:
                zeros = weight.new_zeros(selection.size)
                weight.grad = PackedGradient(weight, selection, zeros)
            compact(weight, selection)  # where somebody has set a dense one
        return weights

    def _check_first_step(self) -> None:
        missing = [n for w, n in self._names.items() if n in self._waiting and w.grad is None]
        reason = None
        if missing:
            reason = (
                f"{len(missing)} of {len(self._names)} tensors in the mask have had no gradient, "
                f"{', '.join(missing[:3])}; call backward before step, on a loss that depends on "
                "them, or take them out of the mask"
            )
        if distributed.from_first(self._identity) != self._identity:
            reason = "workers have different masks, or in_fp32; give all of them the same"
        if (reason := distributed.first_given(reason)) is not None:
            raise TrialError(reason)

    def _calls(self, weight: torch.nn.Parameter, group: dict[str, Any]) -> Calls | None:
        """What does one step of the rule on one weight tensor; None if that is left to torch."""
        kind = None if self._path == "torch" else kind_of(weight, self._in_fp32)
        calls = kind and self._compiled(
            kind, weight, self._selections[weight], self.state[weight], group
        )
        if calls:
            torch.autograd.graph.increment_version(weight)
        elif self._path == "compiled":
            raise ConfigError(
                f"path 'compiled' does not train {self._names[weight]}, {weight.dtype} on "
                f"{weight.device}, in_fp32 {self._in_fp32!r}: it takes fp32 weights, and bf16 "
                "weights with masters or moments, contiguous on a CPU, and of SGD without momentum "
                "none but those with moments; give path='auto'"
            )
        return calls or None

    def _update(self, weight: torch.nn.Parameter, group: dict[str, Any]) -> None:
        """One step of torch's rule on the packed values of one weight tensor."""
        selection, state = self._selections[weight], self.state[weight]
        is_narrow = weight.element_size() < torch.float32.itemsize
        flat = weight.detach().view(-1)
        # Rules take the state of a tensor that has none yet for that of its first step.
        values = state.pop(MASTER, None)
        if values is None:
            values = selection.take(flat)
            if is_narrow and self._in_fp32 == "masters":
                values = values.float()
        values.grad = packed_gradient(weight).elements.to(values.dtype)
        rule = self._wide if is_narrow and self._in_fp32 == "moments" else self._plain
        rule.param_groups = [{**group, "params": [values]}]
        rule.state = {values: state}  # type: ignore[assignment]
        rule.step()
        values.grad = None
        selection.put(flat, values.to(weight.dtype))
        if is_narrow and self._in_fp32 == "masters":
            state[MASTER] = values


class SubnetworkAdamW(SubnetworkOptimizer):
    """AdamW (1711.05101, algorithm 2, as in torch) of the weights in a mask.

    Other arguments and errors: ``SubnetworkOptimizer``.

    Args:
        model: the model.
        mask: of its weights.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second.
        weight_decay: decoupled, of the weights in the mask; 0 unlike in torch.
        max_grad_norm: largest global norm of the gradients.
        in_fp32: what is held in fp32 of narrower weights.
        path: who computes the updates.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mask: SubnetworkMask,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        in_fp32: InFp32 = "masters",
        path: UpdatePath = "auto",
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            model,
            mask,
            plain=torch.optim.AdamW([torch.empty(0)], **own, foreach=False, fused=False),
            wide=Fp32MomentAdamW([torch.nn.Parameter(torch.empty(0))], **own),
            compiled=adamw,
            in_fp32=in_fp32,
            max_grad_norm=max_grad_norm,
            path=path,
        )


class SubnetworkSGD(SubnetworkOptimizer):
    """SGD with momentum (as in torch, without dampening and Nesterov) of the weights in a mask.

    Other arguments and errors: ``SubnetworkOptimizer``.

    Args:
        model: the model.
        mask: of its weights.
        lr: learning rate.
        momentum: 0 keeps no state.
        weight_decay: added to the gradient.
        max_grad_norm: largest global norm of the gradients.
        in_fp32: what is held in fp32 of narrower weights.
        path: who computes the updates.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mask: SubnetworkMask,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        in_fp32: InFp32 = "masters",
        path: UpdatePath = "auto",
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(
            model,
            mask,
            plain=torch.optim.SGD([torch.empty(0)], **own, foreach=False, fused=False),
            wide=Fp32MomentSgd([torch.nn.Parameter(torch.empty(0))], **own),
            compiled=sgd,
            in_fp32=in_fp32,
            max_grad_norm=max_grad_norm,
            path=path,
        )


def _receive(
    waiting: set[str], name: str, selection: Selection, weight: torch.nn.Parameter
) -> None:
    """What is done with a gradient; refers to neither optimizer nor weights, which may end."""
    waiting.discard(name)
    compact(weight, selection)


def _release(
    hooks: Sequence[Any],
    trained: Sequence[torch.nn.Parameter],
    frozen: Sequence[torch.nn.Parameter],
) -> None:
    for hook in hooks:
        hook.remove()
    for weight in trained:
        if isinstance(weight.grad, PackedGradient):
            weight.grad = None
    for weight in frozen:
        weight.requires_grad_(True)
