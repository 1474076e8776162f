"""Records the golden files: ``python tests/record_golden.py``. Tests never write them.

``golden/trial_ids.json`` changes only when the identity of trials does, and then every study of an
earlier release starts from nothing: record it only on purpose.
"""

import json
from pathlib import Path

from rlsparse.config import TrialConfig
from rlsparse.identity import trial_id

TRIAL_IDS = Path(__file__).parent / "golden" / "trial_ids.json"

CASES: dict[str, dict] = {
    "grpo_defaults": {"algorithm": {"name": "grpo"}},
    "sft_defaults": {"algorithm": {"name": "sft"}},
    "dpo_seed_3": {"algorithm": {"name": "dpo", "beta": 0.25}, "seed": 3},
    "grpo_of_a_study": {
        "algorithm": {"name": "grpo", "kl_coef": 0.04},
        "task": {"num_eval_problems": 128},
        "train": {"num_steps": 24, "learning_rate": 3e-6, "max_grad_norm": None},
        "probe": {"snapshots": [6, 12]},
    },
    "ppo_defaults": {"algorithm": {"name": "ppo"}},
    "kto_with_a_file_on_a_data_set": {
        "algorithm": {"name": "kto", "data": "kto.jsonl"},
        "task": {"name": "dataset", "source": "problems.csv", "grader": "math"},
        "train": {"optimizer": "sgd-momentum", "trainable_modules": ["q", "v"], "data_seed": 1},
    },
}


def trial_ids() -> dict[str, str]:
    """The identity of each case on one base, data version and machine setting."""
    return {
        name: trial_id(
            TrialConfig.model_validate(case),
            replicate=0,
            num_threads=1,
            num_workers=1,
            base_fingerprint="0" * 64,
            data_version="1",
        )
        for name, case in CASES.items()
    }


if __name__ == "__main__":
    TRIAL_IDS.write_text(json.dumps(trial_ids(), indent=2) + "\n", encoding="utf-8")
    print(f"recorded {TRIAL_IDS}")
