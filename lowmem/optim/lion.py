"""Lion with a state of 32 or 8 bits."""

from collections.abc import Iterable
from typing import Any

from lowmem.config.schema import STATE_WIDTHS
from lowmem.optim.kernels.formats import StateBits, StepScalars, lion_scalars
from lowmem.optim.low_bit import LowBitOptimizer


class Lion(LowBitOptimizer):
    """The sign of an interpolated momentum, with decoupled weight decay.

    Args:
        params: parameters or groups; every setting but `seed` may differ by group.
        lr: learning rate, about a third of AdamW's.
        betas: share of the momentum in the update, and its decay.
        weight_decay: each step multiplies weights by 1 - lr * weight_decay.
        state_bits: 32 or 8; parameters of fewer than 4096 elements or of one dimension keep 32. There is no 4: Lion takes the sign of
            its momentum, an average over a hundred steps, and what 4 bits round in a hundred steps is more than most momenta.
        seed: of the stochastic rounding.
    Raises:
        ValueError: a setting is out of its range.
    Memory: per parameter 4 bytes at 32 bits, 1.03 at 8; a step adds nothing that grows with a tensor.
    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    state_names = ("exp_avg",)
    widths = STATE_WIDTHS["lion"]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_bits: StateBits = 8,
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "state_bits": state_bits}, seed)

    def scalars(self, group: dict[str, Any], step: int, **random: Any) -> StepScalars:
        """The numbers of this update; the step does not matter."""
        return lion_scalars(lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"], **random)
