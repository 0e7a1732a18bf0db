"""Weights, gradients, states and scalars for the tests of every optimizer kernel."""

import math

import pytest
import torch

from lowmem.optim.kernels.formats import BLOCK, FORMATS, StepScalars, adamw_scalars, lion_scalars, scale_count

BAD = [math.nan, math.inf, -math.inf, 1e30]  # 1e30 squared is no fp32 number
EVERY_FORM = pytest.mark.parametrize("name, bits", [(name, bits) for name in ("adamw", "lion") for bits in (32, 8, 4)])


def new_states(name: str, bits: int, numel: int) -> list[torch.Tensor | None]:
    """exp_avg, exp_avg_sq and their scales, as the optimizers make them."""
    if bits == 32:
        states = [torch.zeros(numel), torch.zeros(numel), None, None]
    else:
        codes = [
            torch.zeros(FORMATS[bits].code_bytes(numel), dtype=dtype) for dtype in (torch.int8 if bits == 8 else torch.uint8, torch.uint8)
        ]
        states = [*codes, torch.zeros(scale_count(numel)), torch.zeros(scale_count(numel))]
    return [state if name == "adamw" or index in (0, 2) else None for index, state in enumerate(states)]


def scalars_of(name: str, step: int) -> StepScalars:
    key, offset = (step * 0x9E3779B1) & 0xFFFFFFFF, BLOCK * step
    if name == "lion":
        return lion_scalars(lr=0.02, betas=(0.9, 0.99), weight_decay=0.1, grad_scale=0.7, key=key, offset=offset)
    return adamw_scalars(lr=0.02, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=step, grad_scale=0.7, key=key, offset=offset)


def random_weights(numel: int, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def gradient(numel: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of every magnitude that fp32 has, subnormal ones too; of zeros; of zeros after the first step; with bad numbers."""
    random = torch.Generator().manual_seed(1000 * step + numel)
    blocks = scale_count(numel)
    exponents = -42 + 58 * torch.rand(blocks, 1, generator=torch.Generator().manual_seed(numel))  # of a block, in every step
    grad = torch.randn(blocks, BLOCK, generator=random) * 10.0**exponents
    grad[3::7] = 0.0
    if step > 1:
        grad[2::7] = 0.0
    for index, bad in enumerate(BAD):
        grad[5::7, 31 * index + step] = bad
    return grad.view(-1)[:numel].to(dtype)
