"""Text in bounded pieces: what every source yields and every tokenizer is fed."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE_CHARS = 16 * 1024


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: at most PIECE_CHARS characters, never empty.
        ends_document: the document ends here; an end-of-document token follows.
    """

    text: str
    ends_document: bool


class PieceCutter:
    """Cuts one document, fed in any portions, into pieces that depend on the document alone.

    A cut falls before whitespace that follows a non-space: byte-level BPE splits there anyway, so that the tokens are those
    of the whole document. Only text without such a place in half a piece is cut inside a word.

    Memory: one piece and one fed portion.
    """

    def __init__(self, piece_chars: int = PIECE_CHARS):
        self._piece_chars = piece_chars
        self._rest = ""

    def feed(self, text: str) -> Iterator[Piece]:
        """The pieces that are complete with `text`; iterate to the end."""
        buffer = self._rest + text
        start = 0
        while len(buffer) - start > self._piece_chars:
            stop = _safe_cut(buffer, start, start + self._piece_chars)
            yield Piece(buffer[start:stop], False)
            start = stop
        self._rest = buffer[start:]

    def finish(self) -> Iterator[Piece]:
        """The last piece of the document; nothing for an empty document."""
        if self._rest:
            yield Piece(self._rest, True)
        self._rest = ""


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
                yield Piece(text, True)
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
