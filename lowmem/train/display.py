"""What a person sees while lowmem works: a bar on a terminal, plain lines elsewhere. Goes to stderr; stdout is for results.

Nothing refreshes in the background: the display draws only when it is told something, at most ten times a second, so that
it takes no time from training on a machine with two cores.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from lowmem.data.text_source import DataProgress
from lowmem.system.units import format_bytes, format_count, format_seconds

DRAW_INTERVAL_S = 0.1
LINE_INTERVAL_S = 10.0
_STAGE_TITLES = {
    "tokenizer": "training the tokenizer on",
    "tokens": "tokenising",
    "check": "checking",
    "waiting": "waiting for another process to tokenise",
}
_RATE_MEMORY = 0.9  # share of the old average that a new step time leaves: about the last ten steps count


class ProgressDisplay(ABC):
    """Shows a run; every method is cheap enough to be called at every step.

    A display is itself a `lowmem.data.text_source.ProgressCallback`. `close` may be called more than once.
    """

    def __call__(self, report: DataProgress) -> None:
        """The preparation of data advanced, or has a warning."""
        if report.stage == "warning":
            self.message(f"warning: {report.message}")
        else:
            self.on_data(report)

    @abstractmethod
    def start(self, total_steps: int, start_step: int) -> None:
        """A run begins, or goes on, at `start_step` finished steps."""

    @abstractmethod
    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """A step is done.

        Args:
            metrics: a line of metrics.jsonl; missing or null values are left out of what is shown.
        """

    @abstractmethod
    def on_eval(self, step: int, val_loss: float) -> None:
        """An evaluation after `step` steps gave `val_loss`, in nats per token."""

    @abstractmethod
    def on_data(self, report: DataProgress) -> None:
        """The preparation of data advanced."""

    @abstractmethod
    def message(self, text: str) -> None:
        """A line that stays."""

    @abstractmethod
    def close(self) -> None:
        """Leave the terminal as it was; the last state stays visible."""


class NullDisplay(ProgressDisplay):
    """Shows nothing: for --quiet and for every rank but the first."""

    def start(self, total_steps: int, start_step: int) -> None: ...

    def on_step(self, metrics: Mapping[str, Any]) -> None: ...

    def on_eval(self, step: int, val_loss: float) -> None: ...

    def on_data(self, report: DataProgress) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class StepRate:
    """Time left in a run, from a running average of the last step times, so that pauses and resumes do not distort it."""

    def __init__(self, total_steps: int, start_step: int):
        self.total_steps = total_steps
        self.step = start_step
        self._mean_s: float | None = None

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Take the step count and `step_time_s` of a line of metrics."""
        self.step = metrics.get("step", self.step + 1)
        seconds = metrics.get("step_time_s")
        if seconds is not None:
            self._mean_s = seconds if self._mean_s is None else _RATE_MEMORY * self._mean_s + (1 - _RATE_MEMORY) * seconds

    def remaining_s(self) -> float | None:
        """Seconds until the last step; None before the first."""
        return None if self._mean_s is None else self._mean_s * max(0, self.total_steps - self.step)


def describe_step(metrics: Mapping[str, Any], val_loss: float | None, remaining_s: float | None) -> str:
    """One line for people: loss, validation loss, learning rate, speed, memory, time left; what is unknown is left out."""
    shown: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("loss", metrics.get("loss"), lambda value: f"{value:.4f}"),
        ("val", val_loss, lambda value: f"{value:.4f}"),
        ("lr", metrics.get("lr"), lambda value: f"{value:.2e}"),
        ("", metrics.get("tokens_per_s"), lambda value: f"{format_count(value)} tok/s"),
        ("ram", metrics.get("host_peak_bytes"), format_bytes),
        ("vram", metrics.get("cuda_allocated_peak_bytes") or metrics.get("cuda_allocated_bytes") or None, format_bytes),
        ("eta", remaining_s, format_seconds),
    ]
    parts = [f"{name} {text(value)}".strip() for name, value, text in shown if value is not None]
    if "loss" in metrics and metrics["loss"] is None:
        parts.insert(0, "loss not finite")
    if metrics.get("skipped"):
        parts.append(f"skipped ({metrics['skipped']})")
    return "  ".join(parts)


def data_title(report: DataProgress) -> str:
    """What is being prepared, for people; the same as long as it is the same piece of work."""
    return f"{_STAGE_TITLES.get(report.stage, report.stage)} {report.source}".rstrip()


def describe_data(report: DataProgress) -> str:
    """How far it is, for people: "1.20 GiB of 3.00 GiB (40%), 310.00M tokens"."""
    if report.stage == "waiting":
        return report.message
    total = report.bytes_total
    text = format_bytes(report.bytes_done)
    if total:
        text += f" of {format_bytes(total)} ({100 * min(report.bytes_done, total) // total}%)"
    if report.tokens:
        text += f", {format_count(report.tokens)} tokens"
    return text + (f"; {report.message}" if report.message else "")


def data_is_done(report: DataProgress) -> bool:
    """Whether this is the last report of its piece of work, as far as can be known."""
    return report.bytes_total is not None and report.bytes_done >= report.bytes_total


class PlainDisplay(ProgressDisplay):
    """Lines for logs, without control characters: the first and last step, evaluations, and otherwise one every ten seconds.

    Args:
        stream: where lines go.
        interval_s: least seconds between two lines about steps or about the same work.
        clock: seconds, monotonic; tests replace it.
    """

    def __init__(self, stream: TextIO, interval_s: float = LINE_INTERVAL_S, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._last_line = -float("inf")
        self._rate = StepRate(0, 0)
        self._val_loss: float | None = None
        self._data_shown = ("", False)

    def start(self, total_steps: int, start_step: int) -> None:
        self._rate = StepRate(total_steps, start_step)
        self._last_line = -float("inf")

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self._rate.update(metrics)
        if self._due() or self._rate.step >= self._rate.total_steps:
            text = describe_step(metrics, self._val_loss, self._rate.remaining_s())
            self._write(f"step {self._rate.step}/{self._rate.total_steps}  {text}")

    def on_eval(self, step: int, val_loss: float) -> None:
        self._val_loss = val_loss
        self._write(f"step {step}/{self._rate.total_steps}  val loss {val_loss:.4f}")

    def on_data(self, report: DataProgress) -> None:
        title, done = data_title(report), data_is_done(report)
        shown_title, shown_done = self._data_shown
        if title != shown_title or (done and not shown_done) or self._due():
            self._data_shown = (title, done)
            self._write(": ".join(filter(None, (title, describe_data(report)))))

    def message(self, text: str) -> None:
        self._write(text, counts=False)

    def close(self) -> None:
        self._stream.flush()

    def _due(self) -> bool:
        return self._clock() - self._last_line >= self._interval_s

    def _write(self, text: str, counts: bool = True) -> None:
        if counts:
            self._last_line = self._clock()
        self._stream.write(text + "\n")
        self._stream.flush()


def make_display(stream: TextIO | None = None, quiet: bool = False) -> ProgressDisplay:
    """The display that suits `stream`: a bar on a terminal, else plain lines.

    Args:
        stream: stderr if None.
        quiet: show nothing; for --quiet and for every rank but the first.
    """
    if quiet:
        return NullDisplay()
    stream = sys.stderr if stream is None else stream
    return BarDisplay(stream) if is_capable_terminal(stream) else PlainDisplay(stream)


def is_capable_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can redraw a line."""
    console = Console(file=stream)
    return console.is_terminal and not console.is_dumb_terminal


class BarDisplay(ProgressDisplay):
    """A bar with the figures of the last step; messages and evaluations scroll above it.

    Args:
        stream: a terminal.
        clock: seconds, monotonic; tests replace it.
        console: instead of one on `stream`; tests replace it.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, console: Console | None = None):
        self._console = console or Console(file=stream)
        self._clock = clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._last_draw = -float("inf")
        self._rate = StepRate(0, 0)
        self._val_loss: float | None = None

    def start(self, total_steps: int, start_step: int) -> None:
        self._rate = StepRate(total_steps, start_step)
        self._begin("training", total_steps)
        self._draw(start_step, f"step {start_step}/{total_steps}")

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self._rate.update(metrics)
        last = self._rate.step >= self._rate.total_steps
        if last or self._due():
            text = describe_step(metrics, self._val_loss, self._rate.remaining_s())
            self._draw(self._rate.step, f"step {self._rate.step}/{self._rate.total_steps}  {text}")

    def on_eval(self, step: int, val_loss: float) -> None:
        self._val_loss = val_loss
        self.message(f"step {step}  val loss {val_loss:.4f}")

    def on_data(self, report: DataProgress) -> None:
        title = data_title(report)
        begins = title != self._what
        if begins:
            self._begin(title, report.bytes_total)
        if self._progress is not None and self._task is not None and (begins or data_is_done(report) or self._due()):
            self._progress.update(self._task, total=report.bytes_total)
            self._draw(report.bytes_done, f"{title}  {describe_data(report)}")

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()
        self._progress, self._task, self._what = None, None, ""

    def _begin(self, what: str, total: int | None) -> None:
        """A new line with a bar; the finished one before it stays."""
        self.close()
        self._what = what
        # auto_refresh would be a thread that redraws all the time; stdout stays untouched for results.
        self._progress = Progress(
            BarColumn(bar_width=20, table_column=Column(min_width=10)),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(what, total=total)
        self._progress.start()

    def _due(self) -> bool:
        return self._clock() - self._last_draw >= DRAW_INTERVAL_S

    def _draw(self, done: int, text: str) -> None:
        if self._progress is None or self._task is None:
            return
        self._last_draw = self._clock()
        self._progress.update(self._task, completed=done, description=text)
        self._progress.refresh()
