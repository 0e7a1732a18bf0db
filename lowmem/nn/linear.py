"""Dense linear layers that keep only their input and the stored weight for backward.

Shapes: N tokens, I features in, O features out.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.nn.quantized import dense
from lowmem.system.dry_run import autocast_kind


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias with the rows of `weight` cut into several contiguous outputs.

    Unlike F.linear it saves the stored weight itself: under autocast no 16-bit copy of it lives until backward, and a
    weight that is partitioned between uses (ZeRO-3) is not kept whole by a view. A quantised one is made for each product and dropped.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, splits, dtype):  # type: ignore[no-untyped-def]
        x = x.to(dtype)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.splits, ctx.dtype = splits, dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, bias.dtype if needs_bias else None
        return _outputs(x, weight, bias, splits, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x_NI, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        shape = grads[0].shape[:-1]
        grads = tuple(grad.reshape(-1, grad.shape[-1]) for grad in grads)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            parts = dense(weight, ctx.dtype).split(ctx.splits)
            grad_x = grads[0] @ parts[0]
            for grad, part in zip(grads[1:], parts[1:], strict=True):
                grad_x.addmm_(grad, part)
            grad_x = grad_x.view(*shape, -1)
        if needs_weight:
            x_NI = x_NI.reshape(-1, x_NI.shape[-1])
            grad_weight = x_NI.new_empty(sum(ctx.splits), x_NI.shape[-1])
            for grad, part in zip(grads, grad_weight.split(ctx.splits), strict=True):
                torch.mm(grad.t(), x_NI, out=part)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if needs_bias:
            grad_bias = torch.cat([grad.sum(0) for grad in grads]).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _outputs(x, weight, bias, splits, dtype) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
    parts = dense(weight, dtype).split(splits)
    biases = [None] * len(splits) if bias is None else bias.to(dtype).split(splits)
    return tuple(F.linear(x, part, b) for part, b in zip(parts, biases, strict=True))


def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, splits: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """`x @ weight.T + bias`, the output features cut into contiguous tensors.

    Args:
        x: (..., in).
        weight: (out, in), may be quantised; cast to the autocast dtype where autocast is on.
        bias: (out,) or None.
        splits: sizes that sum to `out`.
    Returns:
        One (..., size) tensor per size.
    Memory: saves `x` in the computing dtype; the weight is saved by reference.
    """
    dtype = compute_dtype(x)
    splits = tuple(splits)
    with torch.autocast(autocast_kind(x), enabled=False):
        if torch.is_grad_enabled():
            return _Linear.apply(x, weight, bias, splits, dtype)
        return _outputs(x.to(dtype), weight, bias, splits, dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`; see `split_linear`."""
    return split_linear(x, weight, bias, (weight.shape[0],))[0]


class Linear(nn.Linear):
    """A dense layer, normally initialised, possibly several layers of the same input stored as one.

    Args:
        std: standard deviation of the initial weights; the bias starts at zero.
        splits: output sizes; given, forward returns one contiguous tensor per size.
    Memory: in * out + out (with bias) weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, std: float = 0.02, splits: Sequence[int] = ()):
        self.std = std
        self.splits = tuple(splits)
        self.float8: Callable[..., tuple[torch.Tensor, ...]] | None = None  # `lowmem.nn.float8` sets it
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Draw the initial weights from the global generator."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def, override]
        """(..., in) -> (..., out), or a tuple of (..., size) when `splits` is given."""
        if self.float8 is not None:
            outputs = self.float8(x, self.weight, self.bias, self.splits or (self.out_features,))
            return outputs if self.splits else outputs[0]
        if self.splits:
            return split_linear(x, self.weight, self.bias, self.splits)
        return linear(x, self.weight, self.bias)


class CodedLinear(nn.Linear):
    """A linear layer whose weight, kept as codes, is made for each product and dropped, in the forward and again in the backward pass."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for the device of `x`, else the dtype of `x`."""
    device_type = autocast_kind(x)
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower: what sums and statistics are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
