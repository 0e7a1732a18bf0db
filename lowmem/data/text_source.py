"""What every source of text offers, what reading it tells, and documents cut into pieces of bounded size."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class DataProgress:
    """One report; reports come after every bounded piece of work.

    Attributes:
        stage: tokenizer (its vocabulary is trained), tokens (shards are written), check (hashes are computed),
            waiting (another process builds the same shards), warning (`message` should be shown to the user).
        source: which source, as the user named it.
        bytes_done: bytes of input files read, compressed where they are; of text where `max_bytes` is the limit.
        bytes_total: what `bytes_done` ends at; None when nobody knows.
        tokens: tokens written so far.
        message: one line for people, or empty.
    """

    stage: Literal["tokenizer", "tokens", "check", "waiting", "warning"]
    source: str
    bytes_done: int = 0
    bytes_total: int | None = None
    tokens: int = 0
    message: str = ""


ProgressCallback = Callable[[DataProgress], None]


def ignore_progress(report: DataProgress) -> None:
    """The callback of those who do not listen."""


PIECE_CHARS = 16 * 1024


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: at most PIECE_CHARS characters, never empty.
        ends_document: the document ends here; an end-of-document token follows.
        begins_document: it begins here; where the tokenizer begins texts with a token, that comes before.
    """

    text: str
    ends_document: bool
    begins_document: bool


class PieceCutter:
    """Cuts one document, fed in any portions, into pieces that depend on the document alone.

    A cut falls before whitespace that follows a non-space: byte-level BPE splits there anyway, so that the tokens are those
    of the whole document. Only text without such a place in half a piece is cut inside a word.

    Memory: one piece and one fed portion.
    """

    def __init__(self, piece_chars: int = PIECE_CHARS):
        self._piece_chars = piece_chars
        self._rest = ""
        self._begun = False

    def feed(self, text: str) -> Iterator[Piece]:
        """The pieces that are complete with `text`; iterate to the end."""
        buffer = self._rest + text
        start = 0
        while len(buffer) - start > self._piece_chars:
            stop = _safe_cut(buffer, start, start + self._piece_chars)
            yield Piece(buffer[start:stop], False, not self._begun)
            start, self._begun = stop, True
        self._rest = buffer[start:]

    def finish(self) -> Iterator[Piece]:
        """The last piece of the document; nothing for an empty document."""
        if self._rest:
            yield Piece(self._rest, True, not self._begun)
        self._rest, self._begun = "", False


def document_pieces(text: str) -> Iterator[Piece]:
    """The pieces of a document that is in memory already."""
    cutter = PieceCutter()
    yield from cutter.feed(text)
    yield from cutter.finish()


def limit_bytes(pieces: Iterable[Piece], max_bytes: int) -> Iterator[Piece]:
    """Stop after `max_bytes` bytes of UTF-8 text, inside a document if need be (never inside a character)."""
    left = max_bytes
    for piece in pieces:
        size = utf8_size(piece.text)
        if size >= left:
            text = piece.text.encode()[:left].decode(errors="ignore")
            if text:
                yield Piece(text, True, piece.begins_document)
            return
        left -= size
        yield piece


def utf8_size(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _safe_cut(text: str, start: int, stop: int) -> int:
    floor = start + (stop - start) // 2
    cut = max(text.rfind(" ", floor, stop + 1), text.rfind("\n", floor, stop + 1))
    while cut > floor and text[cut - 1].isspace():
        cut -= 1
    return cut if cut > floor else stop


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
