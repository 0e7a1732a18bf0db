"""Gradients of what has a gradient already."""

from collections.abc import Sequence
from typing import Any

import torch


class _Given(torch.autograd.Function):
    """A number whose gradient in a tensor is given.

    Symbols: output is of any shape; grad has that shape.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        ctx.grad = grad
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.grad, None


def gradients_of(
    output: torch.Tensor, wanted: Sequence[torch.Tensor], grad_output: torch.Tensor | None = None, *, retain_graph: bool = False
) -> list[torch.Tensor]:
    """Gradients of `wanted`, as `torch.autograd.grad` computes them, bit for bit.

    torch imports sympy, 31 MB, when it is given a gradient to start from; here backward starts from a number, whose gradient is one.

    Args:
        output: a function of each tensor wanted.
        grad_output: its gradient, of its shape and dtype; None where `output` is one number.
        retain_graph: keep the graph for another pass.
    Memory: none beside the gradients.
    """
    start = output if grad_output is None else _Given.apply(output, grad_output)
    return list(torch.autograd.grad(start, wanted, retain_graph=retain_graph))
