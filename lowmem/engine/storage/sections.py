"""Groups of tensors that are read and written together, each in one piece of a backing, and two buffers through which they pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from lowmem.engine.storage.backing import Backing
from lowmem.engine.storage.disk_file import DiskFile, aligned_buffer, aligned_size
from lowmem.engine.storage.host_memory import Done
from lowmem.system.dry_run import is_fake, note

_BETWEEN_TENSORS = 64  # bytes: kernels of 512 bits read aligned
Key = tuple[int, str]  # id of a parameter, and what is added to its name


@dataclass(frozen=True)
class Piece:
    """One tensor inside a section."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor, in a buffer that has its section."""
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass
class Section:
    """Tensors that are read and written together.

    Attributes:
        start: where it begins in the backing.
        size: bytes; a multiple of ALIGNMENT once it is kept.
        written: bytes from its start that an update changes.
    """

    start: int = 0
    size: int = 0
    written: int = 0
    pieces: dict[Key, Piece] = field(default_factory=dict)

    def add(self, key: Key, like: torch.Tensor) -> None:
        """Make room for one more."""
        offset = -(-self.size // _BETWEEN_TENSORS) * _BETWEEN_TENSORS
        self.pieces[key] = Piece(offset, like.shape, like.dtype)
        self.size = offset + self.pieces[key].nbytes

    def place(self, key: Key) -> tuple[int, int]:
        """Offset in the backing, and bytes, of a tensor."""
        return self.start + self.pieces[key].offset, self.pieces[key].nbytes


@dataclass
class _Slot:
    """A buffer for one section.

    Attributes:
        staging: on the host, where a disk is read for another device.
        holds: the section whose bytes it has, or will have when `transfer` has ended; -1 is none.
    """

    buffer: torch.Tensor | None = None
    staging: torch.Tensor | None = None
    holds: int = -1
    transfer: Any = field(default_factory=Done)


class Sections:
    """Numbered sections, of which two are on the device at a time: an even one and an odd one.

    Args:
        category: of memory, for predictions.
    Attributes:
        parts: by number.
    Memory: two buffers of the size of the largest section on the device, from the first one that is fetched on; where a disk serves a
        GPU as much pinned host memory.
    """

    def __init__(self, backing: Backing, device: torch.device, category: str):
        self.backing, self.device, self.category = backing, device, category
        self.parts: dict[int, Section] = {}
        self._slots = (_Slot(), _Slot())
        self._writes: list[Any] = []

    def keep(self, index: int, section: Section, values: Mapping[Key, torch.Tensor]) -> None:
        """Have section `index`, whose pieces are laid out, in the backing.

        Args:
            values: the first elements of its pieces.
        """
        section.size = section.written = aligned_size(section.size)
        section.start = self.backing.reserve(section.size)
        for key, piece in section.pieces.items():
            value = values[key].detach()
            if not is_fake(value) and value.count_nonzero():  # the backing is zero
                self.backing.put(section.start + piece.offset, value.to("cpu").contiguous())
        self.backing.settle()
        self.parts[index] = section

    def start(self, index: int) -> None:
        """Begin to fetch a section, unless it is here already, or it has nothing in it."""
        slot, section = self._slots[index % 2], self.parts[index]
        if slot.holds == index or not section.size:
            return
        self._allocate(slot)
        slot.holds, slot.transfer = index, self._read(section, slot)

    def fetch(self, index: int) -> dict[Key, torch.Tensor]:
        """The tensors of a section, on the device until another of its parity is begun.

        Raises:
            StorageError: it could not be read, or what was to be written before could not.
        """
        self.check()
        self.start(index)
        slot = self._slots[index % 2]
        try:
            slot.transfer.result()
            self.check()  # what was to be written before this read has ended
        except BaseException:
            slot.holds = -1
            raise
        slot.transfer = Done()
        return self._views(index, slot)

    def blank(self, index: int) -> dict[Key, torch.Tensor]:
        """As `fetch`, to be filled and written: what it has is not read."""
        slot = self._slots[index % 2]
        if self.parts[index].size:
            self._allocate(slot)
        self.check(wait=True)  # nothing may be on its way from or to this buffer
        slot.transfer.result()
        slot.holds, slot.transfer = -1, Done()
        return self._views(index, slot)

    def write(self, index: int) -> None:
        """Begin to keep a section as it is in its buffer."""
        slot, section = self._slots[index % 2], self.parts[index]
        slot.holds = index
        if section.written:
            self._writes.append(self._begin_write(section, slot))

    def check(self, wait: bool = False) -> None:
        """Raise what a write met; one that has not ended is left alone, or waited for."""
        left = []
        for write in self._writes:
            if wait or isinstance(write, Done) or write.done():
                write.result()
            else:
                left.append(write)
        self._writes = left

    def buffer_bytes(self) -> int:
        """What the buffers take."""
        return sum(slot.buffer.numel() for slot in self._slots if slot.buffer is not None)

    def _views(self, index: int, slot: _Slot) -> dict[Key, torch.Tensor]:
        pieces = self.parts[index].pieces
        return {key: piece.view(slot.buffer) for key, piece in pieces.items()} if slot.buffer is not None else {}

    def _allocate(self, slot: _Slot) -> None:
        largest, cuda = max(part.size for part in self.parts.values()), self.device.type == "cuda"
        if slot.buffer is not None and slot.buffer.numel() >= largest:
            return
        slot.transfer.result()
        # both or neither: memory may run out between them, and this be done again
        staging = aligned_buffer(largest, pinned=True) if isinstance(self.backing, DiskFile) and cuda else None
        buffer = torch.empty(largest, dtype=torch.uint8, device=self.device) if cuda else aligned_buffer(largest)
        slot.buffer, slot.staging = buffer, staging
        note(buffer, self.category)

    def _read(self, section: Section, slot: _Slot) -> Any:
        assert slot.buffer is not None
        here = slot.buffer[: section.size]
        if slot.staging is None:
            return self.backing.read(section.start, here)
        assert isinstance(self.backing, DiskFile)
        staged = slot.staging[: section.size]
        return self.backing.read(section.start, staged, partial(_copied, staged, here, self._computed()))

    def _begin_write(self, section: Section, slot: _Slot) -> Any:
        assert slot.buffer is not None
        here = slot.buffer[: section.written]
        if slot.staging is None:
            return self.backing.write(section.start, here)
        assert isinstance(self.backing, DiskFile)
        staged = slot.staging[: section.written]
        return self.backing.write(section.start, staged, partial(_copied, here, staged, self._computed()))

    def _computed(self) -> Any:
        """What is computed until now on a GPU."""
        return torch.cuda.current_stream(self.device).record_event()


def _copied(source: torch.Tensor, to: torch.Tensor, computed: Any) -> None:
    """Copy between host and device in the thread of the disk, once what was computed by then is done."""
    stream = torch.cuda.Stream(to.device if to.is_cuda else source.device)
    stream.wait_event(computed)
    with torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)
    stream.synchronize()
