"""From a configuration to training sequences and held-out windows: the whole data side of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem.config import DataConfig, SourceConfig
from lowmem.data.build import build_shards
from lowmem.data.chat_stream import ChatValidation
from lowmem.data.chat_template import ChatTemplate
from lowmem.data.order import keyed_hash
from lowmem.data.progress import DataProgress, ProgressCallback, ignore_progress
from lowmem.data.shards import TokenShards
from lowmem.data.sources import open_source
from lowmem.data.split import split_tokens
from lowmem.data.storage import cache_root, json_sha256
from lowmem.data.text_source import TextSource
from lowmem.data.tokenizer_build import prepare_tokenizer
from lowmem.data.tokenizers import Tokenizer
from lowmem.data.train_stream import BatchStream, TrainStream
from lowmem.data.validation import ValidationSet
from lowmem.data.windows import StoredWindows, WindowSource
from lowmem.errors import ConfigError, DataError

_MOST_HELD_OUT = 0.5  # beyond this it is the training text that becomes too short first


@dataclass
class PreparedData:
    """What a run trains on.

    Attributes:
        tokenizer: trained, loaded or built in.
        train: the training sequences.
        validation: held-out sequences; None if nothing is held out.
        description: JSON-ready facts for the run's records: tokenizer, tokens, bytes and replacements by source.
        template: how conversations are written; None for text.
    """

    tokenizer: Tokenizer
    train: BatchStream
    validation: ValidationSet | ChatValidation | None
    description: dict[str, Any]
    template: ChatTemplate | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and of every stored token: equal exactly when a resumed run would see the same text."""
        sources = [source.get("tokens_sha256", source["source"]) for source in self.description["sources"]]
        return json_sha256([self.description["tokenizer"]["sha256"], sources])


@dataclass
class _Part:
    """One source: its training windows, its held-out ones, its facts."""

    windows: WindowSource
    held_out: tuple[TokenShards, Any] | None
    facts: dict[str, Any]


def prepare_data(
    config: DataConfig, *, seed: int, progress: ProgressCallback | None = None, tokenizer: Tokenizer | None = None
) -> PreparedData:
    """Train or load the tokenizer, build or find the token shards, divide them and set up the streams.

    Several processes may call this at once: one does the work, the others wait for it.

    Args:
        seed: of the order of the training sequences; the held-out text does not depend on it.
        progress: called after every bounded piece of work.
        tokenizer: of an earlier phase; None trains or loads the one that `config` names.
    Raises:
        ConfigError: settings that contradict each other or have no effect.
        DataError: text, tokenizer or shards missing, malformed or too small.
        StorageError: the cache cannot be written.
    Memory: constant, whatever the size of the corpus.
    """
    report = progress or ignore_progress
    _check_settings(config)
    cache = cache_root(config.cache_dir)
    sources = [open_source(source, config.decode_errors) for source in config.sources]
    for source in sources:
        if source.note:
            report(DataProgress("warning", source.label, message=source.note))
    tokenizer = tokenizer or prepare_tokenizer(config, sources, cache, report)
    parts = [
        _streamed_part(config, source_config, tokenizer, cache, report)
        if source_config.streaming
        else _stored_part(config, source, tokenizer, cache, keyed_hash(seed, number), report)
        for number, (source_config, source) in enumerate(zip(config.sources, sources, strict=True))
    ]
    weights = [source.weight_at for source in config.sources]
    windows, end = [part.windows for part in parts], _document_end(config, tokenizer)
    train = TrainStream(windows, weights, seq_len=config.seq_len, seed=seed, exhausted=config.exhausted, document_end=end)
    validation = _validation(config, parts, tokenizer, cache, report)
    description = {
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256()},
        "sources": [{**part.facts, "weight": source.weight} for part, source in zip(parts, config.sources, strict=True)],
        "train_tokens_per_epoch": train.tokens_per_epoch(),
        "validation_windows": len(validation) if validation else 0,
        "cache": str(cache),
    }
    return PreparedData(tokenizer, train, validation, description)


def _check_settings(config: DataConfig) -> None:
    if config.seq_len < 1:
        raise ConfigError(f"data.seq_len is {config.seq_len}, must be at least 1")
    if not 0 <= config.val_fraction < 1:
        raise ConfigError(f"data.val_fraction is {config.val_fraction}, must be in [0, 1)")
    if not config.sources:
        raise ConfigError("data.sources is empty; name a path, a hub dataset or stdlib: true")
    if config.val_split == "tail" and _own_fraction(config) and any(source.streaming for source in config.sources):
        raise ConfigError("data.val_split is tail, but a streamed source has no known end; choose blocks, or set data.val_source")


def _document_end(config: DataConfig, tokenizer: Tokenizer) -> int | None:
    """The token at which a window goes over to another document, if they are to be kept apart."""
    return tokenizer.eos_id if config.document_mask is True else None


def _own_fraction(config: DataConfig) -> float:
    """Share held out of the training sources themselves."""
    return 0.0 if config.val_source else config.val_fraction


def _stored_part(config: DataConfig, source: TextSource, tokenizer: Tokenizer, cache: Path, key: int, progress: ProgressCallback) -> _Part:
    shards = build_shards(source, tokenizer, cache, progress)
    train, held_out = split_tokens(len(shards), seq_len=config.seq_len, val_fraction=_own_fraction(config), mode=config.val_split)
    windows = StoredWindows(shards, train, seq_len=config.seq_len, key=key, label=source.label)
    facts = _facts(source.label, shards, progress)
    facts["tokens_sha256"] = json_sha256([shard["sha256"] for shard in shards.metadata["shards"]])
    held_out_tokens = int((held_out[:, 1] - held_out[:, 0]).sum())
    facts |= {"train_tokens": len(shards) - held_out_tokens, "validation_tokens": held_out_tokens}
    return _Part(windows, (shards, held_out), facts)


def _streamed_part(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, cache: Path, progress: ProgressCallback) -> _Part:
    from lowmem.data.streaming import HeldOutDocuments, StreamedWindows

    fraction = _own_fraction(config)
    held_out = None
    facts: dict[str, Any] = {"source": source.hub, "streamed": True}
    if fraction:
        documents = HeldOutDocuments(source, seq_len=config.seq_len, val_fraction=fraction)
        shards = build_shards(documents, tokenizer, cache, progress)
        held_out = (shards, split_tokens(len(shards), seq_len=config.seq_len, val_fraction=0, mode="blocks")[0])
        facts["validation_tokens"] = len(shards)
    return _Part(StreamedWindows(source, tokenizer, seq_len=config.seq_len, val_fraction=fraction), held_out, facts)


def _validation(
    config: DataConfig, parts: Sequence[_Part], tokenizer: Tokenizer, cache: Path, progress: ProgressCallback
) -> ValidationSet | None:
    if config.val_source:
        source = open_source(replace(SourceConfig(), path=config.val_source), config.decode_errors)
        shards = build_shards(source, tokenizer, cache, progress)
        _facts(source.label, shards, progress)
        regions, _ = split_tokens(len(shards), seq_len=config.seq_len, val_fraction=0, mode="blocks")
        validation = ValidationSet([(shards, regions)], seq_len=config.seq_len, document_end=_document_end(config, tokenizer))
        remedy = "give more text in data.val_source, or lower data.seq_len"
    elif config.val_fraction:
        held_out = [part.held_out for part in parts if part.held_out]
        validation = ValidationSet(held_out, seq_len=config.seq_len, document_end=_document_end(config, tokenizer))
        remedy = "give more text, lower data.seq_len, name a data.val_source, or set data.val_fraction=0"
        if config.val_fraction > _MOST_HELD_OUT:
            remedy = f"data.val_fraction={config.val_fraction:g} leaves too little to train on: lower it, or {remedy}"
    else:
        return None
    if not len(validation):
        tokens = ", ".join(str(part.facts.get("tokens", "a stream")) for part in parts)
        raise DataError(f"the corpus is too small to hold out one sequence of {config.seq_len} tokens (sources have {tokens}); {remedy}")
    return validation


def _facts(label: str, shards: TokenShards, progress: ProgressCallback) -> dict[str, Any]:
    metadata = shards.metadata
    facts = {"source": label, **{key: metadata[key] for key in ("tokens", "documents", "text_bytes", "replacements", "fingerprint")}}
    if metadata["replacements"]:
        message = f"{label}: {metadata['replacements']} sequences of bytes were not UTF-8 and were replaced by U+FFFD"
        progress(DataProgress("warning", label, message=message))
    return facts
