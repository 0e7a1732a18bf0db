"""The data of every phase of a run, with one tokenizer for all of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.config import PhaseConfig, RunConfig, SourceConfig
from lowmem.data.chat_source import ChatSource, build_chat_tokens
from lowmem.data.chat_stream import ChatStream, ChatValidation, Conversations
from lowmem.data.chat_template import ChatTemplate, choose_chat_template
from lowmem.data.order import keyed_hash
from lowmem.data.prepare import PreparedData, prepare_data
from lowmem.data.progress import DataProgress, ProgressCallback, ignore_progress
from lowmem.data.sources import open_source
from lowmem.data.storage import cache_root
from lowmem.data.text_source import TextSource
from lowmem.data.tokenizer_build import prepare_tokenizer
from lowmem.data.tokenizers import Tokenizer


def prepare_phases(config: RunConfig, progress: ProgressCallback | None = None) -> list[PreparedData]:
    """The data of `config.all_phases()`, in their order, all of it before the first step.

    A tokenizer that is trained learns from the text of every phase.

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
    return [_prepare(config, phase, number, tokenizer, report) for number, phase in enumerate(phases)]


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


def _prepare(config: RunConfig, phase: PhaseConfig, number: int, tokenizer: Tokenizer, progress: ProgressCallback) -> PreparedData:
    seed = keyed_hash(config.train.seed, number) if number else config.train.seed
    if phase.kind == "text":
        sources = phase.sources or config.data.sources
        return prepare_data(replace(config.data, sources=sources), seed=seed, progress=progress, tokenizer=tokenizer)
    return _prepare_chat(config, phase, seed, tokenizer, progress)


def _prepare_chat(config: RunConfig, phase: PhaseConfig, seed: int, tokenizer: Tokenizer, progress: ProgressCallback) -> PreparedData:
    seq_len, cache = config.data.seq_len, cache_root(config.data.cache_dir)
    template = phase_template(config, phase, tokenizer)
    sources, facts = [], []
    for source in phase.sources:
        tokens = build_chat_tokens(_chat_source(config, source, template), tokenizer, cache, progress)
        part = Conversations(tokens, seq_len=seq_len, truncation=phase.truncation, val_fraction=config.data.val_fraction)
        if line := part.counts.describe(phase.truncation, seq_len):
            progress(DataProgress("warning", part.label, message=f"{part.label}: {line}"))
        sources.append(part)
        facts.append(_facts(part) | {"weight": source.weight})
    one_per_row = config.model.name == "i3"  # a recurrent state would carry one conversation over into the next
    train = ChatStream(
        sources, [source.weight_at for source in phase.sources], seq_len=seq_len, seed=seed, exhausted=config.data.exhausted,
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


def _facts(part: Conversations) -> dict[str, Any]:
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
