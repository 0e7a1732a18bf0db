"""Files in every format and compression; every way in which they can be wrong."""

import bz2
import gzip
import json
import lzma
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lowmem.config.schema import SourceConfig
from lowmem.data.text import open_source
from lowmem.data.text_source import ReadCounters
from lowmem.system.errors import ConfigError, DataError
from tests.reference.text import documents

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXT = "First line\r\n\n  indented, naïve 日本語 🙂\n\nlast line without end"


def parquet_bytes(folder, columns) -> bytes:
    path = folder / "made.tmp"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_txt_file_is_one_document_kept_exactly(tmp_path, suffix):
    text = TEXT * 3000  # several blocks and pieces
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](text.encode()))
    counters = ReadCounters()
    assert documents(path, counters=counters) == [text]
    assert counters.input_bytes == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_each_line_of_jsonl_is_a_document(tmp_path, suffix):
    lines = [json.dumps({"id": number, "body": f"{TEXT} {number}"}) for number in range(300)]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](("\n".join(lines) + "\n\n").encode()))
    assert documents(path, text_field="body") == [f"{TEXT} {number}" for number in range(300)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_each_row_of_parquet_is_a_document(tmp_path, suffix):
    data = parquet_bytes(tmp_path, {"id": [1, 2, 3], "text": ["one", TEXT, "three"]})
    path = tmp_path / f"a.parquet{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    counters = ReadCounters()
    assert documents(path, counters=counters) == ["one", TEXT, "three"]
    assert counters.input_bytes == path.stat().st_size


def test_concatenated_members_are_all_read(tmp_path):
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
        assert documents(path) == ["one two"]


def test_folder_and_glob_are_sorted_and_a_folder_passes_over_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text("not data")
    assert documents(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert documents(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert documents(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    assert documents(tmp_path / "a[1].txt") == ["brackets"]


def test_max_bytes_stops_inside_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("12345")
    (tmp_path / "b.txt").write_text("67890")
    assert documents(tmp_path, max_bytes=7) == ["12345", "67"]
    assert documents(tmp_path, max_bytes=5) == ["12345"]


def test_empty_documents_vanish(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "x"}\n')
    assert documents(path) == ["x"]


def test_a_byte_order_mark_does_not_break_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert documents(path) == ["x"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: malformed JSON"),
        ("a.jsonl", b"\n[1]\n", r"a\.jsonl:2: found a list, expected an object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl:1: no field 'text', found 'body', 'id'; set text_field"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: field 'text' is null, expected text"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is a number, expected text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', r"a\.jsonl:2: the lone surrogate U\+D800"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: JSON that cannot be parsed"),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt:2: byte 0xff is not UTF-8"),
        ("a.parquet", b"PAR1 this is none", r"a\.parquet is damaged or no parquet file, after row 0"),
    ],
)
def test_malformed_files_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        documents(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"body": ["x"]}, r"no column 'text', found 'body'"),
        ({"text": [1]}, r"column 'text' is int64, expected text"),
        ({"text": ["x", None]}, r"row 2 has null in 'text'"),
    ],
)
def test_malformed_parquet_columns(tmp_path, columns, message):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(tmp_path, columns))
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut short", "garbage"])
def test_damaged_compressed_files(tmp_path, suffix, damage):
    data = COMPRESS[suffix](TEXT.encode() * 1000)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: len(data) // 2] if damage == "cut short" else b"no compressed data at all")
    with pytest.raises(DataError, match=r"a\.txt\.\w+ is damaged or cut short .*replace it"):
        documents(path)


def test_replacements_are_counted_over_all_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\xff\xfey")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff\\ud800"}\n')
    counters = ReadCounters()
    assert documents(tmp_path, errors="replace", counters=counters) == ["x\ufffd\ufffdy", "\ufffd\ufffd"]
    assert counters.replacements == 4


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"no file matches .*nothing\.txt"):
        documents(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"no file matches .*\*\.jsonl"):
        documents(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match=r"holds no text; found no file ending in \.txt \.jsonl \.parquet"):
        documents(tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"a\.pdf has a format that cannot be read; allowed: \.txt"):
        documents(tmp_path / "a.pdf")


@pytest.mark.parametrize("package, name, extra", [("zstandard", "a.txt.zst", "zstd"), ("pyarrow", "a.parquet", "hub")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package, name, extra):
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"pip install 'lowmem\[{extra}\]'"):
        documents(tmp_path / name)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "no source; set exactly one"),
        ({"path": "x", "stdlib": True}, "path and stdlib; set exactly one"),
        ({"path": "x", "subset": "en", "streaming": True}, r"data.sources\[0\] has subset and streaming, which has no effect on path"),
        ({"stdlib": True, "text_field": "body"}, r"data.sources\[0\] has text_field, which has no effect on stdlib"),
        ({"stdlib": True, "max_bytes": -1}, "max_bytes is -1"),
    ],
)
def test_contradictory_source_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        open_source(SourceConfig(**settings), "fail")


def test_a_column_whose_name_begins_another_is_not_mixed_up(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text.language": ["en", "de"], "text": ["one", "two"]}), path)
    assert documents(path) == ["one", "two"]
    assert documents(path, text_field="text.language") == ["en", "de"]


def test_zstd_frames_may_be_skippable_empty_or_padded(tmp_path):
    path = tmp_path / "a.txt.zst"
    compress = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18" + (70_000).to_bytes(4, "little") + b"x" * 70_000
    path.write_bytes(skippable + compress(b"one ") + compress(b"") + skippable + compress(b"two") + b"\0" * 20)
    assert documents(path) == ["one two"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_cut_anywhere_is_damaged(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](b"one two three" * 5)
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged or cut short"):
            documents(path)
