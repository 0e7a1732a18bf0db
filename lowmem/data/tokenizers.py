"""Tokenizers: what every one offers, the plain ones, and reading them back."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.system.errors import DataError
from lowmem.system.files import json_sha256, write_json

END_OF_TEXT = "<|endoftext|>"
TextPart = tuple[str, int | None]  # a text, and the token that it stands for; None for plain text


class Tokenizer(ABC):
    """Encodes text; every kind is saved as one self-describing JSON file.

    Attributes:
        kind: bpe, chunk, bytes, chars, or huggingface for a ready-made one.
        vocab_size: ids are below this.
        eos_id: the token that ends a document; decoded to its name, such as <|endoftext|>.
        begin_ids: what every text begins with, such as Llama's <s>; empty for most.
    """

    kind: str
    vocab_size: int
    eos_id: int
    begin_ids: tuple[int, ...] = ()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text; no end-of-document token is added.

        Raises:
            DataError: the text holds a lone surrogate, which is no character.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the beginning of a document, at least one: `begin_ids`, unless the text spells them, and the text.

        An empty one without `begin_ids` is what precedes a document in training: the end of another.
        """
        ids, begin = self.encode(text), [*self.begin_ids]
        return ids if ids and ids[: len(begin)] == begin else begin + ids or [self.eos_id]

    def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids of a text as `encode` gives them, and (tokens, 2) where in the text the characters of each begin and end.

        Tokens that share a character have overlapping spans.

        Raises:
            NotImplementedError: of a kind that is not for conversations.
        """
        raise NotImplementedError(self.kind)

    def special_tokens(self) -> dict[str, int]:
        """Names that `encode` takes for one token wherever a text has them."""
        return {}

    def encode_parts(self, parts: Sequence[TextPart]) -> tuple[list[int], np.ndarray]:
        """Ids and spans of a text in which special tokens are where the parts say, and nowhere else, whatever its characters spell.

        Args:
            parts: of the text, in order.
        Returns:
            (tokens,) ids and (tokens, 2) spans in the joined text.
        """
        ids: list[int] = []
        spans, position = [np.empty((0, 2), dtype=np.int64)], 0
        for text, token in parts:
            found, covered = self.encode_spans(text) if token is None else ([token], np.array([[0, len(text)]], dtype=np.int64))
            ids += found
            spans.append(covered + position)
            position += len(text)
        return ids, np.concatenate(spans)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are no complete character become U+FFFD."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `save` writes."""

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json atomically.

        Raises:
            StorageError: the disk is full, or not writable.
        """
        write_json(Path(path), self.to_json())

    def sha256(self) -> str:
        """Identifies the tokenizer by what it does, not by where it came from."""
        return tokenizer_sha256(self.to_json(), self.eos_id, self.begin_ids)


def tokenizer_sha256(value: Any, eos_id: int, begin_ids: Sequence[int] = ()) -> str:
    """The hash of a tokenizer's file and of what its texts begin and end with."""
    return json_sha256([value, eos_id, *([[*begin_ids]] if begin_ids else [])])


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuse a tokenizer whose ids the model's embedding does not hold.

    Args:
        model_vocab_size: rows of the embedding; 0 means that it takes the tokenizer's size.
    Raises:
        DataError: the tokenizer is larger.
    """
    if 0 < model_vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size allows {model_vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or to 0 for exactly that"
        )


def surrogate_error(error: UnicodeEncodeError) -> DataError:
    """The one error of `encode`."""
    return DataError(f"the text holds the lone surrogate U+{ord(error.object[error.start]):04X}, which is no character; remove it")


_LONGEST_WAIT = 8


class TokenStreamDecoder:
    """Gives the text of each id as soon as its characters are complete.

    What it has given, joined, equals `tokenizer.decode` of all the ids once `finish` was called (for bytes that form no
    character the two may differ in the number of U+FFFD).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """New text, or "" while a character is incomplete."""
        self._waiting.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._waiting) < _LONGEST_WAIT:
            return ""
        return self._give(text)

    def finish(self) -> str:
        """The rest; an incomplete character becomes U+FFFD."""
        return self._give(self._new_text()) if self._waiting else ""

    def _new_text(self) -> str:
        # the ids before are decoded again because some tokenizers treat the first id of a text differently
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode(self._context + self._waiting)[len(before) :]

    def _give(self, text: str) -> str:
        self._context, self._waiting = self._waiting, []
        return text


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
