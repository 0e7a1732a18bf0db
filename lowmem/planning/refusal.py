"""Why a run does not fit its budget, in one paragraph: what it needs, of what, and the change that would save most."""

from lowmem.planning.levers import changed, levers, missing_bytes
from lowmem.planning.predict import Prediction, described, predict_peak
from lowmem.units import format_bytes


def refusal(prediction: Prediction, world_size: int = 1, local_ranks: int = 0, margin: float = 0.0) -> str:
    """Empty if the run fits.

    Args:
        world_size, local_ranks: see `predict_peak`.
        margin: share of the budget that is to stay free.
    """
    missing = missing_bytes(prediction, margin)
    if not missing:
        return ""
    budget = prediction.config.budget
    parts = []
    for name, peaks in (("ram", prediction.host), ("vram", prediction.cuda_reserved)):
        if name in missing:
            parts.append(f"{described(peaks)} of {name.upper()}, the budget is {getattr(budget, name)}")
    saving = _largest_saving(prediction, world_size, local_ranks, next(iter(missing)))
    return f"the run needs {' and '.join(parts)}. {saving}See: lowmem plan"


def _largest_saving(prediction: Prediction, world_size: int, local_ranks: int, which: str) -> str:
    def need(other: Prediction) -> int:
        return other.host.peak_bytes if which == "ram" else other.cuda_reserved.peak_bytes

    best, saved = None, 0
    for lever in levers(prediction.config):
        saving = need(prediction) - need(predict_peak(changed(prediction.config, lever), world_size, local_ranks, prediction.base))
        if saving > saved:
            best, saved = lever, saving
    return f"Largest saving: {best.text} (-{format_bytes(saved)}). " if best else ""
