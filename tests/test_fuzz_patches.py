"""Whatever is in a file, weights are right or it is refused; see ``fuzz_patches``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz_patches
import pytest


@pytest.mark.parametrize("what", fuzz_patches.FUZZERS)
def test_damage_is_refused_or_does_no_harm(tmp_path, what):
    """In a process of its own, so that a kernel that reads beyond its memory is a failure."""
    script = Path(fuzz_patches.__file__)
    places = os.pathsep.join(map(str, script.parents[1::-1]))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", script, what, tmp_path],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    seen = json.loads(done.stdout)
    assert seen["refused"] > fuzz_patches.NUM_EXAMPLES / 2
