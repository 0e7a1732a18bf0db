"""Sources of text: files, folders and globs, and the standard library's own sources, document by document."""

import errno
import fnmatch
import os
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Any

from lowmem.config.checks import source_problems
from lowmem.config.schema import SourceConfig
from lowmem.data.decoding import (
    COMPRESSIONS,
    DecodeErrors,
    Utf8Reader,
    check_encoding,
    irregular_kind,
    open_compressed,
    strip_compression,
    without_marks,
)
from lowmem.data.hub import HubSource, StreamedSource
from lowmem.data.records import json_line_texts, parquet_texts
from lowmem.data.text_source import LimitedSource, Piece, PieceCutter, ReadCounters, TextSource, document_pieces
from lowmem.system.errors import ConfigError, DataError

_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__")


class StdlibSource(TextSource):
    """The .py files of the standard library, sorted by path, one document each.

    Installed packages are left out, and so are the few files that are not UTF-8: they exist to test other encodings.

    Args:
        folder: where to look; the running Python's own library by default.
    Raises:
        DataError: the library is not there as files.
    """

    label = "stdlib"

    def __init__(self, folder: Path | None = None):
        self._folder = folder or Path(sysconfig.get_path("stdlib"))
        found = (path.relative_to(self._folder) for path in self._folder.rglob("*.py"))
        self._files = sorted(
            (path for path in found if not set(path.parts).intersection(_LEFT_OUT) and (self._folder / path).is_file()),
            key=lambda path: path.as_posix(),
        )
        if not self._files:
            raise DataError(f"{self._folder} holds no .py files: this Python's standard library is packed away; use path or hub instead")
        self._sizes = [(self._folder / path).stat().st_size for path in self._files]
        self.total_bytes = sum(self._sizes)

    def identity(self) -> dict[str, Any]:
        files = [[path.as_posix(), size] for path, size in zip(self._files, self._sizes, strict=True)]
        return {"kind": "stdlib", "python": sys.version, "files": files}

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        for path, size in zip(self._files, self._sizes, strict=True):
            try:
                text = (self._folder / path).read_bytes().decode()
            except UnicodeDecodeError:
                text = ""
            except OSError as error:
                raise DataError(f"cannot read {self._folder / path}: {error.strerror}; repair this Python installation") from error
            counters.input_bytes += size
            yield from document_pieces(text)


FORMATS = (".txt", ".jsonl", ".parquet")
_BLOCK_BYTES = 64 * 1024
_READER = 2  # another number where the same files give another text, so that shards made before are not taken
_ALLOWED = f"{' '.join(FORMATS)}, each also with {' '.join(COMPRESSIONS)}"


def file_format(path: Path) -> str:
    """.txt, .jsonl or .parquet, whatever the compression; "" for anything else."""
    suffix = Path(strip_compression(path)[0]).suffix.lower()
    return suffix if suffix in FORMATS else ""


@dataclass
class FoundFiles:
    """What a path names.

    Attributes:
        format_of: see `find_files`.
        files: regular files, sorted within each folder.
        hidden: readable ones passed over because their names begin with a dot.
        irregular: pipes, devices and sockets passed over.
    """

    format_of: Callable[[Path], str]
    files: list[Path] = field(default_factory=list)
    hidden: int = 0
    irregular: int = 0

    def note(self, path: str) -> str:
        """One line of what was passed over; "" if nothing was."""
        parts = []
        if self.hidden:
            parts.append(f"{self.hidden} whose names begin with a dot (name them to read them)")
        if self.irregular:
            parts.append(f"{self.irregular} that are no regular files")
        return f"{path}: passed over {' and '.join(parts)}" if parts else ""


def find_files(path: str, format_of: Callable[[Path], str] = file_format, allowed: str = _ALLOWED) -> FoundFiles:
    """Files that `path` names: one file, the readable ones below a folder, or the matches of a glob.

    Links are followed, also to folders, each folder once. Names that begin with a dot are passed over unless `path` spells them.

    Args:
        format_of: the format of a file by its name; "" where it cannot be read.
        allowed: the formats, for the message.
    Raises:
        DataError: there is none, one has a format that is not read, is no regular file, or cannot be looked at.
    """
    place = _usable_path(path)
    status = _status(place)
    found = FoundFiles(format_of)
    if status is not None and stat.S_ISDIR(status.st_mode):
        files = [file for _, files in _tree(place, found) for file in files if format_of(file)]
        _add_regular(files, found)
        if not found.files:
            raise DataError(f"the folder {path} holds no text; found no file ending in {allowed}{_but(found, path)}")
        return found
    if status is not None:
        if kind := irregular_kind(status.st_mode):
            raise DataError(
                f"{path} is {kind}, allowed are regular files and folders, because text is read several times; write it to a file"
            )
        found.files = [place]
    else:
        _add_regular(_glob(place, found), found)
    if not found.files:
        raise DataError(f"no file matches {path}; check the path, which is relative to the working directory{_but(found, path)}")
    for file in found.files:
        if not format_of(file):
            raise DataError(f"{file} has a format that cannot be read; allowed: {allowed}")
    return found


def _but(found: FoundFiles, path: str) -> str:
    note = found.note(path)
    return f" ({note})" if note else ""


def _check_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the path {path!a} is not UTF-8; rename the file or the folder") from error


def _usable_path(path: str) -> Path:
    if "\0" in path:
        raise DataError(f"the path {path!r} holds a NUL byte; remove it")
    _check_utf8(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user, or no home directory
        raise DataError(f"the path {path}: {error}; write it without ~") from error


def _status(place: Path) -> os.stat_result | None:
    """What is at a place, links followed; None where there is nothing, or only a link that leads nowhere."""
    try:
        return place.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        # a glob may be longer than any file's name
        if error.errno == errno.ENAMETOOLONG and has_magic(str(place)):
            return None
        raise DataError(f"cannot read {place}: {error.strerror}; check the path and its permissions") from error


def _names(folder: Path) -> list[str]:
    """Of what a folder holds, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}; check its permissions") from error


def _tree(root: Path, found: FoundFiles) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and those below it, each once however many links lead there, with the entries that are no folders."""
    waiting, seen = [root], set()
    while waiting:
        here = waiting.pop()
        status = _status(here)
        if status is None or (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders: list[Path] = []
        others: list[Path] = []
        for name in _names(here):
            child = here / name
            if name.startswith("."):
                found.hidden += bool(found.format_of(child))
            else:
                status = _status(child)
                (folders if status and stat.S_ISDIR(status.st_mode) else others).append(child)
        yield here, others
        waiting += reversed(folders)


def _glob(pattern: Path, found: FoundFiles) -> list[Path]:
    """What matches a glob, folders left out. A part that matches nothing as a pattern but exists as it is spelled is that name."""
    places = [Path(pattern.anchor)]
    parts = [part for part in pattern.parts if part != pattern.anchor]
    for part in [*parts, "*"] if parts and parts[-1] == "**" else parts:
        if part == "**":
            matches = [folder for place in places if place.is_dir() for folder, _ in _tree(place, found)]
        elif has_magic(part):
            matches = [match for place in places if place.is_dir() for match in _matches(place, part, found)]
        else:
            matches = [place / part for place in places if os.path.lexists(place / part)]
        places = list(dict.fromkeys(matches))
    return [place for place in places if not place.is_dir()]


def _matches(folder: Path, part: str, found: FoundFiles) -> list[Path]:
    names = [name for name in _names(folder) if fnmatch.fnmatchcase(name, part)]
    if not names and os.path.lexists(folder / part):
        return [folder / part]
    shown = [name for name in names if part.startswith(".") or not name.startswith(".")]
    found.hidden += sum(bool(found.format_of(folder / name)) for name in set(names) - set(shown))
    return [folder / name for name in shown]


def _add_regular(files: list[Path], found: FoundFiles) -> None:
    for file in sorted(files):
        _check_utf8(str(file))
        status = _status(file)
        if status is None:
            raise DataError(f"{file} is a link to a file that is missing; restore or remove it")
        if irregular_kind(status.st_mode):
            found.irregular += 1
        else:
            found.files.append(file)


class FileSource(TextSource):
    """Local files in the given order.

    A .txt file is one document and its text is kept to the last character, blank lines included; each line of .jsonl and
    each row of .parquet is one.

    Args:
        label: the path as the user wrote it.
        found: from `find_files`.
        text_field: field of .jsonl and .parquet that holds the text.
    """

    def __init__(self, label: str, found: FoundFiles, text_field: str, decode_errors: DecodeErrors):
        self.label = label
        self.note = found.note(label)
        self._files = found.files
        self._text_field = text_field
        self._decode_errors = decode_errors
        self._sizes = [size for _, size, _ in file_stamps(found.files)]
        self.total_bytes = sum(self._sizes)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "reader": _READER,
            "files": file_stamps(self._files),
            "text_field": self._text_field,
            "decode_errors": self._decode_errors,
        }

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        done = 0
        for path, size in zip(self._files, self._sizes, strict=True):
            kind = file_format(path)
            if kind == ".txt":
                yield from text_file_pieces(path, self._decode_errors, counters)
            elif kind == ".jsonl":
                for text in json_line_texts(path, self._text_field, self._decode_errors, counters):
                    yield from document_pieces(text)
            else:
                for text in parquet_texts(path, self._text_field, self._decode_errors, counters):
                    yield from document_pieces(text)
            done += size
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

    Only byte order marks are left out, at the beginning of the file and of its lines, where joining files leaves them.

    Raises:
        DataError: it cannot be read, is damaged, or has bytes that are not UTF-8 (file and line).
    Memory: one block and one piece.
    """
    before, replaced_before = counters.input_bytes, counters.replacements
    reader = Utf8Reader(str(path), decode_errors)
    cutter = PieceCutter()
    line_begins = True
    with open_compressed(path) as (stream, raw):
        check_encoding(str(path), block := stream.read(_BLOCK_BYTES))
        while block:
            text = reader.decode(block)
            yield from cutter.feed(without_marks(text, line_begins))
            line_begins = text.endswith("\n") if text else line_begins
            counters.input_bytes = before + raw.tell()
            counters.replacements = replaced_before + reader.replacements
            block = stream.read(_BLOCK_BYTES)
        yield from cutter.feed(reader.decode(b"", final=True))
    counters.replacements = replaced_before + reader.replacements
    yield from cutter.finish()


def open_source(config: SourceConfig, decode_errors: DecodeErrors) -> TextSource:
    """The source that `config` describes; reads no text yet.

    Raises:
        ConfigError: not exactly one of path, hub and stdlib is set, or a setting has no effect on the one that is.
        DataError: no such file or dataset.
    """
    if problems := source_problems([config], "data.sources"):
        raise ConfigError("\n".join(problems))
    source: TextSource
    if config.path:
        source = FileSource(config.path, find_files(config.path), config.text_field, decode_errors)
    elif config.hub:
        source = StreamedSource(config) if config.streaming else HubSource(config, decode_errors)
    else:
        source = StdlibSource()
    return LimitedSource(source, config.max_bytes) if config.max_bytes else source
