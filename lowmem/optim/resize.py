"""Optimizer states of parameters whose shape has changed (see `lowmem.nn.rank_change`), or that were stored in another width."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lowmem.optim.kernels.formats import BLOCK, FORMATS, scale_count
from lowmem.optim.kernels.reference import decode_signed, decode_unsigned, encode_signed, encode_unsigned, random_bits, second_bits
from lowmem.optim.kernels.scalars import mix_key
from lowmem.optim.low_bit import LowBitOptimizer

Shape = tuple[int, ...]


@torch.no_grad()
def resize_states(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, old: Shape, *, grown: bool) -> None:
    """Have the states of `parameter`, whose shape was `old`, follow it, quantised ones too.

    Args:
        grown: the old numbers are the first rows and columns of the new: they keep their states. exp_avg of the new ones is zero,
            exp_avg_sq the mean of the old, so that their first steps have a usual size. Otherwise the numbers mean something else
            now: states start anew, with the count of steps that corrects their bias.
    Memory: the states of one parameter in fp32.
    """
    state = optimizer.state[parameter]
    wide = _decoded(state, old) if grown else {}
    step = state.get("step")
    before = dict(state)
    state.clear()
    if isinstance(optimizer, LowBitOptimizer):
        optimizer.begin(parameter)
        state["step"] = step if grown else 0
    else:
        for name, value in before.items():
            state[name] = value if name == "step" else value.new_zeros(parameter.shape)
        if not grown and step is not None:
            step.zero_()
    for name, value in wide.items():
        fill = value.mean() if name == "exp_avg_sq" else value.new_zeros(())
        new = fill.expand(parameter.shape).clone(memory_format=torch.contiguous_format)
        new[tuple(slice(size) for size in old)] = value
        _encode(optimizer, parameter, state, name, new)


@torch.no_grad()
def fit_states(optimizer: LowBitOptimizer) -> None:
    """Give loaded states the width that `optimizer` keeps them in; those that have it stay, bit for bit.

    Earlier versions kept narrow states of norms and biases of 4,096 elements or more, and 4 bits whatever the width of rows.

    Memory: the states of one parameter in fp32.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state, numel = optimizer.state[parameter], parameter.numel()
            held = {_width(state, name, numel) for name in optimizer.state_names if name in state}
            if held <= {optimizer.bits_of(parameter)} or not held <= {32, 8, 4}:
                continue
            wide, step = _decoded(state, tuple(parameter.shape)), state["step"]
            for name in (*wide, *(f"{name}_scale" for name in wide), "step"):
                state.pop(name, None)
            kept = dict(state)
            state.clear()
            optimizer.begin(parameter)
            state.update(kept, step=step)
            for name, value in wide.items():
                _encode(optimizer, parameter, state, name, value)


def _width(state: dict[str, Any], name: str, numel: int) -> int:
    """Bits of a stored state; 0 where it is none of this many elements."""
    value = state[name]
    if f"{name}_scale" not in state:
        return 32 if value.numel() == numel else 0
    return next((bits for bits, fmt in FORMATS.items() if value.numel() == fmt.code_bytes(numel)), 0)


def _decoded(state: dict[str, Any], old: Shape) -> dict[str, torch.Tensor]:
    """exp_avg and exp_avg_sq in fp32, of shape `old`."""
    decoders: dict[str, Callable[..., torch.Tensor]] = {"exp_avg": decode_signed, "exp_avg_sq": decode_unsigned}
    numel, found = torch.Size(old).numel(), {}
    for name, decode in decoders.items():
        if name not in state:
            continue
        value = state[name]
        if f"{name}_scale" in state:
            bits = 8 * value.numel() // (scale_count(numel) * BLOCK)
            value = decode(value.view(-1, BLOCK * bits // 8), state[f"{name}_scale"], FORMATS[bits]).flatten()[:numel]
        found[name] = value.view(old)
    return found


def _encode(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    if f"{name}_scale" not in state:
        state[name].copy_(value)
        return
    assert isinstance(optimizer, LowBitOptimizer)
    bits = optimizer.bits_of(parameter)
    fmt, blocks = FORMATS[bits], scale_count(parameter.numel())
    rows = F.pad(value.flatten(), (0, blocks * BLOCK - value.numel())).view(-1, BLOCK)
    key = mix_key(optimizer.seed, state["step"], parameter.shape[0])
    noise = random_bits(key, 0, rows.numel(), rows.device).view(-1, BLOCK)
    codes, scale = encode_signed(rows, second_bits(noise), fmt) if name == "exp_avg" else encode_unsigned(rows, noise, fmt)
    state[name].view(-1, BLOCK * bits // 8).copy_(codes)
    state[f"{name}_scale"].copy_(scale)
