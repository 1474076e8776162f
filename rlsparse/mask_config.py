"""Which weights a trial trains, if not all: masks of files, of other trials, or made of these.

A mask is one of five mappings, known by the key that each has alone: ``file``, ``from``, ``like``,
``union`` and ``intersection``. The last three are made of others; those that are not are leaves.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    model_validator,
)

from rlsparse.definitions import Take, step_at
from rlsparse.variants import Config

Pick = Literal[
    "random", "random_within_magnitude", "low_magnitude", "high_magnitude", "principal", "other"
]

_DRAWN: tuple[Pick, ...] = ("random", "random_within_magnitude")

_Value = bool | int | float | str | None


def _pairs(value: Any) -> Any:
    """A mapping as pairs in order of the keys, which can be hashed."""
    if not isinstance(value, Mapping):
        return value
    return tuple(sorted((str(k), tuple(v) if isinstance(v, list) else v) for k, v in value.items()))


def _same_other_or_seed(value: Any) -> Any:
    if value in ("same", "other") or (type(value) is int and 0 <= value < 2**31):
        return value
    raise ValueError(f"must be same, other or a seed, 0 or more and below 2**31 (got {value!r})")


class _Mask(Config):
    """Base of masks: written with the keys that they are read with."""

    model_config = ConfigDict(serialize_by_alias=True)


class FileMask(_Mask):
    """A mask file: a local path or an fsspec URL. Identity is that of its bits, not of its place.

    Like a trial's own data, it is looked for from the working directory, and must be the same file
    on every node.
    """

    file: str = Field(min_length=1)


class TrialMask(_Mask):
    """What another trial of the study changed.

    ``from`` says which: ``baseline`` is the baseline's cell, ``cell`` the one of the trial itself;
    both without a mask, and with ``where`` (dotted path -> value) on top, for transfer from another
    algorithm, task or learning rate. ``seed`` is the ``same`` as the trial's, the ``other`` that
    follows it among the study's seeds (the first follows the last), or a number.

    ``take`` says what of it: ``final`` (changed at the end), ``ever_changed`` (after any step) or
    a ``snapshot`` after ``step``, or after that ``fraction`` of its steps; it must be one of the
    trial's ``probe.snapshots``.
    """

    source: Literal["baseline", "cell"] = Field(alias="from")
    take: Take = Take.FINAL
    step: int | None = Field(None, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)
    seed: Annotated[Literal["same", "other"] | int, BeforeValidator(_same_other_or_seed)] = "same"
    where: Annotated[
        tuple[tuple[str, _Value | tuple[_Value, ...]], ...],
        BeforeValidator(_pairs),
        PlainSerializer(dict),
    ] = ()

    @model_validator(mode="after")
    def _says_when(self) -> "TrialMask":
        given = [name for name in ("step", "fraction") if getattr(self, name) is not None]
        if len(given) != (self.take is Take.SNAPSHOT):
            raise ValueError(
                f"take {self.take} has {' and '.join(given) or 'neither step nor fraction'}; a "
                "snapshot needs one of step and fraction, the others none"
            )
        refused = [path for path, _ in self.where if path.split(".")[0] in ("seed", "probe")]
        refused += [path for path, _ in self.where if f"{path}.".startswith("train.mask.")]
        if refused:
            raise ValueError(
                f"where changes {', '.join(refused)}, but says which cell without a mask is meant; "
                "give the seed as seed, and leave the others out"
            )
        return self

    def step_of(self, num_steps: int) -> int:
        """The step, of ``num_steps``, after which the mask is taken."""
        if self.fraction is not None:
            return step_at(self.fraction, num_steps)
        return self.step or num_steps


class LikeMask(_Mask):
    """Another mask with as many weights in each tensor as ``like``, ``pick`` says which.

    ``random``: drawn uniformly; ``random_within_magnitude``: with as many in each power of two of
    |w| of the base, too. ``mask_seed`` null follows the trial's seed, so that seeds stay
    independent. ``low_magnitude`` and ``high_magnitude``: the smallest and largest |w| of the base.
    ``principal`` and ``other``: the largest and smallest of its low-rank approximation.
    """

    like: "MaskConfig"
    pick: Pick = "random"
    mask_seed: int | None = Field(None, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _draws(self) -> "LikeMask":
        if self.mask_seed is not None and self.pick not in _DRAWN:
            raise ValueError(
                f"mask_seed {self.mask_seed} belongs to {' and '.join(_DRAWN)}; nothing of pick "
                f"{self.pick} is drawn: leave it out"
            )
        return self


class UnionMask(_Mask):
    """The weights that are in any of several masks."""

    union: Annotated[tuple["MaskConfig", ...], Field(min_length=2)]


class IntersectionMask(_Mask):
    """The weights that are in all of several masks."""

    intersection: Annotated[tuple["MaskConfig", ...], Field(min_length=2)]


_KEYS: dict[str, type[_Mask]] = {
    "file": FileMask, "from": TrialMask, "like": LikeMask, "union": UnionMask,
    "intersection": IntersectionMask,
}  # fmt: skip


def _member(value: Any) -> str | None:
    """Name of the class that a value is of, by the one key that it has alone."""
    if isinstance(value, _Mask):
        return type(value).__name__
    found = [key for key in _KEYS if key in value] if isinstance(value, Mapping) else []
    return _KEYS[found[0]].__name__ if len(found) == 1 else None


MaskConfig = Annotated[
    Annotated[FileMask, Tag("FileMask")]
    | Annotated[TrialMask, Tag("TrialMask")]
    | Annotated[LikeMask, Tag("LikeMask")]
    | Annotated[UnionMask, Tag("UnionMask")]
    | Annotated[IntersectionMask, Tag("IntersectionMask")],
    Discriminator(
        _member,
        custom_error_type="no_mask",
        custom_error_message=f"must be a mapping with one of the keys {', '.join(_KEYS)}",
    ),
]

Leaf = FileMask | TrialMask

for _made_of_others in (LikeMask, UnionMask, IntersectionMask):
    _made_of_others.model_rebuild()


@dataclass(frozen=True)
class Origin:
    """What a ``TrialMask`` refers to, in a study.

    Attributes:
        trial_id: of the trial whose mask it is.
        take: what of it.
        step: after which the mask is taken.
    """

    trial_id: str
    take: Take
    step: int


def parts(mask: "MaskConfig") -> tuple["MaskConfig", ...]:
    """What a mask is made of; nothing for a leaf."""
    if isinstance(mask, LikeMask):
        return (mask.like,)
    if isinstance(mask, UnionMask):
        return mask.union
    return mask.intersection if isinstance(mask, IntersectionMask) else ()


def leaves(mask: "MaskConfig | None") -> Iterator[Leaf]:
    """Masks that a mask is made of, at the last, in the order in which it lists them."""
    if isinstance(mask, Leaf):
        yield mask
    elif mask is not None:
        for part in parts(mask):
            yield from leaves(part)


def resolved(mask: "MaskConfig", leaf: Callable[[Leaf], Any]) -> dict[str, Any]:
    """A mask as plain data, with what ``leaf`` gives in place of each leaf."""
    if isinstance(mask, Leaf):
        given: dict[str, Any] = leaf(mask)
        return given
    if isinstance(mask, LikeMask):
        return {**mask.model_dump(mode="json"), "like": resolved(mask.like, leaf)}
    key = "union" if isinstance(mask, UnionMask) else "intersection"
    return {key: [resolved(part, leaf) for part in parts(mask)]}


_DEFAULTS: dict[str, Any] = {
    field.alias or name: field.default
    for model in _KEYS.values()
    for name, field in model.model_fields.items()
    if not field.is_required()
}


def label_parts(level: Mapping[str, Any]) -> tuple[str, list[Any], dict[str, Any]] | None:
    """How a mask is called, if a mapping is one: its name, what it is made of, and further words.

    What is left out and what is given as the default are called the same. The mapping need not be
    a valid mask.
    """
    found = [key for key in _KEYS if key in level]
    if len(found) != 1:
        return None
    key, own = found[0], level[found[0]]
    more = {
        k: v
        for k, v in level.items()
        if k != key and not (k in _DEFAULTS and v == _DEFAULTS[k]) and k != "where"
    }
    where = level.get("where") or {}
    more |= where if isinstance(where, Mapping) else {"where": where}
    if key == "file":
        return str(own).removesuffix(".mask.safetensors"), [], more
    if key == "from":
        more.pop("take", None)
        return str(level.get("take", "final")), [] if own == "baseline" else [own], more
    if key == "like":
        more.pop("pick", None)
        return str(level.get("pick", "random")), [own], more
    return key, list(own) if isinstance(own, list | tuple) else [own], more
