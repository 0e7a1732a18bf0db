"""Text to token ids and back: the interface of all tokenizers, and loading them from tokenizer.json."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.compression import open_regular
from lowmem.data.storage import json_sha256, malformed, write_json
from lowmem.errors import DataError
from lowmem.units import format_bytes

END_OF_TEXT = "<|endoftext|>"
_MAX_BYTES = 256 * 1024**2  # ten times the largest vocabularies there are
TextPart = tuple[str, int | None]  # a text, and the token that it stands for; None for plain text


class Tokenizer(ABC):
    """Encodes text; every kind is saved as one self-describing JSON file.

    Attributes:
        kind: bpe, chunk, bytes, chars, or huggingface for a ready-made one.
        vocab_size: ids are below this.
        eos_id: the token that ends a document; decoded to its name, such as <|endoftext|>.
    """

    kind: str
    vocab_size: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text; no end-of-document token is added.

        Raises:
            DataError: the text holds a lone surrogate, which is no character.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

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
        return json_sha256([self.to_json(), self.eos_id])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or in the tokenizer.json of a folder.

    Args:
        path: a tokenizer.json written by `save` or by Hugging Face tokenizers.
    Raises:
        DataError: the file is missing or malformed.
    """
    place, content = _read(Path(path))
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no tokenizer file ({error}); expected a tokenizer.json") from error
    if not isinstance(value, dict):
        raise DataError(f"{place} is no tokenizer file; expected a JSON object, found {type(value).__name__}")
    if "lowmem_tokenizer" not in value:
        from lowmem.data.hf_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer.from_content(content, value, place)
    try:
        return _own_tokenizer(value)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place} is a damaged tokenizer file ({malformed(error)}); restore it") from error


def _read(place: Path) -> tuple[Path, str]:
    """The file that is meant, and its text."""
    try:
        if place.is_dir():
            place = place / "tokenizer.json"
        with open_regular(place) as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {place}: {error.strerror}; check the path") from error
    except ValueError as error:  # NUL in the path, or a name that is not UTF-8
        raise DataError(f"cannot read the tokenizer {str(place)!a} ({error}); check the path") from error
    if len(content) > _MAX_BYTES:
        raise DataError(f"{place} is no tokenizer file: it has more than {format_bytes(_MAX_BYTES)}")
    try:
        return place, content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is no tokenizer file ({error}); expected a tokenizer.json") from error


def _own_tokenizer(value: dict[str, Any]) -> Tokenizer:
    from lowmem.data.chunk_tokenizer import ChunkTokenizer
    from lowmem.data.simple_tokenizers import ByteTokenizer, CharTokenizer

    kind = value["lowmem_tokenizer"]
    texts = value["chunks"] if kind == "chunk" else [value["characters"]] if kind == "chars" else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("chunks and characters must be text")
    if kind == "chunk" and not isinstance(value["lowercase"], bool):
        raise ValueError("lowercase must be true or false")
    if kind == "chunk":
        return ChunkTokenizer(value["chunks"], lowercase=value["lowercase"])
    if kind == "chars":
        return CharTokenizer(value["characters"])
    if kind == "bytes":
        return ByteTokenizer()
    raise ValueError(f"found kind {kind!r}, allowed: chunk, chars, bytes")


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
