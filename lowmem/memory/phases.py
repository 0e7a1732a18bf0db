"""The peak of each phase of a run, so that a peak has a place: load, first_step, steady_steps, evaluation, save.

    phases = PhasePeaks()
    with phases("evaluation"):
        ...
    phases.as_dict()["evaluation"]["host_peak_bytes"]

The names are those of PHASES by agreement; any other is recorded as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lowmem.memory.measure import PeakMemory, measure_peak

PHASES = ("load", "first_step", "steady_steps", "evaluation", "save")


class PhasePeaks:
    """Peaks by the name of a phase. A phase may be visited often; the largest peak stays.

    Inside an open `measure_peak` a visit costs about 0.2 ms, and two reads of the allocator's statistics with CUDA: children are
    not asked again at its ends, what they had at the last sample of the surrounding measurement counts.
    """

    def __init__(self) -> None:
        self._peaks: dict[str, dict[str, int]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[PeakMemory]:
        """A visit of the phase `name`; recorded also when it ends with an error."""
        visit = None
        try:
            with measure_peak(ask_children=False) as visit:
                yield visit
        finally:
            if visit is not None:
                before = self._peaks.get(name, {})
                self._peaks[name] = {key: max(value, before.get(key, 0)) for key, value in visit.peaks().items()}

    def as_dict(self) -> dict[str, dict[str, int]]:
        """{phase: {host_peak_bytes, cuda_allocated_peak_bytes, cuda_reserved_peak_bytes}}, in the order of the first visits."""
        return {name: dict(peaks) for name, peaks in self._peaks.items()}
