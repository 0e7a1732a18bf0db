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
        segments: (sequences, seq_len) int32, which conversation or document of its row a token belongs to: tokens of one see none of
            another, and positions begin anew. 0 is padding. None where every row is one text.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None = None

    @classmethod
    def from_windows(cls, windows: np.ndarray, document_end: int | None = None) -> "Batch":
        """Next-token prediction over (sequences, seq_len + 1) windows of text.

        Args:
            document_end: the token that ends a document, where documents are to be kept apart. As a target it is the last token of its
                document, as an input the first one of the next: no prediction looks beyond its document, and none is left out.
        """
        windows = windows.astype(np.int64, copy=False)
        inputs = windows[:, :-1]
        segments = None if document_end is None else 1 + np.cumsum(inputs == document_end, axis=1, dtype=np.int32)
        return cls(inputs=inputs, targets=windows[:, 1:], segments=segments)

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, start: int, stop: int) -> "Batch":
        """The sequences start..stop-1, without copying."""
        segments = None if self.segments is None else self.segments[start:stop]
        return Batch(self.inputs[start:stop], self.targets[start:stop], segments)

    def padded(self, rows: int) -> "Batch":
        """This batch, or a copy of at least `rows` sequences whose added ones predict nothing."""
        missing = rows - len(self)
        if missing <= 0:
            return self
        repeat = np.zeros(missing, dtype=np.int64)  # the first sequence: tokens and segments that the model takes
        inputs = np.concatenate([self.inputs, self.inputs[repeat]])
        targets = np.concatenate([self.targets, np.full_like(self.targets[repeat], IGNORE_INDEX)])
        return Batch(inputs, targets, None if self.segments is None else np.concatenate([self.segments, self.segments[repeat]]))

    def target_count(self) -> int:
        """Number of predicted tokens."""
        return int((self.targets != IGNORE_INDEX).sum())


def longest_batch(sequences: int, seq_len: int, *, packed: bool = False) -> Batch:
    """A batch that takes as much memory as any of these lengths.

    Args:
        packed: with segments, as conversations have them.
    """
    batch = Batch.from_windows(np.zeros((sequences, seq_len + 1), dtype=np.int64))
    if not packed:
        return batch
    segments = np.ones((sequences, seq_len), dtype=np.int32)
    return Batch(batch.inputs, batch.targets, segments)
