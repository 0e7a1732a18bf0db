"""The model of the host's memory against a brute-force one that keeps nothing but the live blocks, and against real tensors."""

import json
import random
import subprocess
import sys
from itertools import pairwise

import pytest

from lowmem.memory.allocator import KEEP_FROM_BYTES, TOP_PAD_BYTES, TRIM_FROM_BYTES
from lowmem.planning.allocators import HostAllocator
from lowmem.system.devices import cxx_compiler
from lowmem.system.files import compiled_root
from tests.train.tiny_run import ROOT

MIB = 1 << 20
KIB64 = 64 << 10
COST = 16 + 64  # of a block: malloc's header, PyTorch's alignment


class LiveBlocksOnly:
    """The same rules, told from the live blocks alone: gaps are found anew for every request."""

    def __init__(self):
        self.heap, self.mapped, self.touched, self.most_mapped = {}, {}, 0, 0

    def allocate(self, key, size):
        if not size:
            return
        if size >= KEEP_FROM_BYTES:
            self.mapped[key] = (size + 4095) // 4096 * 4096
            self.most_mapped = max(self.most_mapped, sum(self.mapped.values()))
            return
        size = (size + COST + 15) // 16 * 16
        gaps, end = [], 0
        for start, length in sorted(self.heap.values()):
            if start - end >= size:
                gaps.append((start - end, end))
            end = start + length
        self.heap[key] = (min(gaps)[1] if gaps else end, size)
        self.touched = max(self.touched, self.top())

    def release(self, key):
        if self.mapped.pop(key, None) is None and key in self.heap:
            before = self.top()
            del self.heap[key]
            if self.top() < before and self.touched - self.top() >= TRIM_FROM_BYTES:
                self.touched = self.top() + TOP_PAD_BYTES

    def top(self):
        return max((start + length for start, length in self.heap.values()), default=0)

    def resident(self):
        return self.most_mapped + self.touched


def random_sequence(seed: int, count: int) -> list[tuple[int, int]]:
    """(key, size) to allocate, (key, -1) to release; sizes from a few bytes to some MiB, at most 60 alive, all released at the end."""
    generator = random.Random(seed)
    alive: list[int] = []
    steps = []
    for key in range(count):
        while alive and (len(alive) > 60 or generator.random() < 0.45):
            steps.append((alive.pop(generator.randrange(len(alive))), -1))
        steps.append((key, int(2 ** generator.uniform(0, 22.5))))
        alive.append(key)
    return steps + [(key, -1) for key in alive]


def apply(allocator, step):
    key, size = step
    return allocator.release(key) if size < 0 else allocator.allocate(key, size)


@pytest.mark.parametrize("size, resident", [
    (0, 0),
    (1, 96),  # 81 rounded up to 16
    (1000, 1088),
    (KIB64 - 1, KIB64 + COST),  # the largest block of the heap
    (KIB64, KIB64),  # the smallest of the cache: whole pages
    (KIB64 + 1, KIB64 + 4096),
    (3 * MIB + 5000, 3 * MIB + 2 * 4096),
])  # fmt: skip
def test_one_block(size, resident):
    allocator = HostAllocator()
    allocator.allocate(7, size)
    assert allocator.resident_bytes == resident
    allocator.release(7)
    assert allocator.resident_bytes == resident  # kept, or at the end of a heap that is trimmed from 4 MiB on only
    allocator.release_kept()
    assert allocator.resident_bytes == (resident if size < KIB64 else 0)


def test_best_fit_takes_the_smallest_hole_and_leaves_the_rest():
    allocator = HostAllocator()
    for key, size in enumerate((5000, 100, 3000, 100, 9000, 100)):
        allocator.allocate(key, size - COST)
    before = allocator.resident_bytes
    for key in (0, 2, 4):
        allocator.release(key)
    allocator.allocate(10, 2000 - COST)  # into the hole of 3008
    allocator.allocate(11, 1008 - COST)  # exactly what is left of it
    allocator.allocate(12, 5008 - COST)  # the first hole
    allocator.allocate(13, 9008 - COST)
    assert allocator.resident_bytes == before
    allocator.allocate(14, 16)
    assert allocator.resident_bytes == before + 96


def test_neighbours_are_joined():
    allocator = HostAllocator()
    for key in range(4):
        allocator.allocate(key, 1024 - COST)
    for key in (0, 2, 1):  # one is joined with both
        allocator.release(key)
    allocator.allocate(4, 3 * 1024 - COST)
    assert allocator.resident_bytes == 4 * 1024


def test_the_end_of_the_heap_is_given_back_from_4_mib_on():
    allocator = HostAllocator()
    size = 32 * 1024
    for key in range(129):
        allocator.allocate(key, size - COST)
    for key in range(128, 1, -1):
        allocator.release(key)
    assert allocator.resident_bytes == 129 * size  # 32 KiB less than 4 MiB are free at the end
    allocator.release(1)
    assert allocator.resident_bytes == size + TOP_PAD_BYTES
    allocator.allocate(200, size - COST)
    assert allocator.resident_bytes == size + TOP_PAD_BYTES
    allocator.release(0)  # below a live block: kept
    assert allocator.resident_bytes == size + TOP_PAD_BYTES


def test_without_the_cache_malloc_has_all_blocks_below_a_mebibyte():
    allocator = HostAllocator(cached=False)
    allocator.allocate(0, MIB - 1)
    allocator.allocate(1, MIB)
    assert allocator.resident_bytes == MIB + COST + MIB
    allocator.release(0)
    allocator.release_kept()
    assert allocator.resident_bytes == MIB + COST + MIB  # the heap keeps its end below 4 MiB


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences_equal_the_brute_force(seed):
    ours, brute = HostAllocator(), LiveBlocksOnly()
    live = {}
    for step in random_sequence(seed, 600):
        apply(ours, step)
        apply(brute, step)
        live[step[0]] = max(step[1], 0)
        assert ours.resident_bytes == brute.resident()
        assert ours.resident_bytes >= sum(live.values())
        spans = sorted(block for block in ours._blocks.values() if block[0] >= 0 and block[1])
        assert all(start + size <= following for (start, size), (following, _) in pairwise(spans))
    ours.release_kept()
    assert ours.resident_bytes < TRIM_FROM_BYTES  # a tail too small to be trimmed, or the pad
    assert ours._free == []


REPLAY = """
import json, sys, torch
from pathlib import Path
from lowmem.memory.allocator import release_host_memory, set_up_host_memory
from lowmem.memory.procfs import status_bytes
torch.set_num_threads(1)
steps, alive, seen = json.load(sys.stdin), {}, []
torch.empty(4 << 20, dtype=torch.uint8).fill_(1)
assert set_up_host_memory(Path(sys.argv[1])) == ""
release_host_memory()  # holes of the heap are not resident from here on
start = status_bytes()["VmRSS"]
for key, size in steps:
    if size < 0:
        del alive[key]
    else:
        alive[key] = torch.empty(size, dtype=torch.uint8).fill_(1)
    seen.append(status_bytes()["VmRSS"] - start)
print(json.dumps(seen))
"""


@pytest.mark.memory
@pytest.mark.skipif(not cxx_compiler(), reason="no compiler for the cache")
@pytest.mark.parametrize("seed", range(3))
def test_a_random_sequence_of_real_tensors_takes_what_the_model_says(seed):
    steps = random_sequence(seed, 1500)
    command = [sys.executable, "-c", REPLAY, str(compiled_root())]
    result = subprocess.run(command, input=json.dumps(steps), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    real, model, predicted = json.loads(result.stdout), HostAllocator(), []
    for step in steps:
        apply(model, step)
        predicted.append(model.resident_bytes)
    # At most 60 blocks below 64 KiB are alive, so the heap holds less than 4 MiB of them; as much again may lie free at its end or between
    # them and Python's objects, which take less than 1 MiB.
    bound = TRIM_FROM_BYTES + MIB
    assert abs(max(real) - max(predicted)) <= bound
    assert all(ours <= theirs + bound for ours, theirs in zip(real, predicted, strict=True))
    assert max(predicted) > 6 * bound  # the comparison is about tensors
