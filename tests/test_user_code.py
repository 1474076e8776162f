"""A user's functions are found in the current directory, and what is wrong with them is told."""

import sys

import pytest

from rlsparse.errors import ConfigError
from rlsparse.tasks.user_code import code_hash, load_function


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Writes a module into the current directory; all such modules are forgotten in the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    yield write
    for name in {*sys.modules} - before:
        del sys.modules[name]


def test_functions_of_the_current_directory(here):
    here(
        "my_reward.py",
        "import my_part\ndef score(x):\n    import my_late\n    return my_part.ONE\n",
    )
    here("my_part.py", "ONE = 1\n")
    here("my_late.py", "")
    assert load_function("my_reward:score")(0) == 1
    here("my_package/__init__.py", "")
    here("my_package/inner.py", "def f():\n    return 2\n")
    assert load_function("my_package.inner:f")() == 2


def test_installed_modules_go_first(here):
    here("colorsys.py", "def rgb_to_hsv(*_): return None\n")
    sys.modules.pop("colorsys", None)
    assert load_function("colorsys:rgb_to_hsv")(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_none:f",
            r"my_none:f: there is no module my_none; it must be installed, lie in .*path",
        ),
        ("my_code.none:f", "there is no module my_code.none; it must"),
        ("my_code:scor", r"scor does not exist in .*my_code.py; did you mean score\? known: score"),
        ("my_code:LIMIT", "LIMIT is not a function in .*my_code.py; .*known: score"),
        ("my_broken:f", "importing my_broken raised SyntaxError: "),
        ("my_needy:f", "importing my_needy raised ModuleNotFoundError: No module named 'my_lost'"),
        ("my_raising:f", "importing my_raising raised ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_loaded(here, name, message):
    here("my_code.py", "LIMIT = 3\ndef score(): ...\ndef _hidden(): ...\n")
    here("my_broken.py", "def f(:\n")
    here("my_needy.py", "import my_lost\n")
    here("my_raising.py", "1 / 0\n")
    with pytest.raises(ConfigError, match=message.replace("path", "PYTHONPATH")) as caught:
        load_function(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        code_hash(name)


def test_hash_follows_the_source(here):
    here("my_code.py", "def f(): ...\ndef g(): ...\n")
    first = code_hash("my_code:f")
    assert code_hash("my_code:g") == first
    here("my_code.py", "def f(): ...\ndef g(): ... \n")
    assert code_hash("my_code:f") != first
    assert code_hash("builtins:len") != code_hash("builtins:max")
