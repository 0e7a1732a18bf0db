"""From a configuration to streams."""

import json
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest

from lowmem.config.schema import DataConfig, SourceConfig
from lowmem.data.prepare import prepare_data
from lowmem.system.errors import ConfigError, DataError

SEQ_LEN = 16


@pytest.fixture
def config(tmp_path):
    """Two sources whose bytes tell them apart: digits and letters."""
    rng = np.random.default_rng(0)
    for name, alphabet in (("digits", b"0123456789"), ("letters", b"abcdefgh")):
        (tmp_path / f"{name}.txt").write_bytes(rng.choice(list(alphabet), 20_000).astype(np.uint8).tobytes())
    return DataConfig(
        sources=[SourceConfig(path=str(tmp_path / "digits.txt"), weight=3), SourceConfig(path=str(tmp_path / "letters.txt"))],
        tokenizer="bytes",
        seq_len=SEQ_LEN,
        val_fraction=0.05,
        cache_dir=str(tmp_path / "cache"),
    )


def test_the_whole_way(config):
    data = prepare_data(config, seed=0)
    windows = data.train.next(2000)
    assert windows.shape == (2000, SEQ_LEN + 1)
    digits = float(np.mean(windows[:, 0] < ord("a")))
    # three quarters, within five standard deviations of a binomial of 2000 draws: 5 * sqrt(0.75 * 0.25 / 2000) = 0.048
    assert abs(digits - 0.75) < 0.048
    assert next(data.validation.windows(4)).shape == (4, SEQ_LEN + 1)
    facts = json.loads(json.dumps(data.description))
    assert [source["tokens"] for source in facts["sources"]] == [20_001, 20_001]
    assert [source["weight"] for source in facts["sources"]] == [3, 1]
    assert all(source["train_tokens"] + source["validation_tokens"] == 20_001 for source in facts["sources"])
    # five per cent of 20 001 tokens, rounded to whole blocks of 2^6 + 1 (8 of them fit into 1000 tokens)
    assert all(abs(source["validation_tokens"] - 1000) <= 65 for source in facts["sources"])
    assert facts["train_tokens_per_epoch"] == data.train.tokens_per_epoch()
    assert facts["validation_windows"] == len(data.validation)
    assert facts["tokenizer"]["kind"] == "bytes"


def test_held_out_text_is_never_trained_on_whatever_the_seed(config, tmp_path):
    # every token its own: characters of a corpus without repetition
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 8000)))
    (tmp_path / "distinct.txt").write_text(text)
    config = replace(config, sources=[SourceConfig(path=str(tmp_path / "distinct.txt"))], tokenizer="chars")
    held_out = None
    for seed in range(3):
        data = prepare_data(config, seed=seed)
        found = {int(token) for batch in data.validation.windows() for token in batch.ravel()}
        assert held_out is None or found == held_out
        held_out = found
        trained = {int(token) for token in data.train.next(1500).ravel()}  # about three epochs
        assert trained.isdisjoint(held_out)
        assert len(trained) + len(held_out) > 7800


def test_resuming_in_another_process_state(config):
    first = prepare_data(config, seed=5).train
    first.next(100)
    state = json.loads(json.dumps(first.state_dict()))
    second = prepare_data(config, seed=5).train
    second.load_state_dict(state)
    assert np.array_equal(first.next(50), second.next(50))


def test_tail_split_holds_out_the_end(config, tmp_path):
    config = replace(config, sources=config.sources[:1], val_split="tail", val_fraction=0.1)
    data = prepare_data(config, seed=0)
    text = (tmp_path / "digits.txt").read_bytes()
    first = next(data.validation.windows(1))[0]
    assert bytes(first.astype(np.uint8)) == text[18_000 : 18_000 + SEQ_LEN + 1]
    assert data.description["sources"][0]["train_tokens"] == 18_000


def test_a_validation_source_leaves_all_text_for_training(config, tmp_path):
    (tmp_path / "val.txt").write_text("z" * 500)
    data = prepare_data(replace(config, val_source=str(tmp_path / "val.txt")), seed=0)
    assert {int(token) for batch in data.validation.windows() for token in batch.ravel()} == {ord("z")}
    assert len(data.validation) == (501 - 1) // SEQ_LEN
    assert [source["validation_tokens"] for source in data.description["sources"]] == [0, 0]


def test_nothing_held_out(config):
    assert prepare_data(replace(config, val_fraction=0), seed=0).validation is None


def test_replaced_bytes_are_counted_and_told_once(config, tmp_path):
    (tmp_path / "digits.txt").write_bytes(b"text \xff\xfe " * 1000)
    config = replace(config, decode_errors="replace")
    for _ in range(2):  # the second time from the cache
        reports = []
        data = prepare_data(config, seed=0, progress=reports.append)
        assert [source["replacements"] for source in data.description["sources"]] == [2000, 0]
        warnings = [report.message for report in reports if report.stage == "warning"]
        assert len(warnings) == 1
        assert "2000 sequences of bytes were not UTF-8" in warnings[0]


@pytest.mark.parametrize(
    "text, settings, message",
    [
        ("x" * 10, {}, r"has 11 tokens, too few to train on sequences of 16 \(a window needs 17\)"),
        ("x" * 32, {}, r"too small to hold out one sequence of 16 tokens \(sources have 33\).*val_fraction=0"),
        ("", {}, r"digits\.txt holds no text"),
    ],
)
def test_a_corpus_too_small(config, tmp_path, text, settings, message):
    (tmp_path / "digits.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare_data(replace(config, sources=config.sources[:1], **settings), seed=0)


def test_a_validation_source_too_small(config, tmp_path):
    (tmp_path / "val.txt").write_text("z")
    with pytest.raises(DataError, match=r"too small to hold out .*give more text in data\.val_source"):
        prepare_data(replace(config, val_source=str(tmp_path / "val.txt")), seed=0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seq_len": 0}, r"data\.seq_len is 0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction is 1\.0"),
        ({"sources": []}, r"data\.sources is empty"),
        ({"sources": [SourceConfig(hub="x", streaming=True)], "val_split": "tail"}, "a streamed source has no known end"),
    ],
)
def test_contradictory_settings(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        prepare_data(replace(config, **settings), seed=0)


def test_a_mixture_of_stored_and_streamed_text_resumes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    (tmp_path / "hub").mkdir()
    lines = [json.dumps({"text": f"streamed {number} text"}) for number in range(2000)]
    (tmp_path / "hub" / "a.jsonl").write_text("\n".join(lines) + "\n")
    config = replace(config, sources=[*config.sources[:1], SourceConfig(hub=str(tmp_path / "hub"), streaming=True)])
    data = prepare_data(config, seed=0)
    assert data.train.tokens_per_epoch() is None
    assert data.description["sources"][1]["streamed"]
    assert len(data.validation) > data.description["sources"][0]["validation_tokens"] // (SEQ_LEN + 1)
    data.train.next(77)
    state = json.loads(json.dumps(data.train.state_dict()))
    other = prepare_data(config, seed=0).train
    other.load_state_dict(state)
    assert np.array_equal(data.train.next(100), other.next(100))


def test_bpe_on_a_stream_learns_from_its_beginning(config, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.jsonl").write_text("".join(json.dumps({"text": "streamed words " * 50}) + "\n" for _ in range(300)))
    source = SourceConfig(hub=str(tmp_path / "hub"), streaming=True)
    data = prepare_data(replace(config, sources=[source], tokenizer="bpe", tokenizer_vocab_size=270, val_fraction=0), seed=0)
    assert data.tokenizer.vocab_size == 270
    assert "streamed words" in data.tokenizer.decode(data.train.next(1)[0].tolist())


def test_importing_the_data_part_is_light():
    script = (
        "import sys, lowmem.data.prepare; print([name for name in ('datasets', 'pyarrow', 'tokenizers', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_malformed_text_is_reported_through_the_trainer(config, tmp_path):
    (tmp_path / "digits.txt").write_bytes(b"fine\n\xff")
    with pytest.raises(DataError, match=r"digits\.txt:2: byte 0xff is not UTF-8"):
        prepare_data(replace(config, tokenizer="bpe"), seed=0)
