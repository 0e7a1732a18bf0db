"""Host memory for what does not fit into a GPU's: pinned, and copied on a stream of its own while the GPU computes."""

import os
from bisect import bisect_right
from typing import Any

import torch

from lowmem.engine.storage.disk_file import aligned_buffer, aligned_size


class Done:
    """A transfer that has ended."""

    def result(self) -> None:
        """Nothing is waited for."""


class _OnStream(Done):
    """A copy of another stream; what is computed from now on waits for it, the host does not."""

    def __init__(self, event: Any, device: torch.device):
        self.event, self.device = event, device

    def result(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


class HostMemory:
    """What `DiskFile` is on a disk. Where the device is a CPU, which a test may choose, copies are made at once.

    Args:
        device: whose buffers are filled.
    Attributes:
        bytes_read, bytes_written: so far.
    Memory: what is reserved, pinned: PyTorch rounds each piece up to a power of two.
    """

    def __init__(self, device: torch.device):
        self.device, self.size = device, 0
        self.bytes_read = self.bytes_written = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._starts: list[int] = []
        self._pieces: list[torch.Tensor] = []

    def reserve(self, size: int) -> int:
        """Offset of `size` more bytes, which are zero."""
        offset, size = self.size, aligned_size(size)
        self._starts.append(offset)
        self._pieces.append(aligned_buffer(size, pinned=self._stream is not None).zero_())
        self.size += size
        return offset

    def read(self, offset: int, buffer: torch.Tensor) -> Done:
        """Begin to fill a buffer on the device, once what was computed until now is done with it."""
        self.bytes_read += buffer.numel()
        return self._copy(buffer, self._part(offset, buffer.numel()))

    def write(self, offset: int, buffer: torch.Tensor) -> Done:
        """Begin to keep a buffer of the device, as it is after what was computed until now."""
        self.bytes_written += buffer.numel()
        return self._copy(self._part(offset, buffer.numel()), buffer)

    def put(self, offset: int, tensor: torch.Tensor) -> None:
        """Keep a contiguous tensor, now."""
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        self._part(offset, flat.numel()).copy_(flat)

    def get(self, offset: int, tensor: torch.Tensor, *, scattered: bool = False) -> None:
        """Fill a contiguous tensor, now."""
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        flat.copy_(self._part(offset, flat.numel()))

    def copy_to(self, file: int, offset: int, size: int) -> None:
        """Append a part to a file."""
        view = memoryview(self._part(offset, size).numpy())  # type: ignore[arg-type]
        while view:
            view = view[os.write(file, view[: 16 << 20]) :]

    def settle(self) -> None:
        """Nothing is left to be done."""

    def wait(self) -> None:
        """Return once all that was begun is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Give the memory back."""
        self._pieces.clear()
        self._starts.clear()

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> Done:
        if self._stream is None:
            to.copy_(source)
            return Done()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return _OnStream(self._stream.record_event(), self.device)

    def _part(self, offset: int, size: int) -> torch.Tensor:
        index = bisect_right(self._starts, offset) - 1
        start = offset - self._starts[index]
        return self._pieces[index][start : start + size]
