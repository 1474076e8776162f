"""``rlsparse diff``: what it prints and writes, and how it says no."""

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from planted import Pair, make_pair, random_tensor, write_folder
from rich.progress import Progress

from pipelines import diff_command
from rlsparse import spectrum, tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.diff import diff_checkpoints
from rlsparse.errors import CheckpointError, ConfigError
from rlsparse.report.diff_rows import json_content
from rlsparse.report.formats import percent

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), density=0.2)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; gives stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[str, str]:
        app = typer.Typer()
        app.command()(diff_command.diff)
        app([str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr()

    return call


def test_piped_output_is_plain_and_on_stdout_alone(pair: Pair, run: Run) -> None:
    out, err = run(pair.before, pair.after)
    assert err == ""
    assert out.isascii(), "no boxes, no colours"
    assert "\x1b" not in out
    changed = np.concatenate(list(pair.changed.values()))
    assert f"compared {changed.size:,} weights" in out
    assert re.search(rf"^unchanged bitwise +{percent(1 - changed.mean())} *$", out, re.MULTILINE)
    for definition in DEFINITIONS:
        assert f"unchanged {definition}" in out
    q = pair.changed["model.layers.0.self_attn.q_proj.weight"]
    assert re.search(rf"^q +256 +{percent(1 - q.mean())} ", out, re.MULTILINE)
    assert re.search(r"^norm +32 +100 % \(exact\) +100 % \(exact\) +0 +-", out, re.MULTILINE)
    assert re.search(r"^0 +640 ", out, re.MULTILINE), "layers are without their norms"
    assert "q_proj" not in out, "no line per tensor unless asked for"


def test_per_tensor_prints_each(pair: Pair, run: Run) -> None:
    out, _ = run(pair.before, pair.after, "--per-tensor")
    for name, changed in pair.changed.items():
        assert re.search(
            rf"^{re.escape(name)} +{changed.size:,} +{re.escape(percent(1 - changed.mean()))} ",
            out, re.MULTILINE,
        )  # fmt: skip


def test_json_on_stdout_is_alone_there(pair: Pair, run: Run) -> None:
    out, err = run(pair.before, pair.after, "--json", "-")
    expected = json_content(diff_checkpoints(pair.before, pair.after), None)
    assert json.loads(out) == json.loads(json.dumps(expected))
    assert err == ""


def test_json_and_folder_are_written_beside_the_tables(
    pair: Pair, run: Run, tmp_path: Path
) -> None:
    out, _ = run(
        pair.before, pair.after, "--json", tmp_path / "d.json", "--out", tmp_path / "out",
        "--spectrum", "exact",
    )  # fmt: skip
    assert f"xdg-open {tmp_path / 'out' / 'index.html'}" in out
    assert re.search(r"^module +matrices +rank ", out, re.MULTILINE)
    assert "1 = no preference" in out
    said = json.loads((tmp_path / "d.json").read_text())
    assert said == json.loads((tmp_path / "out" / "diff.json").read_text())
    matrices = [name for name, tensor in pair.tensors_before.items() if len(tensor.shape) == 2]
    spectra = tables.read(tmp_path / "out" / "spectra.parquet", "spectra").to_pylist()
    updates = [row for row in spectra if row["kind"] == "update"]
    assert [row["tensor"] for row in updates] == sorted(matrices)
    assert {row["method"] for row in updates} == {"exact"}
    assert len(said["spectra"]) == 2 * len(matrices)
    deltas = tables.read(tmp_path / "out" / "tensor_deltas.parquet", "tensor_deltas")
    assert sum(deltas["num_elements"].to_pylist()) == said["num_elements"]
    assert (tmp_path / "out" / "base_tensors.parquet").is_file()


def test_every_view_has_a_column(pair: Pair, run: Run) -> None:
    out, _ = run(pair.before, pair.after, "--cast", "bfloat16", "--cast", "fp8_e4m3")
    assert re.search(r"^definition +bf16 +fp8_e4m3", out, re.MULTILINE)
    views = diff_checkpoints(pair.before, pair.after, casts=["bf16", "fp8_e4m3"]).to_json()["views"]
    numbers = [percent(views[view]["sparsity"]["abs_1e-04"]) for view in ("bf16", "fp8_e4m3")]
    assert re.search(rf"^unchanged abs_1e-04 +{numbers[0]} +{numbers[1]}", out, re.MULTILINE)


def test_flags_of_the_published_script(pair: Pair, run: Run) -> None:
    plain, _ = run(pair.before, pair.after, "--cast", "bf16")
    flags = ("--sft_model", pair.before, "--rl_model", pair.after, "--torch_dtype", "bfloat16")
    assert run(*flags) == (plain, "")


def test_alias_matches_renamed_tensors(pair: Pair, run: Run, tmp_path: Path) -> None:
    renamed = {f"actor.net.{name}": tensor for name, tensor in pair.tensors_after.items()}
    after = write_folder(tmp_path / "renamed", renamed)
    out, _ = run(pair.before, after, "--alias", "actor.net.=")
    assert f"compared {sum(t.bits.size for t in renamed.values()):,} weights" in out
    assert f"{len(renamed)} tensors compared under another name (actor.net." in out
    assert "and 1 more)" in out


def test_what_was_not_compared_is_said(pair: Pair, run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    after = dict(pair.tensors_after)
    after["extra.weight"] = random_tensor(rng, "bf16", (4, 4))
    embeddings = after["model.embed_tokens.weight"]
    after["model.embed_tokens.weight"] = random_tensor(rng, "bf16", (40, embeddings.shape[1]))
    out, _ = run(pair.before, write_folder(tmp_path / "after", after))
    assert f"  only after: {3 * 16 + 16} after (extra.weight)" in out
    assert "  1 tensor compared in their common rows (model.embed_tokens.weight)" in out


def test_names_are_printed_as_they_are(run: Run, tmp_path: Path) -> None:
    tensor = random_tensor(np.random.default_rng(0), "bf16", (4, 4))
    names = ("[red]a[/red]:smile:", "[bold]gone")
    sides = [
        write_folder(tmp_path / side, dict.fromkeys(names[:number], tensor))
        for side, number in (("before", 2), ("after", 1))
    ]
    out, _ = run(*sides, "--per-tensor")
    assert re.search(r"^\[red\]a\[/red\]:smile: +16 ", out, re.MULTILINE)
    assert "only before: 16 before ([bold]gone)" in out


# --- mistakes --------------------------------------------------------------------------------

MISTAKES = {
    "nothing given": ([], "BEFORE is missing; usage: rlsparse diff BEFORE AFTER"),
    "one given": (["a"], "AFTER is missing"),
    "given twice": (["a", "b", "--sft_model", "c"], "BEFORE is given twice, also as --sft_model c"),
    "tolerances": (["a", "b", "--tolerances", "1e-5"], "--tolerances is not needed: all are"),
    "alias": (["a", "b", "--alias", "x"], "--alias x: must be AFTER_PREFIX=BEFORE_PREFIX"),
    "alias twice": (["a", "b", "--alias", "x=y", "--alias", "x=z"], "names a prefix twice: x=y"),
    "json": (["a", "b", "--json", "no/d.json"], "cannot write no/d.json: no such folder"),
    "json in a folder that is a file": (["a", "b", "--json", "full/x/d.json"], "no such folder"),
    "empty json": (["a", "b", "--json", ""], "--json is empty; give a file, or - for"),
    "json is a folder": (
        ["a", "b", "--json", "full"], "cannot write full: it is a folder; give another --json"
    ),
    "json and new folder": (["a", "b", "--json", "full", "--out", "new"], "it is a folder"),
    "json is the new folder": (["a", "b", "--json", "n", "--out", "./n"], "it is a folder"),
    "json where nothing can be": (["a", "b", "--json", "/proc/d.json"], "cannot write /proc/d"),
    "folder where nothing can be": (
        ["a", "b", "--out", "/proc/nope/x"], "cannot write /proc/nope/x: "
    ),
    "folder in a file": (["a", "b", "--out", "full/x/y"], "cannot write full/x/y: Not a directory"),
    "long name": (["a", "b", "--out", "n" * 300], "File name too long; give a new folder to --out"),
    "full folder": (["a", "b", "--out", "full"], "--out full exists and is not an empty folder"),
    "a file": (["a", "b", "--out", "full/x"], "--out full/x exists and is not an empty folder"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_any_work(
    mistake: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("kept")
    monkeypatch.setattr(diff_command, "_measure", None)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "x"]


def test_the_working_folder_is_not_replaced(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="give a new one"):
        run("a", "b", "--out", ".")


def test_json_on_a_full_disk_is_one_clear_line(pair: Pair, run: Run) -> None:
    with pytest.raises(ConfigError, match=r"cannot write /dev/full: No space .*another --json"):
        run(pair.before, pair.after, "--json", "/dev/full")


@pytest.mark.parametrize("flag", ["--cast", "--torch_dtype"])
@pytest.mark.parametrize("name", ["", "bf17", "stored"])
def test_formats_that_are_none_are_refused(flag: str, name: str, pair: Pair, run: Run) -> None:
    with pytest.raises(CheckpointError, match=f"unknown number format '{name}'; choose of fp32, "):
        run(pair.before, pair.after, flag, name)


def test_help_names_what_can_be_given(run: Run) -> None:
    out, _ = run("--help")
    said = re.sub(r"[\s│]+", " ", out)
    assert "fp32, bf16, fp16, fp8_e4m3" in said
    assert "Checkpoint to compare with." in said
    assert "Checkpoint or patch after it." in said
    for method in ("exact: ", "auto: "):
        assert method in said


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernels get a pair of holes that keeps them busy long enough to be interrupted."""
    num_elements = 2**33
    entry = {"dtype": "BF16", "shape": [num_elements], "data_offsets": [0, 2 * num_elements]}
    header = json.dumps({"a": entry}).encode()
    for side in ("before", "after"):
        with (tmp_path / f"{side}.safetensors").open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(stream.tell() + 2 * num_elements)
    there = set(tmp_path.iterdir())
    # The child reports its own progress, so that the signal comes in the middle of the work.
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pipelines import cli, diff_command
def tell(done, total):
    os.write(1, b".")
class Told:
    def __enter__(self):
        return tell
    def __exit__(self, *error):
        pass
diff_command.progress = lambda label: Told()
sys.argv = ["rlsparse", "diff", "before.safetensors", "after.safetensors", "--threads", "1",
            "--out", "out", "--json", "d.json"]
cli.main()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.read(1) == b"."
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=30)
        finally:
            child.kill()
    assert err.decode() == "rlsparse: interrupted; nothing was written\n"
    assert child.returncode == 130
    assert set(tmp_path.iterdir()) == there


# --- weight and progress ---------------------------------------------------------------------


def test_json_is_light(pair: Pair) -> None:
    """The result for machines needs no library of plots, tables or training."""
    code = f"""
import sys, typer
from pipelines.diff_command import diff
assert "numpy" not in sys.modules, "the module itself is light"
app = typer.Typer()
app.command()(diff)
app([{str(pair.before)!r}, {str(pair.after)!r}, "--json", "-"], standalone_mode=False)
heavy = {{"torch", "ray", "mlflow", "pandas", "scipy", "matplotlib", "jinja2", "pyarrow"}}
sys.exit(", ".join(heavy & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == ""
    assert json.loads(result.stdout)["num_elements"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("limit", [0, 10**12])
def test_progress_is_shown_on_a_terminal_if_the_work_is_worth_it(
    limit: int, pair: Pair, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(diff_command, "PROGRESS_BYTES", limit)
    out, _ = run(pair.before, pair.after, "--json", "-")
    assert json.loads(out)["num_elements"]
    if limit:
        assert terminal.getvalue() == ""
    else:
        assert re.search(r"compare .*bytes|compare .*kB", terminal.getvalue())


def test_progress_of_spectra_starts_at_once_and_weighs_matrices(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 x 16 and 64 x 32, the first is a seventeenth of the work; unchanged ones are none."""
    shapes = {"a": (16, 16), "a.norm": (90, 90), "b": (64, 32), "c": (9,), "d": (8, 8)}
    pair = make_pair(tmp_path, density=0.2, shapes=shapes)
    terminal, shown = Terminal(), []
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    measure = spectrum.measure_spectrum

    def observed(*arguments: Any, **settings: Any) -> spectrum.Spectrum:
        bars[-1].refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
        shown.append(re.findall(r"(spectrum, matrix \d of \d)\D*(\d+)%", text)[-1])
        return measure(*arguments, **settings)

    bars: list[Progress] = []
    make = diff_command._bar
    monkeypatch.setattr(diff_command, "_bar", lambda *c: bars.append(make(*c)) or bars[-1])
    monkeypatch.setattr(spectrum, "measure_spectrum", observed)
    run(pair.before, pair.after, "--json", "-", "--spectrum", "exact")
    costs = np.array([16**3, 0, 64 * 32 * 32, 8**3])
    done = [0, *costs.cumsum()[:-1]] / costs.sum()
    assert shown == [
        (f"spectrum, matrix {i} of 4", f"{100 * share:.0f}") for i, share in enumerate(done, 1)
    ]


@pytest.mark.parametrize("no_colour", [True, False])
def test_a_terminal_gets_tables_and_colours_unless_told(
    no_colour: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(tmp_path, density=0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    run(pair.before, pair.after)
    shown = terminal.getvalue()
    assert "─" in shown
    assert "…" not in shown, "nothing is cut"
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()[4:])) <= 80
    yellow = "\x1b[33m"
    assert (yellow in shown) is not no_colour
    assert "warning: no compared weight differs in any bit" in shown.replace(yellow, "")
