"""Weights kept as codes of 8 or 4 bits: a tensor of a usual shape and dtype whose numbers exist only while they are multiplied."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from lowmem.system.dry_run import representative

WeightBits = Literal[8, 4]
BLOCK = 128  # numbers that share a scale, as in optimizer states
LARGEST_CODE = {8: 127, 4: 7}
_SMALLEST_NORMAL = 2.0**-126


def pack(codes: torch.Tensor) -> torch.Tensor:
    """(blocks, 128) codes in [0, 15] -> (blocks, 64) bytes."""
    low, high = codes.to(torch.uint8).split(BLOCK // 2, dim=1)
    return low | (high << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """(blocks, 64) bytes -> (blocks, 128) codes in [0, 15]."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def decode(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Whole blocks in fp32.

    Args:
        stored: (blocks, 128) int8, or (blocks, 64) uint8 for 4 bits.
        scale: (blocks,) fp32.
    Returns:
        (blocks, 128) fp32.
    """
    code = stored if stored.dtype == torch.int8 else unpack(stored).view(torch.int8) - (LARGEST_CODE[4] + 1)
    return code * scale.unsqueeze(1)


def encode(value: torch.Tensor, noise: torch.Tensor | None, bits: WeightBits) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of whole blocks, as `decode` reads them; a block that holds infinity or NaN becomes zero.

    Args:
        value: (blocks, 128) fp32.
        noise: (blocks, 128) random bits, the lower 16 are used: the mean of what is stored is `value`, to 2^-17 of the distance of
            two codes. None rounds to nearest.
    """
    top = float(LARGEST_CODE[bits])
    absmax = value.abs().amax(1)
    live = (absmax >= _SMALLEST_NORMAL * top) & (absmax < torch.inf)
    inverse = torch.where(live, torch.full_like(absmax, top) / absmax, 0.0)
    units = torch.where(live.unsqueeze(1), value * inverse.unsqueeze(1), 0.0)
    rounding = 0.5 if noise is None else ((noise & 0xFFFF).float() + 0.5) * 2.0**-16
    code = (units + rounding).floor().clamp(-top, top)
    scale = torch.where(live, absmax / torch.full_like(absmax, top), 0.0)
    return (code.to(torch.int8) if bits == 8 else pack(code + (top + 1))), scale


def decode_into(out: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> None:
    """`decode` without most of its temporaries."""
    wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    scale = scale.unsqueeze(1)
    if rows.dtype == torch.int8:
        torch.mul(rows, scale, out=wide)
    else:
        for half, nibbles in zip(wide.split(BLOCK // 2, dim=1), (rows & 15, rows >> 4), strict=True):
            torch.mul(nibbles.view(torch.int8).sub_(LARGEST_CODE[4] + 1), scale, out=half)
    if wide is not out:
        out.copy_(wide)


CODES, SCALE = ".codes", ".scale"  # what is added to a weight's name in a file
MIN_QUANTIZED_NUMEL = 4096  # smaller tensors stay as they are: they are nothing in memory and much in the result
_CHUNK_BLOCKS = 1024  # made at once: 512 KiB in fp32
_aten = torch.ops.aten


@dataclass(frozen=True)
class WeightFormat:
    """What the weights of a model are stored in.

    Attributes:
        dtype: of everything that is not quantised; the quantised weights pass for tensors of this dtype, and their gradients are.
        bits: of the matrices of linear and low-rank layers; embedding and head have 8 at least. None quantises nothing.
    """

    dtype: torch.dtype
    bits: WeightBits | None = None


class CodedWeight(torch.Tensor):
    """Looks like a dense tensor of `shape` and `dtype` to autograd, to optimizers and to whoever counts parameters; holds codes.

    Layers ask for numbers with `dense` and `dense_rows`. Any other operation makes the whole weight for as long as it lasts; writing into
    it is refused. Converting it to another dtype returns an ordinary tensor, moving it to another device does not.

    Attributes:
        PARTS: by what is added to a weight's name in a file, the attributes with the tensors that are kept; those that are None are not.
    """

    PARTS: ClassVar[dict[str, str]]

    def parts(self) -> dict[str, torch.Tensor]:
        """What memory and files hold of it, by what is added to its name."""
        held = {suffix: getattr(self, attribute) for suffix, attribute in self.PARTS.items()}
        return {suffix: part for suffix, part in held.items() if part is not None}

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "CodedWeight":
        """The same weight with each of its parts changed."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight as an ordinary tensor."""
        raise NotImplementedError

    def rows(self, which: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows as an ordinary tensor."""
        return self.dense(dtype)[which]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [self.PARTS[suffix] for suffix in self.parts()], (self.shape, self.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if func._schema.is_mutable:
            raise TypeError(f"{func} would write into a quantised weight, which only an optimizer may; write into .dense(dtype) instead")
        return func(*(_made(value) for value in args), **{name: _made(value) for name, value in kwargs.items()})


class QuantizedWeight(CodedWeight):
    """A weight that is trained: codes of evenly spaced numbers. Its gradient is an ordinary tensor of its shape and dtype.

    Looking up rows of an embedding makes only those.

    Attributes:
        codes: (blocks * 128,) int8, or (blocks * 64,) uint8 for 4 bits.
        scale: (blocks,) fp32.
        bits: 8 or 4.
    Memory: 1.03 or 0.53 bytes a number; no copy in floating point is kept.
    """

    PARTS: ClassVar = {CODES: "codes", SCALE: "scale"}
    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> "QuantizedWeight":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)  # type: ignore[attr-defined]

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype):
        self.codes, self.scale = codes, scale

    @property
    def bits(self) -> WeightBits:
        """Of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedWeight":
        return QuantizedWeight(change(self.codes), change(self.scale), self.shape, self.dtype)

    def blocks(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of the blocks that hold the numbers start, start + 1, ..., sharing memory.

        Args:
            start: a multiple of 128.
        """
        first, last = start // BLOCK, -(-(start + count) // BLOCK)
        size = BLOCK * self.bits // 8
        return self.codes[first * size : last * size], self.scale[first:last]

    def numbers(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The numbers start, start + 1, ... in `dtype`, flat.

        Memory: them, and 1.5 MiB.
        """
        skipped = start % BLOCK
        codes, scale = self.blocks(start - skipped, count + skipped)
        rows = codes.view(-1, BLOCK * self.bits // 8)
        made = torch.empty(len(rows) * BLOCK, dtype=dtype, device=codes.device)
        for first in representative(range(0, len(rows), _CHUNK_BLOCKS), codes):
            part = slice(first, min(first + _CHUNK_BLOCKS, len(rows)))
            decode_into(made[first * BLOCK : part.stop * BLOCK].view(-1, BLOCK), rows[part], scale[part])
        return made[skipped : skipped + count]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.numbers(0, self.numel(), dtype).view(self.shape)

    def rows(self, which: slice, dtype: torch.dtype) -> torch.Tensor:
        start, stop, _ = which.indices(self.shape[0])
        width = self.numel() // self.shape[0]
        return self.numbers(start * width, (stop - start) * width, dtype).view(stop - start, *self.shape[1:])

    def some_rows(self, which: slice) -> "QuantizedWeight":
        """Some rows as they are stored, sharing memory.

        Args:
            which: the first one begins at a multiple of 128 numbers.
        """
        start, stop, _ = which.indices(self.shape[0])
        width = self.numel() // self.shape[0]
        if start * width % BLOCK:
            raise ValueError(f"row {start} begins at number {start * width}, must begin at a multiple of {BLOCK}")
        return QuantizedWeight(*self.blocks(start * width, (stop - start) * width), torch.Size((stop - start, *self.shape[1:])), self.dtype)

    def chosen_rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows of those numbers as an ordinary tensor.

        Args:
            ids: (n,) int64.
        Memory: them; 8 MiB where rows are not whole blocks.
        """
        width = self.numel() // self.shape[0]
        size = BLOCK * self.bits // 8
        codes_BS, made = self.codes.view(-1, size), self.scale.new_empty(len(ids), width, dtype=dtype)
        within = torch.arange(width, device=ids.device)
        span = (width + BLOCK - 2) // BLOCK + 1 if width % BLOCK else width // BLOCK  # blocks that a row may touch
        each = torch.arange(span, device=ids.device)
        at_once = max(1, _CHUNK_BLOCKS // span)
        for first in representative(range(0, len(ids), at_once), self.codes):
            begins = ids[first : first + at_once] * width
            touched = ((begins // BLOCK).unsqueeze(1) + each).clamp_(max=len(codes_BS) - 1).flatten()
            numbers = made.new_empty(len(touched), BLOCK)
            decode_into(numbers, codes_BS[touched], self.scale[touched])
            numbers = numbers.view(len(begins), -1)
            out = made[first : first + at_once]
            if width % BLOCK:
                torch.gather(numbers, 1, (begins % BLOCK).unsqueeze(1) + within, out=out)
            else:
                out.copy_(numbers)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({tuple(self.shape)}, bits={self.bits}, dtype={self.dtype}, requires_grad={self.requires_grad})"

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, outer_size: Any, outer_stride: Any) -> "QuantizedWeight":
        return QuantizedWeight(inner["codes"], inner["scale"], *context)


def quantize(tensor: torch.Tensor, bits: WeightBits) -> QuantizedWeight:
    """`tensor` in codes, rounded to nearest, with its shape and dtype.

    Memory: the codes, and 8 MiB.
    """
    flat = tensor.detach().contiguous().view(-1)
    blocks = -(-flat.numel() // BLOCK)
    dtype = torch.int8 if bits == 8 else torch.uint8
    result = QuantizedWeight(
        torch.empty(blocks * BLOCK * bits // 8, dtype=dtype, device=tensor.device),
        torch.empty(blocks, dtype=torch.float32, device=tensor.device), tensor.shape, tensor.dtype,
    )  # fmt: skip
    for first in representative(range(0, blocks, _CHUNK_BLOCKS), flat):
        part = flat[first * BLOCK : (first + _CHUNK_BLOCKS) * BLOCK].float()
        part = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        codes, scale = result.blocks(first * BLOCK, part.numel())
        new_codes, new_scale = encode(part, None, bits)
        codes.copy_(new_codes.view(-1))
        scale.copy_(new_scale)
    return result


def dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` as an ordinary tensor of `dtype`: itself, where it is one.

    Memory: a copy, where it is quantised or has another dtype.
    """
    return weight.dense(dtype) if isinstance(weight, CodedWeight) else weight.to(dtype)


def dense_rows(weight: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of `weight`; see `dense`."""
    return weight.rows(rows, dtype) if isinstance(weight, CodedWeight) else weight[rows].to(dtype)


def stored_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What memory and files hold of `tensors`: of a quantised one its codes and scales, by its name and what they are."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts = tensor.parts() if isinstance(tensor, CodedWeight) else {"": tensor}
        stored |= {name + suffix: part for suffix, part in parts.items()}
    return stored


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of `tensors` as they are kept."""
    return sum(part.numel() * part.element_size() for tensor in tensors for part in stored_tensors({"": tensor}).values())


def dequantized(tensors: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
    """What a file holds with whole weights in fp32 in place of codes and scales.

    Args:
        tensors: of a file, by name.
        shapes: of the model's weights. What has no place there is handed on as it is.
    Memory: one weight, and what came before its other half.
    """
    halves: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        whole, suffix = name[: -len(CODES)], name[-len(CODES) :]
        if suffix not in (CODES, SCALE) or whole not in shapes:
            yield name, tensor
            continue
        halves[name] = tensor
        if whole + CODES in halves and whole + SCALE in halves:
            codes, scale = halves[whole + CODES], halves[whole + SCALE]
            if _fits(codes, scale, shapes[whole]):
                del halves[whole + CODES], halves[whole + SCALE]
                yield whole, QuantizedWeight(codes, scale, shapes[whole], torch.float32).dense(torch.float32)
    yield from halves.items()


def assign(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value` into `target`, as the nearest codes where that is quantised.

    Memory: the codes of one weight.
    """
    if isinstance(target, QuantizedWeight):
        nearest = quantize(value, target.bits)
        target.codes.copy_(nearest.codes)
        target.scale.copy_(nearest.scale)
    else:
        target.copy_(value)


def _fits(codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> bool:
    blocks = -(-shape.numel() // BLOCK)
    size = {torch.int8: BLOCK, torch.uint8: BLOCK // 2}.get(codes.dtype)
    return size is not None and codes.shape == (blocks * size,) and scale.shape == (blocks,) and scale.dtype == torch.float32


def _made(value: Any) -> Any:
    """`value` with whole weights in place of quantised ones."""
    if isinstance(value, CodedWeight):
        return value.dense(value.dtype)
    if isinstance(value, list | tuple):
        return type(value)(_made(item) for item in value)
    return value


def _to_copy(weight: CodedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **more: Any) -> torch.Tensor:
    device = device or weight.device
    if dtype not in (None, weight.dtype):
        return weight.dense(dtype).to(device)  # type: ignore[arg-type]
    return weight.changed(lambda part: part.to(device, copy=True))


def _embedding(weight: CodedWeight, indices: torch.Tensor, *_: Any) -> torch.Tensor:
    """The rows of an embedding that are asked for."""
    if not isinstance(weight, QuantizedWeight):
        return _aten.embedding.default(weight.dense(weight.dtype), indices)
    return weight.chosen_rows(indices.flatten(), weight.dtype).view(*indices.shape, weight.shape[1])


def _part(weight: CodedWeight) -> torch.Tensor:
    return next(iter(weight.parts().values()))


def _kind(weight: CodedWeight, more: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": more.get("dtype") or weight.dtype, "device": more.get("device") or weight.device}


_HANDLERS: dict[Any, Callable[..., torch.Tensor]] = {
    _aten.detach.default: lambda weight: weight.changed(lambda part: part),
    _aten.alias.default: lambda weight: weight.changed(lambda part: part),
    _aten.clone.default: lambda weight, **_: weight.changed(torch.clone),
    _aten._to_copy.default: _to_copy,
    _aten.embedding.default: _embedding,
    _aten.new_empty.default: lambda weight, size, **more: _part(weight).new_empty(size, **{"dtype": weight.dtype, **more}),
    _aten.new_zeros.default: lambda weight, size, **more: _part(weight).new_zeros(size, **{"dtype": weight.dtype, **more}),
    _aten.empty_like.default: lambda weight, **more: torch.empty(weight.shape, **_kind(weight, more)),
    _aten.zeros_like.default: lambda weight, **more: torch.zeros(weight.shape, **_kind(weight, more)),
}
