import io
import subprocess
import sys

import pytest
from rich.console import Console

from lowmem.data.text_source import DataProgress
from lowmem.train.display import (
    BarDisplay,
    NullDisplay,
    PlainDisplay,
    StepRate,
    describe_data,
    describe_step,
    is_capable_terminal,
    make_display,
)

METRICS = {
    "step": 7, "tokens": 7000, "loss": 3.14159, "lr": 1e-3, "grad_norm": 0.5, "seq_len": 10, "micro_batch_size": 2,
    "step_time_s": 2.0, "tokens_per_s": 12345.6, "host_peak_bytes": 3 * 2**30 // 2, "cuda_allocated_bytes": 0,
}  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def metrics(step: int, **changes) -> dict:
    return {**METRICS, "step": step, **changes}


def plain(clock=None) -> tuple[PlainDisplay, io.StringIO]:
    stream = io.StringIO()
    return PlainDisplay(stream, interval_s=10, clock=clock or Clock()), stream


def bar(clock) -> tuple[BarDisplay, Terminal]:
    stream = Terminal()
    return BarDisplay(stream, clock, Console(file=stream, force_terminal=True, width=120, color_system=None)), stream


def test_a_step_in_one_line():
    assert describe_step(METRICS, 3.5, 3725) == "loss 3.1416  val 3.5000  lr 1.00e-03  12.35k tok/s  ram 1.50 GiB  eta 1:02:05"


def test_what_is_unknown_is_left_out_and_trouble_is_named():
    assert describe_step({"step": 1, "loss": 2.0}, None, None) == "loss 2.0000"
    assert describe_step({"step": 1, "loss": None, "skipped": "nonfinite"}, None, None) == "loss not finite  skipped (nonfinite)"
    assert "vram 2.00 GiB" in describe_step(metrics(1, cuda_allocated_bytes=2**31), None, None)


def test_time_left_follows_recent_steps_and_survives_a_resume():
    rate = StepRate(total_steps=100, start_step=90)
    assert rate.remaining_s() is None
    rate.update({"step": 91, "step_time_s": 10.0})
    assert rate.remaining_s() == 90.0
    rate.update({"step": 92, "step_time_s": 20.0})
    assert rate.remaining_s() == pytest.approx(8 * 11.0)  # 0.9 * 10 + 0.1 * 20


def test_plain_lines_come_at_the_ends_at_evaluations_and_every_ten_seconds():
    clock = Clock()
    display, stream = plain(clock)
    display.start(100, 0)
    for step in range(1, 101):
        clock.now += 1.0
        display.on_step(metrics(step))
        if step == 50:
            display.on_eval(step, 2.5)
    display.close()
    steps = [line.split()[1].split("/")[0] for line in stream.getvalue().splitlines()]
    # after the evaluation's line the next ten seconds begin anew
    assert steps == ["1", "11", "21", "31", "41", "50", "60", "70", "80", "90", "100"]
    assert "step 50/100  val loss 2.5000" in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().isascii()


def test_plain_lines_about_data():
    clock = Clock()
    display, stream = plain(clock)
    for megabytes in range(101):
        clock.now += 0.5
        display(DataProgress("tokens", "a.txt", megabytes * 10**6, 10**8, megabytes * 250_000))
    display(DataProgress("check", "a.txt"))
    display(DataProgress("warning", "a.txt", message="3 bytes were no UTF-8"))
    lines = stream.getvalue().splitlines()
    # begins at 0.5 s, then at 10.5, 20.5, ... 50.5 s, the last of which is also the end
    assert len(lines) == 6 + 2
    assert lines[0] == "tokenising a.txt: 0 B of 95 MiB (0%)"
    assert lines[5] == "tokenising a.txt: 95 MiB of 95 MiB (100%), 25.00M tokens"
    assert lines[6:] == ["checking a.txt: 0 B", "warning: 3 bytes were no UTF-8"]


def test_data_of_unknown_size_and_waiting():
    assert describe_data(DataProgress("tokens", "hub", 3 * 2**20, None, 1500)) == "3 MiB, 1.50k tokens"
    assert describe_data(DataProgress("waiting", "x", message="process 12 writes it")) == "process 12 writes it"


def test_the_bar_draws_at_most_ten_times_a_second_and_shows_the_last_step():
    clock = Clock()
    display, stream = bar(clock)
    display.start(1000, 0)
    drawn = 0
    for step in range(1, 1001):
        clock.now += 0.01
        before = stream.tell()
        display.on_step(metrics(step))
        drawn += stream.tell() > before
    display.close()
    # 10 s at ten a second, the first, and the last
    assert 90 <= drawn <= 102
    assert "step 1000/1000  loss 3.1416" in stream.getvalue()


def test_the_bar_keeps_messages_evaluations_and_data():
    display, stream = bar(Clock())
    display(DataProgress("tokens", "[b]a.txt", 10, 10, 5))
    display.start(10, 4)
    display.message("kept [as it is]")
    display.on_eval(5, 2.25)
    display.close()
    display.close()
    text = stream.getvalue()
    for expected in ("tokenising [b]a.txt  10 B of 10 B (100%), 5 tokens", "step 4/10", "kept [as it is]", "step 5  val loss 2.2500"):
        assert expected in text
    display.message("after the end")
    assert text + "after the end\n" == stream.getvalue()


def test_no_thread_redraws_in_the_background():
    import threading

    before = threading.active_count()
    display, _ = bar(Clock())
    display.start(10, 0)
    assert threading.active_count() == before
    display.close()


def test_the_right_display_for_a_stream(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(make_display(Terminal()), BarDisplay)
    assert isinstance(make_display(io.StringIO()), PlainDisplay)
    assert isinstance(make_display(Terminal(), quiet=True), NullDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert not is_capable_terminal(Terminal())
    assert isinstance(make_display(Terminal()), PlainDisplay)


def test_progress_goes_to_stderr_only():
    code = (
        "from lowmem.train.display import make_display\n"
        "d = make_display(); d.start(2, 0); d.on_step({'step': 2, 'loss': 1.0}); d.message('hello'); d.close()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == ""
    assert result.stderr == "step 2/2  loss 1.0000\nhello\n"


def test_the_quiet_display_says_nothing(capfd):
    display = make_display(quiet=True)
    display.start(3, 0)
    display.on_step(METRICS)
    display.on_eval(1, 1.0)
    display(DataProgress("warning", "x", message="unheard"))
    display.close()
    assert capfd.readouterr() == ("", "")
