"""From sources to what a run learns from: tokens in shards or conversations, phase by phase."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.config.schema import DataConfig, PhaseConfig, RunConfig, SourceConfig
from lowmem.data.chat import ChatSource, ChatStream, ChatValidation, Conversations, build_chat_tokens
from lowmem.data.chat_template import ChatTemplate, choose_chat_template
from lowmem.data.hf_tokenizer import too_many_tokens
from lowmem.data.shards import (
    FORMAT,
    INDEX_FILE,
    PROGRESS_FILE,
    VERIFIED_FILE,
    FinishedShard,
    ShardWriter,
    StoredWindows,
    TokenShards,
    WindowSource,
    is_count,
    is_shard_name,
    keyed_hash,
    read_cached,
    split_tokens,
)
from lowmem.data.stream import BatchStream, TrainStream, ValidationSet
from lowmem.data.text import open_source
from lowmem.data.text_source import PIECE_CHARS, DataProgress, Piece, ProgressCallback, ReadCounters, TextSource, ignore_progress, utf8_size
from lowmem.data.tokenizer_loading import prepare_tokenizer
from lowmem.data.tokenizers import Tokenizer
from lowmem.system.errors import ConfigError, DataError
from lowmem.system.files import cache_root, exclusive_lock, json_sha256, make_directory, write_json

SHARD_TOKENS = 16 * 1024**2
_BATCH_CHARS = 512 * 1024


def build_shards(
    source: TextSource,
    tokenizer: Tokenizer,
    cache: Path,
    progress: ProgressCallback = ignore_progress,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenShards:
    """The shards of a source, from the cache if they are there and unchanged.

    Each document's tokens are followed by the end-of-document token. A second process that wants the same shards waits for
    the first. An interrupted build goes on after its last finished shard and ends with the same bytes.

    Args:
        cache: the cache's root; the entry's folder is named by a hash of the source's identity, the tokenizer and the format.
    Raises:
        DataError: malformed text, no text at all, a source that changed meanwhile, or a damaged cache entry.
        StorageError: the cache cannot be written.
    Memory: one batch of about 512 Ki characters and its tokens, whatever the size of the corpus.
    """
    identity = {
        "format": FORMAT,
        "piece_chars": PIECE_CHARS,
        "shard_tokens": shard_tokens,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256()},
        "source": source.identity(),
    }
    fingerprint = json_sha256(identity)
    folder = cache / "shards" / fingerprint[:32]
    make_directory(folder)
    if not (folder / INDEX_FILE).exists():
        message = f"another process prepares {source.label}; waiting for it"
        with exclusive_lock(folder.with_suffix(".lock"), lambda: progress(DataProgress("waiting", source.label, message=message))):
            if not (folder / INDEX_FILE).exists():
                _Build(source, tokenizer, folder, progress, shard_tokens).run(identity, fingerprint)
    return TokenShards.open(folder, progress)


@dataclass
class _Totals:
    """Sums over the whole source, those of skipped pieces included."""

    documents: int = 0
    text_bytes: int = 0


class _Build:
    """One pass over a source."""

    def __init__(self, source: TextSource, tokenizer: Tokenizer, folder: Path, progress: ProgressCallback, shard_tokens: int):
        self._source = source
        self._tokenizer = tokenizer
        self._folder = folder
        self._progress = progress
        self._counters = ReadCounters()
        self._totals = _Totals()
        self._visible = False  # something else than white space was read
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
        self._writer = ShardWriter(folder, self._dtype, shard_tokens, _intact_shards(folder, self._dtype))
        self._resumed = self._writer.finished[-1] if self._writer.finished else None

    def run(self, identity: dict[str, Any], fingerprint: str) -> None:
        try:
            for batch in self._batches():
                self._write(batch)
                self._report()
            self._writer.close()
        finally:
            self._writer.abandon()
        if not self._visible:
            what = "nothing but white space" if self._totals.documents else "no text"
            raise DataError(f"{self._source.label} holds {what}; check data.sources")
        if self._source.identity() != identity["source"]:
            raise DataError(f"{self._source.label} changed while it was read; run again once its files are complete")
        self._finish(identity, fingerprint)

    def _batches(self) -> Iterator[list[tuple[int, Piece]]]:
        """Pieces that are not in finished shards, with their numbers."""
        skip = self._resumed.next_piece if self._resumed else 0
        batch: list[tuple[int, Piece]] = []
        chars = 0
        for number, piece in enumerate(self._source.pieces(self._counters)):
            self._totals.text_bytes += utf8_size(piece.text)
            self._totals.documents += piece.ends_document
            self._visible = self._visible or not piece.text.isspace()
            if number < skip:
                continue
            batch.append((number, piece))
            chars += len(piece.text)
            if chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def _write(self, batch: list[tuple[int, Piece]]) -> None:
        for (number, piece), ids in zip(batch, self._tokenizer.encode_batch([piece.text for _, piece in batch]), strict=True):
            if too_many_tokens(len(ids), len(piece.text)):
                raise DataError(
                    f"{self._source.label}: the tokenizer makes {len(ids)} tokens of {len(piece.text)} characters; "
                    "choose another data.tokenizer"
                )
            ids[:0] = self._tokenizer.begin_ids if piece.begins_document else ()
            if piece.ends_document:
                ids.append(self._tokenizer.eos_id)
            offset = self._resumed.next_offset if self._resumed and self._resumed.next_piece == number else 0
            self._writer.append(np.array(ids, dtype=self._dtype)[offset:], number, offset)

    def _report(self) -> None:
        total, done = self._source.total_bytes, self._counters.input_bytes
        self._progress(DataProgress("tokens", self._source.label, min(done, total or done), total, self._writer.tokens))

    def _finish(self, identity: dict[str, Any], fingerprint: str) -> None:
        shards = self._writer.finished
        item_bytes = self._dtype.itemsize
        stamps = {shard.file: [shard.sha256, shard.tokens * item_bytes, shard.mtime_ns] for shard in shards}
        write_json(self._folder / VERIFIED_FILE, stamps)
        index = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "tokens": self._writer.tokens,
            **asdict(self._totals),
            "replacements": self._counters.replacements,
            "vocab_size": self._tokenizer.vocab_size,
            "eos_id": self._tokenizer.eos_id,
            "shards": [{"file": shard.file, "tokens": shard.tokens, "sha256": shard.sha256} for shard in shards],
            "fingerprint": fingerprint,
            "made_from": identity,
        }
        write_json(self._folder / INDEX_FILE, index)
        (self._folder / PROGRESS_FILE).unlink(missing_ok=True)


def _intact_shards(folder: Path, dtype: np.dtype) -> list[FinishedShard]:
    """Finished shards of an interrupted build, up to the first that is not as it was written."""
    try:
        recorded = [FinishedShard(**entry) for entry in read_cached(folder / PROGRESS_FILE)]
    except (OSError, ValueError, TypeError, RecursionError):
        return []  # nothing usable: build from the start
    intact = []
    for shard in recorded:
        counts = (shard.tokens, shard.next_piece, shard.next_offset, shard.mtime_ns)
        if not is_shard_name(shard.file) or not all(map(is_count, counts)) or not isinstance(shard.sha256, str):
            break
        path = folder / shard.file
        if not path.is_file():
            break
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (shard.tokens * dtype.itemsize, shard.mtime_ns):
            break
        intact.append(shard)
    return intact


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
    from lowmem.data.hub import HeldOutDocuments, StreamedWindows

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


def prepare_phases(config: RunConfig, progress: ProgressCallback | None = None, *, keeps_segments_apart: bool = True) -> list[PreparedData]:
    """The data of `config.all_phases()`, in their order, all of it before the first step.

    A tokenizer that is trained learns from the text of every phase.

    Args:
        keeps_segments_apart: whether a row of the model may hold several conversations.
    Raises:
        ConfigError, DataError, StorageError: see `prepare_data`.
    Memory: constant, but for 8 bytes a conversation.
    """
    report = progress or ignore_progress
    phases = config.all_phases()
    if len(phases) == 1 and phases[0].kind == "text":
        sources = phases[0].sources or config.data.sources
        return [prepare_data(replace(config.data, sources=sources), seed=config.train.seed, progress=report)]
    tokenizer = prepare_tokenizer(config.data, _all_sources(config, phases), cache_root(config.data.cache_dir), report)
    return [_prepare(config, phase, number, tokenizer, report, not keeps_segments_apart) for number, phase in enumerate(phases)]


def phase_template(config: RunConfig, phase: PhaseConfig, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """The template of a chat phase: its own, the one that comes with the tokenizer, or lowmem's.

    Args:
        tokenizer: names the end token, if it is known by now.
    Raises:
        DataError: it cannot be read, or is no template.
    """
    beside = Path(config.data.tokenizer).expanduser()
    folder = beside if beside.is_dir() else beside.parent
    return choose_chat_template(phase.template, folder if beside.exists() else None, tokenizer)


def check_sources(config: RunConfig) -> None:
    """See that every source on this machine is there, and every template is one; reads no text and asks no hub.

    Raises:
        ConfigError, DataError: see `prepare_data`.
    """
    for phase in config.all_phases():
        for source in phase.sources or config.data.sources:
            if phase.kind == "chat":
                template = phase_template(config, phase)
                if source.path:
                    ChatSource(source, template)
            elif source.path:
                open_source(source, config.data.decode_errors)
    if config.data.val_source and any(phase.kind == "text" for phase in config.all_phases()):
        open_source(SourceConfig(path=config.data.val_source), config.data.decode_errors)


def _all_sources(config: RunConfig, phases: Sequence[PhaseConfig]) -> list[TextSource]:
    """Every source once, for the tokenizer to learn from."""
    found: dict[str, TextSource] = {}
    for phase in phases:
        for source in phase.sources or config.data.sources:
            opened = (
                _chat_source(config, source, phase_template(config, phase))
                if phase.kind == "chat"
                else open_source(source, config.data.decode_errors)
            )
            found.setdefault(f"{phase.kind} {opened.label}", opened)
    return list(found.values())


def _prepare(
    config: RunConfig, phase: PhaseConfig, number: int, tokenizer: Tokenizer, progress: ProgressCallback, one_per_row: bool
) -> PreparedData:
    seed = keyed_hash(config.train.seed, number) if number else config.train.seed
    if phase.kind == "text":
        sources = phase.sources or config.data.sources
        return prepare_data(replace(config.data, sources=sources), seed=seed, progress=progress, tokenizer=tokenizer)
    return _prepare_chat(config, phase, seed, tokenizer, progress, one_per_row)


def _prepare_chat(
    config: RunConfig, phase: PhaseConfig, seed: int, tokenizer: Tokenizer, progress: ProgressCallback, one_per_row: bool
) -> PreparedData:
    seq_len, cache = config.data.seq_len, cache_root(config.data.cache_dir)
    template = phase_template(config, phase, tokenizer)
    sources, facts = [], []
    chosen = phase.sources or config.data.sources
    for source in chosen:
        tokens = build_chat_tokens(_chat_source(config, source, template), tokenizer, cache, progress)
        part = Conversations(tokens, seq_len=seq_len, truncation=phase.truncation, val_fraction=config.data.val_fraction)
        if line := part.counts.describe(phase.truncation, seq_len):
            progress(DataProgress("warning", part.label, message=f"{part.label}: {line}"))
        sources.append(part)
        facts.append(_phase_facts(part) | {"weight": source.weight})
    one_per_row = one_per_row or config.model.name == "i3"  # a recurrent state would carry one conversation over into the next
    train = ChatStream(
        sources, [source.weight_at for source in chosen], seq_len=seq_len, seed=seed, exhausted=config.data.exhausted,
        one_per_row=one_per_row,
    )  # fmt: skip
    validation = ChatValidation(sources, seq_len=seq_len, one_per_row=one_per_row) if config.data.val_fraction else None
    description = {
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256()},
        "sources": facts,
        "validation_windows": len(validation) if validation else 0,
        "cache": str(cache),
    }
    return PreparedData(tokenizer, train, validation, description, template)


def _chat_source(config: RunConfig, source: SourceConfig, template: ChatTemplate) -> ChatSource:
    return ChatSource(source, template, config.data.decode_errors, "mend the records, or set data.decode_errors=replace")


def _phase_facts(part: Conversations) -> dict[str, Any]:
    counts = part.counts
    return {
        "source": part.label,
        "conversations": counts.conversations,
        "tokens": part.tokens.tokens(),
        "cut": counts.cut,
        "dropped": counts.dropped_long + counts.dropped_silent,
        "held_out": len(part.held_out),
        "tokens_sha256": part.tokens.sha256,
    }
