"""What a run will need, and what to run: predictions and plans. Knows the engine; trains nothing."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem.planning.predict import predict_peak
    from lowmem.planning.search import Plan

__all__ = ["plan", "predict_peak"]


def plan(config: Any, budget: Any = None) -> "Plan":
    """The fastest settings for `config` that fit `budget`; see `lowmem.planning.search.plan`.

    Args:
        config: a `RunConfig`; not changed.
        budget: a `BudgetConfig`; default: the one in `config`.
    """
    import copy

    from lowmem.planning.search import plan as search

    config = copy.deepcopy(config)
    config.budget = budget or config.budget
    return search(config)


def __getattr__(name: str) -> Any:
    """Import the predictor when it is asked for."""
    if name == "predict_peak":
        from lowmem.planning.predict import predict_peak

        return predict_peak
    raise AttributeError(name)
