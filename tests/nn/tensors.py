"""Random tensors, and gradients of functions of several outputs."""

import torch


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(function, x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    outputs = function(x, *weights)
    return [*outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), [x, *weights])]
