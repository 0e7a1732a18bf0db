"""The global gradient norm, and clipping by it: known, or estimated where gradients are applied before it is."""

import math
from collections.abc import Iterable
from statistics import median
from typing import Any, Literal

import torch

from lowmem.system.dry_run import device_kind, representative

_SLICE = 1 << 16  # elements reduced at once on a CPU: their fp64 copy (512 KiB) stays in the cache


@torch.no_grad()
def global_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all elements of all tensors, accumulated in fp64 in a fixed order.

    torch's fp32 norm of a million numbers errs by 1e-5 on a CPU, which would make clipping depend on how a model is
    cut into tensors and ranks.

    Returns:
        fp64 scalar; non-finite if any element is.
    Memory: 512 KiB on a CPU; none on CUDA, where reductions convert as they read.
    """
    squares = []
    for tensor in tensors:
        pieces = tensor.reshape(-1).split(_SLICE) if device_kind(tensor) == "cpu" else [tensor]
        squares += [torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in representative(pieces, tensor)]
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


@torch.no_grad()
def clip_gradients(gradients: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`; nothing is touched when it already is.

    Args:
        norm: their global norm.
        max_norm: 0 never clips.
    Source: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
    """
    if 0 < max_norm < norm:
        torch._foreach_mul_(gradients, max_norm / norm)


_STEPS_KEPT = 5  # of which the median is taken: one odd step, or two, change nothing


class BlockClipping:
    """Factors for the gradients of one part of a model after the other, and the global norm once all are known.

    With mode previous the global norm is estimated before each update, from the norm of this step so far and from the share of the
    global norm that recent steps had by the same part:

        estimate_k = n_k / s_k,    n_k^2 = |g_1|^2 + ... + |g_k|^2,    s_k = median over the last 5 steps of n_k / n

    which is exact where the parts keep their proportions, whatever the size of the step; factor_k = min(1, max_norm / estimate_k). As
    s_k <= 1 the estimate is never below n_k, so where the global norm n exceeds max_norm what is applied never exceeds
    max_norm * sqrt(1 + ln(n^2 / max_norm^2)), however the gradient is distributed. In the first step s_k = 1.

    Args:
        max_norm: 0 never clips.
        mode: previous: as above. block: each part's own norm is clipped to max_norm / sqrt(blocks), so that the global norm never exceeds
            max_norm.
        blocks: how many parts a step has; used by mode block alone.
    """

    def __init__(self, max_norm: float, mode: Literal["previous", "block"], blocks: int):
        self.max_norm, self.mode, self.blocks = max_norm, mode, blocks
        self._shares: list[list[float]] = []
        self._squares: list[float] = []

    def factor(self, gradients: list[torch.Tensor], unscale: float) -> float:
        """What to multiply the gradients of a part by, `unscale` included; NaN if they are not finite.

        Args:
            unscale: 1 / loss scale.
        """
        norm = global_norm(gradients).item() * unscale
        self._squares.append(norm * norm)
        if not math.isfinite(norm):
            return math.nan
        limit, reference = self.max_norm, self._estimate()
        if self.mode == "block":
            limit, reference = self.max_norm / math.sqrt(self.blocks), norm
        return unscale * (limit / reference if 0 < limit < reference else 1.0)

    def _estimate(self) -> float:
        """The global norm of this step, as far as it can be known by now."""
        so_far, part = math.sqrt(math.fsum(self._squares)), len(self._squares) - 1
        share = median(shares[part] for shares in self._shares) if self._shares and part < len(self._shares[0]) else 1.0
        return so_far / share if share > 0 else so_far

    def forget(self) -> None:
        """Drop the gradients of a step that does not end."""
        self._squares = []

    def end_step(self) -> float:
        """The global norm before clipping; non-finite if a gradient was."""
        squares, self._squares = self._squares, []
        norm = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan
        if not (0 < norm < math.inf):
            return norm
        so_far = [math.sqrt(math.fsum(squares[: part + 1])) / norm for part in range(len(squares))]
        if self._shares and len(self._shares[0]) != len(so_far):
            self._shares = []  # the parts are others than before
        self._shares = [*self._shares, so_far][-_STEPS_KEPT:]
        return norm

    def state(self) -> dict[str, Any]:
        """JSON-ready, enough to go on exactly."""
        return {"shares": self._shares}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; from a checkpoint without one, as in a first step."""
        self._shares = [list(map(float, shares)) for shares in state.get("shares", [])]
