"""What a person reads while trials run."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.ledger import Ledger
from pipelines.progress import Progress
from pipelines.storage import Storage
from rlsparse.algorithm_config import SftConfig
from rlsparse.config import TrialConfig
from rlsparse.study import Trial


def trial(name: str, seed: int) -> Trial:
    config = TrialConfig(algorithm=SftConfig(), seed=seed)
    return Trial(name, config, 0, {}, "baseline", None)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Storage(str(tmp_path)))


def show(ledger: Ledger, console: Console) -> Progress:
    trials = [trial("a" * 12, 0), trial("b" * 12, 1)]
    with Progress(trials, num_done=3, ledger=ledger, console=console, num_slots=1) as progress:
        for name, error in (("a" * 12, None), ("b" * 12, "no [pairs]")):
            progress.started(name)
            progress.stepped(name, {"step": 7, "loss": 0.25})
            ledger.start(name, host="here", pid=1, versions={})
            if error:
                ledger.fail(name, error)
            else:
                ledger.finish(name)
            progress.ended(name)
    return progress


def test_plain_lines_where_there_is_no_terminal(ledger: Ledger) -> None:
    out = io.StringIO()
    progress = show(ledger, Console(file=out, width=40))
    assert out.getvalue().splitlines() == [
        "[4/5] finished sft s0 (aaaaaaaaaaaa) in 0 s, 1 left, about 0 s",
        "[5/5] failed sft s1 (bbbbbbbbbbbb) in 0 s: no [pairs], nothing left",
    ]
    assert progress.num_failed == 1
    assert progress.running == {}


def test_what_a_worker_tells_names_its_trial(ledger: Ledger) -> None:
    out = io.StringIO()
    show(ledger, Console(file=out, width=40)).noted("a" * 12, "goes on from step 7")
    assert out.getvalue().splitlines()[-1] == "sft s0 (aaaaaaaaaaaa): goes on from step 7"


def test_a_live_view_on_a_terminal(ledger: Ledger) -> None:
    out = io.StringIO()
    show(ledger, Console(file=out, force_terminal=True, width=120))
    assert "no [pairs]" in out.getvalue()
