"""Spectral tools of the Spectron optimizer: the nearest orthogonal matrix, and the largest singular value.

Shapes: B matrices at once, M the shorter side, N the longer one.
"""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
_EPS = 1e-7


def orthogonalize(matrices_BMN: torch.Tensor) -> torch.Tensor:
    """U V^T of each matrix U S V^T, approximately: every singular value becomes one between about 0.7 and 1.2.

    Args:
        matrices_BMN: (B, M, N) with M <= N, fp32; zero matrices stay zero.
    Returns:
        (B, M, N).
    Memory: two more tensors of that shape, and three of (B, M, M).
    Source: the quintic Newton-Schulz iteration and its coefficients, K. Jordan et al. 2024, "Muon".
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices_BMN / matrices_BMN.flatten(1).norm(dim=1).clamp_min_(_EPS).view(-1, 1, 1)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def spectral_norm(matrices_BMN: torch.Tensor, vectors_BM: torch.Tensor) -> torch.Tensor:
    """One step of power iteration: an estimate, from below, of each matrix's largest singular value.

    A vector that a matrix maps to zero, as any is while the matrix is zero, would stay zero; it becomes the row of the identity that
    belongs to the matrix's longest row instead, which no matrix but zero maps to zero.

    Args:
        matrices_BMN: (B, M, N).
        vectors_BM: (B, M) unit vectors, replaced by better ones: calls with slowly changing matrices converge.
    Returns:
        (B,) estimates.
    Memory: twice (B, N).
    """
    rows = matrices_BMN.norm(dim=2)
    longest = (torch.arange(rows.shape[1], device=rows.device) == rows.argmax(dim=1, keepdim=True)).to(vectors_BM.dtype)
    right = torch.bmm(vectors_BM.unsqueeze(1), matrices_BMN).squeeze(1)
    lost = right.norm(dim=1, keepdim=True) == 0
    right = torch.where(lost, torch.bmm(longest.unsqueeze(1), matrices_BMN).squeeze(1), right)
    size = right.norm(dim=1)
    unit = right / torch.where(size > 0, size, 1.0).unsqueeze(1)  # its square may be too small for fp32 where it is not
    left = torch.bmm(matrices_BMN, unit.unsqueeze(2)).squeeze(2)
    length = left.norm(dim=1, keepdim=True)
    vectors_BM.copy_(torch.where(length > 0, left / torch.where(length > 0, length, 1.0), longest))
    return size
