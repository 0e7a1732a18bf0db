"""What a layerwise step keeps of its forward pass: the activations between blocks, on the device, in host memory, or on disk.

Shapes: B batch, T time, C width.
"""

from typing import Any, Literal

import torch

from lowmem.engine.storage.backing import Backing
from lowmem.engine.storage.disk_file import aligned_buffer, aligned_size
from lowmem.system.dry_run import note
from lowmem.system.errors import ConfigError

_WRITES_ALIVE = 2  # micro-batches whose bytes wait for the disk: one is written, the next is copied


class Boundaries:
    """One (B, T, C) tensor per boundary.

    Args:
        sequences: B.
        dtype: what is stored; "same" is the dtype of what is written.
        offload: "cpu" keeps them in pinned host memory, copied on a stream of their own while a GPU computes.
        disk: keeps them in this file instead, which is written and read while the device computes.
    Memory: B * T * C elements for each boundary that was written and not freed; with offload that much host memory, and on the device
        two micro-batches; on a disk three micro-batches of host memory.
    """

    def __init__(
        self,
        sequences: int,
        device: torch.device,
        *,
        dtype: Literal["same", "bf16"] = "same",
        offload: Literal["none", "cpu", "disk"] = "none",
        disk: Backing | None = None,
    ):
        self.sequences, self.device = sequences, device
        self.stored_dtype = torch.bfloat16 if dtype == "bf16" else None
        self.stream = torch.cuda.Stream(device) if offload == "cpu" and device.type == "cuda" else None
        self.dtype = torch.float32
        self._kept: dict[int, torch.Tensor | _OnDisk] = {}
        self._fetched: dict[tuple[int, int, int], Any] = {}
        self._disk, self._writes = disk, _Writes()

    def write(self, index: int, rows: slice, hidden: torch.Tensor) -> None:
        """Keep `hidden` as rows of boundary `index`."""
        kept = self._kept.get(index)
        if kept is None:
            self.dtype = hidden.dtype
            kept = self._kept[index] = self._room(index, (self.sequences, *hidden.shape[1:]), self.stored_dtype or hidden.dtype)
        if isinstance(kept, _OnDisk):
            self._writes.add(kept.write(rows, hidden))
        elif self.stream is None:
            kept[rows] = hidden
        else:
            narrowed = hidden.to(kept.dtype)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                kept[rows].copy_(narrowed, non_blocking=True)
            narrowed.record_stream(self.stream)

    def _room(self, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> "torch.Tensor | _OnDisk":
        if self._disk is not None:
            made = _OnDisk(self._disk, index, shape, dtype)
            if any(isinstance(other, _OnDisk) and other.stride != made.stride for other in self._kept.values()):
                raise ConfigError(
                    "the blocks of this model pass on activations of different sizes, not kept on a disk; use train.boundary_offload=none"
                )
            return made
        place = {"device": "cpu", "pin_memory": True} if self.stream else {"device": self.device}
        kept = torch.empty(shape, dtype=dtype, **place)  # type: ignore[call-overload]
        note(kept, "boundaries")
        return kept

    def prefetch(self, index: int, rows: slice) -> None:
        """Start bringing rows to the device; `read` then finds them there. Nothing where they are there."""
        key, kept = (index, rows.start, rows.stop), self._kept.get(index)
        if kept is None or key in self._fetched or rows.start >= self.sequences:
            return
        if isinstance(kept, _OnDisk):
            self._fetched[key] = kept.read(rows)
        elif self.stream is not None:
            with torch.cuda.stream(self.stream):
                self._fetched[key] = kept[rows].to(self.device, non_blocking=True)

    def read(self, index: int, rows: slice) -> torch.Tensor:
        """Rows of boundary `index` on the device, in the dtype they were written in; not to be changed."""
        kept = self._kept[index]
        if isinstance(kept, torch.Tensor) and self.stream is None:
            return kept[rows].to(self.dtype)
        self.prefetch(index, rows)
        fetched = self._fetched.pop((index, rows.start, rows.stop))
        if isinstance(kept, _OnDisk):
            buffer, transfer = fetched
            transfer.result()
            self._writes.check()  # all that were begun before this read have ended
            return kept.view(buffer).contiguous().to(self.device, self.dtype)
        assert self.stream is not None
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        fetched.record_stream(torch.cuda.current_stream(self.device))
        return fetched.to(self.dtype)

    def free(self, index: int) -> None:
        """Give back the memory of boundary `index`."""
        self._kept.pop(index, None)
        self._drop([key for key in self._fetched if key[0] == index])

    def drop_fetched(self) -> None:
        """Give back the device memory of rows that were prefetched and not read; what was written stays."""
        self._drop(list(self._fetched))

    def _drop(self, keys: list[tuple[int, int, int]]) -> None:
        for key in keys:
            fetched = self._fetched.pop(key)
            if self._disk is not None:
                fetched[1].result()  # the disk writes into that memory until it is done

    def nbytes(self) -> int:
        """Bytes kept in memory."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept.values() if isinstance(kept, torch.Tensor))


class _Writes:
    """Writes that were begun, the oldest of which is waited for where there are too many."""

    def __init__(self) -> None:
        self._begun: list[Any] = []

    def add(self, write: Any) -> None:
        self._begun.append(write)
        self.check(alive=_WRITES_ALIVE - 1)

    def check(self, alive: int = 0) -> None:
        """Raise what a write met; all but the last few have ended then."""
        while len(self._begun) > alive:
            self._begun.pop(0).result()


class _OnDisk:
    """One boundary in a file, each row at an offset that the disk takes.

    Args:
        index: of the boundary; the file has room for those before it, too.
        shape: (B, T, C).
    """

    def __init__(self, disk: Any, index: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.disk, self.dtype, self.row_shape = disk, dtype, shape[1:]
        self.row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        self.stride = aligned_size(self.row_bytes)
        self.start = index * shape[0] * self.stride  # boundaries of one step are of one size: see `Boundaries._room`
        if disk.size < self.start + shape[0] * self.stride:
            disk.reserve(self.start + shape[0] * self.stride - disk.size)

    def write(self, rows: slice, hidden: torch.Tensor) -> Any:
        buffer = aligned_buffer(hidden.shape[0] * self.stride)
        self.view(buffer).copy_(hidden)
        return self.disk.write(self.start + rows.start * self.stride, buffer)

    def read(self, rows: slice) -> tuple[torch.Tensor, Any]:
        buffer = aligned_buffer((rows.stop - rows.start) * self.stride)
        return buffer, self.disk.read(self.start + rows.start * self.stride, buffer)

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """(rows, T, C) of a buffer."""
        flat = buffer.view(-1, self.stride)[:, : self.row_bytes].view(self.dtype)
        return flat.unflatten(1, self.row_shape)
