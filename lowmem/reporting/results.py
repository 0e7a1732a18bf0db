"""What was run and measured, as values to show."""

import json
import platform
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

_PATH = re.compile(r"(?:(?<=^)|(?<=[\s=:'\"({\[,]))(?:/[^/\s,:;'\"(){}\[\]]+)+/(?=[^/\s]|$|\s)")


def describe() -> dict[str, Any]:
    """Date, processor, memory, devices and versions, asked of `lowmem doctor` in a process of its own: it has to load PyTorch."""
    command = [sys.executable, "-m", "lowmem", "doctor", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(answer.stdout)
    except ValueError:  # the figures are worth having without it
        report = {}
    facts = {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(report.get("cpu", {})),
        "memory_bytes": report.get("memory", {}).get("ram_total_bytes"),
        "devices": [f"{device['name']}, {device['total_bytes'] / 2**30:.0f} GiB" for device in report.get("cuda", {}).get("devices", [])],
        "python": platform.python_version(),
        "versions": {row["name"]: row["version"] for row in report.get("libraries", []) if row.get("version")},
    }
    return {name: value for name, value in facts.items() if value}


def _processor(cpu: dict[str, Any]) -> str:
    if "model" not in cpu:
        return ""
    return f"{cpu['model']}, {cpu['usable_cores']} usable cores, {', '.join(cpu['instructions']) or 'no vector instructions known'}"


def without_folders(text: str) -> str:
    """Absolute paths in a text, shortened to their last part."""
    return _PATH.sub(".../", text)


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


PARTS = ("base", "weights", "gradients", "optimizer_states", "activations", "logits", "workspace", "data")
REST = "everything else"
_KNOWN = ("weights", "gradients", "optimizer_states")  # what an engine counts in a run


@dataclass(frozen=True)
class PeakRow:
    """One pair of bars. None stands for what is not known.

    Attributes:
        name: of the configuration.
        place: "RAM" or "GPU memory".
        predicted_parts, measured_parts: bytes by component, in the order of the bar; they add up to the peak, or are empty.
        failure: what went wrong, empty for a run that ended well.
    """

    name: str
    place: str
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    predicted_parts: dict[str, int] = field(default_factory=dict)
    measured_parts: dict[str, int] = field(default_factory=dict)
    tokens_per_s: float | None = None
    failure: str = ""

    @property
    def difference_percent(self) -> float | None:
        """How far the prediction lies above the measurement, in per cent of the measurement."""
        if not self.predicted_bytes or not self.measured_bytes:
            return None
        return 100 * (self.predicted_bytes / self.measured_bytes - 1)


def peak_rows(results: list[dict[str, Any]]) -> list[PeakRow]:
    """Rows of all results: RAM always, GPU memory where a run used or was predicted to use it."""
    return [row for result in results for row in _rows_of(result)]


def _rows_of(result: dict[str, Any]) -> list[PeakRow]:
    predicted, measured = result.get("predicted") or {}, result.get("measured") or {}
    cuda = any((peaks.get("cuda_reserved_peak_bytes") or 0) > 0 for peaks in (predicted, measured))
    places = [("RAM", "host_peak_bytes", "ram_bytes")] + [("GPU memory", "cuda_reserved_peak_bytes", "vram_bytes")] * cuda
    home = _home_of(predicted, [key for _, key, _ in places])
    budget = result.get("budget") or {}
    rows = []
    for place, key, limit in places:
        expected = predicted.get(key)
        parts = predicted.get("components", {}) if expected and key == home else {}
        found = measured.get(key)
        counted = measured.get("components", {}) if found and (key == home or not predicted) and not (cuda and place == "RAM") else {}
        rows.append(
            PeakRow(
                result["name"], place, budget.get(limit) or None, expected, found, _predicted_parts(parts, expected or 0),
                _measured_parts(counted, parts, found or 0), result.get("tokens_per_s"), _failure(result),
            )
        )  # fmt: skip
    return rows


def _home_of(predicted: dict[str, Any], keys: list[str]) -> str:
    """Which peak the predicted components add up to."""
    total = sum(predicted.get("components", {}).values())
    known = [key for key in keys if predicted.get(key)]
    return min(known, key=lambda key: abs(predicted[key] - total), default=keys[-1])


def _predicted_parts(components: dict[str, int], peak: int) -> dict[str, int]:
    """In the order of PARTS, unknown names after them; what does not add up to the peak is shown as the rest."""
    return _fill({name: components[name] for name in sorted(components, key=_rank)}, peak) if components else {}


def _measured_parts(counted: dict[str, int], predicted: dict[str, int], peak: int) -> dict[str, int]:
    """What the engine counted; below it the base as far as it is predicted; the rest of the peak as one."""
    known = {name: counted[name] for name in _KNOWN if counted.get(name)}
    if not known:
        return {REST: peak} if peak else {}
    base = predicted.get("base", 0)
    return _fill(({"base": base} if base and base + sum(known.values()) <= peak else {}) | known, peak)


def _fill(parts: dict[str, int], peak: int) -> dict[str, int]:
    """The parts as far as they fit into the peak, and what is missing to it."""
    filled, left = {}, peak
    for name, size in parts.items():
        if min(size, left) > 0:
            filled[name] = min(size, left)
            left -= filled[name]
    return filled | ({REST: left} if left else {})


def _rank(name: str) -> int:
    return PARTS.index(name) if name in PARTS else len(PARTS)


def _failure(result: dict[str, Any]) -> str:
    code = result.get("exit_code", 0)
    return f"exit code {code}: {result.get('message') or 'no message'}" if code else ""
