"""The running Python's own standard library as text: tens of megabytes on every machine, without a download."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.data.pieces import Piece, document_pieces
from lowmem.data.text_source import ReadCounters, TextSource
from lowmem.errors import DataError

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
