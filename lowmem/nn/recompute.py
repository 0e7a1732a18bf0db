"""Activation checkpointing: what a block keeps for backward, and what it computes again.

none: everything that backward reads.
block: only the block's input; the whole forward runs again.
selective: the outputs of matrix products and of attention, and the residual stream; norms and activation functions,
    marked with `cheap`, run again. For a Llama-like block of width C and hidden width F that is, per token:

        kept always                    numbers      kept by none only          numbers
        block input, after attention   2 * C        both norm outputs          2 * C
        q, k, v                        3 * C        swiglu output              F
        attention output               C
        gate, up                       2 * F

    bf16, C = 1024, F = 2688: 32,512 bytes a layer and token become 23,040; block keeps 2,048.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lowmem.fake import autocast_kind


class _Recipe:
    """How to make a tensor again."""

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[Any, ...], output: torch.Tensor):
        self.function = function
        self.inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
        self.output: torch.Tensor | None = output.detach()
        device_type = autocast_kind(output)
        self.device_type = device_type
        self.autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def run(self) -> torch.Tensor:
        enabled, dtype = self.autocast
        with torch.no_grad(), torch.autocast(self.device_type, dtype=dtype, enabled=enabled):
            return self.function(*self.inputs)


class _Selective:
    """The recipes of one block; outputs are held until the block ends, so that no storage address is used twice."""

    def __init__(self) -> None:
        self.recipes: dict[int, _Recipe] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        recipe = self.recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None or tensor.dtype != recipe.output.dtype:  # type: ignore[union-attr]
            return tensor
        return recipe, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        recipe, size, stride, offset = packed
        return recipe.run().as_strided(size, stride, offset)

    def forget_outputs(self) -> None:
        for recipe in self.recipes.values():
            recipe.output = None


_active: ContextVar[_Selective | None] = ContextVar("lowmem_selective", default=None)


def cheap(function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """`function(*inputs)`, marked as cheaper to compute again than to keep.

    Args:
        function: deterministic, and returning a new contiguous tensor.
        inputs: tensors that backward keeps for another reason, and plain values.
    """
    output = function(*inputs)
    scope = _active.get()
    if scope is not None and torch.is_grad_enabled():
        scope.recipes[output.untyped_storage()._cdata] = _Recipe(function, inputs, output)
    return output


def run_block(block: Callable[..., torch.Tensor], hidden: torch.Tensor, mode: Literal["none", "block", "selective"]) -> torch.Tensor:
    """`block(hidden)`; gradients equal those of mode none bit for bit, random numbers included.

    Memory: see the table above.
    Source: Chen et al. 2016, arXiv:1604.06174 (block); Korthikanti et al. 2022, arXiv:2205.05198 (selective).
    """
    if mode == "none" or not torch.is_grad_enabled():
        return block(hidden)
    if mode == "block":
        return checkpoint(block, hidden, use_reentrant=False)
    scope = _Selective()
    token = _active.set(scope)
    try:
        with saved_tensors_hooks(scope.pack, scope.unpack):
            return block(hidden)
    finally:
        _active.reset(token)
        scope.forget_outputs()
