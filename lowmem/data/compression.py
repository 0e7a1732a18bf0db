"""Opens plain and compressed files for reading, with one error for every way in which they can be damaged."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lowmem.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_ZSTD_BLOCK_BYTES = 16 * 1024


def strip_compression(path: Path) -> tuple[str, str]:
    """Name without its compression suffix, and that suffix or ""."""
    suffix = path.suffix.lower()
    return (path.name[: -len(suffix)], suffix) if suffix in COMPRESSIONS else (path.name, "")


@contextmanager
def open_compressed(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed stream of a file, and the file itself, whose position tells how far the reading has come.

    Raises:
        DataError: the file is missing, unreadable, damaged or cut short (also when that shows later, inside the `with`), or
            zstandard is not installed.
    Memory: the decompressor's window.
    """
    try:
        with open(path, "rb") as raw:
            stream = cast(BinaryIO, _decompressed(raw, strip_compression(path)[1]))
            yield stream, raw
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # bz2 reports damage as an OSError without a number; those of the operating system have one
        if error.errno is None:
            raise _damaged(path, error) from error
        raise DataError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error


def _decompressed(raw: BinaryIO, suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw))
    return raw


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).rstrip(".") or type(error).__name__
    return DataError(f"{path} is damaged or cut short ({reason}); replace it with an intact copy")


class _ZstdReader(io.RawIOBase):
    """Frame after frame; unlike zstandard's own reader it notices a file that ends inside a frame."""

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise DataError("reading .zst files needs the zstandard package: pip install 'lowmem[zstd]'") from error
        self._zstd = zstandard
        self._raw = raw
        self._frame: Any = None
        self._input = b""
        self._output = b""

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
        self._input = self._input or self._raw.read(_ZSTD_BLOCK_BYTES)
        if not self._input:
            if self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            return False
        if self._frame is None:
            self._frame = self._zstd.ZstdDecompressor().decompressobj()
        try:
            self._output = self._frame.decompress(self._input)
        except self._zstd.ZstdError as error:
            raise EOFError(str(error)) from error
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True
