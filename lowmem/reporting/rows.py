"""The results of `lowmem profile` as rows: one kind of memory of one configuration, predicted and measured."""

from dataclasses import dataclass, field
from typing import Any

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
