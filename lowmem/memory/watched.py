"""Runs a command in a process group of its own, watched by `watch.py`, and passes signals on to it."""

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

from lowmem.memory.host import own_memory
from lowmem.memory.watch import INTERVAL_S
from lowmem.memory.watcher import Watcher, read_timeline

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
