"""Shards: what they hold, resuming, locking, damage."""

import errno
import json
import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest

from lowmem.config.schema import SourceConfig
from lowmem.data.prepare import build_shards
from lowmem.data.shards import INDEX_FILE, PROGRESS_FILE, VERIFIED_FILE, ShardWriter, TokenShards
from lowmem.data.text import open_source
from lowmem.data.tokenizers import ByteTokenizer, Tokenizer
from lowmem.system.errors import DataError, StorageError

SHARD_TOKENS = 50_000


class WideTokenizer(Tokenizer):
    """Ids beyond 16 bits: a character's code point."""

    kind, vocab_size, eos_id = "wide", 0x110001, 0x110000

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def to_json(self):
        return {}


class Killed(Exception):
    """Stands in for a signal: raised inside the progress callback."""


@pytest.fixture
def corpus(tmp_path):
    """1.6 MB in two files: three batches, 33 shards; pieces (16 Ki) and shards (50 000) end at different places."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_bytes(rng.choice(list(b"abcdefgh \n"), 800_000).astype(np.uint8).tobytes())
    return folder


def build(corpus, cache, tokenizer=None, **options):
    source = open_source(SourceConfig(path=str(corpus)), "fail")
    return build_shards(source, tokenizer or ByteTokenizer(), cache, shard_tokens=SHARD_TOKENS, **options)


def entry(cache):
    (folder,) = [path for path in (cache / "shards").iterdir() if path.is_dir()]
    return folder


def shard_bytes(cache):
    return {path.name: path.read_bytes() for path in entry(cache).glob("tokens-*")}


def test_shards_hold_the_documents_and_their_ends(corpus, tmp_path):
    shards = build(corpus, tmp_path / "cache")
    expected = np.concatenate([[*(corpus / name).read_bytes(), 256] for name in ("a.txt", "b.txt")])
    assert len(shards) == len(expected) == 1_600_002
    assert np.array_equal(shards.read(0, len(shards)), expected)
    for start, count in ((0, 0), (49_990, 20), (49_999, 1), (50_000, 100_001), (1_600_001, 1)):
        assert np.array_equal(shards.read(start, count), expected[start : start + count])
    for start, count in ((-1, 2), (1_600_000, 3)):
        with pytest.raises(ValueError, match=r"allowed 0\.\.1600001"):
            shards.read(start, count)
    metadata = shards.metadata
    assert (metadata["dtype"], metadata["documents"], metadata["text_bytes"], metadata["replacements"]) == ("uint16", 2, 1_600_000, 0)
    assert len(metadata["shards"]) == -(-1_600_002 // SHARD_TOKENS)


def test_large_vocabularies_take_32_bits(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a🙂" * 10)
    shards = build(path, tmp_path / "cache", WideTokenizer())
    assert shards.metadata["dtype"] == "uint32"
    assert shards.read(0, 21).tolist() == [ord("a"), ord("🙂")] * 10 + [0x110000]


def test_an_unchanged_source_is_not_read_again(corpus, tmp_path):
    reports = []
    build(corpus, tmp_path / "cache", progress=reports.append)
    assert {report.stage for report in reports} == {"tokens"}
    assert (reports[-1].bytes_done, reports[-1].bytes_total, reports[-1].tokens) == (1_600_000, 1_600_000, 1_600_002)
    again = []
    build(corpus, tmp_path / "cache", progress=again.append)
    assert again == []
    (corpus / "a.txt").write_bytes(b"other text")
    build(corpus, tmp_path / "cache", progress=again.append)
    assert {report.stage for report in again} == {"tokens"}


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_killed_build_resumes_with_the_same_bytes(corpus, tmp_path, killed_at):
    build(corpus, tmp_path / "whole")
    count = 0

    def kill(report):
        nonlocal count
        count += 1
        if count == killed_at:
            raise Killed

    with pytest.raises(Killed):
        build(corpus, tmp_path / "killed", progress=kill)
    folder = entry(tmp_path / "killed")
    assert not (folder / INDEX_FILE).exists()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("tokens-*")}
    assert len(kept) >= 10  # each batch fills more than ten shards
    build(corpus, tmp_path / "killed")
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept  # not written a second time
    indexes = [json.loads((entry(tmp_path / name) / INDEX_FILE).read_text()) for name in ("killed", "whole")]
    assert indexes[0] == indexes[1]
    assert not (folder / PROGRESS_FILE).exists()


def test_a_shard_damaged_between_kill_and_resume_is_written_again(corpus, tmp_path):
    build(corpus, tmp_path / "whole")

    def kill(report):
        raise Killed

    with pytest.raises(Killed):
        build(corpus, tmp_path / "killed", progress=kill)
    (entry(tmp_path / "killed") / "tokens-00004.bin").write_bytes(b"short")
    (entry(tmp_path / "killed") / "tokens-00099.bin.partial").write_bytes(b"left over")
    build(corpus, tmp_path / "killed")
    (entry(tmp_path / "killed") / "tokens-00099.bin.partial").unlink()
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damaged_shards_are_named_with_the_remedy(corpus, tmp_path, damage):
    shards = build(corpus, tmp_path / "cache")
    path = entry(tmp_path / "cache") / "tokens-00002.bin"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-2] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    message = {"truncated": "it has 99998 bytes, expected 100000", "missing": "No such file", "flipped": "its SHA-256 is"}[damage]
    with pytest.raises(DataError, match=rf"tokens-00002\.bin is damaged: .*{message}.*; delete the folder .* and run again"):
        build(corpus, tmp_path / "cache")
    if damage != "flipped":
        with pytest.raises(DataError, match=r"tokens-00002\.bin is damaged"):
            shards.read(149_990, 10)
    shutil.rmtree(entry(tmp_path / "cache"))  # the remedy
    assert len(build(corpus, tmp_path / "cache")) == 1_600_002


def test_hashes_are_checked_once_and_again_when_a_file_was_touched(corpus, tmp_path):
    build(corpus, tmp_path / "cache")
    folder = entry(tmp_path / "cache")
    reports = []
    os.utime(folder / "tokens-00001.bin", ns=(1, 1))
    TokenShards.open(folder, reports.append)
    assert [(report.stage, report.source.endswith("tokens-00001.bin")) for report in reports] == [("check", True)]
    TokenShards.open(folder, reports.append)
    assert len(reports) == 1
    (folder / VERIFIED_FILE).unlink()
    TokenShards.open(folder, reports.append)
    assert len(reports) == 1 + 33


@pytest.mark.parametrize("content", ["", "{}", '{"format": 99, "dtype": "uint16"}', '{"format": 1, "dtype": "uint16", "shards": [{}]}'])
def test_a_damaged_index_is_named(corpus, tmp_path, content):
    build(corpus, tmp_path / "cache")
    (entry(tmp_path / "cache") / INDEX_FILE).write_text(content)
    with pytest.raises(DataError, match=r"index\.json is damaged: the index is malformed"):
        build(corpus, tmp_path / "cache")


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt holds no text"):
        build(tmp_path / "a.txt", tmp_path / "cache")


def test_a_source_that_changes_under_the_build_is_refused(corpus, tmp_path):
    def append(report):
        with open(corpus / "a.txt", "ab") as file:
            file.write(b"more")

    with pytest.raises(DataError, match="changed while it was read"):
        build(corpus, tmp_path / "cache", progress=append)


def test_a_full_disk_is_reported_and_leaves_no_partial_shard(corpus, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*tokens-00000\.bin: No space left on device; free space"):
        build(corpus, tmp_path / "cache")
    assert list(entry(tmp_path / "cache").glob("tokens-*")) == []


def test_an_unwritable_cache_is_reported(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write .*data.cache_dir"):
        build(corpus, tmp_path / "cache")


def _build_and_report(corpus, cache, barrier, queue):
    stages = []

    def slowly(report):
        stages.append(report.stage)
        time.sleep(0.05)

    barrier.wait()
    shards = build(corpus, cache, progress=slowly)
    queue.put((sorted(set(stages)), len(shards), shards.metadata["fingerprint"]))


def test_of_two_processes_one_builds_and_one_waits(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_build_and_report, args=(corpus, tmp_path / "cache", barrier, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert [stages for stages, _, _ in results] == [["tokens"], ["waiting"]]
    assert results[0][1:] == results[1][1:]
    build(corpus, tmp_path / "alone")
    assert shard_bytes(tmp_path / "cache") == shard_bytes(tmp_path / "alone")


def test_the_writer_records_where_the_next_shard_begins(tmp_path):
    writer = ShardWriter(tmp_path, np.dtype(np.uint16), shard_tokens=4, finished=[])
    writer.append(np.arange(3, dtype=np.uint16), piece=0)
    writer.append(np.arange(7, dtype=np.uint16), piece=1)  # fills shards 0 (after 1 token) and 1 (after 5), 2 tokens over
    writer.append(np.arange(2, dtype=np.uint16), piece=2)  # fills shard 2 exactly
    writer.close()
    assert [(shard.next_piece, shard.next_offset) for shard in writer.finished] == [(1, 1), (1, 5), (3, 0)]
    assert [shard.tokens for shard in writer.finished] == [4, 4, 4]


def test_a_resumed_piece_counts_its_offset_from_its_own_beginning(tmp_path):
    writer = ShardWriter(tmp_path, np.dtype(np.uint16), shard_tokens=4, finished=[])
    writer.append(np.arange(9, dtype=np.uint16), piece=5, offset=3)  # tokens 3..11 of piece 5
    writer.abandon()
    assert [(shard.next_piece, shard.next_offset) for shard in writer.finished] == [(5, 7), (5, 11)]
