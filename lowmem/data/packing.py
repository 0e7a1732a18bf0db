"""Conversations side by side in rows of one length; none sees another, for every token carries the number of its conversation.

Shapes: R rows, T seq_len.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.errors import DataError

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
