"""The tokenizer of i3: text in chunks of two or three characters."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lowmem.data.tokenizers import END_OF_TEXT, Tokenizer, surrogate_error
from lowmem.errors import DataError

UNKNOWN = "<UNK>"
TRIGRAMS = (
    "the", "and", "ing", "ion", "tio", "for", "tha", "ter", "hat", "his", "ere", "ent", "her", "was",
    "you", "are", "not", "but", "can", "all", "whi", "one", "our", "out", "whe", "hav", "thi", "wit",
)  # fmt: skip
# Three characters if they are one of the trigrams, or follow a space, or are followed by one; else two; a short tail as it is.
_CHUNK = re.compile(rf"{'|'.join(TRIGRAMS)}|(?<= ).{{3}}|.{{3}}(?= )|..?", re.DOTALL)


class ChunkTokenizer(Tokenizer):
    """Chunks of two or three characters, cut by a fixed rule.

    A chunk without an id is tried by its first two characters, then its first one, else it is <UNK> and one character is
    passed over; the rule goes on after whatever was taken. Ids: <UNK> is 0, the chunks follow, end of document is last.

    Args:
        chunks: every chunk that has an id, in the order of ids, <UNK> excluded.
        lowercase: lower-case the text first, as published; False keeps it, and then decoding is exact while every
            character has an id.
    Source: the i3 model family; a reconstruction, since its code is not public. The cap on the vocabulary is ours.
    """

    kind = "chunk"

    def __init__(self, chunks: Sequence[str], *, lowercase: bool):
        self.lowercase = lowercase
        self._chunks = list(chunks)
        self._ids = {chunk: number for number, chunk in enumerate(self._chunks, start=1)}
        if len(self._ids) != len(self._chunks):
            raise ValueError("a chunk occurs twice")
        self.unknown_id = 0
        self.eos_id = len(self._chunks) + 1
        self.vocab_size = len(self._chunks) + 2
        self._texts = [UNKNOWN, *self._chunks, END_OF_TEXT]

    @classmethod
    def train(cls, texts: Iterable[str], *, lowercase: bool, vocab_size: int = 0, characters: Iterable[str] = ()) -> "ChunkTokenizer":
        """The chunks of `texts` by falling frequency, then alphabetically.

        Args:
            vocab_size: keep at most so many ids, <UNK> and end of document included; 0 keeps every chunk. With a cap every
                single character of the texts keeps an id, so that no known character becomes <UNK>.
            characters: more characters that need an id, as they occur in the corpus beyond `texts`.
        Raises:
            DataError: there is no text, or its characters alone exceed `vocab_size`.
        Memory: the distinct chunks of `texts`.
        """
        counts: Counter[str] = Counter()
        alphabet = {part for character in characters for part in (character.lower() if lowercase else character)}
        for text in texts:
            found = chunk_text(text.lower() if lowercase else text)
            counts.update(found)
            alphabet.update(*found)
        if not alphabet:
            raise DataError("the corpus holds no text to take chunks from; check data.sources")
        if not vocab_size:
            return cls(sorted(counts, key=lambda chunk: (-counts[chunk], chunk)), lowercase=lowercase)
        room = vocab_size - 2 - len(alphabet)
        if room < 0:
            raise DataError(
                f"the corpus has {len(alphabet)} different characters, data.tokenizer_vocab_size is {vocab_size}; "
                f"set it to at least {len(alphabet) + 2}, or choose the tokenizer bpe or bytes"
            )
        longer = sorted((chunk for chunk in counts if len(chunk) > 1), key=lambda chunk: (-counts[chunk], chunk))[:room]
        kept = sorted({*alphabet, *longer}, key=lambda chunk: (-counts[chunk], chunk))
        return cls(kept, lowercase=lowercase)

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from error
        text = text.lower() if self.lowercase else text
        ids: list[int] = []
        known, position = self._ids, 0
        while position < len(text):
            # the rule is the same after an unknown chunk, but goes on from another place
            for match in _CHUNK.finditer(text, position):
                token = known.get(match.group())
                if token is None:
                    position = self._encode_unknown(match.group(), match.start(), ids)
                    break
                ids.append(token)
            else:
                break
        return ids

    def _encode_unknown(self, chunk: str, position: int, ids: list[int]) -> int:
        for length in (2, 1):
            if length < len(chunk) and (token := self._ids.get(chunk[:length])) is not None:
                ids.append(token)
                return position + length
        ids.append(self.unknown_id)
        return position + 1

    def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        ids = self.encode(text)
        ends = np.cumsum([1 if token == self.unknown_id else len(self._texts[token]) for token in ids], dtype=np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1) if ids else np.empty((0, 2), dtype=np.int64)
        if not self.lowercase or len(text.lower()) == len(text):
            return ids, spans
        # a few characters are longer in lower case
        origin = np.repeat(np.arange(len(text), dtype=np.int64), [len(character.lower()) for character in text])
        return ids, np.stack([origin[spans[:, 0]], origin[spans[:, 1] - 1] + 1], axis=1)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([self._texts[token] for token in ids])

    def to_json(self) -> dict[str, Any]:
        return {"lowmem_tokenizer": "chunk", "lowercase": self.lowercase, "chunks": self._chunks}


def chunk_text(text: str) -> list[str]:
    """The text cut by the rule, before any vocabulary; the chunks join to the text again."""
    return _CHUNK.findall(text)
