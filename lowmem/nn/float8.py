"""Matrix products of dense layers in fp8, through torchao's tensor-wise dynamic scaling.

Shapes: N tokens, I features in, O features out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.nn.linear import Linear, compute_dtype
from lowmem.system.dry_run import autocast_kind
from lowmem.system.errors import ConfigError

MULTIPLE = 16  # of every dimension of a product on tensor cores


@dataclass(frozen=True)
class Float8Products:
    """How a layer multiplies: inputs and weights as e4m3, gradients of outputs as e5m2, each with one scale, the result in bf16.

    Args:
        emulate: multiply the rounded numbers in fp32, which every device can: for checking.
    """

    emulate: bool = False

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, splits: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """`x @ weight.T + bias`, the output features cut as `splits` say; see `lowmem.nn.linear.split_linear`.

        Memory: saves `x` in the computing dtype and the weight by reference; one fp8 copy of each operand while a product runs.
        """
        dtype = compute_dtype(x)
        with torch.autocast(autocast_kind(x), enabled=False):
            return _Float8Linear.apply(x, weight, bias, tuple(splits), dtype, self.emulate)


def use_float8(model: nn.Module, *, emulate: bool = False) -> int:
    """Have the dense layers of `model` multiply in fp8; the number of layers that do.

    Those stay in bf16 that have a width, or a width of a split, that is no multiple of 16; so do low-rank layers, whose inner products
    are too thin to gain, and norms.

    Args:
        model: the blocks of a language model, whose embedding and head are to stay in bf16.
        emulate: see `Float8Products`.
    Raises:
        ConfigError: no layer is left.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear) and fits_float8(module)]
    if not layers:
        raise ConfigError(
            f"train.precision is fp8, but no dense layer of this model has widths that are all multiples of {MULTIPLE} (low-rank layers "
            "compute in bf16); use train.precision=bf16"
        )
    for layer in layers:
        layer.float8 = Float8Products(emulate)
    return len(layers)


def fits_float8(layer: Linear) -> bool:
    """Whether all widths are multiples of 16."""
    return all(width % MULTIPLE == 0 for width in (layer.in_features, layer.out_features, *layer.splits))


class _Float8Linear(torch.autograd.Function):
    """Rounds each operand anew for every product, so that nothing but the input lives until backward.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3: e4m3 forward, e5m2 for gradients.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, splits, dtype, emulate):  # type: ignore[no-untyped-def]
        x = x.to(dtype)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.splits, ctx.dtype, ctx.emulate = splits, dtype, emulate
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, bias.dtype if needs_bias else None
        x_NI = _cast(x.reshape(-1, x.shape[-1]), "input", emulate)
        biases = [None] * len(splits) if bias is None else bias.to(dtype).split(splits)
        outputs = []
        for part_OI, part_bias in zip(weight.to(dtype).split(splits), biases, strict=True):
            y = torch.mm(x_NI, _cast(part_OI.t(), "weight", emulate))
            y = y if part_bias is None else y.add_(part_bias)
            outputs.append(y.view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        shape = grads[0].shape[:-1]
        grads_NO = [grad.reshape(-1, grad.shape[-1]).to(ctx.dtype).contiguous() for grad in grads]
        x_NI = _cast(x.reshape(-1, x.shape[-1]), "input", ctx.emulate) if needs_weight else grads[0]
        parts = weight.to(ctx.dtype).split(ctx.splits) if needs_x else [None] * len(grads)
        grad_x, grad_weight = None, []
        for grad, part_OI in zip(grads_NO, parts, strict=True):
            rounded = _cast(grad, "grad_output", ctx.emulate)
            if needs_x:
                product = torch.mm(rounded, _cast(part_OI.t(), "weight", ctx.emulate).t())
                grad_x = product if grad_x is None else grad_x.add_(product)
            if needs_weight:
                grad_weight.append(torch.mm(rounded.t(), x_NI))
        grad_bias = torch.cat([grad.sum(0) for grad in grads_NO]).to(ctx.bias_dtype) if needs_bias else None
        weights = torch.cat(grad_weight).to(ctx.weight_dtype) if needs_weight else None
        return None if grad_x is None else grad_x.view(*shape, -1), weights, grad_bias, None, None, None


def _cast(x: torch.Tensor, role: str, emulate: bool) -> torch.Tensor:
    """`x` in fp8 with the scale that its largest number asks for; a product of two such tensors is one in fp8."""
    library, roles, config = _torchao(emulate)
    return library(x, torch.float8_e5m2 if role == "grad_output" else torch.float8_e4m3fn, config, gemm_input_role=roles[role])


@cache
def _torchao(emulate: bool) -> tuple[Any, dict[str, Any], Any]:
    """torchao, imported when a product first needs it: that takes seconds and 100s of MB."""
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig, ScaledMMConfig

    roles = {"input": GemmInputRole.INPUT, "weight": GemmInputRole.WEIGHT, "grad_output": GemmInputRole.GRAD_OUTPUT}
    # the number of tokens, which is the inner dimension of a weight's gradient, need not be a multiple of 16
    output, gradient = (ScaledMMConfig(emulate, fast and not emulate, False, not emulate) for fast in (True, False))
    return hp_tensor_to_float8_dynamic, roles, LinearMMConfig(output, gradient, gradient)
