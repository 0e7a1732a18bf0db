"""Cases at the edges of fp32 for the Triton kernel: in its interpreter on a CPU, and on CUDA."""

import math

import torch

from lowmem.optim.kernels.formats import BLOCK, StepScalars, adamw_scalars, lion_scalars
from tests.optim.kernels.cases import new_states, random_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_scalars(name: str, step: int, lr=0.02, betas=(0.9, 0.99), eps=1e-8) -> StepScalars:
    every = {"lr": lr, "betas": betas, "weight_decay": 0.1, "key": 0xFFFFFFFF - step}
    return lion_scalars(**every) if name == "lion" else adamw_scalars(**every, eps=eps, step=step)


def decaying_case(name: str) -> tuple[torch.Tensor, list[torch.Tensor], list[StepScalars]]:
    """exp_avg and exp_avg_sq fall 5600-fold: through 2^-126, 49 * 2^-126 and 127^2 * 2^-126, where scales become zero."""
    first = torch.tensor([1e-31, 3e-34, 5e-36, 2e-18]).repeat_interleave(BLOCK)
    grads = [first, *[torch.zeros_like(first)] * 29]
    return random_weights(len(first), seed=3), grads, [make_scalars(name, step, betas=(0.75, 0.75)) for step in range(1, 31)]


def huge_case(name: str) -> tuple[torch.Tensor, list[torch.Tensor], list[StepScalars]]:
    """exp_avg_sq beyond 2^126, whose inverse is subnormal, and squares just below and above what fp32 has."""
    grads = [torch.linspace(1.0, 1.85, 2 * BLOCK) * 1e19, torch.linspace(1.84, 1.85, 2 * BLOCK) * 1e19]
    return random_weights(2 * BLOCK, seed=4), grads, [make_scalars(name, step, betas=(0.9, 0.5)) for step in (1, 2)]


def subnormal_case(name: str) -> tuple[torch.Tensor, list[torch.Tensor], list[StepScalars]]:
    """Weights, gradients, roots, quotients and steps below 2^-126."""
    exponents = torch.linspace(-44, -17, 2 * BLOCK)
    grad = 10.0**exponents * (1 - 2 * (torch.arange(2 * BLOCK) % 2))
    return 10.0 ** exponents.flip(0), [grad, grad], [make_scalars(name, step, lr=1e-38, eps=1e-20) for step in (1, 2)]


def any_codes(name: str, bits: int, numel: int) -> list[torch.Tensor | None]:
    """States of random bytes, those behind the last number too."""
    random = torch.Generator().manual_seed(6)
    states = new_states(name, bits, numel)
    for state in states:
        if state is not None:
            state.copy_(torch.rand(state.shape, generator=random) if state.is_floating_point() else state.random_(generator=random))
    return states


def weights_at_the_edges() -> torch.Tensor:
    """Subnormal, largest and infinite numbers of fp16 and bf16, and zeros of both signs."""
    edges = [0.0, -0.0, 6e-8, -6e-8, 5e-7, 6.1e-5, -6.1e-5, 65504.0, -65504.0, 3.38e38, -3.38e38, math.inf, -math.inf, 1e-40, 1e-30, 1.0]
    return torch.tensor(edges).repeat(20)
