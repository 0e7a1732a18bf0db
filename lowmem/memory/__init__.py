"""Memory: measured, limited. Knows nothing of models or training."""

from lowmem.memory.measure import PeakMemory, measure_peak

__all__ = ["PeakMemory", "measure_peak"]
