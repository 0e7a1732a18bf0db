"""Signals and standard streams: one line at most, the right exit code, work that goes on without an audience."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.cli.main import main, run_command
from lowmem.system.errors import StoppedBySignal
from lowmem.system.process import StopRequest
from tests.train.tiny_run import ROOT, tiny_arguments, write_text

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="/dev/full")


def sent(*numbers: int):
    """A command that gets signals while it works, and meets each of them as libraries do: as an error of their own."""

    def command(argv: object) -> int:
        for number in numbers:
            try:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            except KeyboardInterrupt as error:
                raise SystemError("import returned NULL without setting an exception") from error
        return 0

    return command


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["SIGINT", "SIGTERM", "SIGHUP"]
)
def test_a_signal_anywhere_is_one_line_and_its_exit_code(number, code, capsys):
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)  # whatever the tests were started under, such as nohup
    try:
        with contextlib.suppress(KeyboardInterrupt):
            assert run_command(sent(number), []) == code
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert signal.getsignal(number) == default
    finally:
        signal.signal(number, before)


def test_five_signals_in_a_row_are_one(capsys):
    cleaned_up = []

    def command(argv: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            for _ in range(4):  # while what was begun is cleaned up
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            cleaned_up.append(True)
        return 0

    assert run_command(command, []) == 130
    assert cleaned_up
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "stopped" in error


def test_sighup_asks_a_run_to_save():
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, lambda *_: None)  # else the default, which ends the process
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert stop.exit_code == 129
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_run_goes_on():
    """Not new: a signal that the caller had ignored stays ignored; SIGTERM is answered all the same."""
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert stop.exit_code == 0
            signal.signal(signal.SIGHUP, lambda *_: None)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert stop.exit_code == 129
    finally:
        signal.signal(signal.SIGHUP, before)


def test_generation_ended_by_sigterm_says_so(capsys):
    def command(argv: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt as error:
            raise StoppedBySignal("generation stopped", 130) from error
        return 0

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        assert run_command(command, []) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "lowmem: generation stopped\n"


class Broken(io.TextIOBase):
    """A stream whose file is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("words", ["--help", "--version", "pretrain --print_config", "finetune --print_config", "plan --help"])
def test_a_full_standard_output_is_one_line_and_7(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken())
    assert main(words.split()) == 7
    error = capsys.readouterr().err
    assert error.startswith("lowmem: error: standard output cannot be written: No space left on device")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("stream", [Broken(), None], ids=["full", "closed"])
def test_a_run_does_not_need_its_standard_error(stream, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stderr", stream)
    arguments = tiny_arguments(tmp_path / "run", write_text(tmp_path / "text.txt"), **{"train.steps": 2})
    assert main(["pretrain", *arguments]) == 0
    assert (tmp_path / "run" / "memory.json").exists()
    assert capsys.readouterr().out == ""
    assert sys.stderr is stream


@pytest.mark.slow
@needs_full
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "2>/dev/full >/dev/full", ">&- 2>&-", "| true"])
def test_streams_of_a_process(redirection):
    script = f"set -o pipefail; {sys.executable} -m lowmem pretrain --print_config {redirection}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    if redirection == "| true":
        assert (result.returncode, result.stderr) in ((141, ""), (0, ""))
    else:
        assert result.returncode == 7
        assert len(result.stderr.splitlines()) == (0 if "2>" in redirection else 1)


def imports_torch(pid: int) -> bool:
    """Whether a process has come as far as that: Python's own start is over, and lowmem's takes a second or two more."""
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
@pytest.mark.parametrize("delay_s", [0.0, 1.0, 6.0])
def test_five_interrupts_at_any_moment(tmp_path, delay_s):
    """Outside of the training itself, those that followed the first one ended the process by the signal, not with 130."""
    arguments = tiny_arguments(tmp_path / "run", write_text(tmp_path / "text.txt"), **{"train.steps": 100000, "train.save_every": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "lowmem", "pretrain", "--quiet", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not imports_torch(process.pid):
        time.sleep(0.01)
    time.sleep(delay_s)
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 130
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def gone(pid: int, within_s: float = 30.0) -> bool:
    end = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
@pytest.mark.parametrize(
    "start",
    [
        "from lowmem.planning import check; subprocess.run = Run; check.check_run(load_run_config('', [], check=False))",
        "from lowmem.memory.watched import Watcher; watcher = Watcher(1, sys.argv[1]); tell(watcher._process.pid)",
    ],
    ids=["prediction", "watcher"],
)
def test_a_killed_parent_leaves_no_child(start, tmp_path):
    code = f"""
import os, subprocess, sys, time
from lowmem.config.load import load_run_config
def tell(pid):
    print(pid, flush=True)
    time.sleep(600)
def Run(command, **_):  # the prediction's own process, which waits for its request
    tell(subprocess.Popen(command, stdin=int(sys.argv[2])).pid)
{start}
"""
    request, held = os.pipe()  # held open here: that the parent is gone does not end the request
    command = [sys.executable, "-c", code, str(tmp_path / "timeline"), str(request)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, pass_fds=[request]) as process:
            child = int(process.stdout.readline())
            time.sleep(1)
            process.kill()
        ended = gone(child)
        if not ended:
            os.kill(child, signal.SIGKILL)
        assert ended
    finally:
        os.close(request)
        os.close(held)
