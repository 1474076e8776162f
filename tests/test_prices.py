"""CPU time is counted once, under the name that it was spent on."""

import contextlib

import pytest

from rlsparse import prices as module
from rlsparse import tables
from rlsparse.prices import Prices


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test lets pass."""
    now = [100.0]
    monkeypatch.setattr(module.time, "process_time", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


def test_the_inner_name_pays(clock):
    prices = Prices()
    clock(1)
    with prices.of("steps"):
        clock(2)
        with prices.of("windows"):
            clock(4)
        clock(8)
    clock(16)
    with contextlib.suppress(KeyError), prices.of("windows"):
        clock(32)
        raise KeyError
    clock(64)
    assert prices.columns() == {"probe_steps_cpu_s": 10, "probe_windows_cpu_s": 36}


def test_a_trial_keeps_the_price_of_what_it_asked_for(trained, tiny_trial, base):
    plain = trained(tiny_trial(), base).summary
    parts = {"snapshots": [1], "k_steps": [2], "step_masks": True, "step_patches": True,
             "casts": True, "update_interval": 1}  # fmt: skip
    asked = trained(tiny_trial(probe=parts), base).summary
    basic = {"probe_steps_cpu_s", "probe_snapshots_cpu_s", "probe_scores_cpu_s"}
    extra = {
        f"probe_{name}_cpu_s"
        for name in ("windows", "step_masks", "step_patches", "casts", "updates")
    }
    for summary, names in ((plain, basic), (asked, basic | extra)):
        found = {name: value for name, value in summary.items() if name.startswith("probe_")}
        assert set(found) == names
        assert min(found.values()) > 0
        assert sum(found.values()) < summary["cpu_s"]
    known = {name for name in tables.SCHEMAS["trials"].names if name.startswith("probe_")}
    assert known == basic | extra
