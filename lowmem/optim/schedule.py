"""The learning rate as a function of the step."""

import math

from lowmem.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of one update.

    Args:
        step: 1-based count of updates, this one included.
        total_steps: updates of the whole run, or of its phase; the decay ends there. A longer warm-up is cut to it.
    Source: cosine, Loshchilov & Hutter 2017, arXiv:1608.03983; warm-up, stable, decay, Hu et al. 2024, arXiv:2404.06395.
    """
    warmup = min(optim.warmup_steps, total_steps)
    if step <= warmup:
        return optim.lr * step / warmup
    return optim.lr * _decay(optim, step, warmup, total_steps)


def _decay(optim: OptimConfig, step: int, warmup: int, total_steps: int) -> float:
    """Factor in [min_lr_ratio, 1] after warm-up; exactly min_lr_ratio at the last of `total_steps` unless constant."""
    if optim.schedule == "constant":
        return 1.0
    # wsd: a share of all steps, those of the warm-up too, but no step decays before the warm-up is over
    steps = min(optim.decay_fraction * total_steps, total_steps - warmup) if optim.schedule == "wsd" else total_steps - warmup
    progress = min(1.0, max(0.0, (step - (total_steps - steps)) / steps))
    low = optim.min_lr_ratio
    if optim.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (1 - low) * progress
