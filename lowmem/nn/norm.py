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


class _LayerNorm(torch.autograd.Function):
    """PyTorch's kernel for the output and the gradient of x; those of weight and bias are sums over all rows, kept in fp32."""

    @staticmethod
    def forward(ctx, x_ND, weight_D, bias_D, eps):  # type: ignore[no-untyped-def]
        wide, width = accumulate_dtype(x_ND.dtype), x_ND.shape[1]
        weight_wide = x_ND.new_ones(width, dtype=wide) if weight_D is None else weight_D.to(wide)
        bias_wide = None if bias_D is None else bias_D.to(wide)
        out_ND, mean_N1, rstd_N1 = torch.native_layer_norm(x_ND, (width,), weight_wide, bias_wide, eps)
        ctx.save_for_backward(x_ND, weight_D, bias_D, mean_N1, rstd_N1)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        x_ND, weight_D, bias_D, mean_N1, rstd_N1 = ctx.saved_tensors
        rows, width = x_ND.shape
        wide = rstd_N1.dtype
        grad_ND = grad_ND.contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight_wide = x_ND.new_ones(width, dtype=wide) if weight_D is None else weight_D.to(wide)
            only_x = [True, False, False]
            grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(grad_ND, x_ND, [width], mean_N1, rstd_N1, weight_wide, None, only_x)
        if not any(ctx.needs_input_grad[1:3]):
            return grad_x, None, None, None
        grad_weight, grad_bias = torch.zeros(2, width, dtype=wide, device=x_ND.device)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in representative(range(0, rows, step), x_ND):
            part = slice(start, start + step)
            normed = x_ND[part].to(wide, copy=True).sub_(mean_N1[part]).mul_(rstd_N1[part])
            grad = grad_ND[part].to(wide, copy=True)
            grad_bias += grad.sum(0)
            grad_weight += grad.mul_(normed).sum(0)
        of_weight = None if weight_D is None else grad_weight.to(weight_D.dtype)
        return grad_x, of_weight, None if bias_D is None else grad_bias.to(bias_D.dtype), None


def layer_norm(x: torch.Tensor, weight_D: torch.Tensor | None, bias_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Layer normalisation over the last dimension, in the dtype of x.

    PyTorch's kernel for a CPU sums the gradients of a 16-bit weight and bias in 16 bits; here they are sums in fp32, rounded once.

    Args:
        x: (..., D).
        weight_D, bias_D: None for none.
    Memory: saves x and two fp32 numbers a row; in backward two blocks of `BLOCK_ELEMENTS` in fp32.
    """
    width = x.shape[-1]
    if x.dtype.itemsize != 2 or device_kind(x) != "cpu":
        weight_D, bias_D = (None if part is None else part.to(x.dtype) for part in (weight_D, bias_D))
        return F.layer_norm(x, (width,), weight_D, bias_D, eps)
    return _LayerNorm.apply(x.reshape(-1, width), weight_D, bias_D, eps).view(x.shape)


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
            return layer_norm(x, self.weight, self.bias, self.eps).to(dtype)


def make_norm(kind: Literal["rmsnorm", "layernorm"], dim: int, eps: float = 0.0) -> nn.Module:
    """The normalisation layer of that name; eps 0 takes its own default."""
    chosen = {"eps": eps} if eps else {}
    return RMSNorm(dim, **chosen) if kind == "rmsnorm" else LayerNorm(dim, **chosen)
