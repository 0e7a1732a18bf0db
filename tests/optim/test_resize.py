import pytest
import torch

from lowmem.config.schema import STATE_WIDTHS
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.lorptize import change_rank
from lowmem.optim.adamw import AdamW
from lowmem.optim.from_config import allocate_states
from lowmem.optim.lion import Lion
from lowmem.optim.low_bit import LowBitOptimizer, _decoded, resize_states
from lowmem.optim.spectron import Spectron

IN, OUT, RANK = 256, 128, 40


def make(name, bits):
    torch.manual_seed(0)
    layer = LoRPtLinear(IN, OUT, RANK, bias=False)
    if name == "torch":
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)
    elif name == "spectron":
        optimizer = Spectron([{"params": [layer.down, layer.up], "rule": "factors"}], state_bits=bits)
    else:
        optimizer = {"adamw": AdamW, "lion": Lion}[name](layer.parameters(), lr=1e-3, state_bits=bits)
    allocate_states(optimizer)
    for _ in range(3):
        step(layer, optimizer)
    return layer, optimizer


def step(layer, optimizer):
    layer(torch.randn(20, IN)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def wide(optimizer, parameter):
    return _decoded(optimizer.state[parameter], tuple(parameter.shape))


def resize(layer, optimizer, rank):
    old = {p: tuple(p.shape) for p in (layer.down, layer.up)}
    grown = rank > layer.rank
    change_rank(layer, rank, torch.Generator().manual_seed(0))
    for parameter, shape in old.items():
        resize_states(optimizer, parameter, shape, grown=grown)


CASES = [("torch", 32), *((name, bits) for name, widths in STATE_WIDTHS.items() for bits in widths)]


@pytest.mark.parametrize("name, bits", CASES)
def test_growing_keeps_the_states_of_the_old_numbers(name, bits):
    layer, optimizer = make(name, bits)
    before = {p: wide(optimizer, p) for p in layer.parameters()}
    counts = {p: int(optimizer.state[p]["step"]) if "step" in optimizer.state[p] else None for p in layer.parameters()}
    resize(layer, optimizer, RANK + 8)
    for parameter, states in before.items():
        after = wide(optimizer, parameter)
        assert after.keys() == states.keys()
        for state, old in states.items():
            new = after[state]
            assert new.shape == parameter.shape
            kept = new[tuple(slice(size) for size in old.shape)]
            rest = torch.ones_like(new, dtype=torch.bool)
            rest[tuple(slice(size) for size in old.shape)] = False
            if bits == 32:
                assert torch.equal(kept, old)
            else:  # other blocks of 128, other scales: a step of the coarsest code, relative to the largest number
                step_size = {("exp_avg", 8): 2 / 127, ("exp_avg", 4): 2 / 7, ("exp_avg_sq", 8): 2**-4, ("exp_avg_sq", 4): 0.5}[state, bits]
                assert (kept - old).abs().max() <= step_size * old.abs().max()
            if state == "exp_avg":
                assert new[rest].eq(0).all()
            else:
                # rounded at random: over 1,000 new numbers the mean is kept within a few per cent
                assert new[rest].mean().item() == pytest.approx(old.mean().item(), rel=1e-5 if bits == 32 else 0.1)
        if counts[parameter] is not None:
            assert int(optimizer.state[parameter]["step"]) == counts[parameter]
    step(layer, optimizer)
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name, bits", CASES)
def test_shrinking_starts_the_states_anew(name, bits):
    layer, optimizer = make(name, bits)
    resize(layer, optimizer, 8)
    for parameter in layer.parameters():
        for state, value in wide(optimizer, parameter).items():
            assert value.shape == parameter.shape
            assert value.max() <= 1e-3 if state == "exp_avg_sq" and bits != 32 else value.eq(0).all()
        if "step" in optimizer.state[parameter]:
            assert int(optimizer.state[parameter]["step"]) == 0
    if isinstance(optimizer, LowBitOptimizer):
        assert optimizer.bits_of(layer.down) == 32  # fewer than 4096 numbers now
    step(layer, optimizer)
    assert all(p.isfinite().all() for p in layer.parameters())
