"""PyTorch's CUDA caching allocator, as far as it decides how much device memory is allocated and reserved.

Requests are rounded to 512 bytes and cut from segments: 2 MiB ones for requests up to 1 MiB, 20 MiB ones up to 10 MiB, and one of its own
size, rounded to 2 MiB, beyond. Freed blocks are joined with free neighbours in their segment, and segments are kept.

Source: PyTorch 2.13, c10/cuda/CUDACachingAllocator.cpp (constants in c10/core/AllocatorConfig.h).
"""

from bisect import bisect_left, insort

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
