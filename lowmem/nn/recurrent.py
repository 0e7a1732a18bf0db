"""i3's hybrid cell: a decaying average per channel and a small linear state, both linear and time-invariant.

    h_t = w * h_{t-1} + (1 - w) * x_t        s_t = A s_{t-1} + B x_t        y_t = C s_t + D * h_t

`hybrid_loop` is that definition, one step at a time, and the form for decoding. `hybrid_scan` computes the same for a
whole sequence: chunks of L steps are run side by side from zero, then the states at the chunk borders are handed on and
their contribution is added with powers of w and A. Nothing is divided, so w and A may take any value; but above 1 they would grow over
the sequence without end. `HybridCell` therefore hands on `stable_decay` and `contraction` of its parameters, which are those within 1.

Shapes: B batch, T time, C channels, S state width, K chunks of L steps, T = K * L.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.nn.linear import accumulate_dtype, compute_dtype
from lowmem.system.dry_run import autocast_kind, is_fake

CHUNK = 16  # steps per chunk: near the square root of the usual sequence lengths


@dataclass
class HybridState:
    """What the cell remembers: O(1) per token.

    Attributes:
        h_BC, s_BS: fp32.
    """

    h_BC: torch.Tensor
    s_BS: torch.Tensor

    def nbytes(self) -> int:
        """Bytes held."""
        return self.h_BC.nbytes + self.s_BS.nbytes

    def rows(self, start: int, stop: int) -> "HybridState":
        """Some of the sequences, sharing memory with this state."""
        return HybridState(self.h_BC[start:stop], self.s_BS[start:stop])

    def keep(self, rows: Sequence[int]) -> None:
        """Move the sequences `rows`, ascending, to the front, in place."""
        for new, old in enumerate(rows):
            if new != old:
                self.h_BC[new], self.s_BS[new] = self.h_BC[old], self.s_BS[old]

    def reset(self) -> None:
        """Back to the zero state, in place."""
        self.h_BC.zero_()
        self.s_BS.zero_()


def hybrid_loop(x_BTC, w_mix, transition, w_in, w_out, skip, *, state: HybridState | None = None):  # type: ignore[no-untyped-def]
    """The definition, step by step.

    Args:
        x_BTC: input.
        w_mix, skip: (C,): w and D.
        transition: (S, S): A. w_in: (S, C): B. w_out: (C, S): C.
        state: where to start; None is zero. It is not changed.
    Returns:
        y_BTC and the state after the last step.
    """
    batch, _, channels = x_BTC.shape
    h = x_BTC.new_zeros(batch, channels) if state is None else state.h_BC
    s = x_BTC.new_zeros(batch, transition.shape[0]) if state is None else state.s_BS
    outputs = []
    for x in x_BTC.unbind(1):
        h = w_mix * h + (1 - w_mix) * x
        s = s @ transition.t() + x @ w_in.t()
        outputs.append(s @ w_out.t() + h * skip)
    return torch.stack(outputs, 1), HybridState(h, s)


def hybrid_scan(x_BTC, w_mix, transition, w_in, w_out, skip):  # type: ignore[no-untyped-def]
    """`hybrid_loop` from the zero state, for a whole sequence at once; arguments and y_BTC as there.

    Memory: saves x, h and s, and allocates three tensors like x; the recurrence runs in fp32 (fp64 for fp64 input).
    """
    return _HybridScan.apply(x_BTC, w_mix, transition, w_in, w_out, skip)


def decay_scan(u_BTC: torch.Tensor, decay: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """h_t = decay * h_{t-1} + u_t in place, from h = 0; `reverse` runs from the last step to the first.

    Args:
        u_BTC: T a multiple of CHUNK; overwritten with h.
        decay: (C,).
    """
    batch, time, channels = u_BTC.shape
    h_BKLC = u_BTC.view(batch, time // CHUNK, CHUNK, channels)
    chunks, steps = range(h_BKLC.shape[1]), range(CHUNK)
    if reverse:
        chunks, steps = chunks[::-1], steps[::-1]
    for previous, step in pairwise(steps):
        h_BKLC[:, :, step].addcmul_(h_BKLC[:, :, previous], decay)
    powers = torch.cumprod(decay.expand(CHUNK, -1), 0)
    for previous, chunk in pairwise(chunks):
        border = h_BKLC[:, previous, steps[-1]].clone()
        h_BKLC[:, chunk].addcmul_(border.unsqueeze(1), powers.flip(0) if reverse else powers)
    return u_BTC


def matrix_scan(u_BTS: torch.Tensor, transition: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """s_t = transition @ s_{t-1} + u_t in place, from s = 0; `reverse` runs from the last step to the first.

    Args:
        u_BTS: T a multiple of CHUNK; overwritten with s.
        transition: (S, S).
    """
    batch, time, width = u_BTS.shape
    s_BKLS = u_BTS.view(batch, time // CHUNK, CHUNK, width)
    chunks, steps = range(s_BKLS.shape[1]), range(CHUNK)
    if reverse:
        chunks, steps = chunks[::-1], steps[::-1]
    turned = transition.t()
    powers = [turned]
    for previous, step in pairwise(steps):
        s_BKLS[:, :, step] += s_BKLS[:, :, previous] @ turned
        powers.append(powers[-1] @ turned)
    side_by_side = torch.cat(powers[::-1] if reverse else powers, 1)
    for previous, chunk in pairwise(chunks):
        s_BKLS[:, chunk] += (s_BKLS[:, previous, steps[-1]] @ side_by_side).view(batch, CHUNK, width)
    return u_BTS


class _HybridScan(torch.autograd.Function):
    """The gradient of a linear recurrence is the same recurrence run backwards."""

    @staticmethod
    def forward(ctx, x, w_mix, transition, w_in, w_out, skip):  # type: ignore[no-untyped-def]
        dtype, wide = compute_dtype(x), accumulate_dtype(x.dtype)
        with torch.autocast(autocast_kind(x), enabled=False):
            x_in, length = _padded(x.to(dtype)), x.shape[1]
            w = w_mix.to(wide)
            h = decay_scan(x_in * (1 - w), w)
            s = matrix_scan((x_in @ w_in.to(dtype).t()).to(wide), transition.to(wide))
            y = (s.to(dtype) @ w_out.to(dtype).t()).addcmul_(h.to(dtype), skip.to(dtype))
        ctx.save_for_backward(x_in, h, s, w_mix, transition, w_in, w_out, skip)
        ctx.dtypes = x.dtype, dtype, wide
        return y[:, :length]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        x, h, s, w_mix, transition, w_in, w_out, skip = ctx.saved_tensors
        input_dtype, dtype, wide = ctx.dtypes
        length = grad_y.shape[1]
        grad_y = _padded(grad_y)
        w = w_mix.to(wide)
        grad_s = matrix_scan((grad_y @ w_out.to(dtype)).to(wide), transition.to(wide).t(), reverse=True)
        grad_w_out = _outer(s.to(dtype), grad_y).t()
        work = grad_y * h  # one buffer for every product: fresh memory costs more than the arithmetic
        grad_skip = work.sum((0, 1))
        grad_h = decay_scan(grad_y * skip.to(wide), w, reverse=True)
        grad_transition = _outer(grad_s[:, 1:], s[:, :-1])
        # w multiplies h_{t-1} - x_t, and h_{-1} is zero
        torch.mul(grad_h, x, out=work).neg_()
        work[:, 1:].addcmul_(grad_h[:, 1:], h[:, :-1])
        grad_w = work.sum((0, 1))
        narrow = grad_s.to(dtype)
        grad_w_in = _outer(narrow, x)
        grad_h.mul_(1 - w)
        grad_x = grad_h.view(-1, grad_h.shape[-1])
        if dtype == wide:
            grad_x.addmm_(narrow.flatten(0, 1), w_in.to(dtype))
        else:
            grad_x += narrow.flatten(0, 1) @ w_in.to(dtype)
        grad_x = grad_x.view(grad_h.shape)[:, :length].to(input_dtype)
        weights = (w_mix, transition, w_in, w_out, skip)
        grads = (grad_w, grad_transition, grad_w_in, grad_w_out, grad_skip)
        return grad_x, *(grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True))


def stable_decay(w_mix: torch.Tensor) -> torch.Tensor:
    """w itself from -1 to 1, and 1 / w beyond, in fp32 (fp64 for fp64): a channel that left the stable region is led back to it by its
    gradient, where a clamped one would have none.

    Args:
        w_mix: any shape.
    """
    w = w_mix.to(accumulate_dtype(w_mix.dtype))
    beyond = w.abs() > 1
    return torch.where(beyond, torch.where(beyond, w, 1).reciprocal(), w)


def contraction(transition: torch.Tensor) -> torch.Tensor:
    """A itself where no vector becomes longer by it, else A divided by its largest singular value, in fp32 (fp64 for fp64).

    Args:
        transition: (S, S). One that is not finite is returned as it is.
    """
    matrix = transition.to(accumulate_dtype(transition.dtype))
    if is_fake(matrix):
        return matrix
    largest_at_most = torch.linalg.vector_norm(matrix.detach()).item()  # most matrices need no more than this
    if not 1 < largest_at_most < torch.inf:
        return matrix
    with torch.autocast(autocast_kind(matrix), enabled=False):
        return matrix / torch.linalg.matrix_norm(matrix, 2).clamp_min(1)


def _padded(x_BTC: torch.Tensor) -> torch.Tensor:
    """Zeros after the end, up to a whole number of chunks; they reach nothing before them."""
    missing = -x_BTC.shape[1] % CHUNK
    return torch.nn.functional.pad(x_BTC, (0, 0, 0, missing)) if missing else x_BTC.contiguous()


def _outer(a_BTM: torch.Tensor, b_BTN: torch.Tensor) -> torch.Tensor:
    """Sum over batch and time of the outer products, (M, N)."""
    return a_BTM.flatten(0, 1).t() @ b_BTN.flatten(0, 1)


class HybridCell(nn.Module):
    """The cell with its published initial values; see `stable_decay` and `contraction` for what w and A become.

    Args:
        dim: C.
        state_dim: S.
    Memory: 2 * C * S + S * S + 2 * C weights; see `hybrid_scan`.
    """

    def __init__(self, dim: int, state_dim: int = 32, std: float = 0.01):
        super().__init__()
        self.w_mix = nn.Parameter(torch.full((dim,), 0.5))
        self.transition = nn.Parameter(torch.empty(state_dim, state_dim))
        self.w_in = nn.Parameter(torch.empty(state_dim, dim))
        self.w_out = nn.Parameter(torch.empty(dim, state_dim))
        self.skip = nn.Parameter(torch.full((dim,), 0.1))
        for matrix in (self.transition, self.w_in, self.w_out):
            nn.init.normal_(matrix, std=std)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), from the zero state."""
        return hybrid_scan(x_BTC, *self._stable())

    def step(self, x_BTC: torch.Tensor, state: HybridState) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), continuing from `state`, which is advanced in place; computed in fp32."""
        wide = accumulate_dtype(x_BTC.dtype)
        with torch.autocast(autocast_kind(x_BTC), enabled=False):
            weights = [weight.to(wide) for weight in self._stable()]
            y, after = hybrid_loop(x_BTC.to(wide), *weights, state=state)
        state.h_BC.copy_(after.h_BC)
        state.s_BS.copy_(after.s_BS)
        return y.to(x_BTC.dtype)

    def new_state(self, batch_size: int) -> HybridState:
        """The zero state."""
        wide, device = accumulate_dtype(self.w_mix.dtype), self.w_mix.device
        channels, width = self.w_out.shape
        return HybridState(
            torch.zeros(batch_size, channels, dtype=wide, device=device), torch.zeros(batch_size, width, dtype=wide, device=device)
        )

    def _stable(self) -> tuple[torch.Tensor, ...]:
        return stable_decay(self.w_mix), contraction(self.transition), self.w_in, self.w_out, self.skip
