"""Training batches of packed conversations, and the held-out ones."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lowmem.data.batch import Batch
from lowmem.data.chat_source import ChatTokens
from lowmem.data.mixture import EndOfData, Exhausted, Mixture, Weight, check_same_data
from lowmem.data.order import KeyedPermutation, keyed_hash
from lowmem.data.packing import Encoded, Packer, PackingCounts, Truncation, pack_conversations, truncated
from lowmem.errors import DataError

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
