"""The formats of optimizer states, one per width: constants that the three kernel implementations share.

A tensor is cut into blocks of 128 elements in the order of its memory. Each block of a state has one fp32 scale and a code per element.

    state        8 bits                              4 bits
    exp_avg      c in [-127, 127], int8              c in [-7, 7], stored as c + 8
                 value = scale * c * |c|             the same; scale = absmax / 127^2 or / 7^2
    exp_avg_sq   c in [0, 255]                       c in [0, 15]
                 the leading bits of an fp32 number in (0, 1]: 4 bits of exponent and 4, or 1, of mantissa;
                 value = scale * number, scale = the block's largest; c = 255 or 15 is 1, c = 0 is 1.6e-5 or 5.9e-3, never zero

Both are rounded up or down at random so that their mean is exact, each with random bits of its own: an average over steps changes by far
less than the distance of two codes, and rounded to the nearest it would stay where it is. Values below the smallest code of exp_avg_sq
become it.

Two 4-bit codes share a byte: byte i of a block holds element i in its low half and element i + 64 in its high half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

BLOCK = 128  # elements that share a scale
MIN_QUANTIZED_NUMEL = 4096  # smaller tensors keep fp32 states: they are nothing in memory and much in the result
StateBits = Literal[32, 8, 4]
_ONE_BITS = 0x3F800000  # fp32 1.0


@dataclass(frozen=True)
class Format:
    """One width.

    Attributes:
        bits: per element.
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


def state_bits_of(shape: Sequence[int], bits: StateBits, *, ranks: int = 1, flattened: bool = False) -> StateBits:
    """Width of the states of a tensor whose optimizer asks for `bits`.

    Small tensors and those of one dimension (norms, biases) keep 32 bits. 4 bits need blocks that begin at rows, which are multiples of
    128 then: where rows share a block, as those of frequent and rare tokens in an embedding, exp_avg_sq of the rare ones would be less
    than the smallest code. Other tensors have 8 bits instead.

    Args:
        ranks: the elements are divided among so many, in as many equal pieces.
        flattened: the tensor is a part of several matrices in one dimension, and `bits` is what those have.
    """
    if bits == 32 or prod(shape) < MIN_QUANTIZED_NUMEL or (len(shape) < 2 and not flattened):
        return 32
    aligned = flattened or (prod(shape[1:]) % BLOCK == 0 and prod(shape) % (BLOCK * ranks) == 0)
    return bits if aligned or bits == 8 else 8


def state_bytes(shape: Sequence[int], bits: StateBits, *, ranks: int = 1) -> int:
    """Bytes of one state of a tensor whose optimizer asks for `bits`; see `state_bits_of`."""
    numel, width = prod(shape), state_bits_of(shape, bits, ranks=ranks)
    return 4 * numel if width == 32 else FORMATS[width].code_bytes(numel) + 4 * scale_count(numel)


FORMATS = {8: Format(bits=8, signed_max=127, unsigned_max=255, shift=19), 4: Format(bits=4, signed_max=7, unsigned_max=15, shift=22)}
