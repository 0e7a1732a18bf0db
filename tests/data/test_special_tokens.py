"""What a tokenizer puts before a text: as transformers does it, once for each document, never twice."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from lowmem.config.schema import SourceConfig
from lowmem.data.chat_template import choose_chat_template, load_chat_template
from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from lowmem.data.prepare import build_shards
from lowmem.data.text import open_source
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.system.errors import ConfigError
from tests.reference.tiny_tokenizers import library

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]


def write_tokenizer(folder, *, template: bool, **config):
    """A tokenizer of which texts begin with <s> by its tokenizer.json, or do not."""
    tokenizer = Tokenizer.from_str(library("first").to_str())
    if template:
        begin = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", begin)])
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("wanted", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_prompts_are_those_of_transformers(tmp_path, template, wanted):
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "t", template=template, **wanted)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in ("hello, how are you?", "a", " the"):
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]
    assert bool(ours.begin_ids) is template
    assert ours.encode_prompt("") == ([ours.special_tokens()["<s>"]] if template else [ours.eos_id])


def test_a_text_that_spells_the_beginning_has_it_once(tmp_path):
    ours = load_tokenizer(write_tokenizer(tmp_path / "t", template=True))
    begin = ours.begin_ids[0]
    assert ours.encode_prompt("<s>hello").count(begin) == 1
    assert ours.encode_prompt("hello<s>").count(begin) == 2


def test_what_is_saved_begins_texts_alike(tmp_path):
    ours = load_tokenizer(write_tokenizer(tmp_path / "t", template=True))
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved" / "tokenizer.json")
    again = load_tokenizer(tmp_path / "saved" / "tokenizer.json")
    assert (again.begin_ids, again.sha256()) == (ours.begin_ids, ours.sha256())


def test_its_beginning_is_part_of_what_a_tokenizer_is(tmp_path):
    """Shards that were made without it are not taken for those with it."""
    ours = load_tokenizer(write_tokenizer(tmp_path / "t", template=True))
    before = ours.sha256()
    ours.begin_ids = ()
    assert ours.sha256() != before


def test_every_document_begins_with_it_once(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", template=True))
    long = "how are you? " * 4000  # several pieces
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("hello", long, "I am fine")))
    source = open_source(SourceConfig(path=str(tmp_path / "text.jsonl")), "fail")
    shards = build_shards(source, tokenizer, tmp_path / "cache")
    tokens = shards.read(0, len(shards))
    begin, end = tokenizer.begin_ids[0], tokenizer.eos_id
    assert np.count_nonzero(tokens == begin) == np.count_nonzero(tokens == end) == 3
    ends = np.flatnonzero(tokens == end)
    assert [tokens[0], *tokens[ends[:-1] + 1]] == [begin] * 3


@pytest.mark.parametrize("writes", [True, False])
def test_a_conversation_has_what_its_template_writes(tmp_path, writes):
    from transformers import AutoTokenizer

    jinja = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    folder = write_tokenizer(tmp_path / "t", template=True, chat_template=("{{ bos_token }}" if writes else "") + jinja)
    tokenizer = load_tokenizer(folder)
    ids = load_chat_template(folder, tokenizer).encode(tokenizer, MESSAGES)[0].tolist()
    assert ids == AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES)["input_ids"]
    assert ids.count(tokenizer.begin_ids[0]) == writes


def test_lowmems_own_template_begins_as_the_tokenizer_does(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", template=True))
    ids = choose_chat_template("", None, tokenizer).encode(tokenizer, MESSAGES)[0].tolist()
    assert (ids[0], ids.count(ids[0])) == (tokenizer.begin_ids[0], 1)
    own = ByteTokenizer()
    assert choose_chat_template("", None, own).encode(own, MESSAGES)[0].tolist()[:6] == list(b"[INST]")


@pytest.mark.parametrize(
    "tokens, message", [([""], "has ''"), (["<a>", "<a>"], "names a token twice"), (["a"], "has a, which the tokenizer")]
)
def test_tokens_that_cannot_be_added_are_refused(tokens, message):
    tokenizer = HuggingFaceTokenizer.train(["a text of words " * 9], 300)
    with pytest.raises(ConfigError, match=message):
        tokenizer.with_tokens(tokens)
    more = tokenizer.with_tokens(["<a>", "<b>"])
    assert more.token_ids(["<a>", "<b>"]) == [tokenizer.vocab_size, tokenizer.vocab_size + 1] == more.encode("<a><b>")
