"""When the rank of a LoRPt model changes: at given steps, or when the loss no longer falls."""

import math

from lowmem.config import LorptConfig
from lowmem.train.state import TrainState

MIN_IMPROVEMENT = 1e-3  # of the best loss: less is a plateau


def count_evaluation(state: TrainState, loss: float) -> None:
    """Note an evaluation, before `state.best_val_loss` takes it in: was it a thousandth better than the best?"""
    best = state.best_val_loss
    improved = math.isfinite(loss) and (best is None or loss < best * (1 - MIN_IMPROVEMENT))
    state.flat_evaluations = 0 if improved else state.flat_evaluations + 1


def next_rank(lorpt: LorptConfig, state: TrainState, current: int) -> int:
    """The rank to change to before the coming step; 0 to leave it.

    Args:
        current: the rank that the following layers have now; the largest, should they differ.
    """
    due = [step for step in lorpt.schedule if step <= state.step]
    if due:
        rank = lorpt.schedule[max(due)]
        return 0 if rank == state.rank else rank
    if lorpt.grow_to > current and state.flat_evaluations >= lorpt.grow_patience:
        return min(2 * current, lorpt.grow_to)
    return 0
