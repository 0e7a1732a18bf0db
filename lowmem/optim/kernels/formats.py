"""What kernels and their definition share: the layout of narrow states, and the numbers of one step."""

import ctypes
import math
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


_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class StepScalars:
    """Attributes are Python floats with fp32 values, in the names of the formulas.

    Attributes:
        step_size: AdamW: lr / (1 - beta1^step); Lion: lr.
        decay: 1 - lr * weight_decay.
        rsqrt_correction2: 1 / sqrt(1 - beta2^step); 1 for Lion.
        grad_scale: what gradients are multiplied by when they are read: clipping, or a loss scale taken back.
        key: 32 bits that make the random numbers of this tensor and step.
        offset: position in its tensor of the first number that is updated.
    """

    step_size: float
    decay: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    rsqrt_correction2: float
    grad_scale: float
    key: int
    offset: int = 0


def adamw_scalars(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    key: int = 0,
    offset: int = 0,
) -> StepScalars:
    """Scalars of AdamW's update number `step`, counted from 1."""
    beta1, beta2 = betas
    return StepScalars(
        step_size=_fp32(lr / (1 - beta1**step)),
        decay=_fp32(1 - lr * weight_decay),
        beta1=_fp32(beta1),
        one_minus_beta1=_fp32(1 - beta1),
        beta2=_fp32(beta2),
        one_minus_beta2=_fp32(1 - beta2),
        eps=_fp32(eps),
        rsqrt_correction2=_fp32(1 / math.sqrt(1 - beta2**step)),
        grad_scale=_fp32(grad_scale),
        key=key,
        offset=offset,
    )


def lion_scalars(
    *, lr: float, betas: tuple[float, float], weight_decay: float, grad_scale: float = 1.0, key: int = 0, offset: int = 0
) -> StepScalars:
    """Scalars of a Lion update."""
    beta1, beta2 = betas
    return StepScalars(
        step_size=_fp32(lr),
        decay=_fp32(1 - lr * weight_decay),
        beta1=_fp32(beta1),
        one_minus_beta1=_fp32(1 - beta1),
        beta2=_fp32(beta2),
        one_minus_beta2=_fp32(1 - beta2),
        eps=0.0,
        rsqrt_correction2=1.0,
        grad_scale=_fp32(grad_scale),
        key=key,
        offset=offset,
    )


def mix_key(*parts: int) -> int:
    """32 well-mixed bits of several integers.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 32


def _fp32(value: float) -> float:
    return ctypes.c_float(value).value
