"""Low-rank products of one input: y = up(act(down(x))) + bias, for one layer or for several that read the same x.

Shapes: N tokens, I features in, R ranks of all layers together, O features out.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lowmem.fake import autocast_kind
from lowmem.nn.precision import compute_dtype
from lowmem.nn.quantized import dense, dense_rows
from lowmem.nn.recompute import remember


class Factors(NamedTuple):
    """One low-rank layer.

    Attributes:
        down: (rank, in).
        up: (out, rank).
        bias: (out,) or None.
        splits: sizes that sum to `out`; one output per size.
        silu: apply SiLU between the factors.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    splits: tuple[int, ...]
    silu: bool


def low_rank(x: torch.Tensor, layers: Sequence[Factors]) -> tuple[torch.Tensor, ...]:
    """Outputs of every layer, cut as their `splits` say.

    The downward products of all layers are one product, and so are their gradients; the gradient of x is formed once.

    Args:
        x: (..., in); cast to the autocast dtype where autocast is on.
    Returns:
        One contiguous (..., size) tensor per split per layer.
    Memory: saves x and the (..., R) latents in the computing dtype, weights by reference.
    """
    dtype = compute_dtype(x)
    layout = tuple((layer.splits, layer.silu) for layer in layers)
    weights = [tensor for layer in layers for tensor in layer[:3]]
    with torch.autocast(autocast_kind(x), enabled=False):
        return _LowRank.apply(x, dtype, layout, *weights)


class _LowRank(torch.autograd.Function):
    """Saves the weights themselves: no 16-bit copies of them live until backward, and ZeRO-3 may partition them in between."""

    @staticmethod
    def forward(ctx, x, dtype, layout, *weights):  # type: ignore[no-untyped-def]
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        downs, ups, biases = weights[0::3], weights[1::3], weights[2::3]
        latent_NR = x_NI @ _stack(downs, dtype).t()
        ctx.save_for_backward(x_NI, latent_NR, *weights)
        ctx.layout, ctx.dtype, ctx.shape, ctx.x_dtype = layout, dtype, x.shape, x.dtype
        outputs = []
        for (splits, silu), latent, up, bias in zip(layout, latent_NR.split([d.shape[0] for d in downs], 1), ups, biases, strict=True):
            bias_parts = (None,) * len(splits) if bias is None else bias.split(splits)
            for stop, size, bias_part in zip(accumulate(splits), splits, bias_parts, strict=True):
                rows = slice(stop - size, stop)
                output = _expand(latent, up, rows, bias_part, silu)
                remember(output, _expand, latent, up, rows, bias_part, silu)
                outputs.append(output.view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x_NI, latent_NR, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        downs, ups, biases = weights[0::3], weights[1::3], weights[2::3]
        ranks = [down.shape[0] for down in downs]
        grad_latent_NR = torch.empty_like(latent_NR)
        weight_grads: list[torch.Tensor | None] = [None] * len(weights)
        remaining = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        for index, (splits, silu) in enumerate(ctx.layout):
            own, remaining = remaining[: len(splits)], remaining[len(splits) :]
            latent, grad_latent = latent_NR.split(ranks, 1)[index], grad_latent_NR.split(ranks, 1)[index]
            _gradient_of_latent(grad_latent, own, dense(ups[index], ctx.dtype).split(splits))
            if needs[3 + 3 * index + 1]:
                hidden = F.silu(latent) if silu else latent
                grad_up = latent.new_empty(sum(splits), ranks[index])
                for grad, part in zip(own, grad_up.split(splits), strict=True):
                    torch.mm(grad.t(), hidden, out=part)
                weight_grads[3 * index + 1] = grad_up.to(ups[index].dtype)
            if biases[index] is not None and needs[3 + 3 * index + 2]:
                weight_grads[3 * index + 2] = torch.cat([grad.sum(0) for grad in own]).to(biases[index].dtype)
            if silu:
                grad_latent.copy_(torch.ops.aten.silu_backward(grad_latent, latent))
        if any(needs[3::3]):
            stacked = grad_latent_NR.t() @ x_NI
            weight_grads[0::3] = [grad.to(down.dtype) for grad, down in zip(stacked.split(ranks), downs, strict=True)]
        grad_x = None
        if needs[0]:
            grad_x = (grad_latent_NR @ _stack(downs, ctx.dtype)).view(ctx.shape).to(ctx.x_dtype)
        return grad_x, None, None, *weight_grads


def _stack(downs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """(R, I) in `dtype`."""
    return dense(downs[0], dtype) if len(downs) == 1 else torch.cat([dense(down, dtype) for down in downs])


def _expand(latent_NR: torch.Tensor, up: torch.Tensor, rows: slice, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
    """(N, rank) -> (N, O) by `rows` of `up`, in the dtype of the latents."""
    hidden = F.silu(latent_NR) if silu else latent_NR
    return F.linear(hidden, dense_rows(up, rows, hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _gradient_of_latent(grad_latent: torch.Tensor, grads: Sequence[torch.Tensor], ups: Sequence[torch.Tensor]) -> None:
    torch.mm(grads[0], ups[0], out=grad_latent)
    for grad, up in zip(grads[1:], ups[1:], strict=True):
        grad_latent.addmm_(grad, up)
