"""Records golden files: ``python tests/record_golden.py trial_ids`` or ``patches``; tests never do.

``golden/trial_ids.json`` changes only when the identity of trials does, and then every study of an
earlier release starts from nothing: record it only on purpose.

``golden/*.patch.safetensors`` are patches that all later releases must read. They are recorded anew
only with a new ``rlsparse.patch.file.FORMAT_VERSION``.
"""

import json
import sys
from pathlib import Path

import golden_patches

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


def record_patches() -> None:
    """Write the golden patches, one of each coding and compression."""
    for way in golden_patches.WAYS:
        file = golden_patches.golden_file(*way)
        golden_patches.write_golden(file, *way)
        print(f"recorded {file}")


def record_trial_ids() -> None:
    """Write the golden identities."""
    TRIAL_IDS.write_text(json.dumps(trial_ids(), indent=2) + "\n", encoding="utf-8")
    print(f"recorded {TRIAL_IDS}")


RECORDERS = {"trial_ids": record_trial_ids, "patches": record_patches}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in RECORDERS:
        sys.exit(f"usage: python tests/record_golden.py {'|'.join(RECORDERS)}")
    RECORDERS[sys.argv[1]]()
