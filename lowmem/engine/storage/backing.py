"""What holds weights that are not on the device: a disk, host memory, or, in a dry run, nothing."""

import torch

from lowmem.engine.storage.disk_file import DiskFile, aligned_size
from lowmem.engine.storage.host_memory import Done, HostMemory


class NoBacking:
    """For a dry run: keeps nothing, and counts."""

    def __init__(self) -> None:
        self.size = self.bytes_read = self.bytes_written = 0

    def reserve(self, size: int) -> int:
        """As `DiskFile.reserve`."""
        self.size += aligned_size(size)
        return self.size - aligned_size(size)

    def read(self, offset: int, buffer: torch.Tensor) -> Done:
        """As `DiskFile.read`."""
        self.bytes_read += buffer.numel()
        return Done()

    def write(self, offset: int, buffer: torch.Tensor) -> Done:
        """As `DiskFile.write`."""
        self.bytes_written += buffer.numel()
        return Done()

    def put(self, offset: int, tensor: torch.Tensor) -> None:
        """As `DiskFile.put`."""

    def get(self, offset: int, tensor: torch.Tensor, *, scattered: bool = False) -> None:
        """As `DiskFile.get`."""

    def copy_to(self, file: int, offset: int, size: int) -> None:
        """As `DiskFile.copy_to`."""

    def settle(self) -> None:
        """As `DiskFile.settle`."""

    def wait(self) -> None:
        """As `DiskFile.wait`."""

    def close(self) -> None:
        """As `DiskFile.close`."""


Backing = DiskFile | HostMemory | NoBacking
