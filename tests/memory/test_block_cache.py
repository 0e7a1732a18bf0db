"""The cache of large blocks against a plain model of its rule, in fresh processes: it replaces the allocator of the whole process."""

import json
import os
import random
import subprocess
import sys
from collections import OrderedDict

import pytest

from lowmem.data.storage import cache_root
from lowmem.memory.block_cache import BlockCounts, block_counts, compiled_library
from tests.train.tiny_run import ROOT

FOLDER = cache_root("") / "compiled"
pytestmark = pytest.mark.skipif(bool(compiled_library(FOLDER)[1]), reason="no compiler for the cache")
MIB = 1 << 20
PAGE = 4096

SET_UP = """
import json, sys, torch
from pathlib import Path
from lowmem.memory.block_cache import block_counts, release_host_memory, set_up_host_memory
from lowmem.memory.procfs import status_bytes
torch.set_num_threads(1)
def install():
    assert set_up_host_memory(Path(sys.argv[1])) == ""
def make(size):
    return torch.empty(size, dtype=torch.uint8)
"""


def run(code: str, *arguments: str, stdin: str = "") -> list:
    command = [sys.executable, "-c", SET_UP + code, str(FOLDER), *arguments]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


class Rule:
    """Kept blocks, oldest first; the newest of a size is taken first."""

    def __init__(self):
        self.in_use, self.kept, self.peak, self.reused, self.mapped = {}, OrderedDict(), 0, 0, 0

    def allocate(self, key, size):
        size = (size + PAGE - 1) // PAGE * PAGE
        same = [old for old, length in self.kept.items() if length == size]
        if same:
            del self.kept[same[-1]]
            self.reused += 1
        else:
            bound = max(self.peak, self.used() + size)
            while self.kept and self.used() + sum(self.kept.values()) + size > bound:
                self.kept.popitem(last=False)
            self.mapped += 1
        self.in_use[key] = size
        self.peak = max(self.peak, self.used())

    def release(self, key):
        self.kept[key] = self.in_use.pop(key)

    def used(self):
        return sum(self.in_use.values())

    def counts(self):
        return [self.used(), sum(self.kept.values()), self.peak, self.reused, self.mapped]


REPLAY = """
install()
alive, seen = {}, []
for key, size in json.load(sys.stdin):
    if size < 0:
        del alive[key]
    else:
        alive[key] = make(size)
        alive[key][::4096] = key % 251
        assert alive[key].data_ptr() % 4096 == 0
    for other, tensor in alive.items():  # no two blocks share a page
        assert tensor[0] == other % 251 and tensor[-1 - (tensor.numel() - 1) % 4096] == other % 251
    tensor = None
    now = block_counts()
    seen.append([now.in_use_bytes, now.kept_bytes, now.peak_bytes, now.reused, now.mapped])
print(json.dumps(seen))
"""


@pytest.mark.parametrize("seed", range(3))
def test_random_sequences_follow_the_rule(seed):
    generator, alive, steps = random.Random(seed), [], []
    for key in range(400):
        while alive and (len(alive) > 12 or generator.random() < 0.45):
            steps.append((alive.pop(generator.randrange(len(alive))), -1))
        steps.append((key, generator.choice([1 / 16, 0.1, 1, 1.5, 2, 2.0001, 3, 5]) * MIB))
        alive.append(key)
    steps = [(key, int(size)) for key, size in steps]
    rule, expected = Rule(), []
    for key, size in steps:
        rule.release(key) if size < 0 else rule.allocate(key, size)
        expected.append(rule.counts())
    seen = run(REPLAY, stdin=json.dumps(steps))
    assert seen == expected
    assert all(used + kept <= peak for used, kept, peak, _, _ in seen)
    assert seen[-1][3] > 100  # there was something to reuse


def test_a_block_is_reused_and_small_ones_are_not_its_business():
    code = """
install()
large = make(3 << 20)
where = large.data_ptr()
small = make((64 << 10) - 1)
counts = [block_counts().in_use_bytes]
del large
again = make((3 << 20) - 100)  # as many pages
print(json.dumps(counts + [again.data_ptr() == where, block_counts().in_use_bytes, block_counts().reused]))
"""
    assert run(code) == [3 * MIB, True, 3 * MIB, 1]


def test_tensors_from_before_it_are_freed_by_who_made_them():
    code = """
import threading
before = make(5 << 20).fill_(7)
install(), install()
other = []
threads = [threading.Thread(target=lambda: other.extend(make(2 << 20).fill_(1).sum() for _ in range(200))) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
values = [int(before.sum())]
del before
storage = make(4 << 20).fill_(3)
storage.resize_(6 << 20)
values.append(int(storage[: 4 << 20].sum()))
values += [block_counts().in_use_bytes, len(other)]
del storage
print(json.dumps(values + [block_counts().in_use_bytes]))
"""
    assert run(code) == [7 * 5 * MIB, 3 * 4 * MIB, 6 * MIB, 800, 0]


@pytest.mark.memory
def test_what_is_kept_is_resident_until_it_is_released_and_never_above_the_peak():
    code = """
install()
make(8 << 20).fill_(1)
release_host_memory()
start = status_bytes()["VmRSS"]
blocks = [make(8 << 20).fill_(1) for _ in range(10)]
full = status_bytes()["VmRSS"] - start
blocks.clear()
kept = status_bytes()["VmRSS"] - start
peak = 0
for size in (1, 2, 3, 5, 16, 40, 79):
    blocks = [make(size << 20).fill_(1)]
    peak = max(peak, status_bytes()["VmRSS"] - start)
    blocks.clear()
release_host_memory()
print(json.dumps([full, kept, peak, status_bytes()["VmRSS"] - start]))
"""
    full, kept, peak, left = run(code)
    assert 80 * MIB <= full < 81 * MIB
    assert kept >= 80 * MIB
    assert peak < 81 * MIB
    assert left < MIB


@pytest.mark.memory
def test_kept_blocks_make_room_when_the_system_has_no_more_and_the_error_is_pytorchs():
    code = """
import resource
install()
used = status_bytes()["VmData"]
resource.setrlimit(resource.RLIMIT_DATA, (used + (120 << 20), resource.RLIM_INFINITY))
blocks = [make(10 << 20) for _ in range(9)]
del blocks[:]
one = make(100 << 20)  # 90 MiB are kept
try:
    make(100 << 20)
    message = ""
except RuntimeError as error:
    message = str(error)
del one
print(json.dumps([message, make(100 << 20).numel()]))
"""
    message, size = run(code)
    assert "can't allocate memory" in message
    assert size == 100 * MIB


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path):
    compiled_library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    _, problem = compiled_library(tmp_path)
    assert "needs Linux and a C++ compiler" in problem
    assert len(problem.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: something' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    folder = tmp_path / "cache"
    compiled_library.cache_clear()
    _, problem = compiled_library(folder)
    assert "does not compile (x.cpp:1: error: something)" in problem
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be compiled in" in compiled_library(tmp_path / "inside")[1]


def test_a_folder_that_is_a_file_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be compiled in" in compiled_library(tmp_path / "file" / "inside")[1]


def test_not_in_use_it_counts_nothing():
    if block_counts().mapped == 0:
        assert block_counts() == BlockCounts()
