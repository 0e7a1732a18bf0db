"""The optimizer step as a PyTorch operator: C++ on a CPU, Triton on CUDA, the definition elsewhere, nothing on fake tensors.

It is registered through torch.library.Library: an operator made with torch.library.custom_op imports PyTorch's compiler when it is
first called, which costs 150 MB of memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch

from lowmem.optim.kernels import cpu, reference
from lowmem.optim.kernels.formats import StepScalars

_LIBRARY = torch.library.Library("lowmem", "FRAGMENT")
_LIBRARY.define(
    "optimizer_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_sq, Tensor(d!)? exp_avg_scale, "
    "Tensor(e!)? exp_avg_sq_scale, float[] floats, int key, int offset, int bits, Tensor(f!)? param_scale=None) -> ()"
)


def _register(key: str, kernels: Callable[[], Callable[..., None]]) -> None:
    """Run `kernels()` for tensors of a dispatch key."""

    def run(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, floats, key, offset, bits, param_scale=None):  # type: ignore[no-untyped-def]
        scalars = StepScalars(*floats, key, offset)  # type: ignore[call-arg]
        kernels()(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars, bits, param_scale)

    _LIBRARY.impl("optimizer_step", run, key)


def _triton_step() -> Callable[..., None]:
    from lowmem.optim.kernels import triton

    return triton.step_


_register("CPU", lambda: cpu.step_)
_register("CUDA", _triton_step)
_register("CompositeExplicitAutograd", lambda: reference.step_)


def _no_memory(*arguments: Any) -> None:
    """A dry run: nothing beyond the arguments."""


_LIBRARY.impl("optimizer_step", _no_memory, "Meta")


def optimizer_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor | None,
    exp_avg_scale: torch.Tensor | None,
    exp_avg_sq_scale: torch.Tensor | None,
    scalars: StepScalars,
    bits: int,
    param_scale: torch.Tensor | None = None,
) -> None:
    """One step on one tensor, in place, by the kernels of its device; see `lowmem.optim.kernels.reference.step_`."""
    *floats, key, offset = astuple(scalars)
    numbers: Sequence[float] = floats
    states = exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale
    torch.ops.lowmem.optimizer_step(param, grad, *states, numbers, key, offset, bits, param_scale)
