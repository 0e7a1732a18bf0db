"""What every source of text offers: documents in pieces, and what they depend on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowmem.data.pieces import Piece, limit_bytes


@dataclass
class ReadCounters:
    """What a source has done so far; it counts in place while its pieces are taken.

    Attributes:
        input_bytes: bytes of files read, compressed where they are.
        replacements: sequences of bad bytes replaced by U+FFFD.
    """

    input_bytes: int = 0
    replacements: int = 0


class TextSource(ABC):
    """Documents in an order that never changes, read from the start each time.

    Attributes:
        label: the source as the user named it, for messages.
        total_bytes: about what `ReadCounters.input_bytes` ends at; None when nobody knows.
        note: one line about what was passed over, for the user; empty if there is nothing to say.
        streamed: read over the network each time, so that only its beginning is used for training a tokenizer.
    """

    label: str
    total_bytes: int | None = None
    note: str = ""
    streamed: bool = False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the text depends on, JSON-ready: token shards are reused while it stays the same.

        Raises:
            DataError: a file has vanished.
        """

    @abstractmethod
    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        """All documents, piece by piece.

        Raises:
            DataError: malformed input, naming file and line.
        Memory: bounded by the longest line of .jsonl, row group of .parquet or document of a hub dataset; for .txt by nothing.
        """


class LimitedSource(TextSource):
    """The first `max_bytes` bytes of text of another source."""

    def __init__(self, source: TextSource, max_bytes: int):
        self.label, self.note = source.label, source.note
        self.total_bytes = min(source.total_bytes or max_bytes, max_bytes)
        self.streamed = source.streamed
        self._source = source
        self._max_bytes = max_bytes

    def identity(self) -> dict[str, Any]:
        return {**self._source.identity(), "max_bytes": self._max_bytes}

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        return limit_bytes(self._source.pieces(counters), self._max_bytes)
