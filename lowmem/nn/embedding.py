"""Embedding lookups whose gradient is summed in fp32, whatever the weight's dtype.

PyTorch adds the rows of a gradient in the dtype of the weight: in bf16 a row that 8,192 equal tokens chose gets an eighth of its sum.

Shapes: N tokens, V rows, C width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.fake import representative
from lowmem.nn.precision import accumulate_dtype

WIDE_BYTES = 32 << 20  # fp32 alive at once while a narrower gradient is summed
MIN_COLUMNS = 32  # narrower blocks would move more bytes of cache lines than numbers


class _Embedding(torch.autograd.Function):
    """Saves the indices; of the weight only its shape and dtype are needed again, so that ZeRO-3 may partition it in between."""

    @staticmethod
    def forward(ctx, indices, weight, padding_idx):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(indices)
        ctx.rows, ctx.dtype, ctx.padding_idx = weight.shape[0], weight.dtype, padding_idx
        return F.embedding(indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (indices,) = ctx.saved_tensors
        return None, embedding_gradient(indices, grad, ctx.rows, ctx.padding_idx).to(ctx.dtype), None


def embedding(indices: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """The rows `indices` of `weight`.

    Args:
        indices: (...) integers.
        weight: (V, C), may be quantised.
        padding_idx: a row without gradient, from 0 on or from the end.
    Returns:
        (..., C) in the dtype of `weight`.
    Memory: saves the indices; see `embedding_gradient`.
    """
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _Embedding.apply(indices, weight, -1 if padding_idx is None else padding_idx)


def embedding_gradient(indices: torch.Tensor, grad: torch.Tensor, rows: int, padding_idx: int = -1) -> torch.Tensor:
    """For every row the sum of the gradients of the tokens that chose it, in fp32 (fp64 for fp64), rounded once; always the same bits.

    Args:
        indices: (...) integers.
        grad: (..., C).
        rows: V.
        padding_idx: a row that gets nothing; -1 for none.
    Returns:
        (V, C) in the dtype of `grad`.
    Memory: the result; for 16-bit gradients some columns of both in fp32 as well, together `WIDE_BYTES` or 32 columns.
    """
    width = grad.shape[-1]
    grad_NC, indices_N = grad.reshape(-1, width), indices.reshape(-1)
    wide = accumulate_dtype(grad.dtype)
    if grad.dtype == wide:
        return torch.ops.aten.embedding_dense_backward(grad_NC, indices_N, rows, padding_idx, False)
    fitting = WIDE_BYTES // (wide.itemsize * (rows + len(indices_N)))
    columns = min(max(fitting // MIN_COLUMNS, 1) * MIN_COLUMNS, width)
    result_VC = grad.new_empty(rows, width)
    starts = range(0, width, columns)
    for start in representative(starts, grad, distinct=1 if width % columns == 0 else len(starts)):
        part = slice(start, min(start + columns, width))
        wide_part = grad_NC[:, part].to(wide, memory_format=torch.contiguous_format)
        result_VC[:, part] = torch.ops.aten.embedding_dense_backward(wide_part, indices_N, rows, padding_idx, False)
    return result_VC


class Embedding(nn.Embedding):
    """nn.Embedding with the gradient of `embedding`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) integers -> (..., C)."""
        return embedding(input, self.weight, self.padding_idx)
