"""Streams of batches: windows of several sources in their shares, for training and for validation."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, Protocol

import numpy as np

from lowmem.data.batch import Batch
from lowmem.data.shards import TokenShards, WindowSource, keyed_hash, windows_in
from lowmem.system.errors import CheckpointError
from lowmem.system.files import malformed

Exhausted = Literal["repeat", "drop", "stop"]
Weight = float | Callable[[int], float]
_RANGE = 1 << 64
_CHOICE = 3  # what a hash is for; windows.py has the others


class EndOfData(Exception):
    """No sequence is left, by the policy of the mixture."""


class Mixture:
    """A weighted, deterministic choice of sources that is resumed from a few numbers.

    Args:
        weights: relative shares of the sources, each a number or a function of the step.
        lengths: sequences in one pass over each source; None if nobody knows.
        seed: another seed draws in another order.
        exhausted: a source that has been gone through once is repeated, dropped (the others keep their relative shares), or stops
            the mixture.
    Attributes:
        position: sequences drawn so far.
        drawn: of each source.
    """

    def __init__(self, weights: Sequence[Weight], lengths: Sequence[int | None], *, seed: int, exhausted: Exhausted = "repeat"):
        self._weights, self._lengths, self._seed, self._exhausted = list(weights), list(lengths), seed, exhausted
        self.position, self.drawn = 0, [0] * len(self._weights)
        self._borders: tuple[tuple[float, ...] | None, list[int]] = (None, [])
        self._borders_of(tuple(self._weights_at(0)))

    def choose(self, step: int = 0) -> int:
        """Number of the source of the next sequence: a function of seed, position, weights and what is exhausted.

        Raises:
            EndOfData: nothing is left.
        """
        weights = self._weights_at(step)
        if self._exhausted == "drop":
            weights = [0.0 if self._is_exhausted(number) else weight for number, weight in enumerate(weights)]
            if not any(weights):
                raise EndOfData
        value = keyed_hash(self._seed, _CHOICE, self.position)
        number = next(number for number, border in enumerate(self._borders_of(tuple(weights))) if value < border)
        if self._exhausted == "stop" and self._is_exhausted(number):
            raise EndOfData
        return number

    def take(self, number: int) -> int:
        """Count a sequence of source `number`; how many were taken from it before."""
        before = self.drawn[number]
        self.drawn[number] += 1
        self.position += 1
        return before

    def epochs(self) -> list[float | None]:
        """How often each source has been gone through; None where its length is unknown."""
        return [drawn / length if length else None for drawn, length in zip(self.drawn, self._lengths, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"position": self.position, "drawn": list(self.drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: malformed, or of another number of sources.
        """
        try:
            position, drawn = int(state["position"]), [int(count) for count in state["drawn"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the data position in the checkpoint is malformed ({malformed(error)})") from error
        if min([position, *drawn]) < 0:
            raise CheckpointError("the data position in the checkpoint is malformed (a count is below 0)")
        if len(drawn) != len(self.drawn):
            raise CheckpointError(
                f"the checkpoint has positions of {len(drawn)} sources, the run has {len(self.drawn)}; restore data.sources"
            )
        self.position, self.drawn = position, drawn

    def _weights_at(self, step: int) -> list[float]:
        return [weight(step) if callable(weight) else weight for weight in self._weights]

    def _is_exhausted(self, number: int) -> bool:
        length = self._lengths[number]
        return length is not None and self.drawn[number] >= length

    def _borders_of(self, weights: tuple[float, ...]) -> list[int]:
        if self._borders[0] != weights:
            total = sum(weights)
            if not weights or min(weights) < 0 or not total > 0:
                raise ValueError(f"found weights {list(weights)}, each must be at least 0 and one above 0")
            borders = [int(_RANGE * (part / total)) for part in accumulate(weights)]
            last = max(number for number, weight in enumerate(weights) if weight)
            borders[last:] = [_RANGE] * (len(weights) - last)
            self._borders = weights, borders
        return self._borders[1]


def check_same_data(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse the position of another stream.

    Args:
        state: from a checkpoint.
        expected: what it must say of the data.
    Raises:
        CheckpointError: it says something else, or nothing.
    """
    for key, value in expected.items():
        if key not in state:
            raise CheckpointError(f"the data position in the checkpoint is malformed ({key!r} is missing)")
        if state[key] != value:
            raise CheckpointError(
                f"the checkpoint was made with other data: {key} was {state[key]}, is {value}; "
                "restore data.* and train.seed as they were, or start another run"
            )


class BatchStream(Protocol):
    """What the loop takes global batches from; its state is a few numbers."""

    def batch(self, sequences: int, *, seq_len: int, step: int) -> Batch:
        """The next global batch.

        Args:
            sequences: of the longest length of the run.
            seq_len: the length of this batch; shorter sequences are more of them.
            step: of the phase, for weights that change.
        Raises:
            EndOfData: the mixture has come to its end.
        """

    def epochs(self) -> list[float | None]:
        """How often each source has been gone through so far; None for a streamed one."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state, enough to go on exactly."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same data."""


class TrainStream:
    """Training sequences of text.

    What comes next depends only on the state, which is a few numbers (and, for streamed sources, their position).

    Args:
        sources: one for each of `weights`.
        weights: see `Mixture`.
        seq_len: tokens that the longest sequence predicts.
        exhausted: see `Mixture`.
        document_end: see `Batch.from_windows`.
    """

    def __init__(
        self,
        sources: Sequence[WindowSource],
        weights: Sequence[Weight],
        *,
        seq_len: int,
        seed: int,
        exhausted: Exhausted = "repeat",
        document_end: int | None = None,
    ):
        self._sources = list(sources)
        self._mixture = Mixture(weights, [source.windows_per_epoch for source in sources], seed=seed, exhausted=exhausted)
        self._seed = seed
        self._seq_len = seq_len
        self._document_end = document_end

    def batch(self, sequences: int, *, seq_len: int, step: int) -> Batch:
        """The next global batch: sequences * longest tokens, cut to sequences of `seq_len`.

        Windows of the longest length are cut into as many as go into one; what is left of a window is passed over until its source
        comes round again with other borders.

        Raises:
            EndOfData: see `BatchStream`.
        Memory: 8 bytes a token.
        """
        rows = sequences * self._seq_len // seq_len
        pieces = self._seq_len // seq_len
        windows = self.next(-(-rows // pieces), step)
        cut = [windows[:, piece * seq_len : (piece + 1) * seq_len + 1] for piece in range(pieces)]
        return Batch.from_windows(np.concatenate(cut)[:rows] if pieces > 1 else windows[:rows], self._document_end)

    def next(self, count: int, step: int = 0) -> np.ndarray:
        """The next sequences of the longest length, each with the token after its last one.

        Args:
            count: how many.
            step: of the phase.
        Returns:
            (count, seq_len + 1) int64.
        Raises:
            EndOfData: fewer are left.
            DataError: a shard was damaged meanwhile, or the network failed under a streamed source.
        Memory: 8 * count * (seq_len + 1) bytes.
        """
        windows = np.empty((count, self._seq_len + 1), dtype=np.int64)
        for row in range(count):
            number = self._mixture.choose(step)
            windows[row] = self._sources[number].window(self._mixture.take(number))
        return windows

    def tokens_per_epoch(self) -> int | None:
        """Tokens predicted in one pass over every source; None if one is streamed, for nobody knows its length."""
        counts = [source.windows_per_epoch for source in self._sources]
        return None if None in counts else self._seq_len * sum(count for count in counts if count)

    def epochs(self) -> list[float | None]:
        """How often each source has been gone through so far; None for a streamed one."""
        return self._mixture.epochs()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state, enough to go on exactly."""
        return {**self._fixed(), **self._mixture.state_dict(), "sources": [source.state_dict() for source in self._sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same data.

        Raises:
            CheckpointError: the state was made with other data, another seed or sequence length, or is malformed.
        """
        check_same_data(state, self._fixed())
        self._mixture.load_state_dict(state)
        if not isinstance(state.get("sources"), list) or len(state["sources"]) != len(self._sources):
            raise CheckpointError("the data position in the checkpoint is malformed: the state of a source is missing")
        for source, source_state in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(source_state)

    def _fixed(self) -> dict[str, Any]:
        return {"seed": self._seed, "seq_len": self._seq_len, "windows_per_epoch": [source.windows_per_epoch for source in self._sources]}


_BATCH_WINDOWS = 16


class ValidationSet:
    """Windows of held-out regions, end to end, never reaching out of them.

    Args:
        parts: shards with their held-out (n, 2) regions, one for each source.
        seq_len: tokens that a window predicts.
        document_end: see `Batch.from_windows`.
    """

    def __init__(self, parts: Sequence[tuple[TokenShards, np.ndarray]], *, seq_len: int, document_end: int | None = None):
        self._seq_len, self._document_end = seq_len, document_end
        self._shards = [shards for shards, _ in parts]
        starts, owners = [], []
        for owner, (_, regions) in enumerate(parts):
            for (start, stop), count in zip(regions, windows_in(regions[:, 1] - regions[:, 0], seq_len), strict=True):
                starts.append(start + seq_len * np.arange(count, dtype=np.int64))
                owners.append(np.full(count, owner, dtype=np.int32))
                assert count == 0 or starts[-1][-1] + seq_len < stop  # the last target is held out too
        self._starts = np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)
        self._owners = np.concatenate(owners) if owners else np.empty(0, dtype=np.int32)

    def __len__(self) -> int:
        """Windows there are."""
        return len(self._starts)

    def windows(self, limit: int = 0, batch_size: int = _BATCH_WINDOWS) -> Iterator[np.ndarray]:
        """The windows, or `limit` of them spread evenly over the held-out text.

        Args:
            limit: at most so many windows; 0 takes all.
            batch_size: windows in a batch; the last one may have fewer.
        Returns:
            Batches of (n, seq_len + 1) int64.
        Memory: 8 * batch_size * (seq_len + 1) bytes.
        """
        total = len(self)
        count = min(limit, total) if limit else total
        chosen = [number * total // count for number in range(count)]
        for first in range(0, count, batch_size):
            yield np.stack([self._window(number) for number in chosen[first : first + batch_size]])

    def batches(self, limit: int = 0) -> Iterator[Batch]:
        """`windows` as batches."""
        return (Batch.from_windows(part, self._document_end) for part in self.windows(limit))

    def _window(self, number: int) -> np.ndarray:
        return self._shards[self._owners[number]].read(int(self._starts[number]), self._seq_len + 1)
