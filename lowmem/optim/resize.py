"""Optimizer states of parameters whose shape has changed (see `lowmem.nn.rank_change`)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lowmem.optim.kernels.formats import BLOCK, FORMATS, scale_count
from lowmem.optim.kernels.reference import decode_signed, decode_unsigned, encode_signed, encode_unsigned, random_bits
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
    wide = _decoded(optimizer, parameter, state, old) if grown else {}
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


def _decoded(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: dict[str, Any], old: Shape) -> dict[str, torch.Tensor]:
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
    if name == "exp_avg":
        codes, scale = encode_signed(rows, fmt)
    else:
        key = mix_key(optimizer.seed, state["step"], parameter.shape[0])
        codes, scale = encode_unsigned(rows, random_bits(key, 0, rows.numel(), rows.device).view(-1, BLOCK), fmt)
    state[name].view(-1, BLOCK * bits // 8).copy_(codes)
    state[f"{name}_scale"].copy_(scale)
