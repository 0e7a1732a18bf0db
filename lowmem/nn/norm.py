"""Normalisation layers. Shapes: N tokens, D width."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.fake import autocast_kind, device_kind, representative
from lowmem.nn.precision import accumulate_dtype, compute_dtype

BLOCK_ELEMENTS = 1 << 18  # a block of rows in fp32 stays in a core's cache


class _RMSNorm(torch.autograd.Function):
    """Row blocks are normalised in fp32, so that no fp32 copy of the whole input exists; one number per row is saved."""

    @staticmethod
    def forward(ctx, x_ND, weight_D, eps, dtype):  # type: ignore[no-untyped-def]
        rows, width = x_ND.shape
        wide = accumulate_dtype(x_ND.dtype)
        weight_wide = weight_D.to(wide)
        out_ND = torch.empty_like(x_ND, dtype=dtype)
        rstd_N1 = x_ND.new_empty(rows, 1, dtype=wide)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in representative(range(0, rows, step), x_ND):
            block = x_ND[start : start + step].to(wide, copy=True)
            rstd = rstd_N1[start : start + step]
            torch.linalg.vector_norm(block, dim=-1, keepdim=True, out=rstd)
            rstd.square_().div_(width).add_(eps).rsqrt_()
            out_ND[start : start + step] = block.mul_(rstd).mul_(weight_wide)
        ctx.save_for_backward(x_ND, weight_D, rstd_N1)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        x_ND, weight_D, rstd_N1 = ctx.saved_tensors
        rows, width = x_ND.shape
        wide = rstd_N1.dtype
        weight_wide = weight_D.to(wide)
        grad_x = torch.empty_like(x_ND)
        grad_weight = torch.zeros_like(weight_wide)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in representative(range(0, rows, step), x_ND):
            rstd = rstd_N1[start : start + step]
            normed = x_ND[start : start + step].to(wide, copy=True).mul_(rstd)
            grad = grad_ND[start : start + step].to(wide, copy=True)
            product = grad * normed
            grad_weight += product.sum(0)
            projection = (product @ weight_wide).div_(width).unsqueeze_(-1)
            grad.mul_(weight_wide).addcmul_(normed, projection, value=-1).mul_(rstd)
            grad_x[start : start + step] = grad
        return grad_x, grad_weight.to(weight_D.dtype), None, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight.

    Memory: saves the input and one fp32 number per row.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim), in the autocast dtype where autocast is on."""
        dtype = compute_dtype(x)
        if device_kind(x) != "cpu":
            return F.rms_norm(x, (self.dim,), self.weight.to(x.dtype), self.eps).to(dtype)
        return _RMSNorm.apply(x.reshape(-1, self.dim), self.weight, self.eps, dtype).view(x.shape)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias.

    Memory: saves the input and two fp32 numbers per row.
    Source: Ba et al. 2016, arXiv:1607.06450, equation 4.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim), in the autocast dtype where autocast is on."""
        dtype = compute_dtype(x)
        with torch.autocast(autocast_kind(x), enabled=False):
            return F.layer_norm(x, (self.dim,), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps).to(dtype)


def make_norm(kind: Literal["rmsnorm", "layernorm"], dim: int, eps: float = 0.0) -> nn.Module:
    """The normalisation layer of that name; eps 0 takes its own default."""
    chosen = {"eps": eps} if eps else {}
    return RMSNorm(dim, **chosen) if kind == "rmsnorm" else LayerNorm(dim, **chosen)
