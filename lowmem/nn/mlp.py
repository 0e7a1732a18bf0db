"""The feed-forward half of a block. Shapes: C model width, F hidden width."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.nn.factory import LinearFactory
from lowmem.nn.recompute import cheap


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, saving its two inputs and nothing in between."""

    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = grad * up
        torch.ops.aten.silu_backward(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Memory: saves its inputs.
    Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """
    return _SwiGLU.apply(gate, up)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix when both are dense.

    Memory: saves C + 3 * F numbers per token, 2 * F where `selective` recomputation is on.
    """

    def __init__(self, dim: int, hidden_dim: int, factory: LinearFactory, name: str, *, out_std: float = 0.02, bias: bool = False):
        super().__init__()
        self.gate_up = factory.split(dim, {"gate": hidden_dim, "up": hidden_dim}, bias, group="mlp", name=f"{name}.gate_up")
        self.down = factory.linear(hidden_dim, dim, bias, group="mlp", name=f"{name}.down", dense_std=out_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C)."""
        gate, up = self.gate_up(x)
        return self.down(cheap(swiglu, gate, up))


class GELUMLP(nn.Module):
    """down(gelu(up(x))).

    Args:
        tanh: gelu by tanh, as in GPT-2.
    Memory: saves C + 2 * F numbers per token, F where `selective` recomputation is on.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        factory: LinearFactory,
        name: str,
        *,
        out_std: float = 0.02,
        bias: bool = False,
        tanh: bool = False,
    ):
        super().__init__()
        self.gelu = _gelu_tanh if tanh else F.gelu
        self.up = factory.linear(dim, hidden_dim, bias, group="mlp", name=f"{name}.up")
        self.down = factory.linear(hidden_dim, dim, bias, group="mlp", name=f"{name}.down", dense_std=out_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C)."""
        return self.down(cheap(self.gelu, self.up(x)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def default_hidden_dim(activation: Literal["swiglu", "gelu", "gelu_tanh"], dim: int) -> int:
    """8/3 * dim rounded up to a multiple of 64 for swiglu, 4 * dim for gelu."""
    return -(-8 * dim // (3 * 64)) * 64 if activation == "swiglu" else 4 * dim


def make_mlp(activation: Literal["swiglu", "gelu", "gelu_tanh"], *args, **choices) -> nn.Module:  # type: ignore[no-untyped-def]
    """The feed-forward layer of that name."""
    return SwiGLU(*args, **choices) if activation == "swiglu" else GELUMLP(*args, **choices, tanh=activation == "gelu_tanh")
