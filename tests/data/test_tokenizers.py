"""Every kind of tokenizer: lossless where it says so, saved and loaded, streamed, refused where it does not fit."""

import json
import os
import random
import subprocess
import sys

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    ChunkTokenizer,
    TokenStreamDecoder,
    check_vocab,
)
from lowmem.system.errors import ConfigError, DataError

CORPUS = ["the cat sat on the mat. " * 20, "Naïve café, ÄÖÜ ß; the thing was there.\r\n\ttabs\n" * 5]
ODD = (
    "",
    " ",
    "\n\n  \t\r\n",
    "e\u0301 combining",
    "日本語テキスト",
    "👩‍👩‍👧‍👦 🇫🇷",
    "\x00\x01\x7f",
    "İstanbul ΣΑΣ",
    "\u200b\u202eright-to-left שלום",
    "\ufeff\ufffd",
    "don't  stop   ",
)


def make(kind):
    if kind == "bpe":
        return HuggingFaceTokenizer.train(CORPUS, 300)
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer.train([*CORPUS, *ODD])
    return ChunkTokenizer.train(CORPUS, lowercase=False, vocab_size=400, characters="".join(ODD))


KINDS = ("bpe", "bytes", "chars", "chunk")


@pytest.mark.parametrize("kind", KINDS)
def test_odd_unicode_makes_a_lossless_round_trip(kind):
    tokenizer = make(kind)
    rng = random.Random(0)
    mixed = ["".join(rng.choice(ODD[1:] + tuple(CORPUS[1].split())) for _ in range(30)) for _ in range(20)]
    for text in (*ODD, *CORPUS, *mixed):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eos_id for token in ids)
    assert tokenizer.encode_batch(list(ODD)) == [tokenizer.encode(text) for text in ODD]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    tokenizer = make(kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(place)
        assert (loaded.vocab_size, loaded.eos_id, loaded.sha256()) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256())
        assert [loaded.encode(text) for text in ODD] == [tokenizer.encode(text) for text in ODD]
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_document_has_its_own_id(kind):
    tokenizer = make(kind)
    assert tokenizer.decode([*tokenizer.encode("the"), tokenizer.eos_id, *tokenizer.encode("cat")]) == f"the{END_OF_TEXT}cat"


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_equals_decoded_text_and_breaks_no_character(kind):
    tokenizer = make(kind)
    for text in (*ODD, "".join(ODD), *CORPUS):
        decoder = TokenStreamDecoder(tokenizer)
        parts = [decoder.push(token) for token in tokenizer.encode(text)]
        assert "".join(parts) + decoder.finish() == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)


def test_a_streamed_incomplete_character_waits_and_then_shows_as_replacement():
    decoder = TokenStreamDecoder(ByteTokenizer())
    assert [decoder.push(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert decoder.push(0xC3) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_is_refused(kind):
    with pytest.raises(DataError, match=r"lone surrogate U\+DC80"):
        make(kind).encode("bad \udc80")


def test_bpe_is_the_same_every_time_and_within_its_size():
    first, second = (HuggingFaceTokenizer.train(CORPUS, 290) for _ in range(2))
    assert first.sha256() == second.sha256()
    assert first.vocab_size == 290
    assert len(first.encode(CORPUS[0])) < len(CORPUS[0]) / 2  # it has learned the words of its corpus


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(ConfigError, match="tokenizer_vocab_size is 256, bpe needs at least 257"):
        HuggingFaceTokenizer.train(CORPUS, 256)


def test_bpe_reads_a_written_out_end_of_text_as_the_token():
    tokenizer = make("bpe")
    assert tokenizer.encode(f"a{END_OF_TEXT}b").count(tokenizer.eos_id) == 1


def test_chars_are_the_corpus_and_unknown_ones_have_one_id():
    tokenizer = CharTokenizer.train(["hello"])
    assert tokenizer.vocab_size == len(set("hello")) + 2
    assert tokenizer.encode("hexlo") == [1, 0, tokenizer.unknown_id, 2, 3]  # e h l o in code point order
    assert tokenizer.decode([1, tokenizer.unknown_id]) == "h\ufffd"


def ready_made(folder, **special):
    """A word-level tokenizer as others make them: it would truncate, pad and add special tokens by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"hello": 0, "world": 1, **{name: number for number, name in enumerate(special.values(), start=2)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="hello"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.add_special_tokens(list(special.values()))
        begin = next(iter(special.values()))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, words[begin])])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_ready_made_tokenizer_adds_and_drops_nothing(tmp_path):
    tokenizer = load_tokenizer(ready_made(tmp_path / "made", begin="<s>", end="</s>"))
    assert tokenizer.eos_id == 3
    assert tokenizer.encode("hello world hello world") == [0, 1, 0, 1]


def test_a_ready_made_tokenizer_without_an_end_gets_one(tmp_path):
    tokenizer = load_tokenizer(ready_made(tmp_path / "made"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (3, 2)


@pytest.mark.parametrize("written", ["<stop>", {"content": "<stop>"}])
def test_the_companion_file_names_the_end_and_is_saved_again(tmp_path, written):
    folder = ready_made(tmp_path / "made", end="</s>", stop="<stop>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 3
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    assert load_tokenizer(tmp_path / "run" / "tokenizer.json").eos_id == 3


@pytest.mark.parametrize(
    "content, message",
    [
        ("no json", "is no tokenizer file"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "is no tokenizer file"),
        ('{"lowmem_tokenizer": "morse"}', "found kind 'morse', allowed: chunk, chars, bytes"),
        ('{"lowmem_tokenizer": "chunk", "chunks": ["a", "a"], "lowercase": true}', "a chunk occurs twice"),
        ('{"lowmem_tokenizer": "chars"}', "damaged tokenizer file"),
    ],
)
def test_malformed_tokenizer_files(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*tokenizer\.json: No such file"):
        load_tokenizer(tmp_path)


def test_the_model_must_hold_the_vocabulary():
    tokenizer = ByteTokenizer()
    check_vocab(tokenizer, 0)
    check_vocab(tokenizer, 257)
    with pytest.raises(
        DataError, match=r"bytes tokenizer has 257 tokens, model\.vocab_size allows 256; set model\.vocab_size to at least 257"
    ):
        check_vocab(tokenizer, 256)


def test_forking_after_use_prints_no_warning():
    script = (
        "import os\n"
        "from lowmem.data.hf_tokenizer import HuggingFaceTokenizer\n"
        "HuggingFaceTokenizer.train(['some text'], 260).encode_batch(['some', 'text'] * 100)\n"
        "child = os.fork()\n"
        "os._exit(0) if child == 0 else os.waitpid(child, 0)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_usual_patterns_pass_the_trial_of_foreign_tokenizers(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    assert load_tokenizer(tmp_path).vocab_size == 4
