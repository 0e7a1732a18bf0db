"""The definition of the formats and steps, against oracles that list every value instead of computing with bits.

u is 2^-24, the largest relative error of one fp32 rounding.
"""

import math

import pytest
import torch

from lowmem.optim.kernels import reference
from lowmem.optim.kernels.formats import BLOCK, FORMATS, adamw_scalars, lion_scalars

U = 2.0**-24
WIDTHS = [8, 4]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signed_values(bits: int) -> list[float]:
    """What the codes of exp_avg stand for at scale 1, from the lowest code up."""
    top = {8: 127, 4: 7}[bits]
    return [math.copysign(code * code, code) for code in range(-top, top + 1)]


def unsigned_values(bits: int) -> list[float]:
    """The same of exp_avg_sq: 1, and below it each binade cut into 16 or 2 steps."""
    steps = {8: 16, 4: 2}[bits]
    values = [1.0]
    while len(values) < 2**bits:
        binade, step = divmod(len(values) - 1, steps)
        values.append(2.0 ** -(binade + 1) * (2 - (step + 1) / steps))
    return values[::-1]


def stored(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of exp_avg_sq, (blocks, 128), as they lie in memory."""
    return codes.to(torch.uint8) if bits == 8 else reference.pack(codes)


def spread(seed: int, decades: float) -> torch.Tensor:
    """(64, 128) values, each block over another range of magnitudes, the largest at a random place."""
    exponent = -decades * torch.rand(64, BLOCK, generator=generator(seed)) + torch.linspace(-25, 25, 64).unsqueeze(1)
    return 10.0**exponent


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_exp_avg_decodes_to_its_value(bits):
    values = signed_values(bits)
    codes = torch.arange(len(values)) - len(values) // 2
    block = torch.zeros(1, BLOCK, dtype=torch.int64)
    for part in codes.split(BLOCK):
        block[0, : len(part)] = part
        raw = block.to(torch.int8) if bits == 8 else reference.pack(block + 8)
        decoded = reference.decode_signed(raw, torch.tensor([0.5]), FORMATS[bits])[0, : len(part)]
        assert decoded.tolist() == [values[int(code) + len(values) // 2] / 2 for code in part]


@pytest.mark.parametrize("bits, smallest", [(8, 1.6e-5), (4, 5.9e-3)])
def test_every_code_of_exp_avg_sq_decodes_to_its_value(bits, smallest):
    values = unsigned_values(bits)
    for part in torch.arange(len(values)).split(BLOCK):
        block = torch.zeros(1, BLOCK, dtype=torch.int64)
        block[0, : len(part)] = part
        decoded = reference.decode_unsigned(stored(block, bits), torch.tensor([2.0]), FORMATS[bits])[0, : len(part)]
        assert decoded.tolist() == [2 * values[int(code)] for code in part]
    assert values[-1] == 1.0
    assert values[0] == pytest.approx(smallest, rel=0.02)


@pytest.mark.parametrize("bits", WIDTHS)
def test_exp_avg_becomes_a_neighbour_and_its_mean_is_the_value(bits):
    values = torch.tensor(signed_values(bits), dtype=torch.float64)
    top = values[-1].item()
    value = 10.0 ** (-6 * torch.rand(BLOCK, generator=generator(0)))
    value *= torch.where(torch.rand(BLOCK, generator=generator(1)) < 0.5, -1.0, 1.0)
    value[5], value[6], value[7] = -3.7, 0.0, 3.7  # the scale, twice
    share = value.double() / 3.7 * top
    low = (torch.searchsorted(values, share, right=True) - 1).clamp(0, len(values) - 2)
    total, rows = torch.zeros(BLOCK, dtype=torch.float64), 4096
    for first in range(0, 1 << 16, rows):  # every value of the upper 16 of the 23 bits that are used
        noise = torch.arange(first, first + rows) << 16 | 0x8000
        codes, scale = reference.encode_signed(value.expand(rows, -1), noise.unsqueeze(1).expand(-1, BLOCK), FORMATS[bits])
        decoded = reference.decode_signed(codes, scale, FORMATS[bits])
        units = decoded.double() / 3.7 * top
        # decoding rounds twice (scale, product), 2u of the largest; units of the table are at least 1 apart
        assert ((units - values[low]).abs().minimum((units - values[low + 1]).abs()) <= 3 * U * top).all()
        assert decoded[:, 6].abs().max() == 0
        total += decoded.sum(0, dtype=torch.float64)
    gap = (values[low + 1] - values[low]) * 3.7 / top
    # The chance of the upper neighbour is out by 2^-17 of where random numbers begin and 2^-16 of counting. The value in units has two
    # roundings and the threshold three, together 5u of at most 128 gaps < 2^-14.6; decoding 2u of the largest, 128 gaps: 2^-16.
    assert ((total / 2**16 - value.double()).abs() <= (2.0**-17 + 2.0**-16 + 2.0**-14.6 + 2.0**-16) * gap).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("largest", [2.0**-126 * 127**2, 1e-30, 1.0, 0.7, 3.3333333, 3e38])
def test_no_code_of_exp_avg_is_beyond_the_largest(bits, largest):
    value = (largest * (1 + torch.arange(64, dtype=torch.float64) * 2.0**-23)).float().unsqueeze(1).expand(-1, BLOCK).contiguous()
    top = 127 if bits == 8 else 15
    for noise, allowed in ((0, {top}), (0xFFFFFFFF, {top - 1, top})):  # one code less where |value| / absmax rounds below 1, once in 65,536
        codes, _ = reference.encode_signed(value, torch.full((64, BLOCK), noise), FORMATS[bits])
        codes = codes if bits == 8 else reference.unpack(codes)
        assert set(codes.unique().tolist()) <= allowed


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_block_too_small_for_its_scale_becomes_zero(bits):
    square = signed_values(bits)[-1]
    value = torch.full((2, BLOCK), 2.0**-126 * square)
    value[1] *= 0.99
    codes, scale = reference.encode_signed(value, torch.zeros(2, BLOCK, dtype=torch.int64), FORMATS[bits])
    assert scale.tolist() == [2.0**-126, 0.0]
    assert reference.decode_signed(codes, scale, FORMATS[bits])[1].abs().max() == 0
    value = torch.full((2, BLOCK), 2.0**-126)
    value[1] *= 0.99
    codes, scale = reference.encode_unsigned(value, torch.zeros(2, BLOCK, dtype=torch.int64), FORMATS[bits])
    assert scale.tolist() == [2.0**-126, 0.0]
    assert reference.decode_unsigned(codes, scale, FORMATS[bits]).amax(1).tolist() == [2.0**-126, 0.0]


@pytest.mark.parametrize("bits", WIDTHS)
def test_exp_avg_sq_becomes_a_neighbour_and_its_mean_is_the_value(bits):
    values = torch.tensor(unsigned_values(bits), dtype=torch.float64)
    value = 10.0 ** (-6 * torch.rand(BLOCK, generator=generator(2)))
    value[5], value[6] = 3.7, 0.0  # the scale; below the smallest code
    total, rows = torch.zeros(BLOCK, dtype=torch.float64), 4096
    share = value.double() / 3.7
    low = (torch.searchsorted(values, share, right=True) - 1).clamp(0, len(values) - 2)
    for first in range(0, 1 << 16, rows):  # every value of the 16 bits that are used
        noise = torch.arange(first, first + rows) << 16 | 0xABCD
        codes, scale = reference.encode_unsigned(value.expand(rows, -1), noise.unsqueeze(1).expand(-1, BLOCK), FORMATS[bits])
        codes = codes if bits == 8 else reference.unpack(codes)
        assert ((codes == low) | (codes == low + 1)).all()
        assert (scale == value[5]).all()
        total += reference.decode_unsigned(stored(codes, bits), scale, FORMATS[bits]).sum(0, dtype=torch.float64)
    expected = share.clamp_min(values[0].item()) * 3.7
    gap = (values[low + 1] - values[low]) * 3.7
    # 16 random bits cut the chance of the upper neighbour by less than 2^-16. A value is less than 32 gaps, so that dividing by the
    # largest (two roundings) moves it by 64u gaps, and decoding (one) by 32u, together 96u < 2^-17.
    assert ((total / 2**16 - expected).abs() <= 1.5 * 2.0**-16 * gap).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("largest", [2.0**-126, 1e-30, 1.0, 3e38])
def test_exp_avg_sq_never_decodes_to_zero_in_a_live_block(bits, largest):
    value = torch.zeros(1, BLOCK)
    value[0, 17] = largest
    for noise in (0, 0xFFFFFFFF):
        codes, scale = reference.encode_unsigned(value, torch.full((1, BLOCK), noise), FORMATS[bits])
        decoded = reference.decode_unsigned(codes, scale, FORMATS[bits])
        assert scale.item() == torch.tensor(largest).item()
        assert decoded.min() > 0
        assert decoded.isfinite().all()


def test_pack_puts_number_i_and_i_plus_64_into_byte_i_and_unpack_undoes_it():
    codes = torch.randint(16, (5, BLOCK), generator=generator(3))
    packed = reference.pack(codes)
    assert packed.shape == (5, BLOCK // 2)
    assert packed[2, 9].item() == codes[2, 9].item() + 16 * codes[2, 9 + 64].item()
    assert torch.equal(reference.unpack(packed), codes.to(torch.uint8))


def lowbias32(position: int, key: int) -> int:
    """The hash in plain integers."""
    x = (position * 0x9E3779B9 + key) % 2**32
    x ^= x // 2**16
    x = x * 0x7FEB352D % 2**32
    x ^= x // 2**15
    x = x * 0x846CA68B % 2**32
    return x ^ x // 2**16


@pytest.mark.parametrize("key, start", [(0, 0), (1, 7), (0xFFFFFFFF, 2**31 - 2), (0x12345678, 2**33)])
def test_random_bits_are_the_hash_of_position_and_key(key, start):
    assert reference.random_bits(key, start, 5).tolist() == [lowbias32(start + i, key) for i in range(5)]


def test_each_random_bit_is_a_fair_coin():
    count = 1 << 18
    drawn = reference.random_bits(0xC0FFEE, 0, count)
    # the share of ones deviates by 0.5 / sqrt(count) = 0.001; six of them are exceeded once in 500 million
    for bit in range(32):
        assert (drawn >> bit & 1).double().mean().item() == pytest.approx(0.5, abs=0.006)


def test_second_bits_are_a_function_of_the_first():
    assert reference.second_bits(torch.tensor([0xDEADBEEF])).tolist() == [(0xDEADBEEF ^ 0xDEADBEEF >> 15) * 0x2C1B3C6D % 2**32]


def test_random_bits_of_weight_and_states_are_independent():
    """The lower 16 bits round weights, the upper 16 exp_avg_sq, the upper of the second exp_avg: counted in cells, by two and by three."""
    drawn = reference.random_bits(0xC0FFEE, 0, 1 << 20)
    sources = {"weight": drawn & 0xFFFF, "exp_avg_sq": drawn >> 16, "exp_avg": reference.second_bits(drawn) >> 16}
    for names in (("weight", "exp_avg"), ("exp_avg_sq", "exp_avg"), ("weight", "exp_avg_sq", "exp_avg")):
        cell = torch.zeros_like(drawn)
        for name in names:
            cell = cell * 16 + (sources[name] >> 12)
        cells = 16 ** len(names)
        counts, expected = torch.bincount(cell, minlength=cells).double(), len(drawn) / cells
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        # chi-squared of cells - 1 degrees of freedom: mean that, variance twice that; six standard deviations
        assert abs(chi2 - (cells - 1)) <= 6 * (2 * (cells - 1)) ** 0.5, names


SMALL = [6.1e-5, 3.1e-5, 2.0**-15, 2.0**-14 - 2.0**-24, 5.96e-8, 3.3e-8, 2.0**-16 + 2.0**-24]
ROUNDED = {torch.bfloat16: [1.0, 1.003, 3.14159, 1e-40, 1e-20, 2.9e38, 0.0], torch.float16: [1.0, 1.0003, 3.14159, 0.1, 6.5e4, 0.0, *SMALL]}


def both_neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest number of `dtype` at or below `value` and the smallest at or above, by search from the nearest."""
    nearest = torch.tensor(value, dtype=torch.float64).to(dtype)
    raw = nearest.view(torch.int16) + torch.tensor([-1, 0, 1], dtype=torch.int16)
    near = raw.view(dtype).double().tolist()
    return max(x for x in near if x <= value), min(x for x in near if x >= value)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype, magnitude", [(dtype, value) for dtype, values in ROUNDED.items() for value in values])
def test_stochastic_rounding_returns_a_neighbour_and_the_mean_is_the_value(dtype, magnitude, sign):
    value = torch.full((1 << 16,), sign * magnitude)
    low, high = both_neighbours(value[0].abs().item(), dtype)
    rounded = reference.round_to(value, torch.arange(1 << 16) | 0x7EED0000, dtype).double() * sign
    assert set(rounded.tolist()) <= {low, high}
    # every value of the random bits once. bf16, and fp16 above 2^-14, leave out no more bits of fp32 than are drawn, so the mean is
    # exact; below, 14 are drawn and fp32 may hold more: a chance of less than 2^-14 is lost
    lost = 2.0**-14 if dtype == torch.float16 and magnitude < 2.0**-14 else 0.0
    assert abs(rounded.mean().item() - value[0].abs().item()) <= lost * (high - low)


@pytest.mark.parametrize("step", [1, 1_000_000])
@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_adamw_formula_equals_fp64(step, lr):
    settings = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    p, g, m = (torch.randn(4096, generator=generator(seed)) * scale for seed, scale in ((4, 1.0), (5, 1e-2), (6, 1e-2)))
    v = 10.0 ** (-8 + 4 * torch.rand(4096, generator=generator(7)))
    g[:100], v[:50] = 0.0, 0.0
    new_p, new_m, new_v = reference.adamw_formula(p, g, m, v, adamw_scalars(**settings, step=step))

    p64, g64, m64, v64 = (x.double() for x in (p, g, m, v))
    mass = (m64 * 0.9).abs() + (g64 * (1 - 0.9)).abs()
    m64, v64 = m64 * 0.9 + g64 * (1 - 0.9), v64 * 0.999 + g64**2 * (1 - 0.999)
    denominator = (v64 / (1 - 0.999**step)).sqrt() + 1e-8
    step_size = lr / (1 - 0.9**step)
    p64 = p64 * (1 - lr * 0.1) - step_size * m64 / denominator
    # Roundings, first order, 1 % for the rest. exp_avg: factor, product, sum. exp_avg_sq: square, factor, product, sum. Denominator:
    # half of 4, root, factor, product, eps or sum. Weight: 3 for the product with decay and the sum; the rest 3 of exp_avg, 7 of the
    # denominator, quotient, factor, product, sum.
    assert ((new_m - m64).abs() <= 1.01 * 3 * U * mass).all()
    assert ((new_v - v64).abs() <= 1.01 * 4 * U * v64).all()
    assert ((new_p - p64).abs() <= 1.01 * U * (3 * p.abs() + 14 * step_size * mass / denominator)).all()
    if lr == 0:
        assert torch.equal(new_p, p)


def test_lion_formula_equals_fp64():
    p, g, m = (torch.randn(4096, generator=generator(seed)) for seed in (8, 9, 10))
    g[0] = m[0] = 0.0
    new_p, new_m = reference.lion_formula(p, g, m, lion_scalars(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1))
    c = m.double() * 0.9 + g.double() * (1 - 0.9)
    mass = m.abs() + g.abs()
    sure = (c.abs() > 3 * U * mass) | (mass == 0)  # factor, product, sum; below that the sign is anyone's
    assert sure.double().mean() > 0.999
    expected = p.double() * (1 - 1e-2 * 0.1) - 1e-2 * c.sign()
    assert ((new_p - expected).abs() <= 1.01 * U * (3 * p.abs() + 2 * 1e-2))[sure].all()
    assert ((new_m - (m.double() * 0.99 + g.double() * (1 - 0.99))).abs() <= 1.01 * 3 * U * mass).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_gradient_that_is_or_squares_to_no_number_changes_nothing(bad):
    p, m, v = torch.ones(2), torch.full((2,), 0.5), torch.full((2,), 0.25)
    g = torch.tensor([bad, 1.0])
    after = reference.adamw_formula(p, g, m, v, adamw_scalars(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=2))
    for new, old in zip(after, (p, m, v), strict=True):
        assert new[0] == old[0]
        assert new[1] != old[1]
    if abs(bad) != 1e30:
        after = reference.lion_formula(p, g, m, lion_scalars(lr=0.1, betas=(0.9, 0.99), weight_decay=0.1))
        assert [new[0].item() for new in after] == [1.0, 0.5]
