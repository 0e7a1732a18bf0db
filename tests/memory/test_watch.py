"""The watcher against processes of known size: what it sees, what it leaves alone, and what it costs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.memory import watch
from lowmem.memory.procfs import start_time, status_bytes
from lowmem.memory.watch import TreeMemory
from lowmem.memory.watched import Watcher
from tests.memory.fresh_process import TOLERANCE_MIB, linux_only

pytestmark = linux_only
MIB = 1 << 20


def start(code: str) -> subprocess.Popen:
    """A fresh process that has printed a line."""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: subprocess.Popen) -> None:
    process.communicate("\n", timeout=30)


def wait_for(watcher: Watcher, samples: int) -> list[dict]:
    """The timeline once it has that many samples."""
    deadline = time.monotonic() + 20
    while len(watcher.timeline()) < samples:
        assert time.monotonic() < deadline, watcher.timeline()
        time.sleep(0.02)
    return watcher.timeline()


@pytest.mark.memory
def test_a_peak_between_samples_is_seen_and_nobody_s_high_water_mark_is_touched(tmp_path):
    code = "import sys; print(1, flush=True); input(); b = bytearray(150 << 20); del b; print(2, flush=True); input()"
    process = start(code)
    with Watcher(process.pid, tmp_path / "memory.jsonl", interval_s=0.3) as watcher:
        before = wait_for(watcher, 2)
        process.stdin.write("\n"), process.stdin.flush(), process.stdout.readline()
        wait_for(watcher, len(watcher.timeline()) + 2)
        mark = status_bytes(process.pid)
    timeline = watcher.timeline()
    end(process)
    base = before[0]["host_bytes"]
    assert (watcher.peak_bytes() - base) / MIB == pytest.approx(150, abs=TOLERANCE_MIB)
    assert max(sample["host_bytes"] for sample in timeline) - base < TOLERANCE_MIB * MIB  # it was over before a sample
    assert sum(sample["host_peak_bytes"] - base > 100 * MIB for sample in timeline) == 1  # and is told once
    assert (mark["VmHWM"] - base) / MIB == pytest.approx(150, abs=TOLERANCE_MIB)


@pytest.mark.memory
def test_descendants_count_once_for_what_they_share_and_stay_when_their_parent_ends(tmp_path):
    code = """
import os, time
shared = bytearray(100 << 20)
if os.fork() == 0:
    grandchild = os.fork()
    if grandchild == 0:
        own = bytearray(40 << 20)
        time.sleep(60)
    print(grandchild, flush=True)
    time.sleep(0.5)  # long enough to be seen
    os._exit(0)
os.wait()
print("nobody's child below the root any more", flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with Watcher(process.pid, tmp_path / "memory.jsonl") as watcher:
        grandchild = int(process.stdout.readline())
        process.stdout.readline()
        wait_for(watcher, len(watcher.timeline()) + 2)
        last = watcher.timeline()[-1]
    os.kill(grandchild, signal.SIGKILL)
    end(process)
    assert last["processes"] == 2
    assert last["host_bytes"] / MIB == pytest.approx(100 + 40 + 10, abs=TOLERANCE_MIB)  # and an interpreter


@pytest.mark.memory
def test_the_watcher_is_thin_frugal_and_ends_with_what_it_watches(tmp_path):
    process = start("b = bytearray(300 << 20); print(1, flush=True); input()")
    with Watcher(None, tmp_path / "memory.jsonl", interval_s=0.01) as watcher:
        assert watcher.timeline() == []
        watcher.follow(process.pid)
        own, started = watcher._process.pid, time.monotonic()
        wait_for(watcher, 50)
        ticks = Path(f"/proc/{own}/stat").read_text().rsplit(")", 1)[1].split()
        assert status_bytes(own)["VmHWM"] < 12 * MIB
        share = (int(ticks[11]) + int(ticks[12])) / 100 / (time.monotonic() - started)
        assert share < 0.08  # its start is in it, and the clock counts hundredths; without the pauses it would be near 1
        end(process)
        watcher._process.wait(10)


@pytest.mark.memory
def test_a_process_that_watches_itself_does_not_see_the_watcher(tmp_path):
    code = """
import os, sys, time
from lowmem.memory.watched import Watcher
with Watcher(os.getpid(), sys.argv[1], interval_s=0.02) as watcher:
    while len(watcher.timeline()) < 5:
        time.sleep(0.02)
print({sample["processes"] for sample in watcher.timeline()})
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "{1}\n"


def test_run_with_m_it_becomes_the_thin_form():
    process = start("print(1, flush=True); input()")
    command = [sys.executable, "-m", "lowmem.memory.watch", "--pid", str(process.pid), "--interval=0.02"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        record = json.loads(watcher.stdout.readline())
        arguments = Path(f"/proc/{watcher.pid}/cmdline").read_bytes().split(b"\0")
        end(process)
        assert watcher.wait(10) == 0
    assert arguments[1:4] == [b"-S", b"-I", watch.__file__.encode()]
    assert {"t_s", "host_bytes", "host_peak_bytes", "processes"} <= set(record)
    assert record["processes"] == 1
    assert 4 * MIB < record["host_bytes"] < 60 * MIB


@pytest.mark.parametrize("arguments", [[], ["--pid"], ["--pid", "x"], ["--pid", "1", "--often"], ["--pid", "1", "--interval", "soon"]])
def test_bad_usage_is_one_line(arguments, capsys):
    assert watch.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_an_ended_process_has_no_samples(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert start_time(process.pid) is None
    assert watch.main(["--pid", str(process.pid), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == ""


class FakeProc:
    """/proc with processes of given sizes: pid -> (resident, high water mark, shares of anonymous, shared and file pages)."""

    def __init__(self, monkeypatch, root: int):
        self.table: dict[int, tuple[int, int, int, int, int]] = {}
        self.files: dict[int, int] = {}
        monkeypatch.setattr(watch, "child_pids", lambda pid: sorted(set(self.table) - {root}) if pid == root else [])
        monkeypatch.setattr(watch, "start_time", lambda pid: 7 if pid in self.table else None)
        monkeypatch.setattr(watch, "status_bytes", self.status)
        monkeypatch.setattr(watch, "rollup_bytes", self.rollup)

    def status(self, pid):
        return {"VmRSS": self.table[pid][0], "VmHWM": self.table[pid][1], "RssFile": self.files.get(pid, 0)} if pid in self.table else None

    def rollup(self, pid):
        return dict(zip(("Pss_Anon", "Pss_Shmem", "Pss_File"), self.table[pid][2:], strict=True))


def test_a_mark_that_was_reset_and_grew_again_is_a_peak_and_an_old_one_is_not(monkeypatch):
    proc = FakeProc(monkeypatch, 1)
    tree_peaks = []
    proc.table[1] = (100, 900, 0, 0, 0)
    tree = TreeMemory(1)
    for mark in (900, 900, 300, 300, 950):
        proc.table[1] = (100, mark, 0, 0, 0)
        tree_peaks.append(tree.sample()["host_peak_bytes"])
    assert tree_peaks == [100, 100, 300, 100, 950]


def test_a_new_process_counts_from_its_second_sample_with_the_peak_it_has_had(monkeypatch):
    proc = FakeProc(monkeypatch, 1)
    proc.table[1] = (100, 100, 90, 0, 10)
    tree = TreeMemory(1)
    assert tree.sample() == {"host_bytes": 100, "host_peak_bytes": 100, "processes": 1}
    proc.table[2] = (50, 80, 40, 0, 10)
    assert tree.sample()["processes"] == 1
    assert tree.sample() == {"host_bytes": 150, "host_peak_bytes": 180, "processes": 2}
    del proc.table[2]
    assert tree.sample() == {"host_bytes": 100, "host_peak_bytes": 100, "processes": 1}
    del proc.table[1]
    assert tree.sample() is None
    assert not tree.alive()


def test_what_was_there_before_the_first_sample_counts_without_its_past(monkeypatch):
    proc = FakeProc(monkeypatch, 1)
    proc.table = {1: (100, 100, 90, 0, 10), 2: (50, 500, 40, 0, 10)}
    tree = TreeMemory(1)
    tree.sample()
    assert tree.sample() == {"host_bytes": 150, "host_peak_bytes": 150, "processes": 2}


def test_files_that_others_map_too_are_counted_whole_once(monkeypatch):
    proc = FakeProc(monkeypatch, 1)
    proc.files = {1: 60, 2: 60}
    proc.table = {1: (100, 100, 40, 0, 20), 2: (100, 100, 40, 0, 20)}  # a third process outside has the same 60 file pages
    tree = TreeMemory(1)
    tree.sample()
    assert tree.sample()["host_bytes"] == 40 + 40 + 60
