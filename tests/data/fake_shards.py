"""Shards in memory whose token at each position is the position itself."""

import numpy as np


class CountingShards:
    """Stands in for TokenShards."""

    def __init__(self, total: int):
        self._total = total

    def __len__(self) -> int:
        return self._total

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0
        assert start + count <= self._total
        return np.arange(start, start + count, dtype=np.int64)
