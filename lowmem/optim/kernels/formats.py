"""The formats of optimizer states, one per width: numbers that the three kernel implementations share.

A tensor is cut into blocks of 128 numbers in the order of its memory. Each block of a state has one fp32 scale and a code per number.

    state        8 bits                              4 bits
    exp_avg      c in [-127, 127], int8              c in [-7, 7], stored as c + 8
                 value = scale * c * |c|             the same; scale = absmax / 127^2 or / 7^2
    exp_avg_sq   c in [0, 255]                       c in [0, 15]
                 the leading bits of an fp32 number in (0, 1]: 4 bits of exponent and 4, or 1, of mantissa;
                 value = scale * number, scale = the block's largest; c = 255 or 15 is 1, c = 0 is 1.6e-5 or 5.9e-3, never zero

exp_avg is rounded to the nearest value; exp_avg_sq is rounded up or down at random so that its mean is exact, because its change per
step is far smaller than the distance of two codes. Numbers below the smallest code of exp_avg_sq become it.

Two 4-bit codes share a byte: byte i of a block holds number i in its low half and number i + 64 in its high half.
"""

from dataclasses import dataclass
from typing import Literal

BLOCK = 128  # numbers that share a scale
MIN_QUANTIZED_NUMEL = 4096  # smaller tensors (norms, biases) keep fp32 states: they are nothing in memory and much in the result
StateBits = Literal[32, 8, 4]
_ONE_BITS = 0x3F800000  # fp32 1.0


@dataclass(frozen=True)
class Format:
    """One width.

    Attributes:
        bits: per number.
        signed_max: largest code of exp_avg.
        unsigned_max: largest code of exp_avg_sq.
        shift: low bits of fp32 that an exp_avg_sq code leaves out.
    """

    bits: int
    signed_max: int
    unsigned_max: int
    shift: int

    @property
    def base(self) -> int:
        """Code 0 of exp_avg_sq as leading bits of fp32."""
        return (_ONE_BITS >> self.shift) - self.unsigned_max

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of one state; the last block is padded."""
        return scale_count(numel) * BLOCK * self.bits // 8


def scale_count(numel: int) -> int:
    """Blocks, and so scales, of a tensor."""
    return -(-numel // BLOCK)


def state_bytes(numel: int, bits: StateBits) -> int:
    """Bytes of one state of a tensor; small tensors keep 32 bits."""
    if bits == 32 or numel < MIN_QUANTIZED_NUMEL:
        return 4 * numel
    return FORMATS[bits].code_bytes(numel) + 4 * scale_count(numel)


FORMATS = {8: Format(bits=8, signed_max=127, unsigned_max=255, shift=19), 4: Format(bits=4, signed_max=7, unsigned_max=15, shift=22)}
