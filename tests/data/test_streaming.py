"""Hub datasets, downloaded and streamed, through local folders."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lowmem.config.schema import SourceConfig
from lowmem.data.hub import HeldOutDocuments, StreamedWindows, is_held_out, load_hub_dataset
from lowmem.data.text import open_source
from lowmem.data.text_source import ReadCounters
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.system.errors import CheckpointError, DataError

SEQ_LEN = 32
EOS = ByteTokenizer.eos_id


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    datasets.disable_progress_bars()


@pytest.fixture(params=["jsonl", "parquet"])
def folder(request, tmp_path):
    """Two shards of documents, one of them longer than a piece (16 Ki), one empty."""
    place = tmp_path / "hub"
    place.mkdir()
    for number in range(2):
        texts = [f"document {number}-{index} " * (1 + index % 5) for index in range(40)]
        texts[7], texts[8] = "long words " * 4000, ""
        if request.param == "jsonl":
            (place / f"{number}.jsonl").write_text("".join(json.dumps({"body": text, "id": 1}) + "\n" for text in texts))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"body": texts, "id": [1] * 40}), place / f"{number}.parquet", row_group_size=9)
    return place


def texts_of(folder) -> list[str]:
    return [row["body"] for row in datasets.load_dataset(str(folder), split="train")]


def config(folder, **settings):
    return SourceConfig(hub=str(folder), text_field="body", **settings)


def stream(folder, fraction=0.0, seq_len=SEQ_LEN, **settings):
    return StreamedWindows(config(folder, streaming=True, **settings), ByteTokenizer(), seq_len=seq_len, val_fraction=fraction)


@pytest.mark.parametrize("split", ["train", "train[10:20]"])
def test_a_downloaded_dataset_gives_its_rows(folder, split):
    source = open_source(config(folder, split=split), "fail")
    expected = [text for text in (texts_of(folder)[10:20] if "[" in split else texts_of(folder)) if text]
    assert "".join(piece.text + "|" * piece.ends_document for piece in source.pieces(ReadCounters())) == "".join(
        text + "|" for text in expected
    )
    assert source.identity() == open_source(config(folder, split=split), "fail").identity()


def test_windows_follow_the_stream_end_to_end_and_around(folder):
    tokens = [token for text in texts_of(folder) if text for token in (*text.encode(), EOS)]
    windows = stream(folder)
    count = 2 * len(tokens) // SEQ_LEN  # two passes
    got = np.stack([windows.window(drawn) for drawn in range(count)])
    twice = np.array(tokens * 3)
    expected = np.stack([twice[row * SEQ_LEN : row * SEQ_LEN + SEQ_LEN + 1] for row in range(count)])
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_resuming_a_stream_equals_going_on(folder, fraction):
    whole = stream(folder, fraction)
    expected, states = [], []
    for drawn in range(4000):  # 128 000 tokens: more than a pass over 2 * 44 000 and a little
        states.append(whole.state_dict() if drawn % 331 == 0 or drawn in (1, 2) else None)
        expected.append(whole.window(drawn))
    for drawn, state in enumerate(states):
        if state is not None:
            resumed = stream(folder, fraction)
            resumed.load_state_dict(json.loads(json.dumps(state)))
            assert resumed.state_dict() == state  # so that a run can be interrupted again at once
            for later in range(drawn, min(drawn + 600, len(expected))):
                assert np.array_equal(resumed.window(later), expected[later])


def test_the_state_stays_small_within_a_long_document(folder):
    windows = stream(folder)
    sizes = []
    for drawn in range(1000):
        windows.window(drawn)
        sizes.append(len(json.dumps(windows.state_dict())))
    # at most one piece of 16 384 tokens, each up to five characters in JSON, and the position
    assert max(sizes) < 16_384 * 5 + 1000


def test_held_out_documents_and_training_documents_are_disjoint_and_complete(folder):
    fraction = 0.3
    held_out = {text for text in texts_of(folder) if text and is_held_out(text, fraction)}
    rest = {text for text in texts_of(folder) if text} - held_out
    assert len(held_out) > 5
    assert len(rest) > 20
    source = HeldOutDocuments(config(folder, streaming=True), seq_len=2048, val_fraction=fraction)
    text = "".join(piece.text + "|" * piece.ends_document for piece in source.pieces(ReadCounters()))
    assert set(text.removesuffix("|").split("|")) == held_out
    windows = stream(folder, fraction)
    tokens = np.concatenate([windows.window(drawn)[:-1] for drawn in range(3500)])
    trained = {bytes(part.astype(np.uint8)).decode() for part in np.split(tokens, np.flatnonzero(tokens == EOS) + 1)[:-1] if len(part)}
    trained = {text.removesuffix("\x00") for text in trained}  # 256 as a byte
    assert trained == rest


def test_the_share_of_held_out_documents_is_as_asked():
    count = sum(is_held_out(f"document {number}", 0.1) for number in range(10_000))
    assert abs(count - 1000) < 5 * (10_000 * 0.1 * 0.9) ** 0.5  # five standard deviations of a binomial


def test_max_bytes_ends_a_pass(folder):
    first = texts_of(folder)[0].encode() + bytes(texts_of(folder)[1], "ascii")
    limit = len(first) - 3
    windows = stream(folder, max_bytes=limit, seq_len=8)
    pass_tokens = [*texts_of(folder)[0].encode(), EOS, *texts_of(folder)[1].encode()[:-3], EOS]
    got = [windows.window(drawn)[0] for drawn in range(2 * len(pass_tokens) // 8)]
    assert got == (pass_tokens * 3)[: len(got) * 8 : 8]


def test_too_short_a_stream_is_refused_instead_of_read_forever(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.jsonl").write_text('{"body": "tiny"}\n')
    with pytest.raises(DataError, match="too little text to train on sequences of 32"):
        stream(tmp_path / "hub").window(0)


def test_a_stream_that_became_shorter_is_refused(folder, tmp_path):
    windows = stream(folder)
    for drawn in range(1500):
        windows.window(drawn)
    state = windows.state_dict()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.jsonl").write_text('{"body": "tiny"}\n')
    state["dataset"] = None
    other = stream(tmp_path / "short", max_bytes=1)
    state["text_bytes"] = 5
    with pytest.raises(CheckpointError, match="ends before the document"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="malformed"):
        other.load_state_dict({})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"text_field": "text"}, r"has no column 'text', found 'body', 'id'; set text_field"),
        ({"text_field": "id"}, r"'id' is (a number|int64), expected text"),
        ({"text_field": "body", "split": "nope"}, r"cannot load the dataset .*split 'nope'.*check the name and the network"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_mistakes_are_one_line(folder, settings, message, streaming):
    with pytest.raises(DataError, match=message) as caught:
        list(open_source(SourceConfig(hub=str(folder), streaming=streaming, **settings), "fail").pieces(ReadCounters()))
    assert "\n" not in str(caught.value)


def test_a_failing_network_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("cannot reach the hub\nsecond line of noise")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"^cannot load the dataset 'some/set', split 'train': cannot reach the hub; check") as caught:
        load_hub_dataset(SourceConfig(hub="some/set"))
    assert "\n" not in str(caught.value)


def test_code_of_a_dataset_is_never_trusted(monkeypatch):
    seen = {}

    def spy(*args, **kwargs):
        seen.update(kwargs)
        raise ConnectionError("enough")

    monkeypatch.setattr(datasets, "load_dataset", spy)
    with pytest.raises(DataError):
        load_hub_dataset(SourceConfig(hub="some/set"))
    assert not seen.get("trust_remote_code", False)
