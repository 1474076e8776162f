"""The base that ships is small and ordinary; loading rounds it to the format of the regime."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from huggingface_hub.utils import filter_repo_objects
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlsparse.config import STORED_DTYPE, ModelConfig
from rlsparse.errors import CheckpointError
from rlsparse.models import TINY, companion_hash, resolve
from rlsparse.models.loading import load_model, load_tokenizer
from rlsparse.models.tokenizer import CHARACTERS, make_tokenizer


def test_tiny_is_small_and_loads_like_any_folder():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 4_000_000
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert model.dtype == torch.bfloat16
    assert 800_000 <= sum(weight.numel() for weight in model.parameters()) <= 1_500_000
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("make", [make_tokenizer, lambda: load_tokenizer(TINY)])
def test_tokenizer(make):
    tokenizer = make()
    assert tokenizer.bos_token is None
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    for special in (True, False):
        ids = tokenizer(CHARACTERS, add_special_tokens=special)["input_ids"]
        assert len(ids) == len(CHARACTERS) == len(set(ids))
        assert tokenizer.decode(ids) == CHARACTERS
    for text in (" 5", "5 \n", "1  + 2", " ?.", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("a")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.decode([5, tokenizer.eos_token_id], skip_special_tokens=True) == "2"


def test_pad_falls_back_to_the_end_of_text(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(tmp_path).pad_token == "<eos>"


def with_beginning(template: str | None) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with ``?`` as beginning, and ``template`` around every text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "?"})
    if template:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template,
            special_tokens=[("?", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)],
        )
    return tokenizer


@pytest.mark.parametrize(("template", "beginning"), [("? $A", "?"), (None, None)])
def test_a_beginning_is_kept_only_where_the_tokenizer_writes_it(tmp_path, template, beginning):
    with_beginning(template).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_token == beginning
    plain = make_tokenizer()("1 + 2")["input_ids"]
    added = [tokenizer.bos_token_id] if beginning else []
    assert tokenizer("1 + 2")["input_ids"] == added + plain
    assert tokenizer("1 + 2", add_special_tokens=False)["input_ids"] == plain


@pytest.mark.parametrize("template", ["$A <eos>", "? $A <eos>", "<eos> $A", "? ? $A"])
def test_a_tokenizer_that_writes_more_than_a_beginning(tmp_path, template):
    with_beginning(template).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"around every text; at most its bos_token \('\?'\)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_tokenizer_without_an_end(tmp_path, pad):
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = None, pad
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no end-of-text token.* set eos_token in its"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("precision", list(STORED_DTYPE))
def test_weights_are_rounded_to_the_stored_format(wide_base, precision):
    stored = safetensors.numpy.load_file(wide_base.path / "model.safetensors")
    model = load_model(wide_base.path, precision)
    expected_dtype = torch.bfloat16 if precision in ("bf16", "bf16-weights") else torch.float32
    for name, weight in model.named_parameters():
        assert weight.dtype == expected_dtype
        bits = stored[name].view(np.uint32)
        if precision != "fp32":  # nearest bf16, ties to even, by integer arithmetic
            assert np.any(bits & 0xFFFF)
            bits = bits + 0x7FFF + ((bits >> 16) & 1) & 0xFFFF_0000
        assert np.array_equal(weight.detach().float().numpy().view(np.uint32), bits)
    assert model.config._name_or_path == str(wide_base.path)


def test_a_bf16_base_is_loaded_exactly():
    stored = safetensors.torch.load_file(TINY / "model.safetensors")
    for precision in STORED_DTYPE:
        for name, weight in load_model(TINY, precision).named_parameters():
            assert torch.equal(weight.detach().to(torch.bfloat16), stored[name])


def test_the_bases_own_settings_of_generation_do_not_shape_samples(tmp_path):
    """Hub models come with a temperature or a repetition penalty."""
    shutil.copytree(TINY, tmp_path / "base")
    settings = {"temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "do_sample": True}
    ends = {"eos_token_id": [1, 7], "pad_token_id": 0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**settings, **ends}))
    kept = load_model(tmp_path / "base", "fp32").generation_config.to_diff_dict()
    assert {key: kept[key] for key in ends} == ends
    assert not set(settings) & set(kept)


def test_resolve(tmp_path, monkeypatch):
    assert resolve(ModelConfig(source="tiny")) == TINY
    assert resolve(ModelConfig(source=str(tmp_path))) == tmp_path
    shutil.copytree(TINY, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve(ModelConfig(source="org/name")) == tmp_path / "org" / "name"


@pytest.mark.parametrize("source", ["tinny", "/no/such/folder", "./no", "~/no-such", "a/b/c"])
def test_a_path_that_is_not_there(source):
    with pytest.raises(CheckpointError, match=r"no such folder; .*: tiny, .*; or give a folder"):
        resolve(ModelConfig(source=source))


@pytest.mark.parametrize("source", ["no-such/model@main", "org/--not..valid"])
def test_a_hub_id_that_is_not_there(monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="is no folder here and the hub does not give it"):
        resolve(ModelConfig(source=source))


def test_the_hash_of_companions_is_of_names_and_bytes(tmp_path):
    def hash_of(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)
        return companion_hash(folder)

    one = hash_of(vocab__json="a", merges__txt="b")
    assert hash_of(merges__txt="b", vocab__json="a", README__md="c", model__safetensors="d") == one
    others = [
        hash_of(vocab__json="b", merges__txt="a"),
        hash_of(vocab__json="a"),
        hash_of(vocab__txt="a", merges__txt="b"),
        hash_of(vocab__json="a", merges__txt="b", tokenizer__model="c"),
        hash_of(vocab__json="a", merges__txt="b", tokenizer_config__json="c"),
    ]
    assert len({one, *others}) == 6


def test_the_hub_gives_chat_templates_and_merges(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **options: asked.append((name, options)) or str(TINY),
    )
    assert resolve(ModelConfig(source="org/name@v1")) == TINY
    ((name, options),) = asked
    assert (name, options["revision"]) == ("org/name", "v1")
    files = ["merges.txt", "chat_template.jinja", "additional_chat_templates/a.jinja",
             "tokenizer.json", "tokenizer.model", "model.safetensors", "model.bin"]  # fmt: skip
    found = list(filter_repo_objects(files, allow_patterns=options["allow_patterns"]))
    assert found == files[:-1]
