"""How attention learns the order of tokens: rotary (RoPE), linear biases (ALiBi), or a learned table.

Shapes: B batch, T time, H heads, D head width, K keys.
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.nn.layers import embedding
from lowmem.system.dry_run import is_fake
from lowmem.system.errors import ConfigError


class RotaryTable:
    """Cosines and sines of the rotary angles, computed when asked for and kept for the last request only.

    Args:
        head_dim: D, even.
        theta: base of the frequencies.
    Source: Su et al. 2021, arXiv:2104.09864, equation 34; halves layout as in Llama.
    """

    def __init__(self, head_dim: int, theta: float):
        self.head_dim, self.theta = head_dim, theta
        self._key: tuple | None = None
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def get(self, start: int | tuple[int, ...], length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables for the positions start .. start + length - 1.

        Args:
            start: one for all sequences, or one for each of B.
        Returns:
            cos and sin, each (length, 1, head_dim / 2), or (B, length, 1, head_dim / 2), in the dtype and on the device of `like`.
        """
        key = (start, length, like.dtype, like.device)
        if self._key == key and self._tables is not None and not is_fake(like):
            return self._tables
        with torch.inference_mode(False):  # kept tables must serve a later training step
            tables = self._made(start, length, like)
        if not is_fake(like):  # a fake tensor must not outlive the dry run that made it
            self._key, self._tables = key, tables
        return tables

    def _made(self, start: int | tuple[int, ...], length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(like.dtype, torch.float32)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=like.device) / self.head_dim
        positions = token_positions(start, length, like.device).double()
        angles = (positions.unsqueeze(-1) * self.theta**-exponents).to(wide).unsqueeze(-2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class _Rotate(torch.autograd.Function):
    """Rotates and moves heads before time in one pass; backward is the opposite rotation, so nothing but the tables is saved."""

    @staticmethod
    def forward(ctx, x_BTHD, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        batch, time, heads, width = x_BTHD.shape
        out_BHTD = x_BTHD.new_empty(batch, heads, time, width)
        _rotate_into(out_BHTD.transpose(1, 2), x_BTHD, cos, sin, 1)
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHTD):  # type: ignore[no-untyped-def]
        batch, heads, time, width = grad_BHTD.shape
        grad_BTHD = grad_BHTD.new_empty(batch, time, heads, width)
        cos, sin = ctx.saved_tensors
        _rotate_into(grad_BTHD, grad_BHTD.transpose(1, 2), cos, sin, -1)
        return grad_BTHD, None, None


def _rotate_into(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> None:
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)


def rotate(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions.

    Args:
        x_BTHD: queries or keys.
        cos, sin: (T, 1, D / 2) or (B, T, 1, D / 2) from `RotaryTable.get`.
    Returns:
        (B, H, T, D), contiguous.
    Memory: one tensor like `x_BTHD`; saves nothing but the tables.
    """
    return _Rotate.apply(x_BTHD, cos, sin)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """One slope per head: 2^(-8/n), 2^(-16/n), ... for n heads, the sequence for the next powers of two interleaved otherwise.

    Source: Press et al. 2022, arXiv:2108.12409, section 3.
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2 ** (-4 * (i + 1) / whole) for i in range(0, 2 * whole, 2)]
    return tuple((slopes + between)[:num_heads])


def alibi_bias(slopes: tuple[float, ...], queries: range, keys: range, like: torch.Tensor) -> torch.Tensor:
    """-slope * (i - j) for query position i and key position j.

    Args:
        queries, keys: absolute positions.
    Returns:
        (heads, len(queries), len(keys)) in the dtype and on the device of `like`.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    i = torch.arange(queries.start, queries.stop, dtype=wide, device=like.device)
    j = torch.arange(keys.start, keys.stop, dtype=wide, device=like.device)
    slope_H11 = torch.tensor(slopes, dtype=wide, device=like.device).view(-1, 1, 1)
    return (slope_H11 * (j - i.unsqueeze(1))).to(like.dtype)


class LearnedPositions(nn.Module):
    """A trained vector per position.

    Memory: max_seq_len * dim weights.
    """

    def __init__(self, max_seq_len: int, dim: int, std: float = 0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_seq_len, dim))
        nn.init.normal_(self.weight, std=std)

    def forward(self, hidden_BTD: torch.Tensor, start: int | tuple[int, ...], segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Add the vectors of positions start .. start + T - 1, or of those that begin anew with each segment.

        Args:
            start: one for all sequences, or one for each.
        Raises:
            ConfigError: a position lies beyond the table.
        """
        last = start if isinstance(start, int) else max(start)
        stop, length = last + hidden_BTD.shape[1], self.weight.shape[0]
        if stop > length:
            raise ConfigError(
                f"a sequence of {stop} tokens, but the learned positions end at model.max_seq_len = {length}; "
                "shorten it, train with a larger model.max_seq_len, or use positions rope or alibi"
            )
        if segments_BT is not None:
            return hidden_BTD + embedding(segment_positions(segments_BT), self.weight)
        if isinstance(start, int):
            return hidden_BTD + self.weight[start:stop]
        return hidden_BTD + embedding(token_positions(start, hidden_BTD.shape[1], self.weight.device), self.weight)


def token_positions(start: int | tuple[int, ...], time: int, device: torch.device) -> torch.Tensor:
    """int64 positions of `time` tokens that follow `start` others: (T,), or (B, T) if each sequence starts elsewhere."""
    if isinstance(start, int):
        return torch.arange(start, start + time, device=device)
    return torch.tensor(start, device=device).unsqueeze(1) + torch.arange(time, device=device)


def segment_positions(segments_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) int64: how far each token is from the beginning of its segment."""
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand(segments_BT.shape)
    begins = torch.zeros_like(index)
    begins[:, 1:] = torch.where(segments_BT[:, 1:] != segments_BT[:, :-1], index[:, 1:], 0)
    return index - begins.cummax(1).values
