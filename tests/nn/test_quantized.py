"""Weights as codes: what is stored is what was meant on average, layers compute with it as with its numbers, and nothing else is kept."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowmem.nn.linear import split_linear
from lowmem.nn.lorpt import Factors, low_rank
from lowmem.nn.quantized import BLOCK, LARGEST_CODE, QuantizedWeight, decode, encode, quantize, stored_bytes, stored_tensors
from lowmem.optim import AdamW, Lion
from lowmem.optim.kernels.formats import BLOCK as STATE_BLOCK
from lowmem.optim.kernels.reference import random_bits
from tests.nn.tensors import gradients, numbers

BITS = pytest.mark.parametrize("bits", [8, 4])


@BITS
def test_rounding_at_random_has_the_number_as_its_mean(bits):
    """A mean of n draws lies within 5 standard errors: of 128 numbers one in 10,000 such tests would not."""
    value, draws = numbers(1, BLOCK), 4000
    value[0, 7:9] = 0.0
    noise = random_bits(9, 0, draws * BLOCK).view(draws, BLOCK)
    codes, scale = encode(value.expand(draws, BLOCK).contiguous(), noise, bits)
    stored = decode(codes, scale)
    step = scale[0].item()
    fraction = (value[0] / step) % 1
    error = step * (fraction * (1 - fraction) / draws).sqrt()
    allowed = 5 * error + step * (2.0**-17 + LARGEST_CODE[bits] * 2.0**-22)  # bits of the noise, and of fp32
    assert ((stored.mean(0) - value[0]).abs() <= allowed).all()
    assert (stored - value).abs().max() <= step * 1.001
    assert ((stored - value).abs() > 0.3 * step).any()


@BITS
def test_the_largest_number_and_numbers_on_the_grid_stay(bits):
    value = numbers(3, BLOCK)
    value[1] = 0.0
    codes, scale = encode(value, random_bits(1, 0, 3 * BLOCK).view(3, BLOCK), bits)
    stored = decode(codes, scale)
    assert torch.allclose(stored.abs().amax(1), value.abs().amax(1), rtol=2.0**-22, atol=0)
    again = encode(stored, random_bits(2, 0, 3 * BLOCK).view(3, BLOCK), bits)
    # fp32 rounds c * scale / scale' by 2^-22 of it, so that one number in 30,000 may move at 8 bits
    assert (decode(*again) != stored).sum() <= 1 or torch.allclose(decode(*again), stored, rtol=1e-6)
    assert not stored[1].any()
    value[2, 5] = torch.inf
    assert not decode(*encode(value, None, bits))[2].any()
    assert BLOCK == STATE_BLOCK


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_weight_is_a_parameter_of_its_shape(bits, dtype):
    weight = nn.Parameter(quantize(numbers(37, 50).to(dtype), bits))
    assert isinstance(weight, QuantizedWeight)
    assert (weight.shape, weight.dtype, weight.numel(), weight.requires_grad) == ((37, 50), dtype, 1850, True)
    assert stored_bytes([weight]) == 15 * (BLOCK * bits // 8 + 4)
    assert set(stored_tensors({"w": weight})) == {"w.codes", "w.scale"}
    assert torch.equal(weight.rows(slice(3, 31), dtype), weight.dense(dtype)[3:31])
    assert torch.equal(weight.to(torch.float64), weight.dense(torch.float64))
    assert torch.equal(F.embedding(torch.tensor([[3, 3], [36, 0]]), weight), weight.dense(dtype)[torch.tensor([[3, 3], [36, 0]])])
    wide = nn.Parameter(quantize(numbers(5, 2 * BLOCK).to(dtype), bits))
    assert torch.equal(F.embedding(torch.tensor([4, 1, 4]), wide), wide.dense(dtype)[[4, 1, 4]])
    with pytest.raises(TypeError, match="write into a quantised weight"):
        weight.detach().mul_(2)


@BITS
def test_layers_compute_with_codes_as_with_their_numbers(bits):
    x = numbers(6, 40, seed=1).requires_grad_()
    shapes = {"dense": [(60, 40)], "factors": [(9, 40), (60, 9)]}
    functions = {
        "dense": lambda x, w: split_linear(x, w, None, (23, 37)),
        "factors": lambda x, down, up: low_rank(x, [Factors(down, up, None, (23, 37), True)]),
    }
    for name, function in functions.items():
        codes = [nn.Parameter(quantize(numbers(*shape, seed=2), bits)) for shape in shapes[name]]
        dense = [weight.dense(torch.float32).requires_grad_() for weight in codes]
        found, expected = gradients(function, x, *codes), gradients(function, x, *dense)
        assert all(map(torch.equal, found, expected)), name
        assert not any(isinstance(tensor, QuantizedWeight) for tensor in found)


@BITS
@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_an_optimizer_moves_the_codes_as_it_would_move_the_numbers(bits, kind):
    """On average over many seeds, and every number by one of the two codes beside where it should be."""
    start, grad, runs = numbers(40, 103), numbers(40, 103, seed=3), 60  # 4120 numbers: the last block is cut short
    total, expected = torch.zeros_like(start), None
    for seed in range(runs):
        weight = nn.Parameter(quantize(start, bits))
        expected = nn.Parameter(weight.dense(torch.float32))
        for parameter in (weight, expected):
            parameter.grad = grad.t().contiguous().t() if seed % 2 else grad
            kind([parameter], lr=1e-2, weight_decay=0.1, state_bits=8, seed=seed).step()
        total += weight.dense(torch.float32)
    step = weight.scale.repeat_interleave(BLOCK)[: start.numel()].view(start.shape)
    assert ((weight.dense(torch.float32) - expected).abs() <= 1.001 * step).all()
    distance = (total / runs - expected).detach() / step
    fraction = (expected / step) % 1
    variance = (fraction * (1 - fraction)).mean() / runs
    assert abs(distance.square().mean() / variance - 1) < 5 * (2 / start.numel()) ** 0.5
    assert abs(distance.mean()) < 5 * (1 / (4 * runs * start.numel())) ** 0.5


@BITS
def test_nothing_keeps_a_copy_in_floating_point(bits):
    gc.collect()
    before = {id(tensor) for tensor in tensors()}
    weight = nn.Parameter(quantize(numbers(256, 256), bits))
    optimizer = AdamW([weight], state_bits=4)
    x = torch.ones(2, 256)
    for _ in range(2):
        (weight.grad,) = torch.autograd.grad(split_linear(x, weight, None, (256,))[0].sum(), [weight])
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    new = {str(number): tensor for number, tensor in enumerate(tensors()) if id(tensor) not in before and tensor is not x}
    storages = [part.untyped_storage() for part in stored_tensors(new).values()]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    numel = weight.numel()
    assert sum(held.values()) <= numel * bits // 8 + numel + 3 * 4 * numel // BLOCK  # codes, two states of 4 bits, and three scales
    assert len(weight.codes) == numel * bits // 8


def tensors() -> list[torch.Tensor]:
    """All that are alive; isinstance would ask deprecated proxies for their class, which warn."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
