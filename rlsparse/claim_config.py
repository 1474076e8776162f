"""Claims as a study file states them: what is claimed, of which runs, and by which margin.

The rules that decide them are in ``claims``.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rlsparse.levels import Scalar, canonical_path
from rlsparse.variants import Config

Null = Literal["uniform", "tensor", "magnitude", "update_size", "margins", "surrogate"]
"""What the overlap of two masks is compared with; see ``overlap.NULLS``, and ``surrogate``: the
overlap of real runs with runs whose reward carries no information."""


def _one_or_several(value: object) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


_Nulls = Annotated[
    Annotated[Null, Tag("one")] | Annotated[tuple[Null, ...], Field(min_length=1), Tag("several")],
    Discriminator(_one_or_several),  # else what is wrong would be told once for each
]


class At(Config):
    """Where along training runs are compared; the last snapshot when absent.

    ``step``: the snapshot of that step. ``score`` and ``kl``: the logarithm of density is
    interpolated linearly between snapshots where the held-out score, or the KL divergence to the
    base, first reaches this value; ``common`` is the highest one that both runs of a matched pair
    reach.
    """

    step: int | None = Field(None, ge=1)
    score: Literal["common"] | float | None = None
    kl: Literal["common"] | Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> "At":
        if sum(value is not None for value in (self.step, self.score, self.kl)) != 1:
            raise ValueError("`at` takes exactly one of step, score, kl")
        return self


class ClaimBase(Config):
    """What all claims share.

    ``response`` is ``sparsity.<definition>[@<view>]``, ``score_after``, ``score_gain``,
    ``score_validation``, ``kl_final``, ``failed``, ``overlap.<definition>[@<view>]`` or
    ``identical_replicates``.
    ``where``, ``a`` and ``b`` select runs by dotted configuration path (``algorithm`` and ``task``
    are short for ``algorithm.name`` and ``task.name``) or by ``role``, ``control``, ``seed``,
    ``replicate``; controls and surrogates are left out unless asked for, see ``study.left_out``.
    """

    id: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]*$", description="lower-case letters, digits and hyphens"
    )
    source: str = ""
    response: str = "sparsity.bitwise"
    where: dict[str, Scalar] = Field(default_factory=dict)
    at: At | None = None
    note: str = ""

    @property
    def varied(self) -> str:
        """Path in which the runs that the claim compares differ, beside its selectors, or ""."""
        return ""

    @property
    def sides(self) -> dict[str, dict[str, Scalar]]:
        """What selects the claim's runs, by the field that says so: one selector, or several."""
        own: dict[str, Scalar] = {}
        if self.response == "identical_replicates":
            own = {"control": "same_seed"}
        return {"where": {**own, **self.where}}

    @property
    def compared(self) -> tuple[str, ...]:
        """All paths in which the runs that the claim compares are meant to differ."""
        return (self.varied,) if self.varied else ()


class ExactClaim(ClaimBase):
    """An identity: every selected run has exactly this value, under every definition."""

    kind: Literal["exact"]
    value: float = 1.0


class WithinClaim(ClaimBase):
    """The mean over runs lies inside [low, high]."""

    kind: Literal["within"]
    low: float
    high: float


class ReproducesClaim(ClaimBase):
    """The mean over runs lies within ``margin`` of ``value``, a published number.

    Both on the scale of the response: fractions of 1, not percentages.
    """

    kind: Literal["reproduces"]
    value: float
    margin: float = Field(gt=0)


class SidesClaim(ClaimBase):
    """What claims share that compare sides, ``a`` with others, matched by seed.

    With ``tune``, the path of a factor, the runs of a side that are alike but for it and the seed
    are compared at one level: that with the best mean ``score_validation`` at the
    ``tuning_seeds``, which are not compared themselves. See ``claims.tuning``.
    """

    a: dict[str, Scalar]
    b: dict[str, Scalar]
    tune: str | None = None
    tuning_seeds: tuple[int, ...] = ()

    @property
    def given(self) -> dict[str, dict[str, Scalar]]:
        """What each side adds to ``where``."""
        return {"a": self.a, "b": self.b}

    @property
    def sides(self) -> dict[str, dict[str, Scalar]]:
        """All of them."""
        return {name: {**self.where, **side} for name, side in self.given.items()}

    @property
    def compared(self) -> tuple[str, ...]:
        """What any side names, and what is tuned."""
        named = [path for side in self.given.values() for path in side]
        return (*named, *filter(None, [self.tune]))

    @model_validator(mode="after")
    def _both_or_neither(self) -> "SidesClaim":
        if (self.tune is None) == bool(self.tuning_seeds):
            raise ValueError(
                "tune and tuning_seeds go together: the factor whose level is chosen, and the "
                "seeds at which it is; give both or neither"
            )
        return self


class GreaterClaim(SidesClaim):
    """Matched by seed, the response of ``a`` exceeds that of ``b``.

    ``margin`` is an odds ratio for responses that are fractions, else a difference; the default
    asks for any excess.
    """

    kind: Literal["greater"]
    margin: float | None = None


class EquivalentClaim(ClaimBase):
    """No level of ``factor`` moves density by more than the ratio ``margin`` (2x one-sided test).

    Decided only if the factor acted and the positive control moved the response by more.
    """

    kind: Literal["equivalent"]
    factor: str
    margin: float = Field(1.25, gt=1)

    @property
    def varied(self) -> str:
        """The factor."""
        return self.factor


class OverlapClaim(ClaimBase):
    """What claims about the overlap of masks of runs that differ in ``between`` share.

    ``null`` names one null, or several: the claim must hold against the strongest of them, the one
    that leaves the least. ``module`` or ``tensor`` restrict it to some weights.
    """

    response: str = "overlap.bitwise"
    between: str = "seed"
    null: _Nulls = "magnitude"
    margin: float = Field(1.1, ge=1)
    module: str | None = None
    tensor: str | None = None

    @property
    def varied(self) -> str:
        """What the runs of a pair differ in."""
        return canonical_path(self.between)

    @property
    def nulls(self) -> tuple[Null, ...]:
        """The nulls named, as a tuple."""
        return (self.null,) if isinstance(self.null, str) else self.null

    @model_validator(mode="after")
    def _one_part(self) -> "OverlapClaim":
        if self.module is not None and self.tensor is not None:
            raise ValueError("an overlap claim takes at most one of module, tensor")
        return self


class AboveNullClaim(OverlapClaim):
    """Masks overlap more than ``margin`` times what every named null expects."""

    kind: Literal["above_null"]


class BelowNullClaim(OverlapClaim):
    """Masks overlap less than 1 / ``margin`` times what every named null expects."""

    kind: Literal["below_null"]


class RecoversClaim(SidesClaim):
    """``a`` (a trained subnetwork) scores as well as ``b`` (all weights), and better than random.

    Non-inferior: a - b above -``margin``, a difference of scores. Specific: a above every cell of
    ``random``, the same training of random masks: every tuned one with ``tune``, else each at each
    learning rate that was tried.
    """

    kind: Literal["recovers"]
    response: str = "score_after"
    random: dict[str, Scalar]
    margin: float = Field(0.02, gt=0)

    @property
    def given(self) -> dict[str, dict[str, Scalar]]:
        """All three sides."""
        return {**super().given, "random": self.random}


class MonotoneClaim(ClaimBase):
    """From each level of ``factor`` to the next the response goes in one direction.

    Levels are in order of their numbers, or as the study lists them.
    """

    kind: Literal["monotone"]
    factor: str
    direction: Literal["increasing", "decreasing"]

    @property
    def varied(self) -> str:
        """The factor."""
        return self.factor


class InteractionClaim(ClaimBase):
    """The effect of ``factor`` depends on the level of ``by``.

    ``margin``: the ratio of odds ratios (for responses that are no fractions, the difference of
    differences) that counts as one; refuted if all lie inside it.
    """

    kind: Literal["interaction"]
    factor: str
    by: str
    margin: float | None = None

    @property
    def varied(self) -> str:
        """The one of the two that is the reward, if any: it lets surrogates in."""
        return self.by if self.by in ("algorithm", "algorithm.reward") else self.factor

    @property
    def compared(self) -> tuple[str, ...]:
        """Both factors."""
        return (self.factor, self.by)


class AssociatedClaim(ClaimBase):
    """Over runs of a seed, the response rises (or falls) with ``on``, another response.

    The slope is per unit of ``on``, both on the scale of their contrasts; the claim asks for one
    beyond ``margin`` in the direction of ``sign``.
    """

    kind: Literal["associated"]
    on: str
    sign: Literal["positive", "negative"] = "positive"
    margin: float = Field(0.0, ge=0)


Claim = Annotated[
    ExactClaim
    | ReproducesClaim
    | WithinClaim
    | GreaterClaim
    | EquivalentClaim
    | AboveNullClaim
    | BelowNullClaim
    | RecoversClaim
    | MonotoneClaim
    | InteractionClaim
    | AssociatedClaim,
    Field(discriminator="kind"),
]
