"""Measured peaks against allocations of known size, each in a fresh process so that nothing else moves its memory."""

import subprocess
import sys
import types

import pytest

from lowmem.memory import host, measure
from tests.memory.fresh_process import TOLERANCE_MIB, linux_only, run_and_read_mib


@linux_only
@pytest.mark.memory
def test_a_short_allocation_is_seen_and_what_was_freed_before_is_not():
    (peak,) = run_and_read_mib("""
        before = bytearray(300 * MIB); del before
        start = host_rss_bytes()
        with measure_peak() as peak:
            block = bytearray(100 * MIB); del block
        after = bytearray(200 * MIB); del after
        print(peak.host_peak_bytes - start)
    """)
    assert peak == pytest.approx(100, abs=TOLERANCE_MIB)


@linux_only
@pytest.mark.memory
def test_the_peak_can_be_read_while_the_block_runs_and_is_final_after_it():
    early, late, final = run_and_read_mib("""
        start = host_rss_bytes()
        with measure_peak() as peak:
            block = bytearray(64 * MIB); del block
            early = peak.host_peak_bytes
            block = bytearray(128 * MIB); del block
            late = peak.host_peak_bytes
        final = peak.host_peak_bytes
        print(early - start, late - start, final - start)
    """)
    assert [early, late, final] == pytest.approx([64, 128, 128], abs=TOLERANCE_MIB)


@linux_only
@pytest.mark.memory
def test_nested_blocks_each_see_their_own_peak():
    outer, inner, lifetime = run_and_read_mib("""
        start = host_rss_bytes()
        with measure_peak() as outer:
            block = bytearray(200 * MIB); del block
            with measure_peak() as inner:
                block = bytearray(64 * MIB); del block
        print(outer.host_peak_bytes - start, inner.host_peak_bytes - start, host_peak_bytes() - start)
    """)
    assert [outer, inner, lifetime] == pytest.approx([200, 64, 200], abs=TOLERANCE_MIB)


@linux_only
@pytest.mark.memory
def test_a_child_counts_and_so_does_its_peak_between_samples():
    (added,) = run_and_read_mib("""
        child_code = "block = bytearray(200 << 20); del block; import time; time.sleep(1)"
        with measure_peak() as alone:
            idle = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"]); idle.wait()
        with measure_peak() as peak:
            child = subprocess.Popen([sys.executable, "-c", child_code]); child.wait()
        print(peak.host_peak_bytes - alone.host_peak_bytes)
    """)
    assert added == pytest.approx(200, abs=TOLERANCE_MIB)


@linux_only
@pytest.mark.memory
def test_starting_processes_does_not_count_the_parent_twice():
    (added,) = run_and_read_mib("""
        block = bytearray(256 * MIB)
        start = host_rss_bytes()
        with measure_peak() as peak:
            end = time.monotonic() + 2  # 20 samples, of which about every third falls between vfork and exec
            while time.monotonic() < end:
                subprocess.run(["true"])
        print(peak.host_peak_bytes - start)
    """)
    assert added == pytest.approx(0, abs=TOLERANCE_MIB)


@linux_only
@pytest.mark.memory
def test_peaks_of_parent_and_child_that_never_coincide_are_not_added():
    (peak,) = run_and_read_mib("""
        start = host_rss_bytes()
        with measure_peak() as peak:
            block = bytearray(200 * MIB); del block
            time.sleep(0.5)  # several samples, so that the two peaks lie in different intervals
            pid = os.fork()
            if pid == 0:
                block = bytearray(100 * MIB); time.sleep(0.7); os._exit(0)
            os.waitpid(pid, 0)
        print(peak.host_peak_bytes - start)
    """)
    assert peak == pytest.approx(200, abs=TOLERANCE_MIB)


@linux_only
@pytest.mark.memory
def test_pages_shared_after_fork_count_once():
    now, peak = run_and_read_mib("""
        start = host_rss_bytes()
        shared = bytearray(256 * MIB)
        with measure_peak() as peak:
            pid = os.fork()
            if pid == 0:
                own = bytearray(64 * MIB); time.sleep(1.5); os._exit(0)
            time.sleep(0.7)
            now = host_rss_bytes()
            os.waitpid(pid, 0)
        print(now - start, peak.host_peak_bytes - start)
    """)
    assert [now, peak] == pytest.approx([320, 320], abs=TOLERANCE_MIB)


def test_without_reset_a_new_record_is_exact_and_a_lower_peak_is_sampled(monkeypatch):
    readings = iter([(10, 50), (10, 50), (12, 50), (12, 70), (12, 70)])
    monkeypatch.setattr(host, "own_memory", lambda: next(readings))
    monkeypatch.setattr(host, "reset_high_water_mark", lambda: False)
    monkeypatch.setattr(host.ChildMemory, "sample", lambda self: (0, 0))
    monkeypatch.setattr(host.threading, "Thread", lambda **arguments: types.SimpleNamespace(start=lambda: None))
    meter = host.HostMeter()
    peak = meter.start()
    assert not peak.exact
    assert peak.peak_bytes == 10  # 50 happened before the block
    meter.sample()
    assert peak.peak_bytes == 12
    meter.sample()
    assert peak.peak_bytes == 70  # the record grew inside the block
    meter.stop(peak)


def test_without_proc_psutil_answers(monkeypatch):
    monkeypatch.setattr(host, "status_bytes", lambda pid="self": None)
    monkeypatch.setattr(host, "child_pids", lambda: None)
    resident, high_water = host.own_memory()
    assert 0 < resident <= high_water + TOLERANCE_MIB * 2**20
    others = host.ChildMemory().sample()[0]  # an idle helper process of another test's library may still be there
    with subprocess.Popen([sys.executable, "-c", "input('ready')"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.read(5) == b"ready"  # before that it may not have grown yet
        assert host.ChildMemory().sample()[0] > others + 2**20
        child.communicate(b"\n")
    after, peaks = host.ChildMemory().sample()
    assert abs(after - others) < 2**20
    assert peaks == 0


def test_without_cuda_its_numbers_are_zero():
    with measure.measure_peak() as peak:
        pass
    assert peak.peaks() == {"host_peak_bytes": peak.host_peak_bytes, "cuda_allocated_peak_bytes": 0, "cuda_reserved_peak_bytes": 0}
    assert set(peak.as_dict()) - {"cgroup_peak_bytes"} == {*peak.peaks(), "host_peak_exact"}
    assert measure.cuda_allocated_bytes() == measure.cuda_reserved_bytes() == 0
    assert peak.host_peak_bytes > 2**20


class FakeCuda:
    """An allocator with the peak statistics of torch.cuda, on two devices."""

    def __init__(self):
        self.now, self.peak = [0, 0], [0, 0]
        self.retries = 0

    def allocate(self, device: int, size: int) -> None:
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])

    def is_initialized(self):
        return True

    def device_count(self):
        return 2

    def memory_allocated(self, index):
        return self.now[index]

    def memory_reserved(self, index):
        return 2 * self.now[index]

    def memory_stats(self, index):
        peak = self.peak[index]
        return {"allocated_bytes.all.peak": peak, "reserved_bytes.all.peak": 2 * peak, "num_alloc_retries": self.retries * (index == 0)}

    def host_memory_stats(self):
        return {"allocated_bytes.peak": 4096}

    def reset_peak_memory_stats(self, index):
        self.peak[index] = self.now[index]


def test_cuda_peaks_of_nested_blocks(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    cuda.allocate(0, 1000), cuda.allocate(0, -900)
    with measure.measure_peak() as outer:
        cuda.allocate(0, 400), cuda.allocate(0, -400)
        with measure.measure_peak() as inner:
            cuda.allocate(0, 50), cuda.allocate(1, 7), cuda.allocate(0, -50)
        assert measure.cuda_allocated_bytes() == 100 + 7
    assert (inner.cuda_allocated_peak_bytes, inner.cuda_reserved_peak_bytes) == (157, 314)
    assert (outer.cuda_allocated_peak_bytes, outer.cuda_reserved_peak_bytes) == (500, 1000)


def test_other_cuda_numbers_are_their_own_keys_and_retries_those_of_the_block(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(measure, "process_bytes", lambda: 1500)
    monkeypatch.setattr(measure, "cgroup_bytes", lambda name: {"memory.peak": 77}[name])
    cuda.retries = 5
    cuda.allocate(1, 500)
    with measure.measure_peak() as peak:
        cuda.retries = 7
        assert peak.as_dict()["cuda_alloc_retries"] == 2
    cuda.retries = 9
    found = peak.as_dict()
    expected = {
        "cuda_alloc_retries": 2, "nvml_process_bytes": 1500, "cuda_context_bytes": 500, "pinned_host_peak_bytes": 4096,
        "cgroup_peak_bytes": 77, "cuda_allocated_peak_bytes": 500, "cuda_reserved_peak_bytes": 1000,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    monkeypatch.setattr(measure, "process_bytes", lambda: None)  # a driver that does not tell
    assert not {"nvml_process_bytes", "cuda_context_bytes"} & set(peak.as_dict())


def test_legs_of_a_run_are_combined():
    before = {"host_peak_bytes": 9, "cuda_reserved_peak_bytes": 1, "host_peak_exact": True, "cuda_alloc_retries": 2, "cgroup_peak_bytes": 4}
    now = {"host_peak_bytes": 7, "cuda_reserved_peak_bytes": 3, "host_peak_exact": False, "cuda_alloc_retries": 1}
    expected = {
        "host_peak_bytes": 9,
        "cuda_reserved_peak_bytes": 3,
        "host_peak_exact": False,
        "cuda_alloc_retries": 3,
        "cgroup_peak_bytes": 4,
    }
    assert measure.combine_peaks(now, before) == expected
    assert measure.combine_peaks(now, {}) == now


def test_measuring_imports_no_torch():
    code = "import sys, lowmem.memory.measure as m\nwith m.measure_peak(): pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
