"""The watcher of `watch.py`, started and stopped from Python.

    with Watcher(pid, "memory.jsonl") as watcher:
        ...
    watcher.peak_bytes()

Works on Linux; elsewhere the timeline stays empty.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem.memory import watch

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
