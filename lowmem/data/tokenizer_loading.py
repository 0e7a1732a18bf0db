"""The tokenizer of a run: read, or trained on its text once and kept in the cache."""

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lowmem.config.schema import DataConfig
from lowmem.data.decoding import open_regular
from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from lowmem.data.text_source import DataProgress, LimitedSource, ProgressCallback, ReadCounters, TextSource, utf8_size
from lowmem.data.tokenizers import ByteTokenizer, CharTokenizer, ChunkTokenizer, Tokenizer
from lowmem.system.errors import ConfigError, DataError
from lowmem.system.files import exclusive_lock, file_sha256, json_sha256, make_directory, malformed, write_json
from lowmem.system.units import format_bytes

OWN_TOKENIZER = "lowmem_tokenizer.json"  # of an exported model whose tokenizer is lowmem's own
_MAX_BYTES = 256 * 1024**2  # ten times the largest vocabularies there are


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
        return HuggingFaceTokenizer.from_content(content, value, place)
    try:
        return _own_tokenizer(value)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place} is a damaged tokenizer file ({malformed(error)}); restore it") from error


def _read(place: Path) -> tuple[Path, str]:
    """The file that is meant, and its text."""
    try:
        if place.is_dir():
            own = place / OWN_TOKENIZER
            place = own if own.is_file() else place / "tokenizer.json"
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


TRAINED_KINDS = ("bpe", "chunk", "chars")
SAMPLE_BYTES_PER_TOKEN = 2048
MIN_SAMPLE_BYTES = 8 * 1024**2
MAX_SAMPLE_BYTES = 64 * 1024**2
_LEAST_RATE = 1 / 64
_REPORT_PIECES = 256
_FORMAT = 1
_HASH = ".sha256"


def prepare_tokenizer(config: DataConfig, sources: Sequence[TextSource], cache: Path, progress: ProgressCallback) -> Tokenizer:
    """The tokenizer named by `config.tokenizer`; a trained one is kept in the cache.

    bpe and chunk learn from a sample: 2 KiB of text for each token of the vocabulary, between 8 and 64 MiB, an equal share
    from each source, spread over the first 64 shares of it. The characters of chars and chunk come from the whole corpus,
    except for streamed sources, which give their sample.

    Raises:
        ConfigError: a setting has no effect on this kind of tokenizer, or its vocabulary is too small.
        DataError: no such tokenizer, malformed text, or an empty corpus.
        StorageError: the cache cannot be written.
    Memory: the distinct words or chunks of the sample.
    """
    _check_settings(config)
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer not in TRAINED_KINDS:
        return with_added(_ready_made(config.tokenizer), config.add_tokens)
    identity = {
        "format": _FORMAT,
        "kind": config.tokenizer,
        "vocab_size": config.tokenizer_vocab_size,
        "lowercase": config.lowercase,
        "sources": [source.identity() for source in sources],
    }
    folder = cache / "tokenizers"
    make_directory(folder)
    path = folder / f"{json_sha256(identity)[:32]}.json"
    tokenizer = _kept(path)
    if tokenizer is None:
        waiting = DataProgress("waiting", "", message="another process trains the tokenizer; waiting for it")
        with exclusive_lock(path.with_suffix(".lock"), lambda: progress(waiting)):
            tokenizer = _kept(path)
            if tokenizer is None:
                _train(config, sources, progress).save(path)
                write_json(path.with_suffix(_HASH), file_sha256(path))
                tokenizer = load_tokenizer(path)
    tokenizer.kind = config.tokenizer
    return tokenizer


def _kept(path: Path) -> Tokenizer | None:
    """The tokenizer in the cache; None if it is missing or not what was written, and is to be trained."""
    recorded = path.with_suffix(_HASH)
    for file in (path, recorded):
        if file.exists() and not file.is_file():
            raise DataError(f"the tokenizer kept at {file} is no regular file; delete it, so that it is trained again")
    try:
        intact = json.loads(recorded.read_bytes()) == file_sha256(path)
    except (OSError, ValueError, RecursionError):
        return None
    return load_tokenizer(path) if intact else None


def known_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer, where it is known before any text is read and without the hub; None elsewhere.

    Raises:
        ConfigError, DataError: see `prepare_tokenizer`.
    """
    _check_settings(config)
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer in TRAINED_KINDS:
        return None
    path = Path(config.tokenizer).expanduser()
    return with_added(load_tokenizer(path), config.add_tokens) if path.exists() else None


def with_added(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer with `data.add_tokens`.

    Raises:
        ConfigError: it can take none, or has one already.
    """
    if not tokens:
        return tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ConfigError(f"data.add_tokens needs the tokenizer of a model of transformers, found {tokenizer.kind}; leave it out")
    return tokenizer.with_tokens(tokens)


def _check_settings(config: DataConfig) -> None:
    default = DataConfig()
    if config.tokenizer not in ("bpe", "chunk") and config.tokenizer_vocab_size != default.tokenizer_vocab_size:
        raise ConfigError(
            f"data.tokenizer_vocab_size is {config.tokenizer_vocab_size}, but the tokenizer {config.tokenizer} is not trained to a size; "
            "remove the setting, or choose bpe or chunk"
        )
    if config.tokenizer != "chunk" and config.lowercase != default.lowercase:
        raise ConfigError(
            f"data.lowercase has no effect on the tokenizer {config.tokenizer}, which keeps the case; remove it, or choose chunk"
        )


def _ready_made(name: str) -> Tokenizer:
    try:
        path = Path(name).expanduser()
        if path.exists():
            return load_tokenizer(path)
    except (OSError, RuntimeError, ValueError) as error:
        # too long, NUL bytes, no permission, or no such user's home
        raise DataError(f"data.tokenizer is {name!a}, which cannot be looked for ({error}); check the path") from error
    # a hub name has at most one slash and is no file name
    if path.suffix == ".json" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(
            f"data.tokenizer is {name!r}: no such file or folder; allowed: bpe, chunk, bytes, chars, a tokenizer.json, a hub name"
        )
    return HuggingFaceTokenizer.from_hub(name)


def _train(config: DataConfig, sources: Sequence[TextSource], progress: ProgressCallback) -> Tokenizer:
    budget = min(max(config.tokenizer_vocab_size * SAMPLE_BYTES_PER_TOKEN, MIN_SAMPLE_BYTES), MAX_SAMPLE_BYTES)
    if config.tokenizer == "bpe":
        sample = _not_empty(sample_texts(sources, budget, progress))
        return HuggingFaceTokenizer.train(sample, config.tokenizer_vocab_size)
    whole = [LimitedSource(source, budget) if source.streamed else source for source in sources]
    alphabet = CharTokenizer.train(text for source in whole for text in _reported(source, progress))
    if config.tokenizer == "chars":
        return alphabet
    return ChunkTokenizer.train(
        sample_texts(sources, budget, progress),
        lowercase=config.lowercase,
        vocab_size=config.tokenizer_vocab_size,
        characters=alphabet.characters,
    )


def sample_texts(sources: Sequence[TextSource], budget: int, progress: ProgressCallback) -> Iterator[str]:
    """About `budget` bytes of text, the same for the same sources: pieces at even distances from each source in turn.

    Args:
        budget: bytes of UTF-8 text.
    Memory: one piece of each source.
    """
    share = max(1, budget // len(sources))
    left = budget
    for texts in zip_longest(*(_spread_pieces(source, share, progress) for source in sources)):
        for text in texts:
            if text is not None and left > 0:
                left -= utf8_size(text)
                yield text
        if left <= 0:
            return


def _spread_pieces(source: TextSource, share: int, progress: ProgressCallback) -> Iterator[str]:
    rate = 1.0
    if source.total_bytes and not source.streamed:
        rate = max(min(1.0, share / source.total_bytes), _LEAST_RATE)
    for number, text in enumerate(_reported(source, progress)):
        if int((number + 1) * rate) > int(number * rate):
            yield text


def _reported(source: TextSource, progress: ProgressCallback) -> Iterator[str]:
    counters = ReadCounters()
    for number, piece in enumerate(source.pieces(counters)):
        if number % _REPORT_PIECES == 0:
            progress(DataProgress("tokenizer", source.label, counters.input_bytes, source.total_bytes))
        yield piece.text


def _not_empty(texts: Iterator[str]) -> Iterator[str]:
    first = next(texts, None)
    if first is None:
        raise DataError("the corpus holds no text to train a tokenizer on; check data.sources")
    yield first
    yield from texts
