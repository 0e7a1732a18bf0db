"""AdamW with states of 32, 8 or 4 bits."""

from collections.abc import Iterable
from typing import Any

from lowmem.config.schema import STATE_WIDTHS
from lowmem.optim.kernels.formats import StateBits, StepScalars, adamw_scalars
from lowmem.optim.low_bit import LowBitOptimizer


class AdamW(LowBitOptimizer):
    """Adam with decoupled weight decay.

    Args:
        params: parameters or groups; every setting but `seed` may differ by group.
        lr: learning rate.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: each step multiplies weights by 1 - lr * weight_decay.
        state_bits: 32, 8 or 4 per state; parameters of fewer than 4096 elements or of one dimension keep 32, and where 4 is asked for,
            those whose rows are no multiple of 128 have 8.
        seed: of the stochastic rounding.
    Raises:
        ValueError: a setting is out of its range.
    Memory: per parameter 8 bytes at 32 bits, 2.06 at 8, 1.06 at 4; a step adds nothing that grows with a tensor.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; block-wise states after Dettmers et al. 2022, arXiv:2110.02861.
    """

    state_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    widths: tuple[int, ...] = STATE_WIDTHS["adamw"]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: StateBits = 8,
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_bits": state_bits}, seed)

    def scalars(self, group: dict[str, Any], step: int, **random: Any) -> StepScalars:
        """The numbers of update number `step`."""
        return adamw_scalars(
            lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], step=step, **random
        )
