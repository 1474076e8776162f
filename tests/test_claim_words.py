"""Numbers and places as verdicts say them."""

import math

import pandas as pd
import pytest
from test_effects import make_study, trials_of

from rlsparse.claim_config import At
from rlsparse.claims.words import interval, number, place, scope


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.7744, "1.77"), (1.7, "1.70"), (0.0928, "0.0928"), (-0.5, "-0.500"), (12.34, "12.3"),
        (1234.5, "1234"), (0.0012, "0.00120"), (1.5e-6, "1.50e-06"), (3e7, "3.00e+07"),
        (0.0, "0"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


def test_intervals_that_are_not_known_are_left_out() -> None:
    assert interval(1.0, 0.9, 1.1) == "1.00 [0.900, 1.10]"
    assert interval(1.0, math.nan, math.nan) == "1.00"


def test_places() -> None:
    found = [place(at) for at in (None, At(step=10), At(score=0.5), At(score="common"))]
    assert found == ["", "at step 10", "at score 0.5", "at equal score"]
    assert [place(At(kl=0.02)), place(At(kl="common"))] == ["at KL 0.02", "at equal KL"]


def test_a_scope_lists_what_varies_among_its_runs() -> None:
    study = make_study(factors={"train.learning_rate": [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]})
    configs = [trial.config.model_dump(mode="json") for trial in trials_of(study)]
    some = pd.DataFrame({"config": [c for c in configs if c["train"]["learning_rate"] < 2.5e-5]})
    assert "learning rate 1e-05 and 2e-05, 20 steps" in scope(study, some, "bf16", At(step=5))
    assert "bf16-mixed, at step 5, view bf16; checks" in scope(study, some, "bf16", At(step=5))
    every = pd.DataFrame({"config": configs})
    assert "1e-05 and 2e-05 and 3e-05 and 2 more" in scope(study, every, "bf16", None)
    none = pd.DataFrame({"config": []})
    assert scope(study, none, "bf16", None).startswith("base tiny, task chain_sum, learning rate")
