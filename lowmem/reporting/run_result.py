"""What a finished run left in its run directory, and when its steps happened."""

import json
import statistics
from pathlib import Path
from typing import Any


class MetricsTail:
    """Follows metrics.jsonl while a run writes it, and remembers when each line came."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0
        self.lines: list[tuple[float, dict[str, Any]]] = []

    def poll(self, t_s: float) -> None:
        """Take the lines that are new at `t_s`; a line that is still being written waits."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:  # not there yet
            return
        for line in text.splitlines(keepends=True):
            if line.endswith(b"\n"):
                self._offset += len(line)
                self.lines.append((t_s, json.loads(line)))

    def step_times(self) -> list[tuple[float, float]]:
        """(begin, end) of each step; lines that came together are told apart by the durations in them."""
        steps, limit = [], float("inf")
        for came, record in reversed(self.lines):
            if "step_time_s" in record:
                end = min(came, limit)
                limit = max(0.0, end - record["step_time_s"])
                steps.append((limit, end))
        return steps[::-1]

    def spans(self, end_s: float) -> list[dict[str, Any]]:
        """The phases of the run in order, each {phase, from_s, to_s}, without gaps from 0 to its end at `end_s`.

        What comes after a step and before its evaluation is written is evaluation; whatever follows the last line is the save.
        """
        steps = iter(self.step_times())
        marks: list[tuple[str, float]] = []  # phases, each with its end
        for came, record in self.lines:
            if "step_time_s" in record:
                begin, end = next(steps)
                if not marks:
                    marks.append(("load", begin))
                marks.append(("steady_steps" if len(marks) > 1 else "first_step", end))
            elif "val_loss" in record:
                marks.append(("evaluation", came))
        marks.append(("save" if marks else "load", end_s))
        spans: list[dict[str, Any]] = []
        at = 0.0
        for phase, end in marks:
            begin, at = at, max(at, round(end, 3))
            if spans and spans[-1]["phase"] == phase:
                spans[-1]["to_s"] = at
            else:
                spans.append({"phase": phase, "from_s": begin, "to_s": at})
        return spans

    def tokens_per_s(self) -> float | None:
        """Median over the steps after the first; None if there is none."""
        speeds = [record["tokens_per_s"] for _, record in self.lines if "tokens_per_s" in record]
        return round(statistics.median(speeds[1:]), 2) if len(speeds) > 1 else None


def prediction(predicted: dict[str, Any] | None) -> dict[str, Any] | None:
    """A prediction of the peak, or None where only its parts are known."""
    return predicted if predicted and predicted.get("host_peak_bytes") else None


def last_words(stderr: str) -> str:
    """The last line of a failed command that says anything, without the program's name, at most 300 characters."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if line.startswith("lowmem: ")), lines[-1] if lines else "")
    return found.removeprefix("lowmem: ").removeprefix("error: ")[:300]
