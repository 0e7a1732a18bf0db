"""Boundary activations of a layerwise step: what each block was given, for every sequence of the global batch.

Shapes: B sequences of the global batch, T time, C width.
"""

from typing import Literal

import torch

from lowmem.fake import note


class Boundaries:
    """One (B, T, C) tensor per boundary, in device memory or in pinned host memory.

    Args:
        dtype: what is stored; "same" is the dtype of what is written.
        offload: "cpu" keeps them in host memory, copied on a stream of their own while the device computes (CUDA only).
    Memory: B * T * C numbers for each boundary that was written and not freed; with offload that much host memory, and on the device
        two micro-batches.
    """

    def __init__(
        self, sequences: int, device: torch.device, *, dtype: Literal["same", "bf16"] = "same", offload: Literal["none", "cpu"] = "none"
    ):
        self.sequences, self.device = sequences, device
        self.stored_dtype = torch.bfloat16 if dtype == "bf16" else None
        self.stream = torch.cuda.Stream(device) if offload == "cpu" and device.type == "cuda" else None
        self.dtype = torch.float32
        self._kept: dict[int, torch.Tensor] = {}
        self._fetched: dict[tuple[int, int, int], torch.Tensor] = {}

    def write(self, index: int, rows: slice, hidden: torch.Tensor) -> None:
        """Keep `hidden` as rows of boundary `index`."""
        kept = self._kept.get(index)
        if kept is None:
            self.dtype = hidden.dtype
            shape = (self.sequences, *hidden.shape[1:])
            place = {"device": "cpu", "pin_memory": True} if self.stream else {"device": self.device}
            kept = self._kept[index] = torch.empty(shape, dtype=self.stored_dtype or hidden.dtype, **place)  # type: ignore[arg-type]
            note(kept, "boundaries")
        if self.stream is None:
            kept[rows] = hidden
            return
        narrowed = hidden.to(kept.dtype)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            kept[rows].copy_(narrowed, non_blocking=True)
        narrowed.record_stream(self.stream)

    def prefetch(self, index: int, rows: slice) -> None:
        """Start bringing rows to the device; `read` then finds them there. Nothing without offload."""
        key = (index, rows.start, rows.stop)
        if self.stream is None or key in self._fetched or index not in self._kept or rows.start >= self.sequences:
            return
        with torch.cuda.stream(self.stream):
            self._fetched[key] = self._kept[index][rows].to(self.device, non_blocking=True)

    def read(self, index: int, rows: slice) -> torch.Tensor:
        """Rows of boundary `index` on the device, in the dtype they were written in; not to be changed."""
        if self.stream is None:
            return self._kept[index][rows].to(self.dtype)
        self.prefetch(index, rows)
        fetched = self._fetched.pop((index, rows.start, rows.stop))
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        fetched.record_stream(torch.cuda.current_stream(self.device))
        return fetched.to(self.dtype)

    def free(self, index: int) -> None:
        """Give back the memory of boundary `index`."""
        self._kept.pop(index, None)
        for key in [key for key in self._fetched if key[0] == index]:
            del self._fetched[key]

    def drop_fetched(self) -> None:
        """Give back the device memory of rows that were prefetched and not read; what was written stays."""
        self._fetched.clear()

    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept.values())
