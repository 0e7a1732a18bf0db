"""The stream of training sequences of text: windows of several sources, mixed."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lowmem.data.batch import Batch
from lowmem.data.mixture import Exhausted, Mixture, Weight, check_same_data
from lowmem.data.windows import WindowSource
from lowmem.errors import CheckpointError


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
