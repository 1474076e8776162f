"""``rlsparse mask``: every mask it makes, and every mistake in one line."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from planted import LLAMA_SHAPES, Pair, make_pair, random_tensor, write_folder

from pipelines import cli
from pipelines.storage import Storage
from rlsparse.errors import ConfigError, PatchError, RlsparseError, StorageError
from rlsparse.masks import read_masks, unpack
from rlsparse.overlap.mask_set import compare_masks
from rlsparse.tables import EVER_CHANGED

MODULES = {"down", "embed", "norm", "q", "v"}


@pytest.fixture
def run(invoke):
    return partial(invoke, "mask")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A pair in the working directory, 10 % of whose weights changed, and its mask."""
    monkeypatch.chdir(tmp_path)
    return make_pair(tmp_path)


@pytest.fixture
def mask(pair: Pair, run) -> str:
    run("from-diff", "before", "after", "-o", "own.mask.safetensors")
    return "own.mask.safetensors"


def bits(path: str) -> dict[str, np.ndarray]:
    file = read_masks(path)
    return {name: unpack(file.packed(name), int(np.prod(s))) for name, s in file.shapes.items()}


def counts(path: str) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in bits(path).items()}


def test_what_changed(pair, run):
    out = run("from-diff", "before", "after", "-o", "m.mask.safetensors")
    found = bits("m.mask.safetensors")
    assert all((found[name] == pair.changed[name]).all() for name in pair.changed)
    lines = [line.split() for line in out.splitlines()]
    assert ["kind", "changed"] in lines
    assert ["source", "before", "->", "after"] in lines
    table = {line[0]: line[1:4] for line in lines if line[0] in MODULES | {"all"}}
    assert set(table) == MODULES | {"all"}
    assert table["q"] == ["1", "256", "26"]
    total = sum(int(changed.sum()) for changed in pair.changed.values())
    assert table["all"] == ["6", f"{sum(m.size for m in pair.changed.values()):,}", str(total)]
    assert "10.16 %" in out  # 26 of 256


@pytest.mark.parametrize(
    "arguments",
    [
        ("random", "--seed", 1),
        ("random", "--seed", 1, "--within-magnitude", "--base", "before"),
        ("magnitude", "--base", "before", "--pick", "low"),
        ("magnitude", "--base", "before", "--pick", "high"),
        ("principal", "--base", "before", "--pick", "principal"),
        ("principal", "--base", "before", "--pick", "other"),
    ],
)
def test_controls_are_as_dense_and_can_be_compared(mask, run, arguments):
    name, *options = arguments
    run(name, mask, *options, "-o", "out.mask.safetensors")
    assert counts("out.mask.safetensors") == counts(mask)
    assert any((bits("out.mask.safetensors")[n] != m).any() for n, m in bits(mask).items())
    (row, *_) = compare_masks([mask, "out.mask.safetensors"], base="before")
    assert row["num_a"] == row["num_b"] == sum(counts(mask).values())


def test_picks_differ(mask, run):
    run("magnitude", mask, "--base", "before", "--pick", "low", "-o", "low.mask.safetensors")
    run("magnitude", mask, "--base", "before", "--pick", "high", "-o", "high.mask.safetensors")
    weights = {
        name: np.abs((tensor.bits.astype(np.uint32) << 16).view(np.float32))
        for name, tensor in make_pair(Path("again")).tensors_before.items()
    }
    low, high = bits("low.mask.safetensors"), bits("high.mask.safetensors")
    for name, sizes in weights.items():
        if low[name].any():
            assert sizes[low[name]].max() <= sizes[~low[name]].min()
            assert sizes[high[name]].min() >= sizes[~high[name]].max()


def test_uniform(pair, run):
    run("uniform", "before", "--density", 0.25, "--seed", 0, "-o", "u.mask.safetensors")
    sizes = {name: int(np.prod(shape)) for name, shape in LLAMA_SHAPES.items()}
    assert counts("u.mask.safetensors") == {name: n // 4 for name, n in sizes.items()}


def test_algebra(mask, run):
    run("random", mask, "--seed", 0, "-o", "r.mask.safetensors")
    a, b = bits(mask), bits("r.mask.safetensors")
    for operation, expected in (
        ("union", {n: a[n] | b[n] for n in a}),
        ("intersection", {n: a[n] & b[n] for n in a}),
        ("difference", {n: a[n] & ~b[n] for n in a}),
    ):
        run("combine", operation, mask, "r.mask.safetensors", "-o", "c.mask.safetensors", "--force")
        assert all((bits("c.mask.safetensors")[n] == expected[n]).all() for n in a)
    run("complement", mask, "-o", "c.mask.safetensors", "--force")
    assert all((bits("c.mask.safetensors")[n] == ~a[n]).all() for n in a)
    run("complement", "c.mask.safetensors", "-o", "c.mask.safetensors", "--force")
    assert all((bits("c.mask.safetensors")[n] == a[n]).all() for n in a)


def test_info(mask, run):
    content = json.loads(run("info", mask, "--json"))
    assert content["metadata"] == {"kind": "changed", "source": "before -> after", "view": "stored"}
    assert content["base_fingerprint"] == read_masks(mask).base_fingerprint
    *modules, whole = content["modules"]
    assert {row["module"] for row in modules} == MODULES
    assert whole["module"] is None
    assert whole["num_selected"] == sum(counts(mask).values())
    assert whole["density"] == whole["num_selected"] / whole["num_elements"]
    assert f"mask             {mask}" in run("info", mask)


# --- of trials -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(trained, tiny_trial, base, tmp_path_factory) -> Path:
    """The folder of a study with three trials, one of them not done."""
    trial = trained(tiny_trial(probe={"snapshots": [1]}, num_steps=2), base)
    folder = tmp_path_factory.mktemp("study")
    storage = Storage(str(folder))
    for name in ("aa11", "aa22"):
        storage.publish(trial.folder, f"trials/{name}")
    shutil.copytree(trial.folder, folder / "trials" / "bb33")
    return folder


def test_masks_of_trials(study, run, tmp_path):
    def made(name: str, *options: object) -> int:
        path = tmp_path / f"{name}.mask.safetensors"
        run("from-trial", study, "aa1", *options, "-o", path)
        assert read_masks(path).metadata["trial_id"] == "aa11"
        return sum(counts(str(path)).values())

    summary = json.loads((study / "trials/aa11/summary.json").read_text())
    assert made("final") == summary["num_final"]
    assert made("ever", "--take", "ever_changed") == summary["num_final"] + summary["num_cancelled"]
    early = made("early", "--take", "snapshot", "--step", 1)
    assert 0 < early != summary["num_final"]
    assert made("half", "--take", "snapshot", "--fraction", 0.5) == early
    half, one = (read_masks(tmp_path / f"{name}.mask.safetensors") for name in ("half", "early"))
    assert all((half.packed(name) == one.packed(name)).all() for name in half.shapes)


def test_a_damaged_trial_is_told_what_to_do(study, run, tmp_path):
    damaged = tmp_path / "study"
    shutil.copytree(study, damaged)
    out = ("-o", tmp_path / "m.mask.safetensors")
    for file in damaged.glob("trials/aa11/snapshots/step-000002/*.patch.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    remedy = f"; delete {damaged}/trials/aa11 and run the study again: that trial runs again"
    with pytest.raises(PatchError, match=rf"is damaged.*{remedy}$"):
        run("from-trial", damaged, "aa11", *out)
    with pytest.raises(PatchError, match=r"is damaged[^;]*$"):  # or --base is another one
        run("from-trial", damaged, "aa11", "--base", "tiny", *out)


def test_trials_that_give_no_mask(study, run, tmp_path):
    out = ("-o", tmp_path / "m.mask.safetensors")
    for arguments, message in (
        ((study, "aa"), "'aa' names 2 trials: aa11, aa22 in"),
        ((study, "zz"), "'zz' names no trial in .*; give enough of one id of aa11, aa22, bb33"),
        ((study, ""), "'' names no trial"),
        ((study, "bb33"), "trial bb33 is not done; `rlsparse run` its study again"),
        (
            (tmp_path / "none", "aa"),
            "none: no such folder; give that of a study that has run, such as",
        ),
        ((study, "aa11", "--take", "snapshot"), "--take snapshot: give --step or --fraction"),
        ((study, "aa11", "--step", 1), "--take final: give --step or --fraction with"),
        ((study, "aa11", "--take", "snapshot", "--step", 1, "--fraction", 0.5), "one of them"),
        ((study, "aa11", "--take", "snapshot", "--step", 7), "no snapshot of step 7"),
        ((study, "aa11", "--take", "snapshot", "--fraction", 0), "fraction 0.0 of training"),
        ((study, "aa11", "--base", "nowhere"), "nowhere"),
    ):
        with pytest.raises(RlsparseError, match=message):
            run("from-trial", *arguments, *out)
    assert not list(tmp_path.iterdir())
    assert (study / "trials/aa11" / EVER_CHANGED).is_file()


# --- mistakes --------------------------------------------------------------------------------


def test_where_no_mask_is_written(mask, run):
    Path("d.mask.safetensors").mkdir()
    before = Path(mask).read_bytes()
    for out, message in (
        (mask, "own.mask.safetensors is there already; give another file, or --force"),
        ("mask.safetensors", r"mask files are called \*.mask.safetensors"),
        ("no/m.mask.safetensors", "no/m.mask.safetensors: .* make the folder first"),
        ("d.mask.safetensors", "d.mask.safetensors: no file"),
    ):
        for arguments in (
            ("from-diff", "before", "after"),
            ("from-trial", "study", "trial"),
            ("random", mask, "--seed", 0),
            ("uniform", "before", "--density", 0.5, "--seed", 0),
            ("magnitude", mask, "--base", "before", "--pick", "low"),
            ("principal", mask, "--base", "before", "--pick", "other"),
            ("combine", "union", mask, mask),
            ("complement", mask),
        ):
            with pytest.raises(ConfigError, match=message):
                run(*arguments, "-o", out)
    assert Path(mask).read_bytes() == before


def test_what_the_system_refuses_is_told(mask, run, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlsparse.masks.header_bytes", full)
    with pytest.raises(StorageError, match=r"cannot write c.mask.safetensors: No space left"):
        run("complement", mask, "-o", "c.mask.safetensors")
    assert not list(Path().glob("*c.mask*"))


def cases(mask: str) -> list[tuple[tuple[object, ...], str]]:
    Path("cut.mask.safetensors").write_bytes(Path(mask).read_bytes()[:-3])
    Path("text.mask.safetensors").write_text("not a mask")
    rng = np.random.default_rng(0)
    tensors = {name: random_tensor(rng, "bf16", (2, *s[1:])) for name, s in LLAMA_SHAPES.items()}
    write_folder(Path("small"), tensors)
    low = ("--base", "before", "--pick", "low")
    weights = "before/model.safetensors"
    return [
        (("from-diff", "before", "after", "--view", "int4"), "--view int4: choose of stored, fp32"),
        (("from-diff", "before", "nowhere"), "nowhere"),
        (("from-diff", "before", "before"), "no weight is in this mask (changed of before -> bef"),
        (("from-diff", "before", "small"), "small is of another model than before: model.emb"),
        (("random", mask, "--seed", -1), "seed -1: must be 0 or more"),
        (("random", mask, "--seed", 0, "--base", "before"), "--within-magnitude and --base go"),
        (("random", mask, "--seed", 0, "--within-magnitude"), "--within-magnitude and --base go"),
        (("random", "cut.mask.safetensors", "--seed", 0), "cut.mask.safetensors is truncated"),
        (("magnitude", "text.mask.safetensors", *low), "text.mask.safetensors is truncated or not"),
        (("magnitude", "nowhere.mask.safetensors", *low), "nowhere.mask.safetensors"),
        (("magnitude", weights, *low), "model.safetensors is not a mask file"),
        (("magnitude", mask, "--base", "after", "--pick", "low"), "give the checkpoint before"),
        (("principal", mask, "--base", "small", "--pick", "other"), "is of another model than sm"),
        (("uniform", "before", "--density", 0, "--seed", 0), "density 0.0: must be above 0 and"),
        (("uniform", "before", "--density", 1, "--seed", 0), "density 1.0: must be above 0 and"),
        (("uniform", "before", "--density", 1e-9, "--seed", 0), "no weight is in this mask"),
        (("uniform", "nowhere", "--density", 0.5, "--seed", 0), "nowhere"),
        (("combine", "union", mask), "union takes two masks or more, got 1"),
        (("combine", "difference", mask, mask), "no weight is in this mask (difference of"),
        (("combine", "union", mask, "cut.mask.safetensors"), "cut.mask.safetensors is truncated"),
        (("complement", "cut.mask.safetensors"), "cut.mask.safetensors is truncated"),
    ]


def test_mistakes_are_one_line(mask, monkeypatch, capsys):
    """As the command itself prints them; nothing is left behind."""
    given = cases(mask)
    before = sorted(Path().iterdir())
    for arguments, message in given:
        words = ["rlsparse", "mask", *map(str, arguments), "-o", "out.mask.safetensors"]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("rlsparse: ")
        assert message in line
    assert sorted(Path().iterdir()) == before


def test_info_of_no_mask(mask, run):
    for place, message in (("before/model.safetensors", "is not a mask file"), ("gone", "gone")):
        with pytest.raises(RlsparseError, match=message):
            run("info", place)
