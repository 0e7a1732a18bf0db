"""A trace replayed through a model of the allocator: peaks by phase, with what was alive then."""

import mmap
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lowmem.memory.allocator import KEEP_FROM_BYTES, MAP_FROM_BYTES, TOP_PAD_BYTES, TRIM_FROM_BYTES
from lowmem.planning.trace import Trace


class Allocator(Protocol):
    """What a trace is replayed through."""

    def allocate(self, key: int, size: int) -> None:
        """Make a block."""

    def release(self, key: int) -> None:
        """Free it."""

    def release_kept(self) -> None:
        """Give what is free back to the system, as a run does before its first step."""


@dataclass
class Peaks:
    """Peaks of one measure of memory.

    Attributes:
        by_phase: bytes by phase, in order.
        components: bytes by category when tensors took most, and as workspace what the allocator holds beyond them; they sum to the peak.
    """

    by_phase: dict[str, int] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most of all phases."""
        return max(self.by_phase.values(), default=0)

    def times(self, count: int) -> "Peaks":
        """The same `count` times over."""
        return Peaks({phase: size * count for phase, size in self.by_phase.items()}, {n: s * count for n, s in self.components.items()})

    def plus(self, name: str, size_bytes: int) -> "Peaks":
        """The same with `size_bytes` more of component `name` in every phase."""
        components = {**self.components, name: self.components.get(name, 0) + size_bytes}
        return Peaks({phase: size + size_bytes for phase, size in self.by_phase.items()}, components)


def replay(trace: Trace, allocator: Allocator, measures: dict[str, str], elsewhere: str = "") -> dict[str, Peaks]:
    """Peaks of several attributes of one allocator.

    Args:
        measures: name of the result -> attribute of `allocator` that holds bytes.
        elsewhere: a category that is in other memory.
    """
    starts = {position: name for name, position in trace.phases}
    results = {name: Peaks() for name in measures}
    live: Counter[str] = Counter()
    fullest: Counter[str] = Counter()
    phase = "load"
    for position, event in enumerate(trace.events):
        before, phase = phase, starts.get(position, phase)
        if before == "load" != phase:
            allocator.release_kept()
        storage = trace.storages[event if event >= 0 else ~event]
        if elsewhere and storage.category == elsewhere:
            continue
        if event >= 0:
            allocator.allocate(event, storage.size_bytes)
            live[storage.category] += storage.size_bytes
        else:
            allocator.release(~event)
            live[storage.category] -= storage.size_bytes
        for name, attribute in measures.items():
            results[name].by_phase[phase] = max(results[name].by_phase.get(phase, 0), getattr(allocator, attribute))
        if live.total() > fullest.total():
            fullest = Counter(live)
    for name, attribute in measures.items():
        for last, start in trace.phases:
            if start == len(trace.events):
                results[name].by_phase[last] = getattr(allocator, attribute)
        results[name].components = _components(fullest, results[name].peak_bytes)
    return results


def _components(live: Counter[str], peak_bytes: int) -> dict[str, int]:
    """The bytes of a peak by category; what the allocator adds to those in use is workspace."""
    components = dict(+live)
    if "boundaries" in components:
        components["activations"] = live["activations"] + components.pop("boundaries")
    components["workspace"] = live["workspace"] + peak_bytes - live.total()
    return components


def live_peaks(trace: Trace, categories: set[str], rounded: Callable[[int], int] = int) -> dict[str, int]:
    """The most bytes that some categories took together, by phase.

    Args:
        rounded: what a block of so many bytes takes.
    """
    starts = {position: name for name, position in trace.phases}
    peaks: dict[str, int] = {}
    phase, live = "load", 0
    for position, event in enumerate(trace.events):
        phase = starts.get(position, phase)
        storage = trace.storages[event if event >= 0 else ~event]
        if storage.category in categories:
            live += rounded(storage.size_bytes) if event >= 0 else -rounded(storage.size_bytes)
        peaks[phase] = max(peaks.get(phase, 0), live)
    return peaks


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
        """What `lowmem.memory.allocator.release_host_memory` does to kept blocks; the heap is taken to stay as it is."""
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


_ROUND = 512
_SMALL_REQUEST, _SMALL_SEGMENT = 1 << 20, 2 << 20
_LARGE_REQUEST, _LARGE_SEGMENT = 10 << 20, 20 << 20
_ROUND_SEGMENT = 2 << 20


class CudaAllocator:
    """Allocated and reserved bytes of a sequence of allocations and releases on one stream.

    Args:
        limit_bytes: segments without a live block are given back before more than this is reserved; 0 is no limit.
    Attributes:
        allocated_bytes: in live blocks, after rounding.
        reserved_bytes: in segments.
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self._next_segment = 0
        self._segments: dict[int, int] = {}  # segment -> size
        self._blocks: dict[int, tuple[int, int, int]] = {}  # key -> segment, offset, size
        self._pools: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}  # small -> (size, segment, offset), sorted
        self._free_at: dict[tuple[int, int], int] = {}
        self._free_end: dict[tuple[int, int], int] = {}
        self._small_segments: set[int] = set()

    def allocate(self, key: int, size: int) -> None:
        """Allocate `size` bytes under a name of the caller's."""
        if not size:
            self._blocks[key] = (-1, 0, 0)
            return
        size = max(_ROUND, -(-size // _ROUND) * _ROUND)
        small = size <= _SMALL_REQUEST
        pool = self._pools[small]
        index = bisect_left(pool, (size, -1, -1))
        if index == len(pool):
            self._reserve(size, small)
            index = bisect_left(pool, (size, -1, -1))
        length, segment, offset = pool[index]
        self._take(segment, offset)
        rest = length - size
        if rest >= _ROUND if small else rest > _SMALL_REQUEST:
            self._give(segment, offset + size, rest)
        else:
            size = length
        self._blocks[key] = (segment, offset, size)
        self.allocated_bytes += size

    def release(self, key: int) -> None:
        """Free what `allocate` made under that name."""
        segment, offset, size = self._blocks.pop(key)
        if not size:
            return
        self.allocated_bytes -= size
        start, end = offset, offset + size
        if (segment, start) in self._free_end:
            start = self._free_end[segment, start]
            self._take(segment, start)
        if (segment, end) in self._free_at:
            end += self._take(segment, end)
        self._give(segment, start, end - start)

    def _reserve(self, size: int, small: bool) -> None:
        wanted = _SMALL_SEGMENT if small else _LARGE_SEGMENT if size < _LARGE_REQUEST else -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT
        if self.limit_bytes and self.reserved_bytes + wanted > self.limit_bytes:
            self.release_kept()
        segment, self._next_segment = self._next_segment, self._next_segment + 1
        self._segments[segment] = wanted
        if small:
            self._small_segments.add(segment)
        self.reserved_bytes += wanted
        self._give(segment, 0, wanted)

    def release_kept(self) -> None:
        """What `torch.cuda.empty_cache` does: segments without a live block go back."""
        for segment, size in list(self._segments.items()):
            if self._free_at.get((segment, 0)) == size:
                self._take(segment, 0)
                del self._segments[segment]
                self.reserved_bytes -= size

    def _take(self, segment: int, offset: int) -> int:
        size = self._free_at.pop((segment, offset))
        del self._free_end[segment, offset + size]
        pool = self._pools[segment in self._small_segments]
        del pool[bisect_left(pool, (size, segment, offset))]
        return size

    def _give(self, segment: int, offset: int, size: int) -> None:
        self._free_at[segment, offset] = size
        self._free_end[segment, offset + size] = offset
        insort(self._pools[segment in self._small_segments], (size, segment, offset))
