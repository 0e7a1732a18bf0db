"""The optimizer step as a PyTorch custom operator: C++ on a CPU, Triton on CUDA, the definition elsewhere, nothing on fake tensors."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, Optional

import torch

from lowmem.optim.kernels import cpu, reference
from lowmem.optim.kernels.scalars import StepScalars

_MUTATED = ("param", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")


@torch.library.custom_op("lowmem::optimizer_step", mutates_args=_MUTATED)
def _optimizer_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: Optional[torch.Tensor],  # noqa: UP045
    exp_avg_scale: Optional[torch.Tensor],  # noqa: UP045
    exp_avg_sq_scale: Optional[torch.Tensor],  # noqa: UP045
    floats: Sequence[float],
    key: int,
    offset: int,
    bits: int,
) -> None:
    scalars = StepScalars(*floats, key, offset)  # type: ignore[arg-type,call-arg,misc]
    _implementation(param.device.type)(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars, bits)


@_optimizer_step.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    """A dry run: no memory beyond the arguments."""


def _implementation(device_type: str) -> Any:
    if device_type == "cpu":
        return cpu.step_
    if device_type == "cuda":
        from lowmem.optim.kernels import triton  # type: ignore[attr-defined,unused-ignore]

        return triton.step_
    return reference.step_


def optimizer_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor | None,
    exp_avg_scale: torch.Tensor | None,
    exp_avg_sq_scale: torch.Tensor | None,
    scalars: StepScalars,
    bits: int,
) -> None:
    """One step on one tensor, in place, by the kernels of its device; see `lowmem.optim.kernels.reference.step_`."""
    *floats, key, offset = astuple(scalars)
    _optimizer_step(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, floats, key, offset, bits)
