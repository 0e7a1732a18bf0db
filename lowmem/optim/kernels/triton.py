"""The optimizer step on CUDA, one Triton kernel. lowmem/optim/kernels/reference.py is the definition: functions have the names of those
there, and the arithmetic is the same to the bit.

A program updates 8 blocks of 128 numbers, a tile with a block per row: it reads weights, gradients, codes and scales and writes the new
ones in their place. Row maxima depend on all of a row, so that no code or scale is overwritten before every thread has read it.
Before Triton 3.6, which PyTorch 2.11 brings, roots and quotients below 2^-126 came out as zero.
"""

from __future__ import annotations  # tl may be missing

import subprocess
import warnings
from typing import Any

import torch

from lowmem.optim.kernels import reference
from lowmem.optim.kernels.formats import FORMATS, StepScalars, scale_count

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCKS_PER_PROGRAM = 8  # 1024 numbers for 128 threads
_FLOATS = ("step_size", "decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "rsqrt_correction2", "grad_scale")
# Nothing installed, no C compiler, a device that Triton does not know: raised before anything is written
_LAUNCH_ERRORS = (ImportError, RuntimeError, OSError, subprocess.SubprocessError, *((triton.TritonError,) if triton else ()))
_without_kernel: set[torch.device] = set()


def _jit(**options: Any) -> Any:
    """triton.jit, where there is Triton."""
    return triton.jit(**options) if triton else lambda function: function


@_jit()
def _random_bits(key, position):
    x = position.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@_jit()
def _second_bits(random):
    return (random ^ (random >> 15)) * 0x2C1B3C6D


# bf16 numbers pass as bits: Triton's interpreter converts subnormal ones wrongly, and old devices have no instruction for it
@_jit()
def _load_numbers(pointers, live):
    x = tl.load(pointers, mask=live, other=0)
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@_jit()
def _round_to(value, random, dtype: tl.constexpr):
    bits, noise = value.to(tl.int32, bitcast=True), random.to(tl.int32, bitcast=True)
    is_number = value == value  # CUDA's NaN is 0x7FFFFFFF: with noise added it would be -0
    if dtype == tl.bfloat16:
        upper = tl.where(is_number, (bits + (noise & 0xFFFF)) >> 16, 0x7FC0)
        result = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        magnitude = tl.abs(value)
        rounded = (((bits & 0x7FFFFFFF) + (noise & 0x1FFF)) & -0x2000).to(tl.float32, bitcast=True)
        tiny = tl.floor(magnitude * 2.0**24 + (noise & 0x3FFF).to(tl.float32) * 2.0**-14) * 2.0**-24
        rounded = tl.where(magnitude < 2.0**-14, tiny, rounded)
        rounded = tl.where(rounded > 65504.0, 65504.0, rounded)
        signed = rounded * tl.where(value < 0, -1.0, 1.0)  # Triton's -x is 0 - x, which makes no -0
        result = tl.where(is_number, signed, value).to(tl.float16)
    else:
        result = value
    return result


@_jit()
def _load_codes(codes, row, column, live, BITS: tl.constexpr):
    if BITS == 8:
        return tl.load(codes + row * 128 + column, mask=live, other=0).to(tl.int32)
    byte = tl.load(codes + row * 64 + column % 64, mask=live, other=0).to(tl.int32)
    return (byte >> (column // 64 * 4)) & 15


@_jit()
def _store_codes(codes, code, row, column, live, BITS: tl.constexpr):
    if BITS == 8:
        tl.store(codes + row * 128 + column, code.to(codes.dtype.element_ty), mask=live)
    else:
        halves = tl.reshape(code << (column // 64 * 4), (code.shape[0], 2, 64))
        byte = tl.sum(halves, axis=1)
        tl.store(codes + row * 64 + tl.arange(0, 64)[None, :], byte.to(codes.dtype.element_ty), mask=live)


@_jit()
def _decode_signed(code, scale, SIGNED_MAX: tl.constexpr, BITS: tl.constexpr):
    code = (code if BITS == 8 else code - (SIGNED_MAX + 1)).to(tl.float32)
    return code * tl.abs(code) * scale


@_jit()
def _encode_signed(value, random, SIGNED_MAX: tl.constexpr, BITS: tl.constexpr):
    square = SIGNED_MAX * SIGNED_MAX * 1.0
    absmax = tl.max(tl.abs(value), axis=1, keep_dims=True)
    live = absmax >= 2.0**-126 * square
    inverse = tl.where(live, tl.div_rn(square, absmax), 0.0)
    t = tl.abs(value) * inverse
    below = tl.floor(tl.sqrt_rn(t))
    twice = (random >> 9).to(tl.int32).to(tl.float32) * 2.0**-22 + 2.0**-16
    up = t > below * (below + twice) + 0.5 * twice
    magnitude = below.to(tl.int32) + up.to(tl.int32)
    code = tl.where(value < 0, -magnitude, magnitude)
    return (code if BITS == 8 else code + (SIGNED_MAX + 1)), tl.where(live, tl.div_rn(absmax, square), 0.0)


@_jit()
def _decode_unsigned(code, scale, SHIFT: tl.constexpr, BASE: tl.constexpr):
    return ((code + BASE) << SHIFT).to(tl.float32, bitcast=True) * scale


@_jit()
def _encode_unsigned(value, random, UNSIGNED_MAX: tl.constexpr, SHIFT: tl.constexpr, BASE: tl.constexpr):
    largest = tl.max(value, axis=1, keep_dims=True)
    live = largest >= 2.0**-126
    inverse = tl.where(live, tl.div_rn(1.0, largest), 0.0)
    noise = (random >> 16).to(tl.int32) << (SHIFT - 16)
    code = (((value * inverse).to(tl.int32, bitcast=True) + noise) >> SHIFT) - BASE
    return tl.minimum(tl.maximum(code, 0), UNSIGNED_MAX), tl.where(live, largest, 0.0)


@_jit()
def _decode_weight(code, scale, BITS: tl.constexpr):
    return (code if BITS == 8 else code - 8).to(tl.float32) * scale


@_jit()
def _encode_weight(value, random, BITS: tl.constexpr):
    top = 127 if BITS == 8 else 7
    absmax = tl.max(tl.abs(value), axis=1, keep_dims=True)
    live = (absmax >= 2.0**-126 * top) & (absmax < float("inf"))
    inverse = tl.where(live, tl.div_rn(top * 1.0, absmax), 0.0)
    units = tl.where(live, value * inverse, 0.0)
    code = tl.floor(units + ((random & 0xFFFF).to(tl.float32) + 0.5) * 2.0**-16).to(tl.int32)
    code = tl.minimum(tl.maximum(code, -top), top)
    return (code if BITS == 8 else code + 8), tl.where(live, tl.div_rn(absmax, top * 1.0), 0.0)


@_jit(do_not_specialize=["numel", "key"], do_not_specialize_on_alignment=["param_scale", "exp_avg_scale", "exp_avg_sq_scale"])
def _step(
    param, param_scale, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, numel, key,
    step_size, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, rsqrt_correction2, grad_scale,
    LION: tl.constexpr, BITS: tl.constexpr, WEIGHT_BITS: tl.constexpr, ROWS: tl.constexpr,
    SIGNED_MAX: tl.constexpr, UNSIGNED_MAX: tl.constexpr, SHIFT: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    first_block = tl.program_id(0).to(tl.int64) * ROWS
    first = first_block * 128
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, 128)[None, :]
    inside = row * 128 + column
    live, live_row = inside < numel - first, row * 128 < numel - first
    random = _random_bits(key, first + inside)
    if WEIGHT_BITS == 32:
        p_old = _load_numbers(param + first + inside, live)
    else:
        p_codes, p_scale = param + first * WEIGHT_BITS // 8, param_scale + first_block + row
        p_old = _load_codes(p_codes, row, column, live_row, WEIGHT_BITS)
        p_old = _decode_weight(p_old, tl.load(p_scale, mask=live_row, other=0), WEIGHT_BITS)
    g = _load_numbers(grad + first + inside, live) * grad_scale
    if BITS == 32:
        m_old = _load_numbers(exp_avg + first + inside, live)
    else:
        m_codes, m_scale = exp_avg + first * BITS // 8, exp_avg_scale + first_block + row
        m_old = _load_codes(m_codes, row, column, live_row, BITS)
        m_old = _decode_signed(m_old, tl.load(m_scale, mask=live_row, other=0), SIGNED_MAX, BITS)
    if LION:
        finite = tl.abs(g) < float("inf")
        c = m_old * beta1 + g * one_minus_beta1
        direction = (c > 0).to(tl.float32) - (c < 0).to(tl.float32)
        m = m_old * beta2 + g * one_minus_beta2
        p = p_old * decay - direction * step_size
    else:
        if BITS == 32:
            v_old = _load_numbers(exp_avg_sq + first + inside, live)
        else:
            v_codes, v_scale = exp_avg_sq + first * BITS // 8, exp_avg_sq_scale + first_block + row
            v_old = _load_codes(v_codes, row, column, live_row, BITS)
            v_old = _decode_unsigned(v_old, tl.load(v_scale, mask=live_row, other=0), SHIFT, BASE)
        square = g * g
        finite = square < float("inf")
        m = m_old * beta1 + g * one_minus_beta1
        v = v_old * beta2 + square * one_minus_beta2
        p = p_old * decay - tl.div_rn(m, tl.sqrt_rn(v) * rsqrt_correction2 + eps) * step_size
        v = tl.where(finite, v, v_old)
        if BITS == 32:
            tl.store(exp_avg_sq + first + inside, v, mask=live)
        else:
            v_code, scale = _encode_unsigned(tl.where(live, v, 0.0), random, UNSIGNED_MAX, SHIFT, BASE)
            _store_codes(v_codes, v_code, row, column, live_row, BITS)
            tl.store(v_scale, scale, mask=live_row)
    m = tl.where(finite, m, m_old)
    if BITS == 32:
        tl.store(exp_avg + first + inside, m, mask=live)
    else:
        m_code, scale = _encode_signed(tl.where(live, m, 0.0), _second_bits(random), SIGNED_MAX, BITS)
        _store_codes(m_codes, m_code, row, column, live_row, BITS)
        tl.store(m_scale, scale, mask=live_row)
    p = tl.where(finite, p, p_old)
    if WEIGHT_BITS == 32:
        tl.store(param + first + inside, _round_to(p, random, param.dtype.element_ty), mask=live)
    else:
        p_code, scale = _encode_weight(tl.where(live, p, 0.0), random, WEIGHT_BITS)
        _store_codes(p_codes, p_code, row, column, live_row, WEIGHT_BITS)
        tl.store(p_scale, scale, mask=live_row)


def step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor | None,
    exp_avg_scale: torch.Tensor | None,
    exp_avg_sq_scale: torch.Tensor | None,
    scalars: StepScalars,
    bits: int,
    param_scale: torch.Tensor | None = None,
) -> None:
    """See `lowmem.optim.kernels.reference.step_`, which runs, after one warning, where Triton is missing or cannot start the kernel.

    Memory: none.
    """
    if not grad.numel():
        return
    arguments = (param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars, bits, param_scale)
    if param.device not in _without_kernel:
        try:
            _launch(*arguments)
            return
        except _LAUNCH_ERRORS as error:
            _without_kernel.add(param.device)
            warnings.warn(_problem(error), stacklevel=2)
    reference.step_(*arguments)


def _problem(error: Exception) -> str:
    remedy = "a C compiler (gcc or clang) and the Triton of your PyTorch's version" if triton else "Triton (pip install triton)"
    return f"{error}; the plain PyTorch definition of the optimizer step runs instead, many times slower; install {remedy}"


def _launch(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars, bits, param_scale=None):
    if triton is None:
        raise ModuleNotFoundError("Triton is not installed")
    key = (scalars.key + scalars.offset * 0x9E3779B9) & 0xFFFFFFFF
    key -= (key >> 31) << 32  # an int32 of the same bits: one kernel for every key
    fmt = FORMATS.get(bits)
    numbers = (fmt.signed_max, fmt.unsigned_max, fmt.shift, fmt.base) if fmt else (0, 0, 0, 0)
    weight_bits = 32 if param_scale is None else 8 if param.dtype == torch.int8 else 4
    grid = (-(-scale_count(grad.numel()) // BLOCKS_PER_PROGRAM),)
    with torch.cuda.device_of(param):
        _step[grid](
            param, param_scale, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad.numel(), key,
            *(getattr(scalars, name) for name in _FLOATS), exp_avg_sq is None, bits, weight_bits, BLOCKS_PER_PROGRAM, *numbers,
            num_warps=4, enable_fp_fusion=False, sanitize_overflow=False,  # the hash is meant to wrap
        )  # fmt: skip
