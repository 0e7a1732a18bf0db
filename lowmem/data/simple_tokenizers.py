"""Tokenizers that need no training: bytes, and the characters of the corpus."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lowmem.data.tokenizers import END_OF_TEXT, Tokenizer, surrogate_error
from lowmem.errors import DataError

UNKNOWN_CHARACTER = "\ufffd"
_UNICODE_SIZE = 0x110000


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, then one end-of-document token: 257 ids, lossless for any text."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from error

    def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        ids = self.encode(text)
        starts = np.cumsum((np.array(ids, dtype=np.int64) & 0xC0) != 0x80) - 1  # a character begins with every byte that continues none
        return ids, np.stack([starts, starts + 1], axis=1)

    def decode(self, ids: Sequence[int]) -> str:
        data = bytearray()
        for token in ids:
            data += END_OF_TEXT.encode() if token == self.eos_id else bytes((token,))
        return data.decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"lowmem_tokenizer": "bytes"}


class CharTokenizer(Tokenizer):
    """The characters of a corpus in code point order, then end of document, then unknown.

    Args:
        characters: every character that has an id, once.
    Memory: 4.5 MB for the table of all code points.
    """

    kind = "chars"

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self.eos_id = len(self.characters)
        self.unknown_id = self.eos_id + 1
        self.vocab_size = self.eos_id + 2
        self._ids = np.full(_UNICODE_SIZE, self.unknown_id, dtype=np.int32)
        self._ids[np.frombuffer(self.characters.encode("utf-32-le"), dtype=np.uint32)] = np.arange(self.eos_id, dtype=np.int32)
        self._texts = [*self.characters, END_OF_TEXT, UNKNOWN_CHARACTER]

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Every character that occurs in `texts`.

        Raises:
            DataError: there is no text.
        """
        found: set[str] = set()
        for text in texts:
            found.update(text)
        if not found:
            raise DataError("the corpus holds no text to take characters from; check data.sources")
        return cls("".join(found))

    def encode(self, text: str) -> list[int]:
        try:
            return self._ids[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].tolist()
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from error

    def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        starts = np.arange(len(text), dtype=np.int64)
        return self.encode(text), np.stack([starts, starts + 1], axis=1)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([self._texts[token] for token in ids])

    def to_json(self) -> dict[str, Any]:
        return {"lowmem_tokenizer": "chars", "characters": self.characters}
