"""Clipping where the global norm of the gradient is known too late: each block is updated before the next gradient exists."""

import math
from typing import Literal

import torch

from lowmem.optim.clip import global_norm


class BlockClipping:
    """Factors for the gradients of one block after the other, and the global norm once all are known.

    Args:
        max_norm: 0 never clips.
        mode: previous: every block is scaled by what the previous step's global norm asks for (nothing in the first step). block: each
            block's own norm is clipped to max_norm / sqrt(blocks), so that the global norm never exceeds max_norm.
        blocks: how many gradients a step has.
    """

    def __init__(self, max_norm: float, mode: Literal["previous", "block"], blocks: int):
        self.max_norm, self.mode, self.blocks = max_norm, mode, blocks
        self.previous_norm = 0.0
        self._squares: list[float] = []

    def factor(self, gradients: list[torch.Tensor], unscale: float) -> float:
        """What to multiply the gradients of a block by, `unscale` included; NaN if they are not finite.

        Args:
            unscale: 1 / loss scale.
        """
        norm = global_norm(gradients).item() * unscale
        self._squares.append(norm * norm)
        if not math.isfinite(norm):
            return math.nan
        limit = self.max_norm if self.mode == "previous" else self.max_norm / math.sqrt(self.blocks)
        reference = self.previous_norm if self.mode == "previous" else norm
        return unscale * (limit / reference if 0 < limit < reference else 1.0)

    def forget(self) -> None:
        """Drop the gradients of a step that does not end."""
        self._squares = []

    def end_step(self) -> float:
        """The global norm before clipping; non-finite if a gradient was."""
        norm = math.sqrt(math.fsum(self._squares)) if all(map(math.isfinite, self._squares)) else math.nan
        self._squares = []
        if math.isfinite(norm):
            self.previous_norm = norm
        return norm
