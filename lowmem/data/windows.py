"""The training windows of one source on disk: which tokens the n-th window drawn from it holds."""

from typing import Any, Protocol

import numpy as np

from lowmem.data.order import KeyedPermutation, keyed_hash
from lowmem.data.shards import TokenShards
from lowmem.errors import DataError

_MANY_WINDOWS = 8
_ORDER, _OFFSET = 1, 2  # what a hash is for


class WindowSource(Protocol):
    """Windows of one source, for `lowmem.data.train_stream.TrainStream`."""

    label: str

    @property
    def windows_per_epoch(self) -> int | None:
        """Windows of one pass; None if nobody knows."""

    def window(self, drawn: int) -> np.ndarray:
        """(seq_len + 1,) int64, for a source of which `drawn` windows were taken before."""

    def state_dict(self) -> dict[str, Any]:
        """What beyond the number of windows drawn is needed to go on; JSON-ready."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""


class StoredWindows:
    """Windows in shuffled order, epoch after epoch; everything follows from (seed, epoch, position).

    Windows never cross the border of a region, not even with their last target. Within a region they lie end to end, each
    one's last target being the next one's first input, and where the row of windows begins moves from epoch to epoch.

    Args:
        regions: (n, 2) token positions [start, stop) that may be read.
        seq_len: tokens that a window predicts.
        key: 64 bits from the seed and the source's number.
    Raises:
        DataError: no region is as long as a window.
    Memory: two numbers a region.
    """

    def __init__(self, shards: TokenShards, regions: np.ndarray, *, seq_len: int, key: int, label: str):
        self.label = label
        self._shards = shards
        self._seq_len = seq_len
        self._key = key
        lengths = regions[:, 1] - regions[:, 0]
        self._starts = regions[:, 0]
        counts = windows_in(lengths, seq_len)
        # giving up one window of many lets the row begin anywhere within a window's length
        self._counts = np.where(counts > _MANY_WINDOWS, (lengths - seq_len) // seq_len, counts)
        self._slack = np.maximum(lengths - 1 - self._counts * seq_len, 0)
        self._ends = np.cumsum(self._counts)
        self.windows_per_epoch = int(self._ends[-1]) if len(regions) else 0
        if not self.windows_per_epoch:
            raise DataError(
                f"{label} has {len(shards)} tokens, too few to train on sequences of {seq_len} (a window needs {seq_len + 1}); "
                "give more text, or lower data.seq_len"
            )
        self._epoch = -1
        self._permutation = KeyedPermutation(1, 0)

    def window(self, drawn: int) -> np.ndarray:
        epoch, position = divmod(drawn, self.windows_per_epoch)
        return self._shards.read(self.window_start(epoch, position), self._seq_len + 1)

    def window_start(self, epoch: int, position: int) -> int:
        """First token of the window at `position` of an epoch."""
        if epoch != self._epoch:
            self._permutation = KeyedPermutation(self.windows_per_epoch, keyed_hash(self._key, _ORDER, epoch))
            self._epoch = epoch
        number = self._permutation[position]
        region = int(np.searchsorted(self._ends, number, side="right"))
        within = number - int(self._ends[region] - self._counts[region])
        choices = min(int(self._slack[region]), self._seq_len - 1) + 1
        offset = keyed_hash(self._key, _OFFSET, epoch, region) % choices
        return int(self._starts[region]) + offset + within * self._seq_len

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the order is a function."""


def windows_in(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """How many windows of seq_len + 1 tokens, sharing one with the next, lie in regions of these lengths."""
    return np.maximum(lengths - 1, 0) // seq_len
