"""Peaks by phase: the largest visit counts, whatever it holds is its own, and the loop of a run marks its phases."""

import threading
import time
from pathlib import Path

import pytest

from lowmem.config.load import load_run_config
from lowmem.memory import host
from lowmem.memory.measure import PHASES, PeakRecorder, measure_peak
from lowmem.train.display import make_display
from lowmem.train.loop import train
from lowmem.train.setup import set_up
from tests.memory.fresh_process import TOLERANCE_MIB, linux_only, run_and_read_mib
from tests.train.tiny_run import tiny_arguments, write_text


@linux_only
@pytest.mark.memory
def test_the_largest_visit_counts_and_not_what_happened_outside():
    first, second = run_and_read_mib("""
        from lowmem.memory.measure import PeakRecorder
        phases = PeakRecorder()
        with measure_peak():
            start = host_rss_bytes()
            for mib in (50, 120, 80):
                with phases("first"):
                    block = bytearray(mib * MIB); del block
                block = bytearray(300 * MIB); del block
            with phases("second"):
                block = bytearray(20 * MIB); del block
        peaks = phases.as_dict()
        print(peaks["first"]["host_peak_bytes"] - start, peaks["second"]["host_peak_bytes"] - start)
    """)
    assert [first, second] == pytest.approx([120, 20], abs=TOLERANCE_MIB)


@linux_only
@pytest.mark.memory
def test_children_count_as_the_surrounding_measurement_saw_them():
    (added,) = run_and_read_mib("""
        from lowmem.memory.measure import PeakRecorder
        phases = PeakRecorder()
        with measure_peak():
            with phases("alone"): pass
            code = "block = bytearray(150 << 20); print(1, flush=True); input()"
            child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            child.stdout.readline()
            time.sleep(0.5)  # several samples
            with phases("together"): pass
            child.communicate(b"\\n")
        peaks = phases.as_dict()
        print(peaks["together"]["host_peak_bytes"] - peaks["alone"]["host_peak_bytes"])
    """)
    assert added == pytest.approx(150 + 8, abs=TOLERANCE_MIB)  # and the child's interpreter


def test_a_visit_that_ends_with_an_error_is_recorded():
    phases = PeakRecorder()
    with pytest.raises(RuntimeError), phases("evaluation"):
        raise RuntimeError
    assert phases.as_dict()["evaluation"]["host_peak_bytes"] > 2**20


def test_children_are_asked_by_a_visit_only_where_nobody_else_does(monkeypatch):
    asked = []

    def sample(self):
        if threading.current_thread() is threading.main_thread():  # the sampler asks on its own
            asked.append(1)
        return 0, 0

    monkeypatch.setattr(host.ChildMemory, "sample", sample)
    phases = PeakRecorder()
    with measure_peak():
        asked.clear()
        with phases("save"):
            pass
        assert not asked
    asked.clear()
    with phases("save"):
        pass
    assert len(asked) == 3  # twice at its start, once at its end


def test_a_visit_takes_well_under_a_millisecond():
    phases, times = PeakRecorder(), []
    with measure_peak():
        for _ in range(50):
            started = time.perf_counter()
            with phases("steady_steps"):
                pass
            times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 4] < 1e-3  # of a busy machine's times the quieter ones; 0.2 ms when it is idle


def test_a_run_marks_its_phases(tmp_path: Path):
    text = write_text(tmp_path / "text.txt")
    arguments = tiny_arguments(tmp_path / "run", text, train__steps=3, train__eval_every=3, train__save_every=3)
    run = set_up(load_run_config("", [argument.removeprefix("--") for argument in arguments]), make_display(quiet=True))
    train(run)
    assert run.run_dir is not None
    run.run_dir.close()
    assert list(run.peaks.as_dict()) == list(PHASES[1:])
