"""What holds weights that are not on the device: a disk, host memory, or, in a dry run, nothing."""

import torch

from lowmem.engine.storage.disk_file import DiskFile, aligned_size
from lowmem.engine.storage.host_memory import Done, HostMemory
from lowmem.system.dry_run import repeats


class _Counted(Done):
    """A read of a dry run, which counts for as many passes as the one that waits for it stands for.

    A pass that stands for several begins the read of the pass after it; that of the last one, which nobody begins, is waited for outside.
    """

    def __init__(self, backing: "NoBacking", size: int):
        self.backing, self.size, self.begun = backing, size, repeats()

    def result(self) -> None:
        self.backing.bytes_read += self.size * (repeats() if self.begun <= repeats() else 0)
        self.size = 0


class NoBacking:
    """For a dry run: keeps nothing, and counts what a run would read and write.

    Attributes:
        pieces: sizes that were reserved.
        buffers: bytes of each memory that was read into, by its address.
    """

    def __init__(self) -> None:
        self.size = self.bytes_read = self.bytes_written = 0
        self.pieces: list[int] = []
        self.buffers: dict[int, int] = {}

    def reserve(self, size: int) -> int:
        """As `DiskFile.reserve`."""
        self.pieces.append(aligned_size(size))
        self.size += self.pieces[-1]
        return self.size - self.pieces[-1]

    def read(self, offset: int, buffer: torch.Tensor) -> Done:
        """As `DiskFile.read`."""
        memory = buffer.untyped_storage()
        self.buffers[memory._cdata] = memory.nbytes()
        return _Counted(self, buffer.numel())

    def write(self, offset: int, buffer: torch.Tensor) -> Done:
        """As `DiskFile.write`."""
        self.bytes_written += buffer.numel() * repeats()
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
