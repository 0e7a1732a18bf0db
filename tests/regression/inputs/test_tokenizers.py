"""Tokenizer files that explode, lie, or cannot be what they say."""

import json
import os

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from lowmem.config.schema import DataConfig, SourceConfig
from lowmem.data.prepare import build_shards
from lowmem.data.text import open_source
from lowmem.data.text_source import ignore_progress
from lowmem.data.tokenizer_loading import load_tokenizer, prepare_tokenizer
from lowmem.system.errors import DataError


def bpe() -> Tokenizer:
    return Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")]))


def refused(folder, content: str, message: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_normalizer_that_doubles_the_text_again_and_again(tmp_path):
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 9)
    refused(tmp_path, tokenizer.to_str(), r"cannot be used: it makes \d+ tokens of \d+ characters")


@pytest.mark.slow
def test_a_normalizer_that_takes_all_memory(tmp_path):
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 5)
    refused(tmp_path, tokenizer.to_str(), "gives up on a few pages of text, or takes more than 10 s of time or 2.00 GiB of memory")


def test_a_pattern_that_tries_without_end(tmp_path):
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    refused(tmp_path, tokenizer.to_str(), "gives up on a few pages of text")


def test_an_id_far_beyond_the_vocabulary(tmp_path):
    value = json.loads(bpe().to_str())
    value["model"]["vocab"]["b"] = 2**31
    refused(tmp_path, json.dumps(value), "has 4 tokens, but one has the id 2147483648; number them without gaps")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[" * 100_000, "is no tokenizer file"),
        ('{"lowmem_tokenizer": "chunk", "chunks": [1, 2], "lowercase": true}', "chunks and characters must be text"),
        ('{"lowmem_tokenizer": "chunk", "chunks": "ab", "lowercase": true}', "chunks and characters must be text"),
        ('{"lowmem_tokenizer": "chunk", "chunks": ["a"], "lowercase": "no"}', "lowercase must be true or false"),
        ('{"lowmem_tokenizer": "chars", "characters": ["a"]}', "chunks and characters must be text"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    refused(tmp_path, content, message)


def test_a_text_that_the_tokenizer_cannot_express(tmp_path):
    # neither the model's unknown token nor a fallback exists
    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.WordPiece({"the": 0}, unk_token="[UNK]")).to_str())
    with pytest.raises(DataError, match="the tokenizer cannot encode the text .* choose another one"):
        load_tokenizer(tmp_path).encode("other")


@pytest.mark.parametrize("named", ['{"eos_token": {"content": 5}}', '{"eos_token": 5}'])
def test_an_end_token_that_is_no_text(tmp_path, named):
    (tmp_path / "tokenizer_config.json").write_text(named)
    refused(tmp_path, bpe().to_str(), "eos_token is no text")


def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    for place, message in (
        (tmp_path, "tokenizer.json is a named pipe"),
        ("/dev/zero", "is a device"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(place)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/tokenizer.json"])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(DataError, match="which cannot be looked for"):
        prepare_tokenizer(DataConfig(tokenizer=name), [], tmp_path, ignore_progress)


def test_text_that_becomes_far_too_many_tokens_is_not_stored(tmp_path):
    (tmp_path / "a.txt").write_text("xyz " * 100)
    (tmp_path / "tokenizer.json").write_text(bpe().to_str())
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.encode_batch = lambda texts: [[0] * 100_000 for _ in texts]
    with pytest.raises(DataError, match="the tokenizer makes 100000 tokens of 400 characters; choose another data.tokenizer"):
        build_shards(open_source(SourceConfig(path=str(tmp_path / "a.txt")), "fail"), tokenizer, tmp_path)
