"""Local text: a file, a folder or a glob of .txt, .jsonl and .parquet, plain or compressed."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.data.compression import COMPRESSIONS, open_compressed, strip_compression
from lowmem.data.json_lines import json_line_texts
from lowmem.data.parquet_files import parquet_texts
from lowmem.data.pieces import Piece, PieceCutter, document_pieces
from lowmem.data.text_source import ReadCounters, TextSource
from lowmem.data.utf8 import DecodeErrors, Utf8Reader
from lowmem.errors import DataError

FORMATS = (".txt", ".jsonl", ".parquet")
_BLOCK_BYTES = 64 * 1024
_ALLOWED = f"{' '.join(FORMATS)}, each also with {' '.join(COMPRESSIONS)}"


def find_files(path: str) -> list[Path]:
    """Files that `path` names, sorted: one file, the readable ones below a folder, or the matches of a glob.

    Raises:
        DataError: there is none, or one has a format that lowmem does not read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file() and file_format(file))
        if not files:
            raise DataError(f"the folder {path} holds no text; found no file ending in {_ALLOWED}")
        return files
    if place.exists():
        files = [place]
    else:
        files = sorted(Path(match) for match in glob.glob(str(place), recursive=True) if Path(match).is_file())
    if not files:
        raise DataError(f"no file matches {path}; check the path, which is relative to the working directory")
    for file in files:
        if not file_format(file):
            raise DataError(f"{file} has a format that cannot be read; allowed: {_ALLOWED}")
    return files


def file_format(path: Path) -> str:
    """.txt, .jsonl or .parquet, whatever the compression; "" for anything else."""
    suffix = Path(strip_compression(path)[0]).suffix.lower()
    return suffix if suffix in FORMATS else ""


class FileSource(TextSource):
    """Local files in the given order.

    A .txt file is one document and its text is kept to the last character, blank lines included; each line of .jsonl and
    each row of .parquet is one.

    Args:
        label: the path as the user wrote it.
        files: from `find_files`.
        text_field: field of .jsonl and .parquet that holds the text.
    """

    def __init__(self, label: str, files: list[Path], text_field: str, decode_errors: DecodeErrors):
        self.label = label
        self._files = files
        self._text_field = text_field
        self._decode_errors = decode_errors
        self.total_bytes = sum(file.stat().st_size for file in files)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "files": file_stamps(self._files),
            "text_field": self._text_field,
            "decode_errors": self._decode_errors,
        }

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        done = 0
        for path in self._files:
            kind = file_format(path)
            if kind == ".txt":
                yield from text_file_pieces(path, self._decode_errors, counters)
            elif kind == ".jsonl":
                for text in json_line_texts(path, self._text_field, self._decode_errors, counters):
                    yield from document_pieces(text)
            else:
                for text in parquet_texts(path, self._text_field, counters):
                    yield from document_pieces(text)
            done += path.stat().st_size
            counters.input_bytes = done


def file_stamps(files: list[Path]) -> list[list[Any]]:
    """Path, size and modification time of each file.

    Raises:
        DataError: one has vanished.
    """
    stamps = []
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}; check the path and its permissions") from error
        stamps.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    return stamps


def text_file_pieces(path: Path, decode_errors: DecodeErrors, counters: ReadCounters) -> Iterator[Piece]:
    """One .txt file as one document, exactly as it is: line ends and blank lines stay.

    Raises:
        DataError: it cannot be read, is damaged, or has bytes that are not UTF-8 (file and line).
    Memory: one block and one piece.
    """
    before, replaced_before = counters.input_bytes, counters.replacements
    reader = Utf8Reader(str(path), decode_errors)
    cutter = PieceCutter()
    with open_compressed(path) as (stream, raw):
        while block := stream.read(_BLOCK_BYTES):
            yield from cutter.feed(reader.decode(block))
            counters.input_bytes = before + raw.tell()
            counters.replacements = replaced_before + reader.replacements
        yield from cutter.feed(reader.decode(b"", final=True))
    counters.replacements = replaced_before + reader.replacements
    yield from cutter.finish()
