"""The definition of every optimizer step and state format, in plain PyTorch: what the C++ and Triton kernels must equal, and what
runs where neither can.

All arithmetic is fp32, one rounding an operation (no fused multiply-add), in the order written here. Random bits are a hash of the
position of a number and a key, so that every implementation draws the same ones.
"""

import torch

from lowmem.nn.quantized import WeightBits, decode, encode, pack, unpack
from lowmem.optim.kernels.formats import BLOCK, FORMATS, Format, StepScalars, scale_count

_MASK = 0xFFFFFFFF
_SMALLEST_NORMAL = 2.0**-126
CHUNK_BLOCKS = 256  # blocks computed at once: temporaries of 32 Ki numbers


def random_bits(key: int, start: int, count: int, device: torch.device | None = None) -> torch.Tensor:
    """32 random bits for each of the positions start, start + 1, ...

    Returns:
        (count,) int64 in [0, 2^32).
    Source: C. Wellons, "Prospecting for Hash Functions" (2018), the function lowbias32.
    """
    x = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = (x * 0x9E3779B9 + key) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def second_bits(bits: torch.Tensor) -> torch.Tensor:
    """32 more random bits from each of `random_bits`, of which the upper 16 are independent of the lower and of the upper 16 of `bits`.

    Args:
        bits: int64 in [0, 2^32).
    """
    return ((bits ^ (bits >> 15)) * 0x2C1B3C6D) & _MASK


def decode_signed(stored: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """exp_avg of whole blocks.

    Args:
        stored: (blocks, 128) int8, or (blocks, 64) uint8 for 4 bits.
        scale: (blocks,) fp32.
    Returns:
        (blocks, 128) fp32.
    """
    code = stored.float() if fmt.bits == 8 else unpack(stored).float() - (fmt.signed_max + 1)
    return code * code.abs() * scale.unsqueeze(1)


def encode_signed(value: torch.Tensor, bits: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of exp_avg, rounded at random; see `decode_signed`.

    Args:
        value: (blocks, 128) fp32.
        bits: (blocks, 128) random bits; the upper 23 are used: the mean of what is stored is `value`, to 2^-16 of a gap.
    """
    square = float(fmt.signed_max**2)
    absmax = value.abs().amax(1)
    live = absmax >= _SMALLEST_NORMAL * square
    inverse = torch.where(live, torch.full_like(absmax, square) / absmax, 0.0)
    t = value.abs() * inverse.unsqueeze(1)
    code = t.double().sqrt().float().floor()
    # The next code's value is (c + 1)^2, a gap of 2c + 1 away: up if t > c^2 + u (2c + 1), with u uniform in (0, 1). u is at least 2^-17,
    # so that t of the largest, one rounding above square at most, stays.
    twice = (bits >> 9).float() * 2.0**-22 + 2.0**-16
    code = code + (t > code * (code + twice) + 0.5 * twice).float()
    code = torch.where(value < 0, -code, code)
    scale = torch.where(live, absmax / torch.full_like(absmax, square), 0.0)
    if fmt.bits == 8:
        return code.to(torch.int8), scale
    return pack((code + (fmt.signed_max + 1)).to(torch.uint8)), scale


def decode_unsigned(stored: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """exp_avg_sq of whole blocks; arguments as in `decode_signed`."""
    code = (stored if fmt.bits == 8 else unpack(stored)).to(torch.int32)
    return ((code + fmt.base) << fmt.shift).view(torch.float32) * scale.unsqueeze(1)


def encode_unsigned(value: torch.Tensor, bits: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of exp_avg_sq, rounded at random.

    Args:
        value: (blocks, 128) fp32, not negative.
        bits: (blocks, 128) random bits; the upper 16 are used.
    """
    largest = value.amax(1)
    live = largest >= _SMALLEST_NORMAL
    inverse = torch.where(live, torch.ones_like(largest) / largest, 0.0)
    number = (value * inverse.unsqueeze(1)).view(torch.int32)
    noise = (bits >> 16).to(torch.int32) << (fmt.shift - 16)
    code = ((number + noise) >> fmt.shift) - fmt.base
    code = code.clamp(0, fmt.unsigned_max).to(torch.uint8)
    return (code if fmt.bits == 8 else pack(code)), torch.where(live, largest, 0.0)


def round_to(value: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 to `dtype`; to bf16 and fp16 by stochastic rounding, whose mean is the value.

    Args:
        value: fp32.
        bits: random bits of the same shape; the lower 16 are used.
    """
    if dtype == torch.bfloat16:
        rounded = value.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
        rounded = torch.where(value.isnan(), 0x7FC00000, rounded)  # noise would turn some NaN into -0
        return (rounded >> 16).to(torch.int16).view(torch.bfloat16)
    if dtype == torch.float16:
        magnitude = value.abs()
        rounded = ((magnitude.view(torch.int32) + (bits & 0x1FFF).to(torch.int32)) & -0x2000).view(torch.float32)
        # below 2^-14 fp16 has a fixed spacing of 2^-24
        tiny = (magnitude * 2.0**24 + (bits & 0x3FFF).float() * 2.0**-14).floor() * 2.0**-24
        rounded = torch.where(magnitude < 2.0**-14, tiny, rounded).clamp_max(65504.0)
        return torch.where(value.isnan(), value, torch.where(value < 0, -rounded, rounded)).half()
    return value.to(dtype)


def adamw_formula(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, s: StepScalars) -> tuple[torch.Tensor, ...]:
    """New weight, exp_avg and exp_avg_sq of AdamW; numbers whose gradient is not finite, or overflows when squared, stay.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    g = g * s.grad_scale
    square = g * g
    finite = square < torch.inf
    new_m = m * s.beta1 + g * s.one_minus_beta1
    new_v = v * s.beta2 + square * s.one_minus_beta2
    denominator = new_v.double().sqrt().float() * s.rsqrt_correction2 + s.eps
    new_p = p * s.decay - (new_m / denominator) * s.step_size
    return torch.where(finite, new_p, p), torch.where(finite, new_m, m), torch.where(finite, new_v, v)


def lion_formula(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, s: StepScalars) -> tuple[torch.Tensor, ...]:
    """New weight and exp_avg of Lion; numbers whose gradient is not finite stay.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """
    g = g * s.grad_scale
    finite = g.abs() < torch.inf
    direction = (m * s.beta1 + g * s.one_minus_beta1).sign()
    new_m = m * s.beta2 + g * s.one_minus_beta2
    new_p = p * s.decay - direction * s.step_size
    return torch.where(finite, new_p, p), torch.where(finite, new_m, m)


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
    """One step of AdamW, or of Lion if there is no `exp_avg_sq`, in place.

    Args:
        param: (n,) fp32, bf16 or fp16, contiguous; or codes as in `lowmem.nn.quantized`, which are decoded, updated and rounded at
            random.
        grad: (n,) fp32, bf16 or fp16, contiguous; read only.
        exp_avg, exp_avg_sq: codes as in `formats`, or (n,) fp32 for 32 bits.
        exp_avg_scale, exp_avg_sq_scale: (blocks,) fp32; None for 32 bits.
        scalars: the numbers of this step.
        bits: of the states: 32, 8 or 4.
        param_scale: (blocks,) fp32, where `param` holds codes.
    Memory: temporaries of 32 Ki numbers.
    """
    numel = grad.numel()
    for first in range(0, scale_count(numel), CHUNK_BLOCKS):
        blocks = slice(first, min(first + CHUNK_BLOCKS, scale_count(numel)))
        numbers = slice(first * BLOCK, min(blocks.stop * BLOCK, numel))
        _step_chunk(param, grad[numbers], exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars, bits, blocks, numbers, param_scale)


def _step_chunk(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars, bits, blocks, numbers, param_scale):  # type: ignore[no-untyped-def]
    count, live = (blocks.stop - blocks.start) * BLOCK, grad.numel()
    fmt = FORMATS.get(bits)
    noise = random_bits((scalars.key + scalars.offset * 0x9E3779B9) & _MASK, numbers.start, count, param.device)
    if fmt is None:
        m, v = exp_avg[numbers], None if exp_avg_sq is None else exp_avg_sq[numbers]
    else:
        rows = exp_avg.view(-1, BLOCK * bits // 8)[blocks]
        m = decode_signed(rows, exp_avg_scale[blocks], fmt).flatten()
        if exp_avg_sq is not None:
            rows = exp_avg_sq.view(-1, BLOCK * bits // 8)[blocks]
            v = decode_unsigned(rows, exp_avg_sq_scale[blocks], fmt).flatten()
        else:
            v = None
        m, v = m[:live], None if v is None else v[:live]
    if param_scale is None:
        weights = param[numbers].float()
    else:
        codes = param.view(param_scale.numel(), -1)[blocks]
        weights = decode(codes, param_scale[blocks]).flatten()[:live]
    if v is None:
        new_p, new_m = lion_formula(weights, grad.float(), m, scalars)
    else:
        new_p, new_m, new_v = adamw_formula(weights, grad.float(), m, v, scalars)
    if param_scale is None:
        param[numbers] = round_to(new_p, noise[:live], param.dtype)
    else:
        bits_of_weight: WeightBits = 8 if param.dtype == torch.int8 else 4
        new_codes, param_scale[blocks] = encode(_whole_blocks(new_p, count), noise.view(-1, BLOCK), bits_of_weight)
        codes.copy_(new_codes)
    if fmt is None:
        exp_avg[numbers] = new_m
        if v is not None:
            exp_avg_sq[numbers] = new_v
        return
    codes, exp_avg_scale[blocks] = encode_signed(_whole_blocks(new_m, count), second_bits(noise).view(-1, BLOCK), fmt)
    exp_avg.view(-1, BLOCK * bits // 8)[blocks] = codes
    if v is not None:
        codes, exp_avg_sq_scale[blocks] = encode_unsigned(_whole_blocks(new_v, count), noise.view(-1, BLOCK), fmt)
        exp_avg_sq.view(-1, BLOCK * bits // 8)[blocks] = codes


def _whole_blocks(values: torch.Tensor, count: int) -> torch.Tensor:
    """(n,) -> (blocks, 128), the last block filled with zeros."""
    return torch.nn.functional.pad(values, (0, count - values.numel())).view(-1, BLOCK)
