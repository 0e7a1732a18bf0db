"""The process that a command runs in: its standard streams, its child processes, and the signals that ask it to end."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from lowmem.system.errors import StorageError

SAME_WISH_S = 2.0  # a terminal's Ctrl-C reaches a launcher too, which passes it on: several signals for one wish
STOPPED = "stopped before a checkpoint was due; finished work on disk is kept"
_PR_SET_PDEATHSIG = 1  # prctl(2)
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # exit codes of a process that the system ended for want of memory
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number is not None]


class OutputLost(StorageError):
    """Standard output cannot be written."""


class _Stream:
    """A text stream with `write`, `writelines` and `flush` of its own; everything else is the stream's."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def write(self, text: str) -> int:
        raise NotImplementedError


class Errors(_Stream):
    """Standard error; what cannot be written is dropped."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


class Output(_Stream):
    """Standard output.

    Raises:
        BrokenPipeError: its reader has gone.
        OutputLost: every other reason why it cannot be written.
    """

    def write(self, text: str) -> int:
        with _output_errors():
            return int(self._stream.write(text) or 0)

    def flush(self) -> None:
        with _output_errors():
            self._stream.flush()


@contextmanager
def _output_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(f"standard output cannot be written: {error.strerror or error}; free space, or send it somewhere else") from error


@contextmanager
def standard_streams() -> Iterator[None]:
    """Output and Errors in place of sys.stdout and sys.stderr, also where the process was started without them."""
    before = sys.stdin, sys.stdout, sys.stderr
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Read only: what is written to a standard output that does not exist fails, as it should.
            _occupy(number, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115
    sys.stdout, sys.stderr = Output(sys.stdout), Errors(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _occupy(number: int, flags: int) -> None:
    """Open the null device under a number that is free, so that no other file gets it."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, flags)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def discard_output() -> None:
    """Send the rest of standard output nowhere: Python's own flush at exit must not complain once more."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Asked:
    """Which signal asked this process to end; `number` is 0 before."""

    def __init__(self) -> None:
        self.number = 0
        self._at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler: raises KeyboardInterrupt once. A later signal, not of the same wish, ends the process at once."""
        if not self.number:
            self.number, self._at = number, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._at >= SAME_WISH_S:
            self.leave()

    def leave(self) -> None:
        """End the process, with one line."""
        with suppress(OSError):
            os.write(2, f"lowmem: {STOPPED}\n".encode())
        os._exit(128 + self.number)


@contextmanager
def answered_signals(*, last: bool) -> Iterator[Asked]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, once, in the block; a SIGHUP that is ignored (nohup) stays so.

    Args:
        last: nothing but the end of the process follows: there SIGINT has nothing left to stop.
    """
    asked, before = Asked(), {}
    hook = sys.unraisablehook
    try:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                before[number] = signal.signal(number, asked)
    except ValueError:  # not the main thread, which alone answers signals
        before = {}

    def lost(unraisable: Any) -> None:  # raised where Python has no way to pass it on, such as in a destructor
        if asked.number and last and isinstance(unraisable.exc_value, KeyboardInterrupt):
            asked.leave()
        hook(unraisable)

    sys.unraisablehook = lost
    try:
        yield asked
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and number == signal.SIGINT else handler)


def with_parent(command: Sequence[str]) -> list[str]:
    """A command that gets SIGTERM when this process ends, however it ends; outside Linux the command itself.

    `python -m lowmem.system.process PID COMMAND...` arranges that and becomes the command.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-m", "lowmem.system.process", str(os.getpid()), *command]


def _become(words: list[str]) -> None:
    parent, command = int(words[0]), words[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(sys.argv[1:])


class StopRequest:
    """Remembers the first signal; use as a context manager around the loop.

    Attributes:
        exit_code: 0 until a signal came, then 128 and its number: 129, 130 or 143.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._asked_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup: a lost terminal is no wish
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            if time.monotonic() - self._asked_at < SAME_WISH_S:
                return
            before = self._previous[number]
            if callable(before):  # that of the command, which raises once and not again while it cleans up
                before(number, frame)
                return
            raise KeyboardInterrupt
        self._asked_at = time.monotonic()
        self.exit_code = 128 + number
