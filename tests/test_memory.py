"""Running out of memory: one line that says where and what to lower, and the process goes on."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Base

from rlsparse.config import TrialConfig
from rlsparse.errors import TrialError
from rlsparse.memory import is_out_of_memory, peak_bytes, release, tells_out_of_memory

# The limit leaves 200 MB: the first trial's pass does not fit, the second one's does.
PROCESS = """
import gc, resource, sys, weakref
from pathlib import Path
import torch
from rlsparse import train
from rlsparse.config import TrialConfig
from rlsparse.errors import TrialError
large, small, base, fingerprint, out = sys.argv[1:]
models, load = [], train.load_model
def watched(*args, **kwargs):
    models.append(weakref.ref(model := load(*args, **kwargs)))
    return model
train.load_model = watched
def run(config, name):
    return train.train_trial(TrialConfig.model_validate_json(config), trial_id=name,
        base_dir=Path(base), base_fingerprint=fingerprint, out_dir=Path(out) / name)
run(small, "0")
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmSize" in line)
resource.setrlimit(resource.RLIMIT_AS, (taken * 1024 + 200_000_000,) * 2)
try:
    run(large, "1")
except TrialError as error:
    print(error)
gc.collect()
print(sum(model() is not None for model in models))
print(run(small, "2")["score_after"] == run(small, "3")["score_after"])
"""


def test_a_process_without_memory_says_so_and_goes_on(base: Base, tiny_trial, tmp_path) -> None:
    small = tiny_trial("sft", num_steps=1)
    task = {"num_train_problems": 768, "num_eval_problems": 16}
    large = tiny_trial("sft", num_steps=1, batch_size=768, precision="fp32", task=task)
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, large.model_dump_json(), small.model_dump_json(),
         str(base.path), base.fingerprint, str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, num_kept, goes_on = done.stdout.splitlines()
    assert said.startswith("out of memory while training (the process had ")
    assert "allocate" in said
    assert "train.gradient_accumulation_steps 1 (a pass takes 768 sequences)" in said
    assert (num_kept, goes_on) == ("0", "True")


CONFIG = TrialConfig.model_validate({"algorithm": {"name": "grpo"}})
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("training", r"raise train\.gradient_accumulation_steps 1 .*fewer than 64 completions"),
        ("scoring", r"lower task\.num_eval_problems 512"),
        ("measuring the distance to the base", r"task\.max_completion_tokens 6"),
        ("loading the base", "smaller model.source, or less than train.precision bf16-mixed"),
    ],
)
def test_each_phase_has_its_remedy(error: BaseException, phase: str, remedy: str) -> None:
    @tells_out_of_memory(phase)
    def work(config: TrialConfig) -> None:
        raise error

    @tells_out_of_memory("training")
    def outer(config: TrialConfig) -> None:
        work(config)

    with pytest.raises(TrialError, match=f"out of memory while {phase} .*{remedy}") as raised:
        outer(CONFIG)
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value.__context__ is None  # it would hold the frames, and their tensors


def test_the_larger_of_what_is_scored_is_to_be_lowered() -> None:
    task = CONFIG.task.model_copy(update={"num_validation_problems": 600})

    @tells_out_of_memory("scoring")
    def work(config: TrialConfig) -> None:
        raise MemoryError

    with pytest.raises(TrialError, match=r"lower task\.num_validation_problems 600 \(256 are"):
        work(CONFIG.model_copy(update={"task": task}))


def test_other_errors_stay_as_they_are() -> None:
    @tells_out_of_memory("training")
    def work(config: TrialConfig) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit") as raised:
        work(CONFIG)
    assert type(raised.value) is RuntimeError
    assert not is_out_of_memory(TrialError("can't allocate memory"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts from the process's start")
def test_a_trial_does_not_begin_with_the_peak_and_the_memory_of_the_one_before() -> None:
    """In small pieces between which one is kept, as a trial leaves them: glibc keeps them all."""
    pieces = [torch.ones(20_000) for _ in range(4000)]
    kept, high = pieces[-1], peak_bytes()
    del pieces
    before = resident()
    release()
    assert resident() < before - 250e6
    assert peak_bytes() < high - 250e6
    assert kept.sum() == 20_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
