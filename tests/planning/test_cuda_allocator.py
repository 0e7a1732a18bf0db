"""The model of PyTorch's CUDA caching allocator: cases worked out by hand, and a brute-force one over random sequences."""

import random

import pytest

from lowmem.planning.allocators import CudaAllocator

MIB = 1 << 20


@pytest.mark.parametrize("size, allocated, reserved", [
    (0, 0, 0),
    (1, 512, 2 * MIB),
    (513, 1024, 2 * MIB),
    (MIB, MIB, 2 * MIB),  # the largest of the small ones
    (MIB + 1, MIB + 512, 20 * MIB),
    (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
    (10 * MIB, 10 * MIB, 10 * MIB),  # from here on a segment of its own, in steps of 2 MiB
    (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
    (11 * MIB, 12 * MIB, 12 * MIB),  # a rest of 1 MiB or less is not cut off a large block
    (100 * MIB + 512, 100 * MIB + 512, 102 * MIB),
])  # fmt: skip
def test_one_block(size, allocated, reserved):
    allocator = CudaAllocator()
    allocator.allocate(1, size)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)
    allocator.release(1)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, reserved)


def test_segments_are_kept_and_used_again():
    allocator = CudaAllocator()
    for key in range(10):
        allocator.allocate(key, 30 * MIB)
        allocator.release(key)
    assert allocator.reserved_bytes == 30 * MIB
    allocator.allocate(20, 31 * MIB)  # does not fit
    assert allocator.reserved_bytes == 62 * MIB


def test_best_fit_takes_the_smallest_hole():
    allocator = CudaAllocator()
    for key, size in enumerate((40, 30, 50)):
        allocator.allocate(key, size * MIB)
    for key in range(3):
        allocator.release(key)
    for key, size in ((3, 30), (4, 40), (5, 50)):  # each has its place only if the one before took the smallest that fits
        allocator.allocate(key, size * MIB)
    assert allocator.reserved_bytes == 120 * MIB


def test_neighbours_are_joined_within_a_segment_only():
    allocator = CudaAllocator()
    for key in range(4):
        allocator.allocate(key, 512 * 1024)  # fills one small segment
    allocator.allocate(4, MIB)
    assert allocator.reserved_bytes == 4 * MIB
    for key in (1, 3, 2):
        allocator.release(key)
    allocator.allocate(5, MIB)
    allocator.allocate(6, 512 * 1024)
    assert allocator.reserved_bytes == 4 * MIB
    for key in (0, 4, 5, 6):
        allocator.release(key)
    allocator.allocate(7, MIB + 512)  # two empty small segments are no large one
    assert allocator.reserved_bytes == 24 * MIB


def test_small_blocks_do_not_take_large_segments():
    allocator = CudaAllocator()
    allocator.allocate(0, 8 * MIB)
    allocator.allocate(1, 1024)
    assert allocator.reserved_bytes == 22 * MIB


def test_the_limit_gives_unused_segments_back_and_only_those():
    allocator = CudaAllocator(limit_bytes=100 * MIB)
    allocator.allocate(0, 40 * MIB)
    allocator.allocate(1, 50 * MIB)
    allocator.release(0)
    allocator.allocate(2, 10 * MIB)  # in the hole of 40
    allocator.release(1)
    allocator.allocate(3, 60 * MIB)  # 90 are reserved; without the 50 that nobody uses 100 are enough
    assert allocator.reserved_bytes == 100 * MIB
    allocator.allocate(4, 60 * MIB)  # nothing to give back: what is needed is told all the same
    assert allocator.reserved_bytes == 160 * MIB


class LiveBlocksOnly:
    """The same rules, told from segments and live blocks: holes are found anew for every request."""

    def __init__(self, limit):
        self.limit, self.segments, self.blocks, self.made = limit, {}, {}, 0

    def allocate(self, key, size):
        size = (size + 511) // 512 * 512
        small = size <= MIB
        if not self.holes(size, small):
            wanted = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            if self.limit and self.reserved() + wanted > self.limit:
                used = {segment for segment, _, _ in self.blocks.values()}
                self.segments = {name: of for name, of in self.segments.items() if name in used}
            self.segments[self.made] = (wanted, small)
            self.made += 1
        length, segment, start = min(self.holes(size, small))
        whole = length - size < 512 if small else length - size <= MIB
        self.blocks[key] = (segment, start, length if whole else size)

    def holes(self, size, small):
        found = []
        for segment, (total, kind) in self.segments.items():
            if kind != small:
                continue
            end = 0
            for start, length in [*sorted((s, n) for of, s, n in self.blocks.values() if of == segment), (total, 0)]:
                if start - end >= size:
                    found.append((start - end, segment, end))
                end = start + length
        return found

    def reserved(self):
        return sum(total for total, _ in self.segments.values())

    def allocated(self):
        return sum(length for _, _, length in self.blocks.values())


@pytest.mark.parametrize("seed, limit", [(0, 0), (1, 0), (2, 200 * MIB), (3, 120 * MIB)])
def test_random_sequences_equal_the_brute_force(seed, limit):
    generator = random.Random(seed)
    ours, brute = CudaAllocator(limit), LiveBlocksOnly(limit)
    live: dict[int, int] = {}
    for key in range(400):
        while live and (len(live) > 25 or generator.random() < 0.45):
            gone = generator.choice(list(live))
            del live[gone], brute.blocks[gone]
            ours.release(gone)
        live[key] = int(2 ** generator.uniform(3, 24.5))
        ours.allocate(key, live[key])
        brute.allocate(key, live[key])
        assert (ours.allocated_bytes, ours.reserved_bytes) == (brute.allocated(), brute.reserved())
        assert ours.reserved_bytes >= ours.allocated_bytes >= sum(live.values())
    for key in live:
        ours.release(key)
    assert ours.allocated_bytes == 0
    assert ours.reserved_bytes == brute.reserved()
