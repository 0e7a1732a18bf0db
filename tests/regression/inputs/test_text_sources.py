"""Sources of text that were read wrong, refused wrongly, or waited for without end."""

import bz2
import gzip
import json
import lzma
import os
import socket
import tempfile
import threading
import tracemalloc
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from lowmem.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from lowmem.data import records
from lowmem.data.prepare import build_shards, prepare_data
from lowmem.data.shards import FinishedShard
from lowmem.data.text import open_source
from lowmem.data.text_source import ReadCounters
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.engine.from_config import build_configured_model
from lowmem.engine.resolve import keeps_documents_apart
from lowmem.generation.settings import read_prompts
from lowmem.system.errors import DataError, StorageError
from lowmem.system.files import cache_root
from tests.reference.text import documents

MIB = 1024**2


def parquet(path, table) -> None:
    pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.table(table), path)


# Which files


def test_folders_behind_links_are_read_once_and_loops_end(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.txt").write_text("behind a link")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("plain")
    (corpus / "link").symlink_to(outside)
    (corpus / "same").symlink_to(outside)
    (outside / "loop").symlink_to(corpus)
    (corpus / "self").symlink_to(".")
    assert documents(corpus) == ["plain", "behind a link"]


def test_two_loops_do_not_make_a_glob_exponential(tmp_path):
    (tmp_path / "a.txt").write_text("once")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(".")
    assert documents(tmp_path / "**" / "*.txt") == ["once"]


def test_hidden_files_are_passed_over_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("shown")
    (tmp_path / ".b.txt").write_text("hidden")
    (tmp_path / ".folder").mkdir()
    (tmp_path / ".folder" / "c.txt").write_text("below a hidden folder")
    assert documents(tmp_path) == ["shown"]
    assert "passed over 1 whose names begin with a dot" in open_source(SourceConfig(path=str(tmp_path)), "fail").note
    assert documents(tmp_path / ".b.txt") == ["hidden"]
    assert documents(tmp_path / ".folder") == ["below a hidden folder"]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("missing.txt")
    with pytest.raises(DataError, match=r"b\.txt is a link to a file that is missing"):
        documents(tmp_path)


def test_a_folder_with_brackets_in_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "[2023] a"
    folder.mkdir()
    (folder / "x.txt").write_text("brackets")
    monkeypatch.chdir(tmp_path)
    assert documents("[2023] a/*.txt") == ["brackets"]
    assert documents("[2023] a/**") == ["brackets"]


@pytest.mark.parametrize(
    "name, message",
    [("x" * 300 + ".txt", "File name too long"), ("a\0b.txt", "holds a NUL byte"), ("caf\udce9.txt", "is not UTF-8")],
)
def test_names_that_no_file_can_have(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        documents(f"{tmp_path}/{name}")


def test_a_name_in_a_folder_that_is_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    with pytest.raises(DataError, match=r"caf\\udce9\.txt' is not UTF-8; rename"):
        documents(tmp_path)


def test_no_permission_to_list_a_folder(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.txt").write_text("x")
    listdir = os.listdir

    def refuse(folder):
        if str(folder).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"cannot read the folder .*shut: Permission denied"):
        documents(tmp_path)


def test_no_home_directory(monkeypatch):
    with pytest.raises(DataError, match="write it without ~"):
        documents("~nobody-of-this-name/a.txt")


# What is no file


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_device_link(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make, kind", [(make_fifo, "a named pipe"), (make_socket, "a socket"), (make_device_link, "a device")])
def test_pipes_sockets_and_devices_are_refused_and_passed_over(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    make(tmp_path.joinpath("odd.txt") if make is not make_socket else "odd.txt")
    with pytest.raises(DataError, match=f"odd.txt is {kind}, allowed are regular files"):
        documents("odd.txt")
    with pytest.raises(DataError, match="1 that are no regular files"):
        documents(".")
    (tmp_path / "a.txt").write_text("x")
    assert documents(".") == ["x"]
    assert documents("*.txt") == ["x"]
    assert "passed over 1 that are no regular files" in open_source(SourceConfig(path="."), "fail").note


def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    source = open_source(SourceConfig(path=str(path)), "fail")
    path.unlink()
    os.mkfifo(path)
    opened = threading.Thread(target=lambda: os.close(os.open(path, os.O_WRONLY)), daemon=True)
    opened.start()  # lets a reader that would wait go on, so that this test ends either way
    with pytest.raises(DataError, match="is a named pipe"):
        list(source.pieces(ReadCounters()))
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK)):
        opened.join()


# What text


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress])
def test_byte_order_marks_of_txt_are_no_characters(tmp_path, compress):
    mark = "\ufeff"
    path = tmp_path / ("a.txt" if compress(b"") == b"" else "a.txt.gz")
    path.write_bytes(compress(f"{mark}one\n{mark}two {mark} inside\n".encode()))
    assert documents(path) == [f"one\ntwo {mark} inside\n"]
    # where a block ends makes no difference
    path.write_bytes(compress(("x" * (64 * 1024 - 1) + f"\n{mark}y").encode()))
    assert documents(path) == ["x" * (64 * 1024 - 1) + "\ny"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("errors", ["fail", "replace"])
def test_other_encodings_are_named_whatever_is_replaced(tmp_path, encoding, errors):
    (tmp_path / "a.txt").write_bytes("Some words of text\n".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes('{"text": "words"}\n'.encode(encoding))
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(DataError, match=rf"{name} is UTF-{encoding[4:6]}, expected UTF-8; convert it"):
            documents(tmp_path / name, errors)


def test_joined_jsonl_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one"}\ufeff{"text": "two"} {"text": "three"}\n\ufeff{"text": "four"}\n'.encode())
    assert documents(path) == ["one", "two", "three", "four"]


def test_long_numbers_in_other_fields_do_not_matter(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "x", "id": {"9" * 5000}}}\n')
    assert documents(path) == ["x"]


def test_a_line_without_end_is_refused_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 8 * MIB)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * MIB)
        file.write(b'"}\n')
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: a line of more than 8 MiB"):
            documents(path)
        # the line up to the limit, twice while it is joined
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


# Parquet


def invalid_utf8(values: list[bytes]):
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


def test_parquet_that_is_not_utf8_names_the_row_or_is_replaced(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, {"text": invalid_utf8([b"good", b"b\xc9d"])})
    with pytest.raises(DataError, match=r"a\.parquet: row 2: byte 0xc9 is not UTF-8 .* set data\.decode_errors=replace"):
        documents(path)
    counters = ReadCounters()
    assert documents(path, "replace", counters) == ["good", "b\ufffdd"]
    assert counters.replacements == 1


@pytest.mark.parametrize("kind", [pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.binary(), pyarrow.large_binary()])
def test_parquet_columns_that_hold_text_in_other_types(tmp_path, kind):
    path = tmp_path / "a.parquet"
    texts = ["naïve", "b", "naïve"]
    parquet(path, {"text": pyarrow.array([text.encode() for text in texts] if "binary" in str(kind) else texts).cast(kind)})
    assert documents(path) == texts


def test_parquet_with_two_columns_of_the_name(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]))
    with pytest.raises(DataError, match="2 columns are named 'text'"):
        documents(path)


def test_a_row_that_unpacks_to_more_than_a_document_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", MIB)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 2 * MIB]}), path, use_dictionary=False, compression="zstd")
    with pytest.raises(DataError, match="row 1 has 2 MiB of text, allowed are 1 MiB; divide it"):
        documents(path)


def test_parquet_that_was_made_to_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_RATIO_BYTES", MIB)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * MIB] * 8}), path, use_dictionary=False, compression="zstd")
    with pytest.raises(DataError, match="unpacks from .* to 8 MiB, allowed is a ratio of 1000"):
        documents(path)


def test_a_value_that_many_rows_share_is_unpacked_for_few_of_them_at_once(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), pyarrow.array(["x" * 4 * MIB]))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": column.cast(pyarrow.string())}), path, dictionary_pagesize_limit=64 * MIB, store_schema=False
    )
    pieces = open_source(SourceConfig(path=str(path)), "fail").pieces(ReadCounters())
    before = pyarrow.total_allocated_bytes()
    next(pieces)
    # 8 rows of 4 MiB, as many bytes again while a batch is made, and the dictionary itself; 256 rows would be 1 GiB
    assert pyarrow.total_allocated_bytes() - before < 100 * MIB


def test_a_compressed_file_that_is_no_parquet_is_not_unpacked(tmp_path):
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(b"\0" * 8 * MIB))
    with pytest.raises(DataError, match=r"a\.parquet\.gz is damaged or no parquet file, after row 0 \(it does not begin as one\)"):
        documents(path)


def test_a_compressed_parquet_leaves_room_on_the_disk(tmp_path, monkeypatch):
    plain, path = tmp_path / "b.tmp", tmp_path / "a.parquet.gz"
    parquet(plain, {"text": ["x"]})
    path.write_bytes(gzip.compress(plain.read_bytes()))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100 * MIB))
    with pytest.raises(StorageError, match="set TMPDIR to a folder on a larger disk"):
        documents(path)


def test_rows_of_a_hub_dataset_that_are_not_utf8(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "a.parquet", {"text": invalid_utf8([b"good", b"b\xc9d"])})
    config = SourceConfig(hub=str(tmp_path / "data"))
    with pytest.raises(DataError, match="row 2: byte 0xc9 is not UTF-8"):
        list(open_source(config, "fail").pieces(ReadCounters()))
    counters = ReadCounters()
    assert [piece.text for piece in open_source(config, "replace").pieces(counters)] == ["good", "b\ufffdd"]
    assert counters.replacements == 1


# Compression


def test_zstd_is_read_in_linear_time_and_flat_memory(tmp_path):
    path = tmp_path / "a.txt.zst"
    line = b"the same line again and again, which zstd stores once\n"
    with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(32):
            writer.write(line * (MIB // len(line)))
    assert path.stat().st_size < 16 * 1024  # one read of the file gave all of it at once
    tracemalloc.start()
    try:
        total = sum(len(piece.text) for piece in open_source(SourceConfig(path=str(path)), "fail").pieces(ReadCounters()))
        assert total == 32 * (MIB // len(line)) * len(line)
        # 512 bytes stand for at most 128 blocks of 128 KiB, twice while they are joined: 33 MiB; here far fewer
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


def test_an_intact_zstd_file_with_a_long_window_is_not_called_damaged(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    path = tmp_path / "a.txt.zst"
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(compressor.compress(b"text") + compressor.flush())
    with pytest.raises(DataError, match="needs a window of 256 MiB of memory to be unpacked, allowed is 128 MiB"):
        documents(path)


def test_an_xz_dictionary_beyond_the_limit_is_named(tmp_path):
    data = bytearray(lzma.compress(b"text", preset=0))
    # the first block's header, after 12 bytes of the stream's: size, flags, filter 0x21, one byte of properties, padding, CRC
    size = (data[12] + 1) * 4
    assert data[14:16] == b"\x21\x01"
    data[16] = 38  # 2 GiB
    data[12 + size - 4 : 12 + size] = zlib.crc32(data[12 : 12 + size - 4]).to_bytes(4, "little")
    path = tmp_path / "a.txt.xz"
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="needs more than 256 MiB of memory to be unpacked"):
        documents(path)


def test_a_damaged_second_part_of_bz2_is_not_left_out_silently(tmp_path):
    path = tmp_path / "a.txt.bz2"
    second = bytearray(bz2.compress(b"two"))
    second[0] ^= 1
    path.write_bytes(bz2.compress(b"one") + bytes(second))
    with pytest.raises(DataError, match="damaged or cut short"):
        documents(path)


def test_json_errors_name_few_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({f"field{number}": 0 for number in range(10_000)}) + "\n")
    with pytest.raises(DataError, match="no field 'text'") as caught:
        documents(path)
    assert len(str(caught.value)) < 1000


def test_text_of_nothing_but_white_space(tmp_path):
    (tmp_path / "a.txt").write_text(" \n" * 200)
    with pytest.raises(DataError, match="holds nothing but white space"):
        stored(tmp_path)


def test_a_held_out_share_that_leaves_nothing_to_train_on(tmp_path):
    (tmp_path / "a.txt").write_text("words " * 100)
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path / "a.txt"))], tokenizer="bytes", val_fraction=0.999, val_split="tail")
    with pytest.raises(DataError, match="data.val_fraction=0.999 leaves too little to train on: lower it"):
        prepare_data(replace(config, seq_len=16, cache_dir=str(tmp_path)), seed=0)


# The cache


def stored(folder):
    return build_shards(open_source(SourceConfig(path=str(folder / "a.txt")), "fail"), ByteTokenizer(), folder / "cache")


def changed_index(folder, change) -> None:
    (folder / "a.txt").write_text("some text " * 50)
    stored(folder)
    path = next((folder / "cache" / "shards").glob("*/index.json"))
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["shards"][0].update(file="/dev/zero", tokens=0),
        lambda index: index["shards"][0].update(file="../other/tokens-00000.bin"),
        lambda index: index["shards"][0].update(tokens=-5),
        lambda index: index.update(tokens=7),
        lambda index: index.pop("replacements"),
        lambda index: index.pop("fingerprint"),
    ],
    ids=["device", "outside", "negative", "sum", "replacements", "fingerprint"],
)
def test_an_index_that_cannot_be_true_is_refused_before_its_files_are_read(tmp_path, change):
    changed_index(tmp_path, change)
    with pytest.raises(DataError, match=r"the index is malformed .* delete the folder .* and run again, which rebuilds it"):
        stored(tmp_path)


def test_an_index_without_end_of_brackets(tmp_path):
    changed_index(tmp_path, lambda index: None)
    next((tmp_path / "cache" / "shards").glob("*/index.json")).write_text("[" * 100_000)
    with pytest.raises(DataError, match="the index is malformed"):
        stored(tmp_path)


@pytest.mark.parametrize("entry", [{"file": 5}, {"next_piece": "2"}, {"tokens": None}, "[" * 100_000])
def test_a_record_of_an_interrupted_build_that_cannot_be_true_is_not_used(tmp_path, entry):
    changed_index(tmp_path, lambda index: None)
    folder = next((tmp_path / "cache" / "shards").glob("*/index.json")).parent
    shard = next(folder.glob("*.bin"))
    status = shard.stat()
    true = FinishedShard(shard.name, status.st_size // 2, "0" * 64, status.st_mtime_ns, 1, 0)
    (folder / "progress.json").write_text(entry if isinstance(entry, str) else json.dumps([{**asdict(true), **entry}]))
    (folder / "index.json").unlink()
    assert len(stored(tmp_path)) == 501


@pytest.mark.parametrize("name", ["index.json", "verified.json", "progress.json", "tokens-00000.bin"])
def test_pipes_among_the_files_of_the_cache_are_neither_read_nor_written(tmp_path, name):
    changed_index(tmp_path, lambda index: None)
    folder = next((tmp_path / "cache" / "shards").glob("*/index.json")).parent
    if name == "progress.json":
        (folder / "index.json").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=rf"{name} is damaged: it is a named pipe; delete the folder"):
        stored(tmp_path)


def test_a_damaged_tokenizer_in_the_cache_is_trained_again(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path / "a.txt"))], tokenizer="chars", seq_len=16, cache_dir=str(tmp_path / "c"))
    before = prepare_data(config, seed=0).fingerprint
    kept = next((tmp_path / "c" / "tokenizers").glob("*.json"))
    whole = kept.read_bytes()
    for damaged in (whole[:20], whole.replace(b"some", b"tome"), whole.replace(b"x", b"y")):
        kept.write_bytes(damaged)
        assert prepare_data(config, seed=0).fingerprint == before


def test_no_home_and_no_name(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"lowmem-{os.getuid()}"
    assert cache_root("") == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(StorageError, match="belongs to others; set XDG_CACHE_HOME"):
        cache_root("")
    with pytest.raises(StorageError, match="write it without ~"):
        cache_root("~nobody-of-this-name/cache")


# Documents in one window


def masked_data(folder, first: str):
    folder.mkdir()
    # a document of 19 bytes and its end, again and again, with one of 9 before it
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [first, *["the same text again"] * 8]))
    config = DataConfig(
        sources=[SourceConfig(path=str(folder))], tokenizer="bytes", seq_len=30, val_fraction=0.2, val_split="tail", cache_dir=str(folder)
    )
    config.document_mask = True
    return prepare_data(config, seed=0)


def test_no_token_sees_the_document_before_its_own(tmp_path):
    logits = []
    model_config = ModelConfig(dim=32, num_layers=2, num_heads=2, vocab_size=257, max_seq_len=30, positions="learned")
    model = build_configured_model(RunConfig(model=model_config)).eval()
    for name, first in (("one", "something"), ("two", "NOTHING!!")):
        data = masked_data(tmp_path / name, first)
        batch = next(
            batch for batch in (data.train.batch(1, seq_len=30, step=0) for _ in range(1000)) if batch.inputs[0, 0] == ord(first[0])
        )
        # the end of a document is its last target and the first input of the next one: nothing to predict is left out
        assert np.array_equal(np.flatnonzero(np.diff(batch.segments[0])) + 1, np.flatnonzero(batch.inputs[0] == 256))
        assert batch.target_count() == 30
        held_out = next(data.validation.batches())
        assert np.array_equal(held_out.segments, 1 + np.cumsum(held_out.inputs == 256, axis=1))
        tokens, segments = torch.from_numpy(batch.inputs.copy()), torch.from_numpy(batch.segments)
        with torch.no_grad():
            hidden = model.embed(tokens, segments_BT=segments)
            for index in range(2):
                hidden = model.block(index, segments)(hidden)
        logits.append(hidden[:, 9:])
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "model, device, teacher, masked",
    [("decoder", "cpu", "", True), ("decoder", "cuda", "", False), ("i3", "cpu", "", False), ("decoder", "cpu", "decoder", True),
     ("decoder", "cpu", "i3", False)],
)  # fmt: skip
def test_documents_are_kept_apart_where_model_teacher_and_device_can(tmp_path, model, device, teacher, masked):
    config = RunConfig(model=ModelConfig(name=model))
    if teacher:
        config.train.distill.teacher = str(tmp_path)
        (tmp_path / "config.yaml").write_text(f"model:\n  name: {teacher}\n")
    assert keeps_documents_apart(config, torch.device(device)) is masked
    for wanted in (True, False):
        config.data.document_mask = wanted
        assert keeps_documents_apart(config, torch.device(device)) is wanted


@pytest.mark.parametrize(
    "line", ['{"text": "aaaa", "text": "zzzz"}', '{"text": "a", "meta": {"id": 1, "id": 2}}', '{"t\\u0065xt": "a", "text": "b"}']
)
def test_a_key_that_occurs_twice_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line)
    with pytest.raises(DataError, match=r"a.jsonl:3: .*'(text|id)' occurs twice in one object"):
        documents(tmp_path / "a.jsonl")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "prompt": "b"}')
    with pytest.raises(DataError, match=r"p.jsonl:1: no JSON \('prompt' occurs twice in one object\)"):
        read_prompts(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("end", ["gz", "xz", "bz2", "zst"])
def test_an_empty_download_of_a_compressed_file_is_damaged(tmp_path, end):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    assert "".join(documents(tmp_path)) == "good"
    for name in ("b.txt", "b.jsonl"):
        for content in (b"", bytes(4096)):  # the second of a program that makes room first
            (tmp_path / f"{name}.{end}").write_bytes(content)
            with pytest.raises(DataError, match=f"{name}.{end} is damaged or cut short"):
                documents(tmp_path)
        (tmp_path / f"{name}.{end}").unlink()
    nothing = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.ZstdCompressor().compress}[end](b"")
    (tmp_path / f"c.txt.{end}").write_bytes(nothing)
    assert "".join(documents(tmp_path)) == "good"
