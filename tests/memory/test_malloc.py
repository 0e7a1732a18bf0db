"""Large freed blocks leave a fresh process at once, which the C library's own thresholds do not do."""

import json
import subprocess
import sys

import pytest

from lowmem.memory.allocator import MAP_FROM_BYTES, fix_malloc_thresholds
from tests.train.tiny_run import ROOT

pytestmark = [
    pytest.mark.memory,
    pytest.mark.skipif(sys.platform != "linux", reason="glibc and /proc"),
]
MIB = 1 << 20

# Blocks of 1 to 32 MiB, each beside a small one that stays, as activations lie beside what Python makes meanwhile.
BLOCKS = """
import json, sys, torch
from lowmem.memory.allocator import fix_malloc_thresholds
from lowmem.memory.procfs import status_bytes
torch.set_num_threads(1)
torch.empty(40 << 20, dtype=torch.uint8).fill_(1)  # a freed block of more than 32 MiB: glibc would map such ones all the same
torch.empty(31 << 20, dtype=torch.uint8).fill_(1)  # and this one raises its threshold
fixed = sys.argv[1] == "fixed" and fix_malloc_thresholds()
start, kept, large = status_bytes()["VmRSS"], [], []
for size in [1, 2, 3, 5, 8, 13, 21, 31] * 3:
    large.append(torch.empty(size << 20, dtype=torch.uint8).fill_(1))
    kept.append(torch.empty(300 << 10, dtype=torch.uint8).fill_(1))
full = status_bytes()["VmRSS"] - start
large.clear()
print(json.dumps([fixed, full, status_bytes()["VmRSS"] - start, sum(k.numel() for k in kept)]))
"""


def after_freeing(mode: str) -> list:
    result = subprocess.run([sys.executable, "-c", BLOCKS, mode], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(not fix_malloc_thresholds(), reason="no glibc")
def test_freed_blocks_leave_the_process():
    fixed, full, left, kept = after_freeing("fixed")
    assert fixed
    assert full > 3 * 84 * MIB
    assert left < kept + MIB  # the small ones are there, and what Python took meanwhile


@pytest.mark.skipif(not fix_malloc_thresholds(), reason="no glibc")
def test_left_alone_they_stay():
    _, full, left, kept = after_freeing("alone")
    assert full > 3 * 84 * MIB
    assert left > kept + 30 * MIB  # below a small block that is alive the heap cannot shrink


def test_blocks_are_mapped_from_one_mebibyte_on():
    assert MAP_FROM_BYTES == MIB
