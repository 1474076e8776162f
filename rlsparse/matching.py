"""Which tensors of two checkpoints correspond, and accounting that adds up.

Names are matched exactly first, then with the prefixes of known wrappers taken off, then tensors
that one side stores fused with the parts that the other side stores apart. Every such layout is a
concatenation of the flat parts, so a part is a slice of the fused tensor and nothing is copied.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rlsparse.checkpoint import Checkpoint
from rlsparse.errors import CheckpointError
from rlsparse.names import layer_and_module
from rlsparse.tensor_file import TensorInfo

MIN_COMMON = 0.01
"""Checkpoints that share less than this of the smaller one (tied copies aside) are refused."""


class TensorPair(NamedTuple):
    """Two runs of weights that correspond.

    ``shape`` is common to both; where one side has more rows, the common rows come first. Where
    one side is fused, its tensor is the slice of it that holds the part, and ``name`` is the
    part's; else ``name`` is the name before.
    """

    name: str
    before: TensorInfo
    after: TensorInfo
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Matching:
    """What corresponds, and where every element of both checkpoints is counted.

    Attributes:
        pairs: in order of name; each element of a checkpoint is in at most one.
        accounting: numbers of elements (``total_before``, ``total_after``, ``compared``,
            ``tied_before``, ``tied_after``, ``removed``, ``added``, ``reshaped_before``,
            ``reshaped_after``), the names behind them (``tied_tensors``, ``removed_tensors``,
            ``added_tensors``, ``reshaped_tensors``, ``resized_tensors``), ``renamed_tensors``
            (name after -> name before) and ``mapped_tensors`` (fused name -> names of its parts).
    """

    pairs: list[TensorPair]
    accounting: dict[str, Any]


def match_tensors(
    before: Checkpoint, after: Checkpoint, aliases: Mapping[str, str] | None = None
) -> Matching:
    """Pair the tensors of two checkpoints and account for every element of both.

    total_before = compared + tied_before + removed + reshaped_before, and
    total_after = compared + tied_after + added + reshaped_after.

    - Embeddings and heads with another number of rows are compared in the common rows, the rest
      counts as removed or added.
    - A head tied to its embedding is no weight of its own, whether the file stores it or not: a
      stored copy counts as tied. So where only one side is tied, the separate head of the other
      side counts as added (or removed) and is compared with nothing.
    - Fused tensors are mapped when all their parts are there: ``qkv_proj`` (rows q, k, v, sized as
      config.json says), ``gate_up_proj`` (rows gate, up; weights and biases), and the experts of a
      layer as transformers 5 stacks them: ``experts.gate_up_proj`` [experts, 2 inner, hidden],
      ``experts.down_proj`` [experts, hidden, inner]. Other layouts are refused, unless both sides
      have the same.
    - Tensors without a counterpart, buffers among them, are listed as removed or added.

    Args:
        before: one checkpoint.
        after: the other.
        aliases: prefix in ``after`` -> prefix in ``before``, for names that do not match exactly;
            the longest that fits is taken.

    Raises:
        CheckpointError: names match in more than one way, a fused tensor cannot be mapped to the
            parts on the other side, or nearly nothing is in common.
    """
    aliases = aliases or {}
    for prefix in aliases:
        if not any(name.startswith(prefix) for name in after.tensors):
            raise CheckpointError(
                f"alias {prefix!r} -> {aliases[prefix]!r}: no tensor of {after.path} begins with "
                f"{prefix!r}; one of them is {next(iter(after.tensors), 'none')}"
            )
    ours, theirs = ({info.name: info for info in side.counted} for side in (before, after))
    links = {name: (ours[name], theirs[name]) for name in ours.keys() & theirs.keys()}
    left = _by_key((ours[name] for name in ours.keys() - theirs.keys()), {})
    right = _by_key((theirs[name] for name in theirs.keys() - ours.keys()), aliases)
    renamed, mapped = {}, {}
    for key in left.keys() & right.keys():
        one, other = _only(left.pop(key)), _only(right.pop(key))
        links[one.name] = one, other
        renamed[other.name] = one.name
    configs = _configs(before, after)
    for fused, slices in _unfused(left, right, configs):
        links |= {part.name: (piece, part) for piece, part in slices}
        mapped[fused] = [part.name for _, part in slices]
    for fused, slices in _unfused(right, left, configs):
        links |= {part.name: (part, piece) for piece, part in slices}
        mapped[fused] = [part.name for _, part in slices]
    pairs, accounting = _account(before, after, dict(sorted(links.items())))
    accounting["renamed_tensors"] = dict(sorted(renamed.items()))
    accounting["mapped_tensors"] = dict(sorted(mapped.items()))
    return Matching(pairs, accounting)


_Links = Mapping[str, tuple[TensorInfo, TensorInfo]]

_PARTS = (
    "compared", "tied_before", "tied_after", "removed", "added", "reshaped_before",
    "reshaped_after",
)  # fmt: skip


def _account(
    before: Checkpoint, after: Checkpoint, links: _Links
) -> tuple[list[TensorPair], dict[str, Any]]:
    """The pairs of common shape, and where each element is counted."""
    removed, added = (
        [info for info in side.counted if info.name not in linked]
        for side, linked in (
            (before, {one.name for one, _ in links.values()}),
            (after, {other.name for _, other in links.values()}),
        )
    )
    count = Counter(
        tied_before=sum(before.tensors[name].num_elements for name in before.tied),
        tied_after=sum(after.tensors[name].num_elements for name in after.tied),
        removed=sum(info.num_elements for info in removed),
        added=sum(info.num_elements for info in added),
    )
    listed: dict[str, list[str]] = {
        "tied": sorted({*before.tied, *after.tied}),
        "removed": [info.name for info in removed],
        "added": [info.name for info in added],
        "reshaped": [],
        "resized": [],
    }
    pairs: list[TensorPair] = []
    for name, (one, other) in links.items():
        shape = _common_shape(one, other)
        if shape is None:
            listed["reshaped"].append(name)
            count.update(reshaped_before=one.num_elements, reshaped_after=other.num_elements)
            continue
        if one.shape != other.shape:
            listed["resized"].append(name)
        num_common = math.prod(shape)
        count.update(
            compared=num_common,
            removed=one.num_elements - num_common,
            added=other.num_elements - num_common,
        )
        pairs.append(TensorPair(name, one, other, shape))
    totals = [sum(info.num_elements for info in side.tensors.values()) for side in (before, after)]
    smaller = min(totals[0] - count["tied_before"], totals[1] - count["tied_after"])
    if not count["compared"] or count["compared"] < MIN_COMMON * smaller:
        raise CheckpointError(
            f"{before.path} and {after.path} have {'almost ' if count['compared'] else ''}no "
            f"weights in common ({count['compared']} of {smaller}): "
            f"{len(listed['reshaped'])} tensors differ in shape, {len(removed)} are only "
            f"in the first, {len(added)} only in the second; are they of one model?"
        )
    for total, *parts in (
        (totals[0], "compared", "tied_before", "removed", "reshaped_before"),
        (totals[1], "compared", "tied_after", "added", "reshaped_after"),
    ):
        assert total == sum(count[part] for part in parts), (total, count)
    accounting: dict[str, Any] = {"total_before": totals[0], "total_after": totals[1]}
    accounting |= {part: count[part] for part in _PARTS}
    return pairs, accounting | {f"{part}_tensors": names for part, names in listed.items()}


def _common_shape(one: TensorInfo, other: TensorInfo) -> tuple[int, ...] | None:
    """The shape that is compared: the common rows of a resized vocabulary; None for reshaped."""
    if one.shape == other.shape:
        return one.shape
    is_vocabulary = layer_and_module(one.name, one.shape)[1] in ("embed", "head")
    if not is_vocabulary or not one.shape or one.shape[1:] != other.shape[1:]:
        return None
    return min(one.shape[0], other.shape[0]), *one.shape[1:]


# --- names -------------------------------------------------------------------------------------

_WRAPPER = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_PREFIXES = re.compile(r"^((module|base_model\.model|model|transformer|language_model)\.)+")
_EXPERT = re.compile(r"(\.experts\.\d+)\.(w[123])\.")
_EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_Keyed = dict[str, list[TensorInfo]]


def _key(name: str) -> str:
    """A name without what wrappers and model classes put before it, and Mixtral's old names."""
    name = _PREFIXES.sub("", _WRAPPER.sub("", name).removeprefix("."))
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return _EXPERT.sub(lambda found: f"{found[1]}.{_EXPERT_NAMES[found[2]]}.", name)


def _by_key(infos: Iterable[TensorInfo], aliases: Mapping[str, str]) -> _Keyed:
    """Tensors by key, in order of name; those of one key are ambiguous."""
    keyed: _Keyed = defaultdict(list)
    for info in sorted(infos, key=lambda info: info.name):
        name = info.name
        fitting = [prefix for prefix in aliases if name.startswith(prefix)]
        if fitting:
            prefix = max(fitting, key=len)
            name = aliases[prefix] + name.removeprefix(prefix)
        keyed[_key(name)].append(info)
    return dict(keyed)


def _only(infos: Sequence[TensorInfo]) -> TensorInfo:
    if len(infos) > 1:
        raise CheckpointError(
            f"{' and '.join(info.name for info in infos)} in {infos[0].file} differ only in known "
            "prefixes, so either may be the other checkpoint's tensor; store only one of them"
        )
    return infos[0]


# --- fused tensors -----------------------------------------------------------------------------

_QKV = ("q_proj", "k_proj", "v_proj")
_NOT_ROWS = {
    "c_attn": "GPT-2 stores it transposed, its parts are columns",
    "query_key_value": "the order of its rows depends on the model, most interleave the heads",
    "Wqkv": "the order of its rows depends on the model",
    "wqkv": "its rows are interleaved by groups of heads",
    "W_pack": "the order of its rows depends on the model",
}
"""Fused modules that are not mapped, and why."""

_SPLIT: dict[str, tuple[str, ...]] = {
    "qkv_proj": _QKV,
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),  # the experts of a layer in one tensor
    **dict.fromkeys(_NOT_ROWS, _QKV),
}
"""Fused module -> its parts, in the order of their rows."""

_FUSED_EXPERTS = re.compile(r"(?:.*\.)?experts\.(gate_up_proj|down_proj)(?:_bias)?")
_EXPERT_PART = re.compile(r"((?:.*\.)?experts)\.(\d+)\.((?:gate|up|down)_proj)\.(weight|bias)")
_INTERLEAVED_EXPERTS = ("gpt_oss", "openai_privacy_filter")
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

_Place = tuple[int, int]
"""Where a part lies in a fused tensor: expert (0 outside of experts), part."""

_Slices = list[tuple[TensorInfo, TensorInfo]]
_Configs = Sequence[Mapping[str, Any]]


def _memberships(key: str) -> Iterator[tuple[str, _Place]]:
    """The fused tensors, by key, that a tensor may be a part of, and its place there."""
    module, _, kind = key.rpartition(".")
    stem, dot, part = module.rpartition(".")
    for fused, parts in _SPLIT.items():
        if part in parts:
            yield f"{stem}{dot}{fused}.{kind}", (0, parts.index(part))
    if found := _EXPERT_PART.fullmatch(key):
        stem, expert, part, kind = found.groups()
        fused = "down_proj" if part == "down_proj" else "gate_up_proj"
        suffix = "_bias" if kind == "bias" else ""
        yield f"{stem}.{fused}{suffix}", (int(expert), _SPLIT[fused].index(part))


def _unfused(whole: _Keyed, split: _Keyed, configs: _Configs) -> Iterator[tuple[str, _Slices]]:
    """Fused tensors of one side whose parts the other side stores: name, (slice, part) in order.

    Raises:
        CheckpointError: only some parts are there, or the layout is not one that can be mapped.
    """
    groups: dict[str, dict[_Place, TensorInfo]] = defaultdict(dict)
    for key, infos in split.items():
        for group, place in _memberships(key):
            if group in whole:
                groups[group][place] = _only(infos)
                break
    for key, found in sorted(groups.items()):
        fused, one = _only(whole[key]), next(iter(found.values()))
        if reason := _why_not(key, fused, found, configs):
            raise CheckpointError(
                f"{fused.name} {list(fused.shape)} in {fused.file} cannot be compared with its "
                f"parts such as {one.name} {list(one.shape)} in {one.file}: {reason}; save both "
                "checkpoints in one layout, with one version of transformers"
            )
        slices, offset = [], fused.offset
        for _, part in sorted(found.items()):
            slices.append((replace(fused, shape=part.shape, offset=offset), part))
            offset += slices[-1][0].size_bytes
        yield fused.name, slices


def _why_not(
    key: str, fused: TensorInfo, found: Mapping[_Place, TensorInfo], configs: _Configs
) -> str | None:
    """Why a fused tensor is not the concatenation of the parts found; None if it is."""
    experts = _FUSED_EXPERTS.fullmatch(key)
    module = experts[1] if experts else key.split(".")[-2]
    if module in _NOT_ROWS:
        return _NOT_ROWS[module]
    names = _SPLIT[module]
    num_experts = fused.shape[0] if experts and fused.shape else 1
    places = itertools.product(range(num_experts), range(len(names)))
    lacking = list(itertools.islice((place for place in places if place not in found), 4))
    if lacking:
        parts = (f"{names[part]}{f' of expert {e}' if experts else ''}" for e, part in lacking)
        return f"the parts lack {', '.join(parts)}"
    if max(found)[0] >= num_experts:
        return f"it has {num_experts} experts, the parts go up to expert {max(found)[0]}"
    shapes = [found[place].shape for place in sorted(found)]
    rows = [shape[0] if shape else 0 for shape in shapes[: len(names)]]
    expected = (*((num_experts,) if experts else ()), sum(rows), *shapes[0][1:])
    if fused.shape == (*expected[:-2], *reversed(expected[-2:])) != expected:
        return f"its axes are transposed, the parts make {list(expected)}"
    is_even = len(set(shapes)) == 1 or module == "qkv_proj"
    if fused.shape != expected or not is_even or len({shape[1:] for shape in shapes}) > 1:
        return f"the parts have the shapes {sorted(map(list, set(shapes)))}"
    if module == "qkv_proj":
        return _why_not_heads(rows, configs)
    size = rows[0] if module == "gate_up_proj" else shapes[0][-1]
    return _why_not_experts(num_experts, size, key, configs) if experts else None


def _configs(*checkpoints: Checkpoint) -> _Configs:
    """The configurations, and those of the text or vision model nested in them."""
    own = [checkpoint.config for checkpoint in checkpoints]
    return own + [part for config in own for part in config.values() if isinstance(part, dict)]


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of ``keys`` that the configuration gives as a positive integer."""
    given = (config.get(key) for key in keys)
    return next((n for n in given if type(n) is int and n > 0), None)


def _why_not_heads(rows: Sequence[int], configs: _Configs) -> str | None:
    """None if some configuration gives q, k and v these numbers of rows."""
    for config in configs:
        num_heads = _number(config, "num_attention_heads") or 0
        num_kv_heads = _number(config, "num_key_value_heads") or num_heads
        hidden_size = _number(config, "hidden_size") or 0
        head_dim = _number(config, "head_dim") or hidden_size // max(num_heads, 1)
        if list(rows) == [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]:
            return None
    return (
        f"no config.json has num_attention_heads, num_key_value_heads and head_dim (or "
        f"hidden_size) that make {list(rows)} rows of q, k, v"
    )


def _why_not_experts(num_experts: int, size: int, key: str, configs: _Configs) -> str | None:
    """None unless a configuration says otherwise: the layout, experts, or their inner ``size``."""
    for config in configs:
        if config.get("model_type") in _INTERLEAVED_EXPERTS:
            return f"{config['model_type']} interleaves gate and up"
        said = _number(config, *_NUM_EXPERTS)
        if said is None:
            continue
        if said != num_experts:
            return f"it has {num_experts} experts, config.json says {said}"
        said = _number(config, "moe_intermediate_size", "intermediate_size") or size
        if said != size and not key.endswith("down_proj_bias"):
            return f"its experts are {size} wide, config.json says {said}"
    return None
