"""Global gradient norm and clipping without temporaries of the size of a tensor."""

from collections.abc import Iterable

import torch

from lowmem.fake import device_kind, representative

_SLICE = 1 << 16  # elements reduced at once on a CPU: their fp64 copy (512 KiB) stays in the cache


@torch.no_grad()
def global_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all elements of all tensors, accumulated in fp64 in a fixed order.

    torch's fp32 norm of a million numbers errs by 1e-5 on a CPU, which would make clipping depend on how a model is
    cut into tensors and ranks.

    Returns:
        fp64 scalar; non-finite if any element is.
    Memory: 512 KiB on a CPU; none on CUDA, where reductions convert as they read.
    """
    squares = []
    for tensor in tensors:
        pieces = tensor.reshape(-1).split(_SLICE) if device_kind(tensor) == "cpu" else [tensor]
        squares += [torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in representative(pieces, tensor)]
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


@torch.no_grad()
def clip_gradients(gradients: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`; nothing is touched when it already is.

    Args:
        norm: their global norm.
        max_norm: 0 never clips.
    Source: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
    """
    if 0 < max_norm < norm:
        torch._foreach_mul_(gradients, max_norm / norm)
