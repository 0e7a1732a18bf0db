"""The formats of quantised weights: numbers that the layers and the three optimizer kernels share.

A weight is cut into blocks of 128 numbers in the order of its memory. A block has one fp32 scale, and each number a code:

    bits   codes                                bytes a number
    8      c in [-127, 127], int8               1.03
    4      c in [-7, 7], stored as c + 8        0.53; byte i of a block holds number i in its low half and number i + 64 in its high half

value = c * scale, and scale = largest magnitude of the block / 127 or / 7, so that the largest number is a code itself. Rounding is at
random with the number as its mean (`noise`): an update is far smaller than the distance of two codes, and nearest rounding would undo it.
"""

from typing import Literal

import torch

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
