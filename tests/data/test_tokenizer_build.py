"""Choosing, training and caching the tokenizer of a run."""

import pytest
import tokenizers

from lowmem.config.schema import DataConfig, SourceConfig
from lowmem.data.text import open_source
from lowmem.data.text_source import ignore_progress
from lowmem.data.tokenizer_loading import MIN_SAMPLE_BYTES, prepare_tokenizer, sample_texts
from lowmem.system.errors import ConfigError, DataError
from lowmem.system.files import cache_root

TEXT = "the cat sat on the mat; naïve Ünï\n" * 40


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


def prepare(tmp_path, corpus, progress=ignore_progress, **settings):
    config = DataConfig(sources=[SourceConfig(path=str(corpus))], **settings)
    return prepare_tokenizer(config, [open_source(source, "fail") for source in config.sources], tmp_path / "cache", progress)


@pytest.mark.parametrize(
    "settings, vocab_size",
    [
        ({"tokenizer": "bpe", "tokenizer_vocab_size": 270}, 270),
        ({"tokenizer": "chunk", "tokenizer_vocab_size": 30}, 30),
        ({"tokenizer": "bytes"}, 257),
        ({"tokenizer": "chars"}, len(set(TEXT)) + 2),
    ],
)
def test_each_kind_is_trained_once(tmp_path, corpus, settings, vocab_size):
    reports = []
    tokenizer = prepare(tmp_path, corpus, reports.append, **settings)
    assert (tokenizer.kind, tokenizer.vocab_size) == (settings["tokenizer"], vocab_size)
    assert bool(reports) == (settings["tokenizer"] != "bytes")
    again = []
    assert prepare(tmp_path, corpus, again.append, **settings).sha256() == tokenizer.sha256()
    assert again == []


def test_the_published_chunk_tokenizer_lower_cases_and_the_lossless_one_does_not(tmp_path, corpus):
    for lowercase in (True, False):
        tokenizer = prepare(tmp_path, corpus, tokenizer="chunk", tokenizer_vocab_size=60, lowercase=lowercase)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == (TEXT.lower() if lowercase else TEXT)


def test_a_ready_made_tokenizer_is_loaded_from_file_or_folder(tmp_path, corpus):
    made = prepare(tmp_path, corpus, tokenizer="bpe", tokenizer_vocab_size=270)
    (tmp_path / "made").mkdir()
    made.save(tmp_path / "made" / "tokenizer.json")
    for place in ("made", "made/tokenizer.json"):
        assert prepare(tmp_path, corpus, tokenizer=str(tmp_path / place)).encode(TEXT) == made.encode(TEXT)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokenizer": "bytes", "tokenizer_vocab_size": 300}, "tokenizer_vocab_size is 300, but the tokenizer bytes is not trained"),
        ({"tokenizer": "chars", "tokenizer_vocab_size": 300}, "tokenizer_vocab_size is 300, but the tokenizer chars"),
        ({"tokenizer": "bpe", "lowercase": False}, "lowercase has no effect on the tokenizer bpe"),
        ({"tokenizer": "bpe", "tokenizer_vocab_size": 100}, "tokenizer_vocab_size is 100, bpe needs at least 257"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, corpus, settings, message):
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path, corpus, **settings)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/tokenizer.json", "tokenizer.json", "~/nothing"])
def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path, corpus, name):
    with pytest.raises(DataError, match="no such file or folder; allowed: bpe, chunk"):
        prepare(tmp_path, corpus, tokenizer=name)


def test_a_hub_name_that_fails_is_one_line(tmp_path, corpus, monkeypatch):
    class NoNetwork:
        @staticmethod
        def from_pretrained(name):
            raise FileNotFoundError("cannot find the requested files.\nnoise")

    monkeypatch.setattr(tokenizers, "Tokenizer", NoNetwork)
    with pytest.raises(DataError, match=r"'some/model': no such file, and the hub gave none \(cannot find the requested files\)") as caught:
        prepare(tmp_path, corpus, tokenizer="some/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bpe", "chunk", "chars"])
def test_an_empty_corpus_is_refused(tmp_path, kind):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="the corpus holds no text"):
        prepare(tmp_path, tmp_path / "empty.txt", tokenizer=kind)


def test_the_sample_is_bounded_and_takes_from_every_source_and_from_its_end(tmp_path):
    # 16 KB lines make pieces of 16 Ki; 4 MB against a budget of 1 MB: an eighth of each of two sources
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{number} " + "x" * 15_990 + "\n" for number in range(250)))
    sources = [open_source(SourceConfig(path=str(tmp_path / f"{name}.txt")), "fail") for name in "ab"]
    texts = list(sample_texts(sources, 1_000_000, ignore_progress))
    assert 1_000_000 * 0.95 < sum(map(len, texts)) < 1_000_000 + 2 * 16_384
    together = "".join(texts)
    for name in "ab":
        numbers = [number for number in range(250) if f"{name}{number} " in together]
        assert numbers[0] < 10
        assert numbers[-1] > 235
    assert list(sample_texts(sources, 1_000_000, ignore_progress)) == texts
    assert len("".join(sample_texts(sources, MIN_SAMPLE_BYTES, ignore_progress))) == 2 * sum(
        len(f"a{number} ") + 15_991 for number in range(250)
    )


def test_the_cache_is_below_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root("") == tmp_path / "lowmem"
    assert cache_root(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root("") == tmp_path / "home" / ".cache" / "lowmem"
