"""One global batch of token sequences, as numbers on the host."""

from dataclasses import dataclass

import numpy as np

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Sequences and what they predict.

    Attributes:
        inputs: (sequences, seq_len) int64 token ids.
        targets: (sequences, seq_len) int64 next tokens; `IGNORE_INDEX` where nothing is predicted.
    """

    inputs: np.ndarray
    targets: np.ndarray

    @classmethod
    def from_windows(cls, windows: np.ndarray) -> "Batch":
        """Next-token prediction over (sequences, seq_len + 1) windows of text."""
        windows = windows.astype(np.int64, copy=False)
        return cls(inputs=windows[:, :-1], targets=windows[:, 1:])

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, start: int, stop: int) -> "Batch":
        """The sequences start..stop-1, without copying."""
        return Batch(self.inputs[start:stop], self.targets[start:stop])

    def target_count(self) -> int:
        """Number of predicted tokens."""
        return int((self.targets != IGNORE_INDEX).sum())
