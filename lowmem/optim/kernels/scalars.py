"""The numbers of one optimizer step, rounded once on the host so that every kernel computes with the same ones."""

import ctypes
import math
from dataclasses import dataclass

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
