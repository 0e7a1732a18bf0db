"""A command that runs while a process of its own watches its memory."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.memory import watch
from lowmem.memory.host import own_memory
from lowmem.memory.watch import INTERVAL_S

_STOP_S = 5.0


class Watcher:
    """A process that writes the memory of another process's tree to a file while it runs.

    Args:
        pid: whom to watch; None to start first and say it with `follow`, so that nothing of the process is missed.
        path: JSON lines, overwritten.
        interval_s: seconds between samples; more where samples are expensive.
        nvml: sample device memory too.
    Memory: a process of 9 MiB, which is a child of this one.
    """

    def __init__(self, pid: int | None, path: str | Path, *, interval_s: float = watch.INTERVAL_S, nvml: bool = False):
        self.path = Path(path)
        self.path.write_text("")
        isolated = ["-I"] if nvml else ["-S", "-I"]
        arguments = [f"--pid={'-' if pid is None else pid}", f"--interval={interval_s}", f"--out={self.path}", f"--parent={os.getpid()}"]
        arguments += ["--nvml"] * nvml
        self._process = subprocess.Popen(
            [sys.executable, *isolated, watch.__file__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        self.began = time.monotonic()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def follow(self, pid: int) -> None:
        """Begin to watch `pid`; `began` is the clock of the samples from here on."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it could not start: the timeline stays empty
            self._process.stdin.write(f"{pid}\n")
            self._process.stdin.flush()
        self.began = time.monotonic()

    def stop(self) -> None:
        """End the watcher; the file keeps what it wrote."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def timeline(self) -> list[dict[str, Any]]:
        """The samples so far; a line that is still being written is left out."""
        return read_timeline(self.path)

    def peak_bytes(self) -> int:
        """The most resident at once so far; 0 before the first sample."""
        return max((sample["host_peak_bytes"] for sample in self.timeline()), default=0)


def read_timeline(path: str | Path) -> list[dict[str, Any]]:
    """Samples of a watcher's file."""
    lines = Path(path).read_text(encoding="ascii").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


POLL_S = 0.02
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class WatchedRun:
    """What became of a command.

    Attributes:
        exit_code: as a shell reports it, 128 + n after signal n.
        duration_s: from its start to its end.
        host_peak_bytes: most resident at once in the tree, as far as the samples and the kernel's account of its processes tell.
        timeline: the samples; t_s counts from its start.
        forwarded: the last signal passed on to it, 0 if none.
    """

    exit_code: int
    duration_s: float
    host_peak_bytes: int
    timeline: list[dict[str, Any]]
    forwarded: int


def run_watched(
    command: Sequence[str],
    *,
    interval_s: float = INTERVAL_S,
    nvml: bool = False,
    on_poll: Callable[[float], None] = lambda t_s: None,
    **streams: Any,
) -> WatchedRun:
    """Run `command` to its end.

    Args:
        interval_s, nvml: of the watcher.
        on_poll: called every 20 ms with the seconds since the start, and once after the end.
        streams: stdin, stdout, stderr and env as `subprocess.Popen` takes them.
    Raises:
        OSError: the command cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="lowmem-watch-") as folder, _forwarding() as forward:
        path = Path(folder) / "timeline.jsonl"
        with Watcher(None, path, interval_s=interval_s, nvml=nvml) as watcher:
            own_peak = own_memory()[1]
            # its own session, so that Ctrl-C reaches it through us, once, and reading from the terminal does not stop it
            process = subprocess.Popen(list(command), start_new_session=True, **streams)
            try:
                watcher.follow(process.pid)
                forward.to(process.pid)
                pid = 0
                while not pid:
                    time.sleep(POLL_S)
                    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                    duration = time.monotonic() - watcher.began
                    on_poll(duration)
            except BaseException:  # nobody would watch it any more, and nobody would wait for it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        code = process.returncode = os.waitstatus_to_exitcode(status)
        timeline = read_timeline(path)
    peak = max((sample["host_peak_bytes"] for sample in timeline), default=0)
    largest = usage.ru_maxrss * _MAXRSS_UNIT  # of one process of the tree, however short it lived
    if largest > own_peak:  # below that it may be ours: the kernel counts what a process was before exec
        peak = max(peak, largest)
    return WatchedRun(code if code >= 0 else 128 - code, duration, peak, timeline, forward.number)


class _Forward:
    """Passes signals on to a process group; keeps one that comes before there is a group."""

    def __init__(self) -> None:
        self.number = 0
        self._group = 0

    def __call__(self, number: int, frame: object) -> None:
        self.number = number
        if self._group:
            self._send()

    def to(self, group: int) -> None:
        self._group = group
        if self.number:
            self._send()

    def _send(self) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(self._group, self.number)


@contextmanager
def _forwarding() -> Iterator[_Forward]:
    """While it lasts signals are for the command; only the main thread can arrange that."""
    forward, before = _Forward(), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield forward
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
