"""The stream of training sequences: a weighted, deterministic mixture of sources."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from lowmem.data.order import keyed_hash
from lowmem.data.windows import WindowSource
from lowmem.errors import CheckpointError

_RANGE = 1 << 64
_CHOICE = 3  # what a hash is for; windows.py has the others


class Mixture:
    """Which source the sequence at each position comes from.

    Args:
        weights: relative shares, each above 0.
        seed: another seed draws in another order.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        if not weights or min(weights) <= 0:
            raise ValueError(f"found weights {list(weights)}, each must be above 0")
        total = sum(weights)
        self._seed = seed
        self._borders = [int(_RANGE * (part / total)) for part in accumulate(weights)]
        self._borders[-1] = _RANGE

    def source_at(self, position: int) -> int:
        """Number of the source; a function of (seed, position) alone."""
        value = keyed_hash(self._seed, _CHOICE, position)
        return next(number for number, border in enumerate(self._borders) if value < border)


class TrainStream:
    """Training sequences without end: each source wraps around to a new epoch of its own when it is exhausted.

    What comes next depends only on the state, which is a few numbers (and, for streamed sources, their position).

    Args:
        sources: one for each of `weights`.
        seq_len: tokens that a sequence predicts.
    """

    def __init__(self, sources: Sequence[WindowSource], weights: Sequence[float], *, seq_len: int, seed: int):
        self._sources = list(sources)
        self._mixture = Mixture(weights, seed)
        self._seed = seed
        self._seq_len = seq_len
        self._drawn = [0] * len(self._sources)
        self.position = 0

    def next(self, count: int) -> np.ndarray:
        """The next sequences, each with the token after its last one.

        Args:
            count: how many.
        Returns:
            (count, seq_len + 1) int64.
        Raises:
            DataError: a shard was damaged meanwhile, or the network failed under a streamed source.
        Memory: 8 * count * (seq_len + 1) bytes.
        """
        windows = np.empty((count, self._seq_len + 1), dtype=np.int64)
        for row in range(count):
            number = self._mixture.source_at(self.position)
            windows[row] = self._sources[number].window(self._drawn[number])
            self._drawn[number] += 1
            self.position += 1
        return windows

    def tokens_per_epoch(self) -> int | None:
        """Tokens predicted in one pass over every source; None if one is streamed, for nobody knows its length."""
        counts = [source.windows_per_epoch for source in self._sources]
        return None if None in counts else self._seq_len * sum(count for count in counts if count)

    def epochs(self) -> list[float | None]:
        """How often each source has been gone through so far; None for a streamed one."""
        return [
            drawn / source.windows_per_epoch if source.windows_per_epoch else None
            for drawn, source in zip(self._drawn, self._sources, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state, enough to go on exactly."""
        return {
            **self._fixed(),
            "position": self.position,
            "drawn": list(self._drawn),
            "sources": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same data.

        Raises:
            CheckpointError: the state was made with other data, another seed or sequence length, or is malformed.
        """
        try:
            found = {key: state[key] for key in self._fixed()}
            position, drawn, sources = int(state["position"]), [int(count) for count in state["drawn"]], list(state["sources"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the data position in the checkpoint is malformed ({type(error).__name__}: {error})") from error
        for key, expected in self._fixed().items():
            if found[key] != expected:
                raise CheckpointError(
                    f"the checkpoint was made with other data: {key} was {found[key]}, is {expected}; "
                    "restore data.* and train.seed as they were, or start another run"
                )
        self.position, self._drawn = position, drawn
        for source, source_state in zip(self._sources, sources, strict=True):
            source.load_state_dict(source_state)

    def _fixed(self) -> dict[str, Any]:
        return {"seed": self._seed, "seq_len": self._seq_len, "windows_per_epoch": [source.windows_per_epoch for source in self._sources]}
