"""Byte-level BPE trained here, and ready-made tokenizers, both through the Hugging Face tokenizers library."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lowmem.data.compression import open_regular
from lowmem.data.storage import write_json
from lowmem.data.tokenizer_probe import check_foreign_tokenizer
from lowmem.data.tokenizers import END_OF_TEXT, Tokenizer, surrogate_error
from lowmem.errors import ConfigError, DataError

MIN_BPE_VOCAB = 257  # the 256 bytes and end of text
_MAX_HOLES = 65536
_SHOWN_CHARACTERS = 200
_COMPANION = "tokenizer_config.json"
# Names that models give to their end-of-text token, most usual first.
_END_NAMES = (
    END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>", "<|end|>", "<EOT>", "[SEP]",
)  # fmt: skip


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, used without the special tokens that it would add by itself.

    A special token that is written out in the text is encoded as that token: corpora mark document ends that way.

    Args:
        tokenizer: the library's object; its truncation and padding are switched off.
        eos_token: name of the end-of-document token; "" looks for the usual names, and adds <|endoftext|> if there is none.
    """

    def __init__(self, tokenizer: Any, eos_token: str = "", kind: str = "huggingface"):
        # the library warns when a process forks after it has used threads, unless this is set
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.kind = kind
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._eos_token = eos_token or _usual_end(tokenizer)
        if tokenizer.token_to_id(self._eos_token) is None:
            tokenizer.add_special_tokens([self._eos_token])
        self.eos_id = tokenizer.token_to_id(self._eos_token)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "HuggingFaceTokenizer":
        """Byte-level BPE, lossless for any text; <|endoftext|> is id 0.

        Args:
            vocab_size: ids to learn; a small corpus may end with fewer.
        Raises:
            ConfigError: `vocab_size` is below 257.
        Memory: the distinct words of `texts`.
        Source: Sennrich et al. 2016, arXiv:1508.07909; over bytes as in GPT-2.
        """
        if vocab_size < MIN_BPE_VOCAB:
            raise ConfigError(f"data.tokenizer_vocab_size is {vocab_size}, bpe needs at least {MIN_BPE_VOCAB} (256 bytes and end of text)")
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        tokenizer = Library(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(iter(texts), trainer)
        return cls(tokenizer, END_OF_TEXT, kind="bpe")

    @classmethod
    def from_content(cls, content: str, value: dict[str, Any], path: Path) -> "HuggingFaceTokenizer":
        """A tokenizer.json; the tokenizer_config.json beside it, where there is one, names the end-of-document token.

        Args:
            content: of the file.
            value: the same, parsed.
            path: where it is.
        Raises:
            DataError: the library does not understand the file, or it takes more time or memory than a tokenizer may.
        """
        from tokenizers import Tokenizer as Library

        check_foreign_tokenizer(content, value, str(path))
        try:
            tokenizer = Library.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path} is no tokenizer file ({_line(error)}); expected a tokenizer.json") from error
        _check_ids(tokenizer, str(path))
        return cls(tokenizer, _companion_end(path.with_name(_COMPANION)))

    @classmethod
    def from_hub(cls, name: str) -> "HuggingFaceTokenizer":
        """The tokenizer of a model on the Hugging Face hub.

        Raises:
            DataError: there is none by that name, or the network fails.
        """
        from tokenizers import Tokenizer as Library

        try:
            tokenizer = Library.from_pretrained(name)
        except Exception as error:  # the library and the HTTP client beneath raise classes without a common base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DataError(
                f"data.tokenizer is {name!r}: no such file, and the hub gave none ({reason}); "
                "allowed: bpe, chunk, bytes, chars, a tokenizer.json, a folder with one, or a hub name"
            ) from error
        content = tokenizer.to_str()
        check_foreign_tokenizer(content, json.loads(content), f"of {name}")
        _check_ids(tokenizer, name)
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise surrogate_error(error) from error
            raise
        except Exception as error:  # as above
            raise DataError(f"the tokenizer cannot encode the text ({_line(error)}); choose another one, or mend it") from error

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json in Hugging Face's format, and tokenizer_config.json beside it if the end token's name is unusual.

        Raises:
            StorageError: the disk is full, or not writable.
        """
        super().save(path)
        if self._eos_token != _usual_end(self._tokenizer):
            write_json(Path(path).with_name(_COMPANION), {"eos_token": self._eos_token})


def _check_ids(tokenizer: Any, name: str) -> None:
    """Refuse ids far beyond the vocabulary: an embedding has a row for each number below the largest id."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=0)
    if largest >= _MAX_HOLES + 2 * len(vocabulary):
        raise DataError(f"the tokenizer {name} has {len(vocabulary)} tokens, but one has the id {largest}; number them without gaps")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS].rstrip(".")


def _usual_end(tokenizer: Any) -> str:
    return next((name for name in _END_NAMES if tokenizer.token_to_id(name) is not None), END_OF_TEXT)


def _companion_end(path: Path) -> str:
    try:
        with open_regular(path) as file:
            named = json.loads(file.read().decode()).get("eos_token") or ""
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); mend or remove it") from error
    named = named.get("content", "") if isinstance(named, dict) else named
    if not isinstance(named, str):
        raise DataError(f"{path} cannot be read (eos_token is no text); mend or remove it")
    return named
