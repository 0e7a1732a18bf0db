"""When the rank of a LoRPt model changes: at given steps, or when the loss no longer falls."""

from lowmem.config import LorptConfig
from lowmem.train.state import TrainState


def count_evaluation(state: TrainState, improved: bool) -> None:
    """Note whether an evaluation was the best so far."""
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
