"""The learning rate as a function of the step."""

import math

from lowmem.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of one update.

    Args:
        step: 1-based count of updates, this one included.
        total_steps: updates of the whole run; the decay ends there.
    Source: cosine, Loshchilov & Hutter 2017, arXiv:1608.03983; warm-up, stable, decay, Hu et al. 2024, arXiv:2404.06395.
    """
    warmup = min(optim.warmup_steps, total_steps)
    if step <= warmup:
        return optim.lr * step / warmup
    return optim.lr * _decay(optim, step - warmup, total_steps - warmup)


def _decay(optim: OptimConfig, step: int, steps: int) -> float:
    """Factor in [min_lr_ratio, 1] after warm-up; exactly min_lr_ratio at the last of `steps` unless constant."""
    progress = min(1.0, step / steps)
    low = optim.min_lr_ratio
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if optim.schedule == "linear":
        return 1 - (1 - low) * progress
    decay_start = 1 - optim.decay_fraction
    return 1.0 if progress <= decay_start else 1 - (1 - low) * (progress - decay_start) / optim.decay_fraction
