"""What decoding remembers of the tokens so far, sequence by sequence. Shapes: B batch, T new tokens, W width.

Every sequence begins in slot 0 and has a length of its own, so a slot is a position and sequences of different lengths are decoded
together: what lies beyond the length of one is masked, and written over by its next tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from lowmem.nn.positions import token_positions

C = TypeVar("C", bound="RowCache")


class RowCache(Protocol):
    """What the caches of all layers offer; each method does what `LayerCache` says."""

    @property
    def lengths(self) -> np.ndarray: ...

    def nbytes(self) -> int: ...

    def rows(self, start: int, stop: int) -> Any: ...

    def keep(self, rows: Sequence[int]) -> None: ...

    def reset(self) -> None: ...


class LayerCache:
    """Preallocated rows for one layer: keys and values, or their low-rank latents.

    Args:
        batch_size: B.
        max_len: tokens it can hold.
        widths: one buffer per width.
    Attributes:
        buffers: (B, max_len, W) each.
        lengths: tokens held by each sequence. A numpy array, because it is read for every token and real also in a dry run.
    Memory: batch_size * max_len * sum(widths) elements, allocated here.
    """

    def __init__(self, batch_size: int, max_len: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.buffers = [torch.zeros(batch_size, max_len, width, dtype=dtype, device=device) for width in widths]
        self.lengths = np.zeros(batch_size, dtype=np.int64)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @property
    def start(self) -> int | tuple[int, ...]:
        """Position of the next token: one number if it is the same for all sequences, else one for each."""
        return next_positions(self.lengths)

    def append(self, *new_BTW: torch.Tensor) -> list[torch.Tensor]:
        """Store the new rows and return everything held, (B, length, W) each; of shorter sequences only the beginning means anything.

        Raises:
            ValueError: more tokens than the cache was made for, or another batch size.
        """
        batch, capacity = self.buffers[0].shape[:2]
        time = new_BTW[0].shape[1]
        if self.length + time > capacity or new_BTW[0].shape[0] != batch:
            raise ValueError(
                f"found {new_BTW[0].shape[0]} sequences of {self.length} + {time} tokens, the cache holds {batch} of at most "
                f"{capacity}; make a larger one with new_cache"
            )
        start = self.start
        for buffer, new in zip(self.buffers, new_BTW, strict=True):
            if isinstance(start, int):
                buffer[:, start : start + time] = new
            else:
                row_B1 = torch.arange(batch, device=buffer.device).unsqueeze(1)
                buffer[row_B1, token_positions(start, time, buffer.device)] = new.to(buffer.dtype)
        self.lengths += time
        return [buffer[:, : self.length] for buffer in self.buffers]

    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def rows(self, start: int, stop: int) -> "LayerCache":
        """Some of the sequences, sharing memory with this cache."""
        view = copy.copy(self)
        view.buffers = [buffer[start:stop] for buffer in self.buffers]
        view.lengths = self.lengths[start:stop]
        return view

    def keep(self, rows: Sequence[int]) -> None:
        """Move the sequences `rows`, ascending, to the front, in place; the others are overwritten or left behind."""
        for new, old in enumerate(rows):
            if new != old:
                length = self.lengths[new] = self.lengths[old]
                for buffer in self.buffers:
                    buffer[new, :length] = buffer[old, :length]

    def reset(self) -> None:
        """Forget every sequence."""
        self.lengths[:] = 0


@dataclass
class ModelCache(Generic[C]):
    """One cache per block; what is asked of it is asked of all."""

    layers: list[C]

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64: tokens that each sequence holds."""
        return self.layers[0].lengths

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @property
    def start(self) -> int | tuple[int, ...]:
        """Position of the next token, of all sequences or of each."""
        return next_positions(self.lengths)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes() for layer in self.layers)

    def rows(self, start: int, stop: int) -> "ModelCache[C]":
        """Some of the sequences, sharing memory with this cache."""
        return ModelCache([layer.rows(start, stop) for layer in self.layers])

    def keep(self, rows: Sequence[int]) -> None:
        """Move the sequences `rows`, ascending, to the front, in place."""
        for layer in self.layers:
            layer.keep(rows)

    def reset(self) -> None:
        """Forget every sequence."""
        for layer in self.layers:
            layer.reset()


def next_positions(lengths: np.ndarray) -> int | tuple[int, ...]:
    """Where new tokens go: one position if all sequences are equally long, else one for each."""
    first = int(lengths[0])
    return first if (lengths == first).all() else tuple(lengths.tolist())
