"""The frame holds: the README's tree is complete, imports stay light, modules stay small."""

import importlib.util
import pkgutil
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "mlflow", "pandas", "numba", "transformers", "matplotlib")


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [file for file in listed.stdout.splitlines() if (ROOT / file).exists()]


def tree_of_readme() -> set[str]:
    """Paths and patterns in the commented tree: two spaces a level, folders end with a slash."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\n(rlsparse/ .*?)```", text, re.DOTALL)
    assert block, "README.md has no tree"
    paths, folders = set(), []
    for line in block[1].splitlines():
        names = line.split("  #")[0].rstrip()
        if not names:
            continue
        depth = (len(names) - len(names.lstrip())) // 2
        del folders[depth:]
        for name in names.split():
            if name.endswith("/"):
                folders.append(name)
                paths.add("".join(folders))
            else:
                paths.add("".join(folders) + name)
    return paths


def test_the_tree_in_the_readme_names_every_file():
    named = tree_of_readme()
    whole = {path for path in named if path.endswith("/") and not any(
        other != path and other.startswith(path) for other in named)}  # fmt: skip
    missing = [
        file
        for file in tracked_files()
        if not any(fnmatch(file, name) for name in named)
        and not any(file.startswith(folder) for folder in whole)
    ]
    assert not missing


def test_the_tree_in_the_readme_names_nothing_else():
    gone = [path for path in tree_of_readme() if not list(ROOT.glob(path))]
    assert not gone


@pytest.mark.parametrize(
    "command", [["--help"], ["run", "--help"], ["diff", "--help"], ["mask", "random", "--help"]]
)
def test_help_is_light(command):
    code = (
        "import sys; from pipelines.cli import main\n"
        f"sys.argv = ['rlsparse', *{command!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def test_every_module_imports_and_is_documented():
    for package in ("rlsparse", "pipelines"):
        for info in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            needs_triton = info.name.endswith(("kernels.gpu", "kernels.triton_code"))
            if needs_triton and not importlib.util.find_spec("triton"):
                continue  # there is none but for Linux
            if not info.name.endswith("__main__"):
                assert importlib.import_module(info.name).__doc__, info.name


def test_modules_are_at_most_400_lines():
    long = {
        file: count
        for file in tracked_files()
        if file.startswith(("rlsparse/", "pipelines/")) and file.endswith(".py")
        for count in [len((ROOT / file).read_text().splitlines())]
        if count > 400
    }
    assert not long
