"""A scratch file for what does not fit into memory, read and written past the page cache by a thread of its own."""

import errno
import os
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lowmem.system.errors import StorageError

ALIGNMENT = 4096  # bytes: of offsets, sizes and buffers that O_DIRECT takes, on every disk in use
_CHUNK_BYTES = 16 << 20  # of one call: large enough for any disk, and a signal is answered between two
_SETTLE_BYTES = 64 << 20  # written through the page cache before it is emptied


def aligned_size(size: int) -> int:
    """`size` rounded up to what the file reads and writes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned_buffer(size: int, *, pinned: bool = False) -> torch.Tensor:
    """(size,) uint8 on the host, or on the meta device in its context, at an address that O_DIRECT takes.

    Memory: `size` bytes and one page.
    """
    if pinned:  # begins at a page; PyTorch rounds its size up to a power of two, which one more page would double
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = 0 if raw.is_meta else -raw.data_ptr() % ALIGNMENT
    return raw[start : start + size]


class DiskFile:
    """A file without a name: it is gone when the process is, however that ends. Its bytes are zero before they are written.

    `read` and `write` are carried out one after the other, in the order of their calls, by one thread; `put` and `copy_to` at once.

    Args:
        directory: on the disk to be used; created if absent.
        option: that names another directory.
    Attributes:
        direct: whether the page cache is passed by; file systems without O_DIRECT (tmpfs) go through it, and it is emptied behind.
        bytes_read, bytes_written: so far, by `read` and `write`.
    Raises:
        StorageError: the directory cannot be created or written.
    Memory: none beyond the buffers that it is given.
    """

    def __init__(self, directory: Path, option: str = "train.storage_dir"):
        self.directory, self._option = directory, option
        self.size = self.bytes_read = self.bytes_written = self._unsettled = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._buffered, name = tempfile.mkstemp(prefix=".lowmem-", suffix=".weights", dir=directory)
            try:
                self._scattered = os.open(name, os.O_RDONLY)
                self._raw = self._open_direct(name)
            finally:
                os.unlink(name)
        except OSError as error:
            raise self._failure(error, "be created") from error
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._scattered, 0, 0, os.POSIX_FADV_RANDOM)
        self._thread = ThreadPoolExecutor(1, "lowmem-disk")
        self._released = weakref.finalize(self, _close, {self._raw, self._buffered, self._scattered})

    def _open_direct(self, name: str) -> int:
        self.direct = False
        try:
            raw = os.open(name, os.O_RDWR | os.O_DIRECT)
        except (OSError, AttributeError):  # a file system, or a system, that has no such thing
            return self._buffered
        probe = aligned_buffer(ALIGNMENT)
        try:  # some refuse only when it is used
            os.pwritev(raw, [_view(probe.zero_())], 0)
            os.preadv(raw, [_view(probe)], 0)
            self.direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(raw)
            return self._buffered
        return raw

    def reserve(self, size: int) -> int:
        """Offset of `size` more bytes, which are on the disk from now on.

        Raises:
            StorageError: the disk has no room for them.
        """
        offset, size = self.size, aligned_size(size)
        if size:
            try:
                os.posix_fallocate(self._buffered, offset, size)
            except OSError as error:
                raise self._failure(error, f"grow to {offset + size:,} bytes") from error
        self.size += size
        return offset

    def read(self, offset: int, buffer: torch.Tensor, then: Callable[[], None] | None = None) -> Future[None]:
        """Begin to fill a buffer.

        Args:
            offset: a multiple of ALIGNMENT, as is the size of the buffer.
            then: called by the thread once it is full.
        """
        self.bytes_read += buffer.numel()
        return self._thread.submit(self._transfer, os.preadv, offset, buffer, "be read", None, then)

    def write(self, offset: int, buffer: torch.Tensor, before: Callable[[], None] | None = None) -> Future[None]:
        """Begin to write a buffer, which must not change until that is done; see `read`.

        Args:
            before: called by the thread before it begins.
        """
        self.bytes_written += buffer.numel()
        return self._thread.submit(self._transfer, os.pwritev, offset, buffer, "be written", before, None)

    def put(self, offset: int, tensor: torch.Tensor) -> None:
        """Write a contiguous tensor on the host anywhere, now.

        Raises:
            StorageError: the disk is full, or failed.
        """
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _CHUNK_BYTES):
            part = flat[start : start + _CHUNK_BYTES]
            self._transfer(os.pwritev, offset + start, part, "be written", fd=self._buffered)
            self._unsettled += part.numel()
        if self._unsettled >= _SETTLE_BYTES:
            self.settle()

    def get(self, offset: int, tensor: torch.Tensor, *, scattered: bool = False) -> None:
        """Fill a contiguous tensor on the host from anywhere, now.

        Args:
            scattered: what follows in the file will not be asked for next.
        Raises:
            StorageError: the disk failed.
        """
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        self._transfer(os.preadv, offset, flat, "be read", fd=self._scattered if scattered else self._buffered)

    def copy_to(self, file: int, offset: int, size: int) -> None:
        """Append a part to another file, within the file system where it can.

        Args:
            file: descriptor, at the position where the part goes.
        Raises:
            OSError: that file cannot be written.
        """
        copied = 0
        try:
            while copied < size:
                step = os.copy_file_range(self._buffered, file, min(size - copied, _CHUNK_BYTES), offset_src=offset + copied)
                if not step:
                    break
                copied += step
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise  # other systems and file systems refuse it in many ways
        while copied < size:
            view = memoryview(os.pread(self._buffered, min(size - copied, _CHUNK_BYTES), offset + copied))
            if not view:
                raise StorageError(f"the scratch file in {self.directory} ended early; run the same command again")
            while view:
                done = os.write(file, view)
                view, copied = view[done:], copied + done
        self._forget(offset, size)

    def settle(self) -> None:
        """Have the disk hold what `put` wrote, and the page cache nothing of it."""
        if self._unsettled:
            try:
                os.fdatasync(self._buffered)
            except OSError as error:
                raise self._failure(error, "be written") from error
            self._forget(0, 0)
            self._unsettled = 0

    def wait(self) -> None:
        """Return once all that was begun is done."""
        self._thread.submit(int).result()

    def close(self) -> None:
        """Give the disk's room back; so does the end of the process, and of the last reference to this."""
        self._thread.shutdown(wait=True)
        self._released()

    def _transfer(
        self,
        call: Callable[..., int],
        offset: int,
        buffer: torch.Tensor,
        what: str,
        before: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
        fd: int | None = None,
    ) -> None:
        if before is not None:
            before()
        view, done, descriptor = _view(buffer), 0, self._raw if fd is None else fd
        try:
            while done < len(view):
                moved = call(descriptor, [view[done : done + _CHUNK_BYTES]], offset + done)
                if not moved:
                    raise OSError(errno.EIO, "the file ended early")
                done += moved
            if descriptor == self._buffered and fd is None and call is os.pwritev:
                os.fdatasync(descriptor)  # else an error would be told to nobody, and the page cache would keep what was written
        except OSError as error:
            raise self._failure(error, what) from error
        if descriptor == self._buffered and fd is None:
            self._forget(offset, len(view))
        if then is not None:
            then()

    def _forget(self, offset: int, size: int) -> None:
        """Have the page cache drop a part that is on the disk; where there is no disk below, as with tmpfs, nothing happens."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._buffered, offset, size, os.POSIX_FADV_DONTNEED)

    def _failure(self, error: OSError, what: str) -> StorageError:
        kept = "checkpoints written before are intact; " if self._option.startswith("train.") else ""
        return StorageError(
            f"the scratch file for weights in {self.directory} cannot {what}: {error.strerror or error}; {kept}free space there, or name "
            f"another folder with {self._option}, then run the same command again"
        )


def _view(buffer: torch.Tensor) -> Any:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]


def _close(descriptors: set[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
