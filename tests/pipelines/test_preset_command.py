"""``rlsparse preset``, with stand-ins for the published pairs, which only the hub has."""

import json

import numpy as np
import pytest
import typer
from planted import Tensor, make_pair, write_folder
from typer.testing import CliRunner

from pipelines import preset_command
from rlsparse.errors import CheckpointError, ConfigError

ORPO = {"abs_1e-08": 0.7316, "abs_1e-07": 0.7318, "abs_1e-06": 0.7323, "abs_1e-05": 0.7694}


@pytest.fixture
def run(capsys):
    """Runs the command in this process; gives exit code and stdout."""

    def call(*arguments):
        app = typer.Typer()
        app.add_typer(preset_command.app, name="preset")
        result = CliRunner().invoke(app, ["preset", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout

    return call


@pytest.fixture
def orpo_like(tmp_path):
    """Two bf16 folders that differ as the table says of mistral-orpo-beta.

    Of 10,000 weights 7316 stay; the others move by just what their tolerance allows.
    """
    after = np.zeros(10_000, np.float32)
    after[7316:7318] = 9.9e-8
    after[7318:7323] = 9.9e-7
    after[7323:7694] = 9.9e-6
    after[7694:] = 9.9e-5
    folders = []
    for name, weights in (("before", np.zeros_like(after)), ("after", after)):
        bits = (weights.view(np.uint32) >> 16).astype(np.uint16)
        tensor = Tensor("bf16", (100, 100), bits)
        folders.append(write_folder(tmp_path / name, {"model.layers.0.mlp.up_proj.weight": tensor}))
    return folders


def test_a_pair_like_the_published_one_passes(run, orpo_like):
    before, after = orpo_like
    arguments = ("verify", "mistral-orpo-beta", "--before", before, "--after", after)
    code, out = run(*arguments)
    assert code == 0
    assert "mistral-orpo-beta agrees with what was published" in out
    line = next(line for line in out.splitlines() if line.startswith("abs_1e-05"))
    assert line.split() == ["abs_1e-05", "76.94", "76.94", "+0.00", "0.10", "pass"]
    code, out = run(*arguments, "--json")
    found = json.loads(out)
    assert (code, found["passed"]) == (0, True)
    assert {c["definition"]: c["ours"] for c in found["comparisons"]}.items() >= ORPO.items()


def test_a_side_in_fp32_is_compared_in_the_cast_of_the_preset(run, orpo_like, tmp_path):
    before, after = orpo_like
    bits = np.frombuffer((after / "model.safetensors").read_bytes()[-20_000:], "<u2")
    wide = Tensor("fp32", (100, 100), (bits.astype(np.uint32) << 16) + np.uint32(1))
    folder = write_folder(tmp_path / "wide", {"model.layers.0.mlp.up_proj.weight": wide})
    code, out = run("verify", "mistral-orpo-beta", "--before", before, "--after", folder)
    assert code == 0  # the last digit of fp32 is lost when rounded to bf16
    assert "agrees with what was published" in out


def test_another_pair_fails_with_exit_code_1(run, tmp_path):
    pair = make_pair(tmp_path, density=0.5)
    code, out = run("verify", "mistral-orpo-beta", "--before", pair.before, "--after", pair.after)
    assert code == 1
    assert "mistral-orpo-beta DIFFERS from what was published" in out
    assert sum(line.rstrip().endswith("FAIL") for line in out.splitlines()) == 4


def test_list(run):
    code, out = run("list")
    assert code == 0
    for name in ("tulu3-8b-dpo", "olmo2-1b-rlvr", "disputed-mistral-ppo"):
        assert f"\n{name} " in out
    rows = json.loads(run("list", "--json")[1])
    found = next(row for row in rows if row["name"] == "mistral-orpo-beta")
    assert found["published"] == ORPO


def test_what_cannot_be_verified(run, tmp_path):
    with pytest.raises(ConfigError, match=r"no preset 'tulu'; did you mean tulu3"):
        run("verify", "tulu")
    with pytest.raises(ConfigError, match=r"no repository is known .* give --before and"):
        run("verify", "disputed-mistral-ppo")
    with pytest.raises(CheckpointError, match="nowhere"):
        run("verify", "tulu3-8b-dpo", "--before", tmp_path / "nowhere", "--after", tmp_path)
