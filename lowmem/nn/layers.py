"""The layers between products of attention: embedding, norms, feed-forward layers, heads."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.nn.linear import Linear, accumulate_dtype, compute_dtype, linear
from lowmem.nn.lorpt import LinearFactory, LoRPtLinear, bottleneck_of, lorpt_rank
from lowmem.nn.loss import CrossEntropyOptions, chunked_cross_entropy
from lowmem.nn.recompute import cheap
from lowmem.system.dry_run import autocast_kind, device_kind, representative

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


def embedding_gradient(
    indices: torch.Tensor, grad: torch.Tensor, rows: int, padding_idx: int = -1, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """For every row the sum of the gradients of the tokens that chose it, in fp32 (fp64 for fp64), rounded once; always the same bits.

    Args:
        indices: (...) integers.
        grad: (..., C).
        rows: V.
        padding_idx: a row that gets nothing; -1 for none.
        dtype: of the result; None is that of `grad`.
    Returns:
        (V, C).
    Memory: the result; for 16-bit gradients some columns of both in fp32 as well, together `WIDE_BYTES` or 32 columns.
    """
    width = grad.shape[-1]
    grad_NC, indices_N = grad.reshape(-1, width), indices.reshape(-1)
    wide = accumulate_dtype(grad.dtype)
    if grad.dtype == wide:
        return torch.ops.aten.embedding_dense_backward(grad_NC, indices_N, rows, padding_idx, False)
    fitting = WIDE_BYTES // (wide.itemsize * (rows + len(indices_N)))
    columns = min(max(fitting // MIN_COLUMNS, 1) * MIN_COLUMNS, width)
    result_VC = grad.new_empty(rows, width, dtype=dtype)
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


class DenseHead(Linear):
    """A (V, C) matrix, with or without bias."""

    def forward(self, hidden, targets=None, denominator=1.0, options=CrossEntropyOptions()):  # type: ignore[no-untyped-def, override] # noqa: B008
        """Logits (..., V), or with `targets` the loss of `chunked_cross_entropy`."""
        if targets is None:
            return super().forward(hidden)
        return chunked_cross_entropy(hidden, self.weight, self.bias, targets, denominator, options)


class LoRPtHead(LoRPtLinear):
    """Two factors; the loss runs over chunks of the second one."""

    def forward(self, hidden, targets=None, denominator=1.0, options=CrossEntropyOptions()):  # type: ignore[no-untyped-def, override] # noqa: B008
        """Logits (..., V), or with `targets` the loss of `chunked_cross_entropy`."""
        if targets is None:
            return super().forward(hidden)
        return chunked_cross_entropy(self.latent(hidden), self.up, self.bias, targets, denominator, options)


class TiedHead(nn.Module):
    """No weights of its own: it is handed the embedding's."""

    def forward(self, hidden, weight, targets=None, denominator=1.0, options=CrossEntropyOptions()):  # type: ignore[no-untyped-def] # noqa: B008
        """Logits (..., V), or with `targets` the loss of `chunked_cross_entropy`."""
        if targets is None:
            return linear(hidden, weight)
        return chunked_cross_entropy(hidden, weight, None, targets, denominator, options)


def make_head(dim: int, vocab_size: int, bias: bool, factory: LinearFactory, name: str = "head") -> DenseHead | LoRPtHead:
    """The untied head that the factory's LoRPt settings ask for under this name.

    Raises:
        ConfigError: the rank saves nothing.
    """
    factory.note("head", name)
    lorpt = factory.lorpt
    rank = lorpt_rank(lorpt, "head", name)
    if rank == 0:
        return DenseHead(dim, vocab_size, bias)
    return LoRPtHead(dim, vocab_size, rank, bias, bottleneck_of(lorpt), lorpt.init)


class ExactLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension with the gradients of `lowmem.nn.layers.layer_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return layer_norm(input, self.weight, self.bias, self.eps)


def use_exact_gradients(model: nn.Module) -> None:
    """Have the embeddings and layer norms of any model sum the gradients of their weights in fp32.

    What they compute, their names and their weights stay. A class derived from nn.Embedding keeps its own forward, of which
    nn.Embedding's is a part: one that scales what was looked up scales it still. Embeddings that rescale their rows (max_norm), weigh
    gradients by frequency or make sparse ones are left alone, and so are norms over several dimensions.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None):
            _derive(module, nn.Embedding, Embedding)
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            _derive(module, nn.LayerNorm, ExactLayerNorm)


def _derive(module: nn.Module, general: type[nn.Module], exact: type[nn.Module]) -> None:
    """Put `exact` before `general` among the classes that `module` inherits from."""
    kind = type(module)
    if not issubclass(kind, exact):
        module.__class__ = exact if kind is general else type(kind.__name__, (kind, exact), {})
