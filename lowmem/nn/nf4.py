"""Frozen weights in NF4: codes of 4 bits whose numbers are the quantiles of a normal distribution, by the kernels of bitsandbytes.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lowmem.nn.arrival import on_arrival
from lowmem.nn.linear import CodedLinear
from lowmem.nn.quantized import CODES, CodedWeight
from lowmem.system.dry_run import representative
from lowmem.system.errors import ConfigError

BLOCK = 64  # numbers that share a scale
SCALE_BLOCK = 256  # scales that share one, with double quantisation
_CHUNK = 1 << 20  # numbers that are quantised at once: bitsandbytes' kernel for CPUs takes 20 bytes for each
_ops = torch.ops


@dataclass(frozen=True)
class Nf4:
    """How weights are kept in NF4.

    Attributes:
        double: their scales in 8 bits, too.
    """

    double: bool = True


class Nf4Weight(CodedWeight):
    """A frozen weight of a linear layer.

    Attributes:
        codes: (numbers / 2,) uint8, the first of two in the upper bits.
        absmax: (blocks,) fp32, or uint8 with double quantisation.
        scale: (blocks / 256,) fp32, the scales of `absmax`, and offset: what is added to their products; None without double quantisation.
    Memory: 0.5625 bytes a number, 0.516 with double quantisation; no copy in floating point is kept.
    """

    PARTS: ClassVar = {CODES: "codes", ".absmax": "absmax", ".absmax_scale": "scale", ".absmax_offset": "offset"}
    codes: torch.Tensor
    absmax: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None

    @staticmethod
    def __new__(cls, parts: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> "Nf4Weight":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts["codes"].device)  # type: ignore[attr-defined]

    def __init__(self, parts: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype):
        for attribute in self.PARTS.values():
            setattr(self, attribute, parts.get(attribute))

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Nf4Weight":
        return Nf4Weight({self.PARTS[suffix]: change(part) for suffix, part in self.parts().items()}, self.shape, self.dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        wanted, dtype = dtype, torch.float32 if dtype == torch.float64 else dtype
        absmax = self._scales()
        if self.codes.is_meta:
            return torch.empty(self.shape, dtype=wanted, device="meta")
        made = _ops.bitsandbytes.dequantize_4bit.default(self.codes, absmax, BLOCK, "nf4", list(self.shape), dtype)
        return made.view(self.shape).to(wanted)

    def _scales(self) -> torch.Tensor:
        if self.scale is None:
            return self.absmax
        if self.codes.is_meta:
            return torch.empty(self.absmax.shape, dtype=torch.float32, device="meta")
        table = _scale_table(self.codes.device)
        absmax = _ops.bitsandbytes.dequantize_blockwise.default(self.absmax, self.scale, table, SCALE_BLOCK, torch.float32)
        return absmax.add_(self.offset)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Nf4Weight({tuple(self.shape)}, dtype={self.dtype}, double={self.scale is not None})"

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, outer_size: Any, outer_stride: Any) -> "Nf4Weight":
        return Nf4Weight(inner, *context)


class Nf4Linear(CodedLinear):
    """A linear layer with a frozen weight in NF4."""


def quantize_nf4(tensor: torch.Tensor, double: bool) -> Nf4Weight:
    """`tensor` in NF4, with its shape and dtype; on the meta device what that would take.

    Args:
        double: keep the scales in 8 bits, too.
    Raises:
        ConfigError: bitsandbytes is missing.
    Memory: the codes, some 20 MiB, and with double quantisation 8 bytes for each scale.
    """
    functional = import_bitsandbytes().functional
    flat = tensor.detach().reshape(-1)
    count, blocks = flat.numel(), -(-flat.numel() // BLOCK)
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    for first in representative(range(0, count, _CHUNK), flat):
        part = flat[first : first + _CHUNK]
        if flat.is_meta:
            break
        packed, scales = _ops.bitsandbytes.quantize_4bit.default(part, BLOCK, "nf4", torch.uint8)
        codes[first // 2 : first // 2 + packed.numel()] = packed.view(-1)
        absmax[first // BLOCK : first // BLOCK + scales.numel()] = scales
    parts = {"codes": codes, "absmax": absmax}
    if double and flat.is_meta:
        one = torch.empty((), dtype=torch.float32, device="meta")
        narrow = torch.empty(blocks, dtype=torch.uint8, device="meta")
        parts |= {"absmax": narrow, "scale": one.new_empty(-(-blocks // SCALE_BLOCK)), "offset": one}
    elif double:
        offset = absmax.mean()
        narrow, state = functional.quantize_blockwise(absmax - offset, blocksize=SCALE_BLOCK)
        parts |= {"absmax": narrow, "scale": state.absmax, "offset": offset}
    return Nf4Weight(parts, tensor.shape, tensor.dtype)


def store_linears_as_nf4(blocks: nn.Module, double: bool) -> None:
    """Put every linear layer of `blocks` into NF4, in place.

    Raises:
        ConfigError: bitsandbytes is missing, or there is no such layer.
    Memory: one layer more at a time.
    """
    for layer in plain_linears(blocks, "nf4"):
        layer.weight = nn.Parameter(quantize_nf4(layer.weight, double), requires_grad=False)
        layer.__class__ = Nf4Linear


def quantise_on_arrival(blocks: nn.Module, double: bool) -> None:
    """Have every linear layer of `blocks` put the weight that it is given next into NF4, so that a model is never whole while it is read.

    Raises:
        ConfigError: see `store_linears_as_nf4`.
    """
    import_bitsandbytes()

    def take(layer: nn.Module, weight: nn.Parameter) -> nn.Parameter:
        layer.__class__ = Nf4Linear
        return nn.Parameter(quantize_nf4(weight, double), requires_grad=False)

    for layer in plain_linears(blocks, "nf4"):
        on_arrival(layer, take)


def plain_linears(blocks: nn.Module, weight_dtype: str) -> list[nn.Linear]:
    """The linear layers of a model's blocks.

    Args:
        weight_dtype: what they are to be kept in, for the message.
    Raises:
        ConfigError: there are none.
    """
    found = [layer for layer in blocks.modules() if type(layer) is nn.Linear]
    if not found:
        raise ConfigError(
            f"train.weight_dtype={weight_dtype} stores linear layers, and the blocks of this model have none (GPT-2 of transformers has "
            "layers of its own kind, Conv1D); use bf16"
        )
    return found


def import_bitsandbytes() -> Any:
    """The library.

    Raises:
        ConfigError: it is missing.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package for kernels that are not used here
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("train.weight_dtype=nf4 needs bitsandbytes; pip install 'lowmem[bnb]'") from error
    return bitsandbytes


def _scale_table(device: torch.device) -> torch.Tensor:
    """The numbers that 8-bit scales stand for."""
    functional = import_bitsandbytes().functional
    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()
    return functional.name2qmap["dynamic"].to(device)
