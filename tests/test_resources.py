"""What workers may share, is said before anything runs; who has one worker sees no difference."""

import pytest
import small_study
from pydantic import ValidationError

from rlsparse.config import TrialConfig
from rlsparse.errors import ConfigError
from rlsparse.resources import Resources
from rlsparse.study import expand


def trial(name: str, batch_size: int = 16, accumulation: int = 1, **more: object) -> TrialConfig:
    train = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    return TrialConfig.model_validate({"algorithm": {"name": name, **more}, "train": train})


def test_an_older_name_of_the_gpus_is_understood():
    assert Resources.model_validate({"num_gpus": 0.5}) == Resources(gpus_per_worker=0.5)
    assert Resources().model_dump() == {
        "num_threads": 1, "num_workers": 1, "gpus_per_worker": 0.0, "strategy": "ddp",
        "max_failures": 2, "save_interval_s": 600.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"strategy": "fsdp"}, "num_workers is 1; raise it"),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, "have one each, or none"),
        ({"num_workers": 2, "gpus_per_worker": 2}, "give 1 or 0"),
        ({"gpus_per_worker": 4}, "num_workers for more GPUs"),
        ({"num_workers": 0}, "greater than or equal to 1"),
        ({"num_workers": 2, "strategy": "zero"}, "'ddp' or 'fsdp'"),
    ],
)
def test_what_workers_cannot_be(given, said):
    with pytest.raises(ValidationError, match=said):
        Resources.model_validate(given)


TWO, THREE = Resources(num_workers=2), Resources(num_workers=3)
FSDP = Resources(num_workers=2, strategy="fsdp")


@pytest.mark.parametrize(
    ("resources", "config", "said"),
    [
        (THREE, trial("sft"), "= 16 must be a multiple of num_workers 3"),
        (
            TWO,
            trial("sft", batch_size=6, accumulation=2),
            "= 3 must be a multiple of num_workers 2",
        ),
        (TWO, trial("kto", batch_size=2), "at least 4 for kto"),
        (
            TWO,
            trial("grpo", batch_size=8),
            "num_workers = 4) must be a multiple of algorithm.num_g",
        ),
        (FSDP, trial("ppo"), "strategy fsdp does not train ppo"),
        (FSDP, trial("prime"), "strategy fsdp does not train prime"),
        (FSDP, trial("grpo", generation={"engine": "vllm"}), "does not hand vLLM its weights"),
        (FSDP, trial("sft").model_copy(update={"keep_checkpoints": True}), "keeps no checkpoints"),
    ],
)
def test_trials_that_do_not_split_are_refused(resources, config, said):
    assert said in (resources.conflict(config) or "")


@pytest.mark.parametrize(
    ("resources", "config"),
    [
        (Resources(), trial("kto", batch_size=3)),
        (TWO, trial("kto", batch_size=4)),
        (TWO, trial("grpo")),
        (TWO, trial("grpo", batch_size=8, steps_per_rollout=2)),
        (FSDP, trial("grpo")),
        (FSDP, trial("dpo")),
    ],
)
def test_trials_that_split_are_not(resources, config):
    assert resources.conflict(config) is None


def test_the_error_names_the_line(tmp_path):
    text = small_study.STUDY.replace("seeds:", "resources:\n  num_workers: 3\nseeds:")
    line = text.splitlines().index("resources:") + 1
    with pytest.raises(ConfigError, match=rf"why\.yaml:{line}: resources: .* num_workers 3"):
        small_study.load(tmp_path, text)


def test_only_several_workers_and_how_they_train_make_other_trials(tmp_path):
    def names(resources: str) -> list[str]:
        text = small_study.STUDY.replace("{name: grpo}", "{name: sft}")
        study = small_study.load(tmp_path, text.replace("seeds:", f"{resources}\nseeds:"))
        trials = expand(study, fingerprint=lambda model: "f", data_version=lambda config: "1")
        return [trial.trial_id for trial in trials]

    found = [
        names(""),
        names("resources: {num_workers: 2}"),
        names("resources: {num_workers: 2, strategy: fsdp}"),
    ]
    assert len({name for some in found for name in some}) == sum(map(len, found))
    assert names("resources: {num_workers: 1, gpus_per_worker: 1, strategy: ddp}") == found[0]
