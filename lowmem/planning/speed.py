"""How long a step will take: its work, divided by what this machine was measured to do.

A roofline by kind of work: matrix products by dtype, memory traffic of everything else, a fixed cost an operator, and the optimizer by
its parameters. The rates come from a probe of a few seconds (`lowmem.planning.probe`), kept in the cache; for a named device they are
its published numbers times what is usually reached.
"""

from lowmem.config import RunConfig
from lowmem.models.base import LanguageModel
from lowmem.planning.probe import Rates, rates_for
from lowmem.planning.trace import Trace


def step_seconds(config: RunConfig, trace: Trace, model: LanguageModel, world_size: int) -> float:
    """Seconds of one steady step of the whole run.

    Args:
        config: resolved.
        trace: of one rank's share of it.
    """
    return trace_seconds(config, trace, model, rates_for(config), world_size)


def trace_seconds(config: RunConfig, trace: Trace, model: LanguageModel, rates: Rates, world_size: int = 1) -> float:
    """As `step_seconds`, with rates that are given."""
    cost = trace.costs["steady_steps"]
    products = sum(flops / rates.flops_per_s(dtype) for dtype, flops in cost.matmul_flops.items())
    traffic = cost.moved_bytes / rates.bytes_per_s
    update = model.num_parameters() / rates.updates_per_s(config)
    return (products + traffic + cost.calls * rates.call_s) * (world_size if config.device == "cpu" else 1) + update
