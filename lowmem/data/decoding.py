"""From the bytes of a file to text: decompression in pieces, and UTF-8 that names file and line where it is not."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Protocol, cast

from lowmem.system.errors import DataError
from lowmem.system.units import format_bytes

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
MAX_WINDOW_BYTES = 128 * 1024**2  # what zstd itself reads without being told otherwise
_MAX_XZ_BYTES = 256 * 1024**2
_INPUT_BYTES = 16 * 1024
_OUTPUT_BYTES = 256 * 1024
# 128 blocks of 4 bytes, each of which can stand for 128 KiB: what one portion makes stays below 17 MiB
_ZSTD_PORTION_BYTES = 512
_ZSTD_HEADER_BYTES = 18
_NOTHING = "it holds nothing, not even a compressed frame"
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)  # fmt: skip


def strip_compression(path: Path) -> tuple[str, str]:
    """Name without its compression suffix, and that suffix or ""."""
    suffix = path.suffix.lower()
    return (path.name[: -len(suffix)], suffix) if suffix in COMPRESSIONS else (path.name, "")


def irregular_kind(mode: int) -> str:
    """What a file is that cannot be read twice from its beginning, such as "a device"; "" for a regular file.

    Args:
        mode: `st_mode` of `os.stat`.
    """
    if stat.S_ISREG(mode):
        return ""
    return next((kind for test, kind in _KINDS if test(mode)), "no file")


@contextmanager
def open_compressed(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed stream of a file, and the file itself, whose position tells how far the reading has come.

    Raises:
        DataError: the file is missing, unreadable, no regular file, damaged or cut short (also when that shows later, inside the
            `with`), needs more memory to be unpacked than is allowed, or zstandard is not installed.
    Memory: the decompressor's window, at most 128 MiB for .zst and 256 MiB for .xz, and at most 33 MiB of unpacked text.
    """
    try:
        with open_regular(path) as raw:
            stream = cast(BinaryIO, _decompressed(path, raw))
            yield stream, raw
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # bz2 reports damage as an OSError without a number; those of the operating system have one
        if error.errno is None:
            raise _damaged(path, error) from error
        raise DataError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened for reading; the kind is checked on what was opened, so that a pipe never makes it wait.

    Raises:
        DataError: it is a pipe, a device, a socket or a folder.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = irregular_kind(os.fstat(handle).st_mode)
        if kind:
            raise DataError(f"{path} is {kind}, allowed are regular files, because text is read several times; write it to a file")
        return cast(BinaryIO, os.fdopen(handle, "rb"))
    except BaseException:
        os.close(handle)
        raise


def _decompressed(path: Path, raw: BinaryIO) -> IO[bytes]:
    suffix = strip_compression(path)[1]
    if suffix == ".gz":
        if not os.fstat(raw.fileno()).st_size:
            raise EOFError(_NOTHING)  # the library takes it for text of no length
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    makers: dict[str, Callable[[], _Frame]] = {
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lambda: _XzFrame(path),
        ".zst": lambda: _ZstdFrame(path),
    }
    if suffix in makers:
        return io.BufferedReader(_FrameReader(raw, makers[suffix]), _OUTPUT_BYTES)
    return raw


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).rstrip(".") or type(error).__name__
    return DataError(f"{path} is damaged or cut short ({reason}); replace it with an intact copy")


class _Frame(Protocol):
    """One compressed unit of a file, as bz2 and lzma offer it."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _FrameReader(io.RawIOBase):
    """Frame after frame; unlike the libraries' own readers it notices a file that ends inside a frame, or whose second one is damaged."""

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], _Frame]):
        self._raw, self._new_frame = raw, new_frame
        self._frame: _Frame | None = None
        self._begun = False
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and self._fill():
            pass
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _fill(self) -> bool:
        """Decompress some more; false at the end of the file."""
        if not self._input and (self._frame is None or self._frame.needs_input):
            self._input = self._raw.read(_INPUT_BYTES)
            if not self._input and self._frame is not None:
                raise EOFError("the file ends inside a compressed frame")
            if not self._input and not self._begun:
                raise EOFError(_NOTHING)
            if not self._input:
                return False
        if self._frame is None:
            self._input = self._input.lstrip(b"\0")  # tapes and xz pad with zeros
            if not self._input:
                return True
            self._frame, self._begun = self._new_frame(), True
        self._output = memoryview(self._frame.decompress(self._input, _OUTPUT_BYTES))
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return True


class _XzFrame:
    """An .xz stream whose dictionary has a limit."""

    def __init__(self, path: Path):
        self._path = path
        self._decompressor = lzma.LZMADecompressor(memlimit=_MAX_XZ_BYTES)

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def needs_input(self) -> bool:
        return self._decompressor.needs_input

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            return self._decompressor.decompress(data, max_length)
        except lzma.LZMAError as error:
            if "limit" not in str(error):
                raise
            raise DataError(
                f"{self._path} needs more than {format_bytes(_MAX_XZ_BYTES)} of memory to be unpacked, which is what is allowed; "
                "compress it again with xz -9 or less"
            ) from error


class _ZstdFrame:
    """A zstd frame, fed in portions so small that what they unpack to stays small."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise DataError("reading .zst files needs the zstandard package: pip install 'lowmem[zstd]'") from error
        self._zstd, self._path = zstandard, path
        self._frame: Any = None
        self._pending = memoryview(b"")
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._frame is not None and self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data + bytes(self._pending)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._pending = memoryview(bytes(self._pending) + data)
        try:
            if self._frame is None and not self._begin():
                return b""
            portion, self._pending = self._pending[:_ZSTD_PORTION_BYTES], self._pending[_ZSTD_PORTION_BYTES:]
            self.needs_input = not self._pending
            return self._frame.decompress(portion)
        except self._zstd.ZstdError as error:
            raise EOFError(str(error)) from error

    def _begin(self) -> bool:
        """Look at the frame's header; false while it is incomplete."""
        try:
            window = self._zstd.get_frame_parameters(self._pending).window_size
        except self._zstd.ZstdError:
            if len(self._pending) < _ZSTD_HEADER_BYTES:
                return False
            raise
        if window > MAX_WINDOW_BYTES:
            raise DataError(
                f"{self._path} needs a window of {format_bytes(window)} of memory to be unpacked, allowed is "
                f"{format_bytes(MAX_WINDOW_BYTES)}; unpack it with zstd -d --long=31, and compress it again without --long"
            )
        self._frame = self._zstd.ZstdDecompressor().decompressobj()
        return True


DecodeErrors = Literal["fail", "replace"]
_MARK = "\ufeff"
_HEAD_BYTES = 4096
_OTHER_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip


def check_encoding(name: str, head: bytes) -> None:
    """Refuse a file that is UTF-16 or UTF-32, of which much would pass as UTF-8 full of NUL characters.

    Args:
        name: the file, for the message.
        head: its beginning.
    Raises:
        DataError: it begins with the mark of another encoding, or every other byte is NUL.
    """
    head = head[:_HEAD_BYTES]
    found = next((encoding for mark, encoding in _OTHER_MARKS if head.startswith(mark)), "")
    even, odd = head[::2], head[1::2]
    nul_even, nul_odd = even.count(0), odd.count(0)
    # Latin letters in UTF-16 have NUL in one half of every pair and never in the other
    if not found and ((nul_even == 0 and 2 * nul_odd > len(odd)) or (nul_odd == 0 and 2 * nul_even > len(even) > 1)):
        found = "UTF-16"
    if found:
        raise DataError(f"{name} is {found}, expected UTF-8; convert it: iconv -f {found} -t UTF-8")


def without_marks(text: str, line_begins: bool = True) -> str:
    """Text without byte order marks at the beginning of its lines; elsewhere U+FEFF is a character like any other.

    Args:
        line_begins: the text begins a line.
    """
    if text.isascii() or _MARK not in text:
        return text
    if line_begins:
        text = text.removeprefix(_MARK)
    return text.replace(f"\n{_MARK}", "\n")


def decode_value(data: bytes, place: str, errors: DecodeErrors) -> tuple[str, int]:
    """The text of a value that is bytes, and how many sequences of bytes were replaced.

    Args:
        place: file and row, for the message.
    Raises:
        DataError: it is not UTF-8, and `errors` is fail.
    """
    try:
        return data.decode(), 0
    except UnicodeDecodeError as error:
        if errors == "fail":
            raise DataError(
                f"{place}: byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason}); mend the row, or set data.decode_errors=replace"
            ) from error
    reader = Utf8Reader(place, errors)
    return reader.decode(data, final=True), reader.replacements


class Utf8Reader:
    """Decodes one file in portions that may end inside a character.

    Args:
        name: the file, for the message.
        errors: fail, or replace by U+FFFD.
        first_line: line number of the first portion.
        remedy: what the message advises.

    Attributes:
        replacements: sequences of bytes replaced so far.
    """

    def __init__(
        self, name: str, errors: DecodeErrors, first_line: int = 1, remedy: str = "convert the file, or set data.decode_errors=replace"
    ):
        self._name = name
        self._remedy = remedy
        self._errors = errors
        self._line = first_line
        self._rest = b""
        self.replacements = 0

    def decode(self, data: bytes, final: bool = False) -> str:
        """Text of the bytes that are complete with `data`.

        Args:
            final: nothing follows, so an incomplete character is an error.
        Raises:
            DataError: bytes that are not UTF-8, with file and line; only with `errors="fail"`.
        """
        data = self._rest + data
        self._rest = b""
        parts = []
        start = 0
        while start < len(data):
            try:
                text, used = codecs.utf_8_decode(memoryview(data)[start:], "strict", final)
            except UnicodeDecodeError as error:
                bad_start, bad_stop = start + error.start, start + error.end
                if self._errors == "fail":
                    raise self._error(data, bad_start, error.reason) from error
                parts += [data[start:bad_start].decode(), "\ufffd"]
                self.replacements += 1
                start = bad_stop
                continue
            parts.append(text)
            start += used
            if not used or not final:
                break
        self._rest = data[start:]
        self._line += data.count(b"\n", 0, start)
        return "".join(parts)

    def _error(self, data: bytes, position: int, reason: str) -> DataError:
        line = self._line + data.count(b"\n", 0, position)
        return DataError(f"{self._name}:{line}: byte 0x{data[position]:02x} is not UTF-8 ({reason}); {self._remedy}")


def replace_surrogates(text: str, name: str, line: int, errors: DecodeErrors) -> tuple[str, int]:
    """Text without lone surrogates, which JSON escapes can smuggle in and UTF-8 cannot express.

    Returns:
        The text and how many were replaced by U+FFFD.
    Raises:
        DataError: there is one, and `errors` is fail.
    """
    if text.isascii():
        return text, 0
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "fail":
            raise DataError(
                f"{name}:{line}: the lone surrogate U+{ord(text[error.start]):04X} is no character; "
                "mend the text, or set data.decode_errors=replace"
            ) from error
        count = sum(0xD800 <= ord(character) <= 0xDFFF for character in text)
        return "".join("\ufffd" if 0xD800 <= ord(character) <= 0xDFFF else character for character in text), count
    return text, 0
