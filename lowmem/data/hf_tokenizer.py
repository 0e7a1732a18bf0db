"""Tokenizers of the tokenizers library, trained here or read from a tokenizer.json, and what is checked before one is used."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.decoding import open_regular
from lowmem.data.records import value_kind
from lowmem.data.tokenizers import END_OF_TEXT, TextPart, Tokenizer, surrogate_error
from lowmem.system.errors import ConfigError, DataError
from lowmem.system.files import write_json
from lowmem.system.units import format_bytes

CPU_SECONDS = 10  # the largest tokenizers load in two
MEMORY_BYTES = 2 * 1024**3
MAX_TOKENS_PER_CHARACTER = 64
_WALL_SECONDS = 600  # on a machine that others use, too
_RUN_CHARACTERS = 4096
_RUNS = ("a", "A", " ", "0", "\n", "-", ".", "_", "'", "é", "\u0301", "日", "🙂", "\u200d", "ab", "a ", "a1")
_PLAIN = (
    "The quick brown fox can't jump over 1234567 lazy dogs; naïve café, ÄÖÜ. 日本語テキスト\r\n\tdef f(x):\n        return x != 'y'  # 🙂\n"
)
_PATTERNS = ("Replace", "Split", "Precompiled")


def check_foreign_tokenizer(content: str, value: Any, name: str) -> None:
    """Load and use a tokenizer.json under limits of time and memory, if it has parts that could need them.

    Args:
        content: of the file.
        value: the same, parsed.
        name: the file, for the message.
    Raises:
        DataError: it cannot be loaded or used, or takes more than the limits.
    Memory: another process, at most 2 GiB while it runs.
    """
    if not _has_patterns({key: value.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}):
        return
    command = [sys.executable, "-m", "lowmem.data.hf_tokenizer"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(
            command, input=content.encode(), env=environment, capture_output=True, timeout=_WALL_SECONDS, check=False, close_fds=True
        )
    except subprocess.TimeoutExpired as error:
        raise _refusal(name, f"takes more than {_WALL_SECONDS} s for a few pages of text") from error
    except UnicodeEncodeError as error:
        raise _refusal(name, "holds a lone surrogate") from error
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode == 0:
        return
    if lines:
        raise _refusal(name, lines[-1])
    limits = f"{CPU_SECONDS} s of time or {format_bytes(MEMORY_BYTES)} of memory"
    raise _refusal(name, f"gives up on a few pages of text, or takes more than {limits} for them (exit status {done.returncode})")


def too_many_tokens(tokens: int, characters: int) -> bool:
    """Whether a text has become more tokens than any tokenizer that is meant for text makes of it."""
    return tokens > MAX_TOKENS_PER_CHARACTER * (characters + 16)


def _refusal(name: str, reason: str) -> DataError:
    return DataError(f"the tokenizer {name} cannot be used: it {reason}; choose another one")


def _has_patterns(part: Any) -> bool:
    if isinstance(part, dict):
        return part.get("type") in _PATTERNS or any(_has_patterns(inner) for inner in part.values())
    return isinstance(part, list) and any(_has_patterns(inner) for inner in part)


def probe_texts() -> list[str]:
    """Prose, and what patterns stumble over: long runs of one character, with and without something else after them."""
    runs = [run * (_RUN_CHARACTERS // len(run)) for run in _RUNS]
    return [_PLAIN * 8, *(run + end for run in runs for end in ("", "!"))]


def _problem(content: str) -> str:
    """What is wrong with a tokenizer.json; "" for nothing."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises plain Exception
        return f"is no tokenizer.json ({_one_line(error)})"
    for text in probe_texts():
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokenizer.decode(ids, skip_special_tokens=False)
        except Exception as error:  # as above
            return f"fails on the text {text[:20]!r}... ({_one_line(error)})"
        if too_many_tokens(len(ids), len(text)):
            return f"makes {len(ids)} tokens of {len(text)} characters"
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def main() -> int:
    """Probe the tokenizer.json on standard input; the problem goes to standard output, as one line."""
    for kind, most in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_DATA, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    problem = _problem(sys.stdin.buffer.read().decode())
    if problem:
        print(json.dumps(problem, ensure_ascii=True)[1:-1])
    return bool(problem)


if __name__ == "__main__":
    sys.exit(main())


MIN_BPE_VOCAB = 257  # the 256 bytes and end of text
_MAX_HOLES = 65536
_SHOWN_CHARACTERS = 200
_COMPANION = "tokenizer_config.json"
_BYTE = re.compile("(<0x[0-9A-F]{2}>)?")  # a byte of a character without a token; a model finds it by its name
# Names that models give to their end-of-text token, most usual first.
_END_NAMES = (
    END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>", "<|end|>", "<EOT>", "[SEP]",
)  # fmt: skip


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, used without the special tokens that it would add by itself; those at the beginning are `begin_ids`.

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
        self.begin_ids = _begin_ids(tokenizer)

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

    def with_tokens(self, tokens: Sequence[str]) -> "HuggingFaceTokenizer":
        """A copy that has these tokens besides, with the ids after the last.

        Raises:
            ConfigError: one is there already, or is none, or stands twice.
        """
        from tokenizers import Tokenizer as Library

        if len(set(tokens)) < len(tokens):
            raise ConfigError(f"data.add_tokens names a token twice: {', '.join(tokens)[:200]}; leave one out")
        if known := [token for token in tokens if self._tokenizer.token_to_id(token) is not None]:
            raise ConfigError(f"data.add_tokens has {', '.join(known)[:200]}, which the tokenizer has already; leave it out")
        more = Library.from_str(self._tokenizer.to_str())
        more.add_tokens(list(tokens))
        if unusable := [token for token in tokens if more.token_to_id(token) is None]:
            raise ConfigError(f"data.add_tokens has {unusable[0]!r}, which the tokenizer cannot take; leave it out")
        return HuggingFaceTokenizer(more, self._eos_token, self.kind)

    def token_ids(self, tokens: Sequence[str]) -> list[int]:
        """Ids of tokens that the vocabulary has."""
        return [self._tokenizer.token_to_id(token) for token in tokens]

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

    def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        return _encode_spans(self._tokenizer, text)

    def special_tokens(self) -> dict[str, int]:
        return dict(self._special)

    def encode_parts(self, parts: Sequence[TextPart]) -> tuple[list[int], np.ndarray]:
        """As in the base class; the text is encoded in one piece, for what a token is depends on what is beside it.

        Where plain text spells the names of special tokens, or may do so once it is normalised, or another name stands for one, the text is
        encoded by a copy of the tokenizer in which special tokens have names of noncharacters, which no text has.

        Memory: from then on a second tokenizer.
        """
        text = "".join(part for part, _ in parts)
        if split_names(text, self._special) == merge_plain(parts) and not self._hidden_names:
            return self.encode_spans(text)
        renamed = [(part if token is None else self._private[token], len(part)) for part, token in parts]
        ids, spans = _encode_spans(self._renamed, "".join(part for part, _ in renamed))
        # position in the text of every character of the renamed one, and of its end
        starts, ends, position = [], [], 0
        for part, length in renamed:
            same = length == len(part)
            starts.append(position + (np.arange(len(part)) if same else np.zeros(len(part), dtype=np.int64)))
            ends.append(position + (np.arange(len(part)) + 1 if same else np.full(len(part), length)))
            position += length
        first, last = np.concatenate([*starts, [position]]), np.concatenate([[0], *ends])
        ids = [self._renamed_ids.get(token, token) for token in ids]
        return ids, np.stack([first[spans[:, 0]], np.maximum(first[spans[:, 0]], last[spans[:, 1]])], axis=1)

    @cached_property
    def _special(self) -> dict[str, int]:
        tokens = self._tokenizer.get_added_tokens_decoder().items()
        special = {token.content: number for number, token in tokens if token.special and not _BYTE.fullmatch(token.content)}
        return special | {self._eos_token: self.eos_id}

    @cached_property
    def _hidden_names(self) -> bool:
        """Whether a text may become a special token whose name it does not spell: <|END|> where the text is lower-cased first."""
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        return self._tokenizer.normalizer is not None and any(token.special and token.normalized for token in tokens)

    @cached_property
    def _private(self) -> dict[int, str]:
        return {token: f"\ufde0{token}\ufde1" for token in self._special.values()}

    @cached_property
    def _renamed(self) -> Any:
        from tokenizers import Tokenizer as Library

        return Library.from_str(json.dumps(_renamed(self.to_json(), {name: self._private[token] for name, token in self._special.items()})))

    @cached_property
    def _renamed_ids(self) -> dict[int, int]:
        """Ids of the copy that the library numbers anew, to those of the tokenizer."""
        names = {private: token for token, private in self._private.items()}
        pairs = ((number, token.content) for number, token in self._renamed.get_added_tokens_decoder().items())
        return {number: names.get(name, self._tokenizer.token_to_id(name)) for number, name in pairs}

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


def split_names(text: str, names: dict[str, int]) -> list[TextPart]:
    """The text cut before and after every name, with the token that it stands for; the longest of several."""
    if not names:
        return [(text, None)] if text else []
    return [(part, names.get(part) if odd % 2 else None) for odd, part in enumerate(name_pattern(tuple(names)).split(text)) if part]


@lru_cache(maxsize=8)
def name_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """One of several names, the longest that fits."""
    return re.compile(f"({'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})")


def merge_plain(parts: Sequence[TextPart]) -> list[TextPart]:
    """The same with neighbouring plain texts joined, and empty ones left out."""
    merged: list[TextPart] = []
    for text, token in parts:
        if token is None and merged and merged[-1][1] is None:
            merged[-1] = (merged[-1][0] + text, None)
        elif text:
            merged.append((text, token))
    return merged


def _encode_spans(tokenizer: Any, text: str) -> tuple[list[int], np.ndarray]:
    """Spans before the post-processor, which leaves spaces out of them."""
    processor, tokenizer.post_processor = tokenizer.post_processor, None
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from error
        raise
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"the tokenizer cannot encode the text ({_line(error)}); choose another one, or mend it") from error
    finally:
        tokenizer.post_processor = processor
    return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _renamed(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json with other names for some of its tokens, where they are added and in the model."""
    model = dict(value["model"])
    if isinstance(vocab := model.get("vocab"), dict):
        model["vocab"] = {names.get(name, name): number for name, number in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [
        {**token, "content": names[token["content"]], "normalized": False, "single_word": False} if token["content"] in names else token
        for token in value["added_tokens"]
    ]
    return {**value, "model": model, "added_tokens": added, "post_processor": None}


def _usual_end(tokenizer: Any) -> str:
    return next((name for name in _END_NAMES if tokenizer.token_to_id(name) is not None), END_OF_TEXT)


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """What a tokenizer_config.json says; empty where there is none.

    Raises:
        DataError: it cannot be read, is no JSON object, or has what is no text.
    """
    try:
        with open_regular(path) as file:
            values = json.loads(file.read().decode())
        if not isinstance(values, dict):
            raise ValueError(f"it holds {value_kind(values)}, expected an object")
        # a name with half a character can be neither encoded nor saved
        json.dumps(values, ensure_ascii=False).encode()
    except FileNotFoundError:
        return {}
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(f"{path} holds the lone surrogate U+{code:04X}, which is no character; mend or remove it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); mend or remove it") from error
    return values


def _companion_end(path: Path) -> str:
    named = read_tokenizer_config(path).get("eos_token") or ""
    named = named.get("content", "") if isinstance(named, dict) else named
    if not isinstance(named, str):
        raise DataError(f"{path} cannot be read (eos_token is no text); mend or remove it")
    return named


def _begin_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before every text, by its tokenizer.json alone, as in transformers 5."""
    if tokenizer.post_processor is None:
        return ()
    try:
        encoding = tokenizer.encode("a", add_special_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"the tokenizer cannot encode a text with its special tokens ({_line(error)}); mend its post_processor") from error
    mask = [*encoding.special_tokens_mask, 0]
    return tuple(encoding.ids[: mask.index(0)])
