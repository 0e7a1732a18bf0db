"""Orthogonal momentum for matrices and for low-rank factors, AdamW for everything else.

A matrix W with momentum M moves by lr * s * O, where O is M with every singular value made one; a product W = up @ down moves its factors
so that the product moves no further:

    M <- beta M + (1 - beta) G           per factor
    O <- orthogonalize(M)                singular values near 1
    rho <- lr * s / (sigma(up) + sigma(down) + 1)
    up <- up - rho O_up,  down <- down - rho O_down,   so that |change of up @ down|_2 <= lr * s

with s = 0.2 * sqrt(max(in, out)), which gives a full-rank update the size that AdamW's has: one lr serves all parameters. One state an
element instead of AdamW's two, and for thin factors orthogonalisation is nearly free.

Source: Spectron, arXiv:2602.12429; momentum orthogonalisation, K. Jordan et al. 2024 ("Muon"); s, Liu et al. 2025, arXiv:2502.16982.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lowmem.config.schema import STATE_WIDTHS
from lowmem.optim.adamw import AdamW
from lowmem.optim.kernels.formats import BLOCK, FORMATS, StateBits, mix_key
from lowmem.optim.kernels.reference import decode_signed, encode_signed, random_bits, round_to, second_bits

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


RULES = ("adamw", "matrix", "factors")
UPDATE_RMS = 0.2
BATCH_NUMBERS = 1 << 20  # numbers of equally shaped matrices that are orthogonalised at once


class Spectron(AdamW):
    """Orthogonal momentum where a group's rule says so.

    Args:
        params: groups with a key "rule": "matrix" (2-D parameters, each on its own), "factors" (down (rank, in) and up (out, rank)
            alternating) or "adamw" (the default). A key "splits" of a matrix group has a tuple per parameter: one that is not empty
            says that the parameter is several matrices of so many rows, one below the other.
        lr: learning rate of all of them.
        momentum: beta of the rules matrix and factors.
        betas, eps, weight_decay, seed: see `AdamW`; weight decay is decoupled in every rule.
        state_bits: 32 or 8. There is no 4: every singular value of the momentum becomes one, those of what was rounded, too, and with 4
            bits most of them are: the cosine of the update with that of 32 bits is 0.59 to 0.72.
    Raises:
        ValueError: a setting is out of its range, a matrix is not 2-D, or factors do not come in pairs.
    Memory: per element of a matrix or factor 4 bytes at 32 bits, 1.03 at 8; a step adds about four times BATCH_NUMBERS, or the
        largest matrix, in fp32.
    """

    widths = STATE_WIDTHS["spectron"]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_bits: StateBits = 32,
        seed: int = 0,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, must be in [0, 1)")
        self.momentum = momentum
        super().__init__(params, lr, betas, eps, weight_decay, state_bits=state_bits, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rule = param_group.setdefault("rule", "adamw")
        param_group.setdefault("splits", [])
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if rule not in RULES:
            raise ValueError(f"rule is {rule}; allowed: {', '.join(RULES)}")
        if rule != "adamw" and any(p.ndim != 2 for p in params):
            raise ValueError(f"rule {rule} is for 2-D parameters, found one of {next(p.ndim for p in params if p.ndim != 2)} dimensions")
        if rule == "factors" and (len(params) % 2 or any(d.shape[0] != u.shape[1] for d, u in zip(params[::2], params[1::2], strict=True))):
            raise ValueError("rule factors needs down (rank, in) and up (out, rank) alternating; these parameters are not in such pairs")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; equally shaped matrices together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._index_parameters()
        batches: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                self.begin(parameter)
                if group["rule"] == "adamw":
                    self.update(parameter, parameter.grad)
                else:
                    batches[(id(group), self._splits.get(parameter, ()), *sorted(parameter.shape))].append(parameter)
        for batch in batches.values():
            size = max(1, BATCH_NUMBERS // batch[0].numel())
            for start in range(0, len(batch), size):
                part = batch[start : start + size]
                self._move(part, [parameter.grad for parameter in part], 1.0)  # type: ignore[misc]
        return loss

    def begin(self, parameter: torch.Tensor) -> None:
        """See `LowBitOptimizer.begin`; the size of a factor's step needs its partner's largest singular value."""
        super().begin(parameter)
        if parameter in self._partners:
            self._allocate(self._partners[parameter])

    @torch.no_grad()
    def update(self, parameter: torch.Tensor, grad: torch.Tensor, *, start: int = 0, grad_scale: float = 1.0) -> None:
        """See `LowBitOptimizer.update`; matrices and factors take their whole gradient at once."""
        if self._groups[parameter]["rule"] == "adamw":
            super().update(parameter, grad, start=start, grad_scale=grad_scale)
        elif grad.numel() != parameter.numel():
            raise ValueError("a part of a gradient was given for a parameter that is orthogonalised; it needs the whole one")
        else:
            self._move([parameter], [grad.view(parameter.shape)], grad_scale)

    def _move(self, parameters: list[torch.Tensor], grads: list[torch.Tensor], grad_scale: float) -> None:
        """One update of parameters of one group that are alike up to transposition."""
        group = self._groups[parameters[0]]
        momenta = [self._momentum(p, g, grad_scale) for p, g in zip(parameters, grads, strict=True)]
        first = 0
        for rows in self._splits.get(parameters[0], ()) or (None,):
            part = slice(None) if rows is None else slice(first, first + rows)
            first += rows or 0
            directions = orthogonalize(torch.stack([_flat(momentum[part]) for momentum in momenta]))
            for parameter, flat in zip(parameters, directions, strict=True):
                direction = flat if _is_flat(parameter[part]) else flat.mT
                step, decay = group["lr"] * self._scale(parameter, part), group["lr"] * group["weight_decay"]
                self._apply(parameter, part, direction, step, decay)
            del directions
        if group["rule"] == "factors":
            for parameter in parameters:
                self._measure(parameter)

    def _momentum(self, parameter: torch.Tensor, grad: torch.Tensor, grad_scale: float) -> torch.Tensor:
        """The new momentum in fp32, after it was stored."""
        state, bits = self.state[parameter], self.bits_of(parameter)
        weight = (1 - self.momentum) * grad_scale
        if bits == 32:
            return state["exp_avg"].mul_(self.momentum).add_(grad, alpha=weight)
        fmt = FORMATS[bits]
        rows = state["exp_avg"].view(-1, BLOCK * bits // 8)
        padded = decode_signed(rows, state["exp_avg_scale"], fmt).flatten()
        momentum = padded[: parameter.numel()].view(parameter.shape)
        momentum.mul_(self.momentum).add_(grad, alpha=weight)
        random = second_bits(self._random(parameter, 0, padded.numel())).view(-1, BLOCK)
        codes, scale = encode_signed(padded.view(-1, BLOCK), random, fmt)
        rows.copy_(codes)
        state["exp_avg_scale"].copy_(scale)
        return momentum

    def _scale(self, parameter: torch.Tensor, part: slice) -> float | torch.Tensor:
        partner = self._partners.get(parameter)
        if partner is None:
            return UPDATE_RMS * math.sqrt(max(parameter[part].shape))
        sigmas = self.state[parameter]["sigma"] + self.state[partner]["sigma"]
        size = max(max(parameter.shape), max(partner.shape))
        return UPDATE_RMS * math.sqrt(size) / (sigmas + 1)

    def _apply(self, parameter: torch.Tensor, part: slice, direction: torch.Tensor, step: float | torch.Tensor, decay: float) -> None:
        weights = parameter[part]
        if weights.dtype == torch.float32:
            weights.mul_(1 - decay).sub_(direction * step)
            return
        new = (weights.float() * (1 - decay)).sub_(direction * step)
        first = (part.start or 0) * parameter.shape[1]
        weights.copy_(round_to(new, self._random(parameter, first, weights.numel()).view(weights.shape), weights.dtype))

    def _random(self, parameter: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Random bits of this step for the elements first, first + 1, ..."""
        key = mix_key(self.seed, self.state[parameter]["step"], self._positions[parameter])
        return random_bits(key, first, count, parameter.device)

    def _measure(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        flat = _flat(parameter.detach()).float().unsqueeze(0)
        state["sigma"].copy_(spectral_norm(flat, state["vector"].unsqueeze(0))[0])

    def names_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        return self.state_names if self._groups[parameter]["rule"] == "adamw" else ("exp_avg",)

    def _allocate(self, parameter: torch.Tensor) -> None:
        rule = self._groups[parameter]["rule"]
        if rule == "adamw" or self.state[parameter]:
            super()._allocate(parameter)
            return
        super()._allocate(parameter)
        if rule == "factors":
            state = self.state[parameter]
            state["vector"] = parameter.new_full((min(parameter.shape),), min(parameter.shape) ** -0.5, dtype=torch.float32)
            state["sigma"] = parameter.new_zeros((), dtype=torch.float32)
            for _ in range(10):
                self._measure(parameter)

    def _index_parameters(self) -> None:
        super()._index_parameters()
        self._partners: dict[torch.Tensor, torch.Tensor] = {}
        self._splits: dict[torch.Tensor, tuple[int, ...]] = {}
        for group in self.param_groups:
            self._splits.update((p, sizes) for p, sizes in zip(group["params"], group.get("splits", ()), strict=False) if sizes)
            if group.get("rule") == "factors":
                for down, up in zip(group["params"][::2], group["params"][1::2], strict=True):
                    self._partners[down], self._partners[up] = up, down


def _is_flat(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _flat(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, lying on its longer side."""
    return matrix if _is_flat(matrix) else matrix.mT
