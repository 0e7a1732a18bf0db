"""A trace through a model of an allocator: the peak of every phase, and what the memory held when tensors took most."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lowmem.planning.trace import Trace


class Allocator(Protocol):
    """What a trace is replayed through."""

    def allocate(self, key: int, size: int) -> None:
        """Make a block."""

    def release(self, key: int) -> None:
        """Free it."""

    def release_kept(self) -> None:
        """Give what is free back to the system, as a run does before its first step."""


@dataclass
class Peaks:
    """Peaks of one measure of memory.

    Attributes:
        by_phase: bytes by phase, in order.
        components: bytes by category when tensors took most, and as workspace what the allocator holds beyond them; they sum to the peak.
    """

    by_phase: dict[str, int] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most of all phases."""
        return max(self.by_phase.values(), default=0)

    def times(self, count: int) -> "Peaks":
        """The same `count` times over."""
        return Peaks({phase: size * count for phase, size in self.by_phase.items()}, {n: s * count for n, s in self.components.items()})

    def plus(self, name: str, size_bytes: int) -> "Peaks":
        """The same with `size_bytes` more of component `name` in every phase."""
        components = {**self.components, name: self.components.get(name, 0) + size_bytes}
        return Peaks({phase: size + size_bytes for phase, size in self.by_phase.items()}, components)


def replay(trace: Trace, allocator: Allocator, measures: dict[str, str], elsewhere: str = "") -> dict[str, Peaks]:
    """Peaks of several attributes of one allocator.

    Args:
        measures: name of the result -> attribute of `allocator` that holds bytes.
        elsewhere: a category that is in other memory.
    """
    starts = {position: name for name, position in trace.phases}
    results = {name: Peaks() for name in measures}
    live: Counter[str] = Counter()
    fullest: Counter[str] = Counter()
    phase = "load"
    for position, event in enumerate(trace.events):
        before, phase = phase, starts.get(position, phase)
        if before == "load" != phase:
            allocator.release_kept()
        storage = trace.storages[event if event >= 0 else ~event]
        if elsewhere and storage.category == elsewhere:
            continue
        if event >= 0:
            allocator.allocate(event, storage.size_bytes)
            live[storage.category] += storage.size_bytes
        else:
            allocator.release(~event)
            live[storage.category] -= storage.size_bytes
        for name, attribute in measures.items():
            results[name].by_phase[phase] = max(results[name].by_phase.get(phase, 0), getattr(allocator, attribute))
        if live.total() > fullest.total():
            fullest = Counter(live)
    for name, attribute in measures.items():
        for last, start in trace.phases:
            if start == len(trace.events):
                results[name].by_phase[last] = getattr(allocator, attribute)
        results[name].components = _components(fullest, results[name].peak_bytes)
    return results


def _components(live: Counter[str], peak_bytes: int) -> dict[str, int]:
    """The bytes of a peak by category; what the allocator adds to those in use is workspace."""
    components = dict(+live)
    if "boundaries" in components:
        components["activations"] = live["activations"] + components.pop("boundaries")
    components["workspace"] = live["workspace"] + peak_bytes - live.total()
    return components


def live_peaks(trace: Trace, categories: set[str], rounded: Callable[[int], int] = int) -> dict[str, int]:
    """The most bytes that some categories took together, by phase.

    Args:
        rounded: what a block of so many bytes takes.
    """
    starts = {position: name for name, position in trace.phases}
    peaks: dict[str, int] = {}
    phase, live = "load", 0
    for position, event in enumerate(trace.events):
        phase = starts.get(position, phase)
        storage = trace.storages[event if event >= 0 else ~event]
        if storage.category in categories:
            live += rounded(storage.size_bytes) if event >= 0 else -rounded(storage.size_bytes)
        peaks[phase] = max(peaks.get(phase, 0), live)
    return peaks
