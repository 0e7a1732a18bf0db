"""The held-out text: always the same windows in the same order."""

from collections.abc import Iterator, Sequence

import numpy as np

from lowmem.data.batch import Batch
from lowmem.data.shards import TokenShards
from lowmem.data.windows import windows_in

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
