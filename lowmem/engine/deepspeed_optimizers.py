"""Optimizers inside ZeRO: what lowmem's own need to be there, and corrections to DeepSpeed's host-memory ones.

ZeRO flattens every parameter group, hands this rank's part of it to the optimizer as a single parameter, and steps one at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch

from lowmem.optim.kernels.formats import StateBits, state_bits_of
from lowmem.optim.kernels.scalars import mix_key
from lowmem.optim.low_bit import LowBitOptimizer


def separate_by_state_width(optimizer: torch.optim.Optimizer, ranks: int) -> None:
    """Give parameters whose states have other widths groups of their own, before ZeRO flattens groups; for lowmem's optimizers only.

    Flattened with others, norms and biases would get narrow states like those, and rows would share blocks.

    Args:
        ranks: that the flattened groups are divided among.
    """
    if not isinstance(optimizer, LowBitOptimizer):
        return
    for group in list(optimizer.param_groups):
        by_width: dict[StateBits, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            by_width.setdefault(state_bits_of(parameter.shape, group["state_bits"], ranks=ranks), []).append(parameter)
        (bits, group["params"]), *others = by_width.items()
        group.update(state_bits=bits, flattened=True)
        for bits, parameters in others:
            optimizer.add_param_group({**group, "params": parameters, "state_bits": bits})


def prepare_optimizer(ds_engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Correct DeepSpeed's own optimizers and lowmem's before their first step; others are left alone.

    Args:
        ds_engine: what `deepspeed.initialize` made of it.
    Memory: for CPULion the states, which its first step would allocate, and twice as many, otherwise.
    """
    loss_scaler: Any = getattr(ds_engine.optimizer, "loss_scaler", None)
    if hasattr(loss_scaler, "raise_error_at_min_scale"):
        loss_scaler.raise_error_at_min_scale = False  # the step is reported as skipped, and the loop decides when to give up
    kind = type(optimizer).__name__
    if kind == "DeepSpeedCPUAdam":
        _make_bias_correction_stateless(optimizer)
    elif kind == "DeepSpeedCPULion":
        _allocate_lion_states(ds_engine, optimizer)
    elif isinstance(optimizer, LowBitOptimizer):
        _draw_apart(ds_engine, optimizer)


def partitions(ds_engine: Any) -> Iterator[torch.Tensor]:
    """The flat fp32 tensors of this rank that a ZeRO stage hands to its optimizer."""
    zero = ds_engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        yield from getattr(zero, name, [])


def _make_bias_correction_stateless(optimizer: Any) -> None:
    """Have CPUAdam compute beta**step from the step alone.

    The operator multiplies a running product from step to step, and only calls pow after a jump. A resumed process starts with
    a jump, so its first bias correction could differ in the last bit from that of a process that never stopped. An update of a
    dummy at step 0 before every step makes every step a jump.
    """
    dummy = [torch.zeros(1) for _ in range(4)]

    def jump_to_zero(optimizer: Any, args: Any, options: Any) -> None:
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, 0.0, beta1, beta2, group["eps"], 0.0, False, *dummy)

    optimizer.register_step_pre_hook(jump_to_zero)


def _allocate_lion_states(ds_engine: Any, optimizer: Any) -> None:
    """Give CPULion its one state; left to itself it also allocates Adam's second one and never uses it."""
    for partition in partitions(ds_engine):
        optimizer.state[partition] = {"step": 0, "exp_avg": torch.zeros_like(partition, dtype=torch.float32, requires_grad=False)}


def _draw_apart(ds_engine: Any, optimizer: LowBitOptimizer) -> None:
    """Give each partition of each rank random numbers of its own: to the optimizer every one of them is parameter 0.

    Stage 0 has no partitions: its ranks update equal weights, and must round them alike.
    """
    numbers = {partition: number for number, partition in enumerate(partitions(ds_engine))}
    if not numbers:
        return
    seed, rank = optimizer.seed, ds_engine.global_rank

    def reseed(optimizer: Any, args: Any, options: Any) -> None:
        first = next(parameter for group in optimizer.param_groups for parameter in group["params"])
        optimizer.seed = mix_key(seed, rank, numbers[first])

    optimizer.register_step_pre_hook(reseed)
