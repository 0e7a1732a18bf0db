"""Optimizers with low-bit states, usable without the rest of lowmem."""

from lowmem.optim.adamw import AdamW
from lowmem.optim.lion import Lion

__all__ = ["AdamW", "Lion"]
