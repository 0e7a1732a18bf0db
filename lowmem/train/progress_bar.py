"""The display for terminals: one line with a bar, drawn by rich."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from lowmem.data.progress import DataProgress
from lowmem.train.progress import DRAW_INTERVAL_S, ProgressDisplay, StepRate, data_is_done, data_title, describe_data, describe_step


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
