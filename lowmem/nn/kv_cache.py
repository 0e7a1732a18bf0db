"""What decoding remembers of the tokens so far. Shapes: B batch, T new tokens, W width."""

import torch


class LayerCache:
    """Preallocated rows for one layer: keys and values, or their low-rank latents.

    Args:
        batch_size: B.
        max_len: tokens it can hold.
        widths: one buffer per width.
    Memory: batch_size * max_len * sum(widths) elements, allocated here.
    """

    def __init__(self, batch_size: int, max_len: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.buffers = [torch.zeros(batch_size, max_len, width, dtype=dtype, device=device) for width in widths]
        self.length = 0

    def append(self, *new_BTW: torch.Tensor) -> list[torch.Tensor]:
        """Store the new rows and return everything held, (B, length, W) each.

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
        stop = self.length + time
        for buffer, new in zip(self.buffers, new_BTW, strict=True):
            buffer[:, self.length : stop] = new
        self.length = stop
        return [buffer[:, :stop] for buffer in self.buffers]

    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)
