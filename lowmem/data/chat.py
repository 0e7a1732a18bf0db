"""Conversations as tokens: read, written by a template, packed into rows, and drawn for training and validation."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowmem.config.schema import SourceConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.data.chat_records import (
    CHAT_FORMATS,
    CONVERT,
    FIELDS,
    Conversation,
    chat_format,
    parse_record,
    read_conversations,
    without_nulls,
)
from lowmem.data.chat_template import ChatTemplate
from lowmem.data.decoding import DecodeErrors
from lowmem.data.shards import KeyedPermutation, keyed_hash
from lowmem.data.stream import EndOfData, Exhausted, Mixture, Weight, check_same_data
from lowmem.data.template_worker import WORKER
from lowmem.data.text import file_stamps, find_files
from lowmem.data.text_source import DataProgress, Piece, ProgressCallback, ReadCounters, TextSource, document_pieces, utf8_size
from lowmem.data.tokenizers import Tokenizer
from lowmem.system.errors import DataError
from lowmem.system.files import exclusive_lock, file_sha256, json_sha256, make_directory, storage_errors, write_json

Truncation = Literal["cut", "drop"]
_OPEN_ROWS = 64  # rows that are tried for room
Encoded = tuple[np.ndarray, np.ndarray]  # tokens, and which of them are the assistant's


@dataclass
class PackingCounts:
    """What became of the conversations.

    Attributes:
        conversations: read.
        cut: longer than a row; their beginning is used.
        dropped_long: longer than a row and left out, by policy.
        dropped_silent: left out because nothing of the assistant's was left to learn, or all of it has the weight 0.
    """

    conversations: int = 0
    cut: int = 0
    dropped_long: int = 0
    dropped_silent: int = 0

    def used(self) -> int:
        """Conversations that are trained on."""
        return self.conversations - self.dropped_long - self.dropped_silent

    def describe(self, truncation: Truncation, seq_len: int) -> str:
        """One line; "" if every conversation is used whole."""
        parts = []
        if self.cut:
            parts.append(f"{self.cut} longer than {seq_len} tokens were cut there")
        if self.dropped_long:
            parts.append(f"{self.dropped_long} longer than {seq_len} tokens were left out")
        if self.dropped_silent:
            parts.append(f"{self.dropped_silent} were left out because no word of the assistant's to learn lies within {seq_len} tokens")
        return f"of {self.conversations} conversations {', '.join(parts)} (truncation: {truncation})" if parts else ""


def truncated(encoded: Encoded, seq_len: int, truncation: Truncation, counts: PackingCounts) -> Encoded | None:
    """The part of a conversation that a row takes, None if it is left out; counted in `counts`.

    Args:
        truncation: cut keeps the beginning of a long conversation; drop leaves it out.
    """
    tokens, said = encoded
    counts.conversations += 1
    if len(tokens) > seq_len + 1:
        if truncation == "drop":
            counts.dropped_long += 1
            return None
        tokens, said = tokens[: seq_len + 1], said[: seq_len + 1]
    if not said[1:].any():
        counts.dropped_silent += 1
        return None
    counts.cut += len(tokens) < len(encoded[0])
    return tokens, said


class Packer:
    """Fills the rows of one batch, each conversation into the first row that has room.

    Args:
        rows: R.
        seq_len: T.
        one_per_row: for models that cannot keep conversations apart.
    Memory: 20 * R * T bytes.
    """

    def __init__(self, rows: int, seq_len: int, *, one_per_row: bool = False):
        self.seq_len, self.one_per_row = seq_len, one_per_row
        self._inputs = np.zeros((rows, seq_len), dtype=np.int64)
        self._targets = np.full((rows, seq_len), IGNORE_INDEX, dtype=np.int64)
        self._segments = np.zeros((rows, seq_len), dtype=np.int32)
        self._filled = [0] * rows
        self._held = [0] * rows

    def add(self, tokens: np.ndarray, said: np.ndarray) -> bool:
        """Place a conversation of at most T + 1 tokens; false, and nothing done, where no row has room.

        Args:
            said: which tokens are to be predicted.
        """
        length = len(tokens) - 1
        for row, filled in enumerate(self._filled):
            if filled + length <= self.seq_len and not (self.one_per_row and filled):
                place = slice(filled, filled + length)
                self._inputs[row, place] = tokens[:-1]
                self._targets[row, place] = np.where(said[1:], tokens[1:], IGNORE_INDEX)
                self._held[row] += 1
                self._segments[row, place] = self._held[row]
                self._filled[row] = self.seq_len if self.one_per_row else filled + length
                return True
        return False

    def batch(self) -> Batch:
        """The rows; padding is token 0 in segment 0, with nothing to predict."""
        return Batch(self._inputs, self._targets, self._segments)


@dataclass
class PackedConversations:
    """All conversations of a set in as few rows as first-fit finds.

    Attributes:
        batch: (R, T) rows with segments.
        counts: what became of the conversations.
    """

    batch: Batch
    counts: PackingCounts = field(default_factory=PackingCounts)

    def padding_share(self) -> float:
        """Share of the positions that hold no token."""
        assert self.batch.segments is not None
        return float((self.batch.segments == 0).mean())


def pack_conversations(
    encoded: Iterable[Encoded], seq_len: int, truncation: Truncation = "cut", *, one_per_row: bool = False
) -> PackedConversations:
    """Every conversation once, packed.

    Raises:
        DataError: none is left.
    Memory: 20 bytes a position.
    """
    counts = PackingCounts()
    open_rows: list[Packer] = []
    for item in encoded:
        kept = truncated(item, seq_len, truncation, counts)
        if kept is None:
            continue
        if not any(row.add(*kept) for row in open_rows[-_OPEN_ROWS:]):
            row = Packer(1, seq_len, one_per_row=one_per_row)
            row.add(*kept)
            open_rows.append(row)
    rows = [row.batch() for row in open_rows]
    if not rows:
        raise DataError(f"no conversation is left to learn from: {counts.describe(truncation, seq_len) or 'the file holds none'}")
    inputs, targets = (np.concatenate([getattr(row, name) for row in rows]) for name in ("inputs", "targets"))
    return PackedConversations(Batch(inputs, targets, np.concatenate([row.segments for row in rows if row.segments is not None])), counts)


_FORMAT = 3  # another number where the same records give other tokens, so that those made before are not taken
_SAID = 1 << 31  # the bit of a token that the assistant says
_INDEX = "index.json"
_REPORT_CONVERSATIONS = 256


class ChatSource(TextSource):
    """Files or a hub dataset of conversations, each rendered as one document.

    Args:
        config: with path or hub.
        template: how they are written.
        decode_errors: what becomes of bytes that are not UTF-8, and of lone surrogates.
        remedy: for them, told where they are refused.
    Raises:
        DataError: no such file or dataset.
    """

    def __init__(self, config: SourceConfig, template: ChatTemplate, decode_errors: DecodeErrors = "fail", remedy: str = CONVERT):
        self.label = config.path or config.hub
        self.template = template
        self._decode_errors, self._remedy = decode_errors, remedy
        self._config = config
        found = find_files(config.path, chat_format, CHAT_FORMATS) if config.path else None
        self._files, self.note = (found.files, found.note(config.path)) if found else ([], "")
        self.total_bytes = sum(file.stat().st_size for file in self._files) or None

    def identity(self) -> dict[str, Any]:
        common = {"kind": "chat", "template": [self.template.source, self.template.names], "decode_errors": self._decode_errors}
        if self._config.path:
            return {**common, "files": file_stamps(self._files)}
        return {**common, "hub": self._config.hub, "subset": self._config.subset, "split": self._config.split}

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        for conversation in self.conversations():
            text = self.template.render(conversation)
            counters.input_bytes += utf8_size(text)
            yield from document_pieces(text)

    def conversations(self) -> Iterator[Conversation]:
        """The conversations in the order of the files.

        Raises:
            DataError: malformed, naming file and record.
        """
        for file in self._files:
            yield from read_conversations(file, self._decode_errors, self._remedy)
        if self._config.hub:
            from lowmem.data.hub import load_hub_rows

            for number, row in enumerate(load_hub_rows(self._config, FIELDS), start=1):
                yield parse_record(without_nulls(dict(row)), f"{self.label}: row {number}", self._decode_errors, self._remedy)


class ChatTokens:
    """Tokenised conversations on disk.

    Attributes:
        hashes: (conversations,) uint64 of what each record says, whatever the template, the tokenizer and the other records.
    Memory: mapped files: pages that were read, which the kernel may take back.
    """

    def __init__(self, folder: Path, label: str):
        self.label = label
        self.sha256 = file_sha256(folder / "tokens.bin")
        self._tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
        self._ends = np.fromfile(folder / "ends.bin", dtype=np.int64)
        self.hashes = np.fromfile(folder / "hashes.bin", dtype=np.uint64)

    def __len__(self) -> int:
        """Conversations."""
        return len(self._ends)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens,) int64, and (tokens,) bool where the assistant says them."""
        start = self._ends[number - 1] if number else 0
        packed = np.asarray(self._tokens[start : self._ends[number]])
        return (packed & ~np.uint32(_SAID)).astype(np.int64), packed >= _SAID

    def tokens(self) -> int:
        """Of all conversations."""
        return len(self._tokens)


def build_chat_tokens(source: ChatSource, tokenizer: Tokenizer, cache: Path, progress: ProgressCallback) -> ChatTokens:
    """The tokens of a source, from the cache if they are there and unchanged.

    Raises:
        DataError: malformed records, or none.
        StorageError: the cache cannot be written.
    Memory: one conversation, and 16 bytes for each.
    """
    identity = {"format": _FORMAT, "tokenizer": tokenizer.sha256(), "source": source.identity()}
    folder = cache / "chat" / json_sha256(identity)[:32]
    if source.note:
        progress(DataProgress("warning", source.label, message=source.note))
    make_directory(folder.parent)
    if not (folder / _INDEX).exists():
        message = f"another process prepares {source.label}; waiting for it"
        with exclusive_lock(folder.with_suffix(".lock"), lambda: progress(DataProgress("waiting", source.label, message=message))):
            if not (folder / _INDEX).exists():
                _write(source, tokenizer, folder, progress)
    WORKER.close()  # nothing is rendered for a while
    return ChatTokens(folder, source.label)


def _write(source: ChatSource, tokenizer: Tokenizer, folder: Path, progress: ProgressCallback) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_directory(unfinished)
    ends, hashes, total = [], [], 0
    with storage_errors(unfinished), open(unfinished / "tokens.bin", "wb") as file:
        for conversation in source.conversations():
            tokens, said = source.template.encode(tokenizer, conversation)
            file.write((tokens.astype(np.uint32) | np.where(said, _SAID, 0).astype(np.uint32)).tobytes())
            total += len(tokens)
            ends.append(total)
            hashes.append(int(json_sha256([conversation.messages, conversation.extras])[:16], 16))
            if len(ends) % _REPORT_CONVERSATIONS == 0:
                progress(DataProgress("tokens", source.label, tokens=total))
        if not ends:
            raise DataError(f"{source.label} holds no conversation")
        file.flush()
        os.fsync(file.fileno())
    with storage_errors(unfinished):
        np.array(ends, dtype=np.int64).tofile(unfinished / "ends.bin")
        np.array(hashes, dtype=np.uint64).tofile(unfinished / "hashes.bin")
    write_json(unfinished / _INDEX, {"conversations": len(ends), "tokens": total})
    with storage_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


_HELD_OUT = 5  # what a hash is for
_BATCH_ROWS = 16


class Conversations:
    """What is trained on of one source, and what is held out: conversations that fit, by policy.

    Which are held out depends on what the records say alone, not on `seq_len`, the policy, the template or the tokenizer: a run that goes
    on with others must not train on what was held out.

    Args:
        val_fraction: share of the conversations that is held out; at least one where it is above 0.
        options: what stands before the names of `seq_len` and `val_fraction` where the user writes them.
    Raises:
        DataError: none is left to train on, or of those that are held out.
    Memory: 8 bytes a conversation.
    """

    def __init__(self, tokens: ChatTokens, *, seq_len: int, truncation: Truncation, val_fraction: float, options: str = "data."):
        self.label, self.tokens, self.seq_len, self.truncation = tokens.label, tokens, seq_len, truncation
        self.counts = PackingCounts()
        usable = [truncated(tokens[number], seq_len, truncation, self.counts) is not None for number in range(len(tokens))]
        count = max(1, round(val_fraction * len(tokens))) if val_fraction else 0
        chosen = np.zeros(len(tokens), dtype=bool)
        # by the records' own hashes: other records beside them change little
        keys = np.array([keyed_hash(_HELD_OUT, int(value)) for value in tokens.hashes], dtype=np.uint64)
        chosen[np.argsort(keys, kind="stable")[:count]] = True
        held_out, self.train = np.flatnonzero(chosen & usable), np.flatnonzero(~chosen & usable)
        self.held_out: list[int] = held_out.tolist()
        if not len(self.train) or (count and not self.held_out):
            said, less = self.counts.describe(truncation, seq_len), f", or set {options}val_fraction=0" if count else ""
            raise DataError(
                f"{self.label} has {len(self.train)} conversations to learn from and {len(self.held_out)} held out"
                f"{f' ({said})' if said else ''}; give more, or raise {options}seq_len{less}"
            )

    def encoded(self, number: int) -> Encoded:
        """Tokens of conversation `number`, cut to a row."""
        kept = truncated(self.tokens[number], self.seq_len, self.truncation, PackingCounts())
        assert kept is not None
        return kept

    def drawn(self, number: int, key: int) -> Encoded:
        """The conversation that is drawn after `number` others, in an order of its own for each pass."""
        epoch, position = divmod(number, len(self.train))
        return self.encoded(int(self.train[KeyedPermutation(len(self.train), keyed_hash(key, epoch))[position]]))


class ChatStream:
    """Packed training batches; a conversation that no row has room for begins the next batch.

    Args:
        sources: one for each of `weights`.
        one_per_row: for models that cannot keep conversations apart.
    """

    def __init__(
        self,
        sources: Sequence[Conversations],
        weights: Sequence[Weight],
        *,
        seq_len: int,
        seed: int,
        exhausted: Exhausted = "repeat",
        one_per_row: bool = False,
    ):
        self._sources, self._seq_len, self._seed, self._one_per_row = list(sources), seq_len, seed, one_per_row
        self._mixture = Mixture(weights, [len(source.train) for source in sources], seed=seed, exhausted=exhausted)

    def batch(self, sequences: int, *, seq_len: int, step: int) -> Batch:
        """The next (sequences, seq_len) rows, as full as first-fit makes them.

        Raises:
            EndOfData: nothing is left.
        Memory: 20 bytes a position.
        """
        packer, filled = Packer(sequences, self._seq_len, one_per_row=self._one_per_row), False
        while True:
            try:
                number = self._mixture.choose(step)
            except EndOfData:
                if filled:
                    break
                raise
            if not packer.add(*self._sources[number].drawn(self._mixture.drawn[number], keyed_hash(self._seed, number))):
                break
            filled = True
            self._mixture.take(number)
        return packer.batch()

    def epochs(self) -> list[float | None]:
        """How often each source has been gone through so far."""
        return self._mixture.epochs()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state, enough to go on exactly."""
        return {**self._fixed(), **self._mixture.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same data.

        Raises:
            CheckpointError: of other data, or malformed.
        """
        check_same_data(state, self._fixed())
        self._mixture.load_state_dict(state)

    def _fixed(self) -> dict[str, Any]:
        return {"seed": self._seed, "seq_len": self._seq_len, "conversations": [len(source.train) for source in self._sources]}


class ChatValidation:
    """The held-out conversations of all sources, packed once.

    Memory: 20 bytes a position of the rows.
    """

    def __init__(self, sources: Sequence[Conversations], *, seq_len: int, one_per_row: bool):
        encoded = (source.encoded(number) for source in sources for number in source.held_out)
        self._rows = pack_conversations(encoded, seq_len, one_per_row=one_per_row).batch

    def __len__(self) -> int:
        """Rows."""
        return len(self._rows)

    def batches(self, limit: int = 0) -> Iterator[Batch]:
        """The rows, or `limit` of them spread evenly."""
        total = len(self)
        count = min(limit, total) if limit else total
        chosen = np.array([number * total // count for number in range(count)])
        for first in range(0, count, _BATCH_ROWS):
            part = chosen[first : first + _BATCH_ROWS]
            assert self._rows.segments is not None
            yield Batch(self._rows.inputs[part], self._rows.targets[part], self._rows.segments[part])
