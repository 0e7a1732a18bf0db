"""malloc with fixed thresholds and the cache of large blocks (`lowmem.memory`), as far as they decide how much memory is resident.

Large blocks are mapped one by one, and kept when freed as long as all together take no more than those in use did at their peak. Smaller
ones come from a heap by best fit, and the heap only shrinks at its end.

Source: glibc 2.36, malloc/malloc.c; the manual's section "Malloc Tunable Parameters".
"""

import mmap
from bisect import bisect_left, insort

from lowmem.memory.block_cache import KEEP_FROM_BYTES
from lowmem.memory.malloc import MAP_FROM_BYTES, TOP_PAD_BYTES, TRIM_FROM_BYTES

_PAGE = mmap.PAGESIZE
_ALIGNMENT = 64  # PyTorch asks for it
_OVERHEAD = 16


class HostAllocator:
    """Resident bytes of a sequence of allocations and releases, each of which is touched as a whole.

    Args:
        cached: whether the cache of blocks is in use; without it malloc has all blocks, and maps those from 1 MiB on.
    Attributes:
        resident_bytes: now.
        heap_peak_bytes: the most that the heap of smaller blocks ever held.
    """

    def __init__(self, cached: bool = True) -> None:
        self._map_from = KEEP_FROM_BYTES if cached else MAP_FROM_BYTES
        self.heap_peak_bytes = 0
        self._mapped = 0
        self._mapped_peak = 0  # since what is kept was last released: blocks in use and kept ones take that much, or less
        self._top = 0  # first byte of the heap that no block holds
        self._touched = 0  # first byte that was not written since the heap last shrank
        self._blocks: dict[int, tuple[int, int]] = {}  # key -> address (-1 if mapped), size
        self._free: list[tuple[int, int]] = []  # size, address; sorted
        self._free_at: dict[int, int] = {}  # address -> size
        self._free_end: dict[int, int] = {}  # end -> address

    @property
    def resident_bytes(self) -> int:
        return self._mapped_peak + self._touched

    @property
    def heap_passing_bytes(self) -> int:
        """What the heap held at its fullest beyond the blocks that are in it now."""
        return self.heap_peak_bytes - sum(size for address, size in self._blocks.values() if address >= 0)

    def release_kept(self) -> None:
        """What `lowmem.memory.block_cache.release_host_memory` does to kept blocks; the heap is taken to stay as it is."""
        self._mapped_peak = self._mapped

    def allocate(self, key: int, size: int) -> None:
        """Allocate `size` bytes under a name of the caller's."""
        if not size:
            self._blocks[key] = (0, 0)
            return
        if size >= self._map_from:
            size = -(-size // _PAGE) * _PAGE
            self._blocks[key] = (-1, size)
            self._mapped += size
            self._mapped_peak = max(self._mapped_peak, self._mapped)
        else:
            size = -(-(size + _OVERHEAD + _ALIGNMENT) // 16) * 16
            self._blocks[key] = (self._place(size), size)

    def release(self, key: int) -> None:
        """Free what `allocate` made under that name."""
        address, size = self._blocks.pop(key)
        if not size:
            return
        if address < 0:
            self._mapped -= size
            return
        start, end = address, address + size
        if start in self._free_end:
            start = self._take(self._free_end[start])[0]
        if end in self._free_at:
            following, length = self._take(end)
            end = following + length
        if end == self._top:
            self._top = start
            if self._touched - self._top >= TRIM_FROM_BYTES:
                self._touched = self._top + TOP_PAD_BYTES
        else:
            self._give(start, end - start)

    def _place(self, size: int) -> int:
        index = bisect_left(self._free, (size, -1))
        if index < len(self._free):
            length, address = self._free[index]
            self._take(address)
            if length > size:
                self._give(address + size, length - size)
            return address
        address = self._top
        self._top += size
        self._touched = max(self._touched, self._top)
        self.heap_peak_bytes = max(self.heap_peak_bytes, self._touched)
        return address

    def _take(self, address: int) -> tuple[int, int]:
        size = self._free_at.pop(address)
        del self._free_end[address + size]
        del self._free[bisect_left(self._free, (size, address))]
        return address, size

    def _give(self, address: int, size: int) -> None:
        self._free_at[address] = size
        self._free_end[address + size] = address
        insort(self._free, (size, address))
