"""Causal attention without a whole score matrix, forward and backward.

On a CPU the queries are taken in blocks, the keys above a block's diagonal are never touched, and every product is a
plain batched matrix product. In 16 bits oneDNN computes these several times faster than the fused kernel behind
F.scaled_dot_product_attention multiplies; in fp32 the two are close and the better one is taken by shape.

Shapes: B batch, H heads, T time, D head width, G the B * H heads one after another, Q and K blocks of queries and keys.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lowmem.fake import autocast_kind, device_kind, is_fake, representative
from lowmem.nn.positions import alibi_bias, token_positions
from lowmem.nn.recompute import follow

BLOCKS = 4  # 4 blocks of queries compute 62.5 % of the square, 8 would 56 % in twice as many calls
MIN_BLOCK, MAX_BLOCK = 32, 512
MAX_SCORES = 1 << 19  # scores alive at once: they stay in a core's cache


def causal_attention(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    slopes: tuple[float, ...] = (),
    segments_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, each token attending itself and what came before.

    Args:
        q_BHTD, k_BHTD, v_BHTD: same shape and dtype.
        slopes: H ALiBi slopes; empty for none.
        segments_BT: tokens attend only those with their own number; None lets them attend all.
    Returns:
        (B, T, H * D), contiguous.
    Memory: saves q, k and v; the scores of one block are alive at once, in forward and in backward.
    """
    batch, heads, time, width = q_BHTD.shape
    with torch.autocast(autocast_kind(q_BHTD), enabled=False):
        if segments_BT is not None:
            return blocked_attention(q_BHTD, k_BHTD, v_BHTD, slopes, segments_BT)
        if _prefers_fused(q_BHTD, slopes):
            out_BHTD = _fused(q_BHTD, k_BHTD, v_BHTD, slopes)
            return out_BHTD.transpose(1, 2).reshape(batch, time, heads * width)
        return blocked_attention(q_BHTD, k_BHTD, v_BHTD, slopes)


def blocked_attention(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    slopes: tuple[float, ...] = (),
    segments_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """`causal_attention` by blocks of queries, on any device and in any dtype."""
    q, k, v = (follow(torch.Tensor.contiguous, x) for x in (q_BHTD, k_BHTD, v_BHTD))
    return _BlockedAttention.apply(q, k, v, slopes, segments_BT)


def cached_attention(
    q_BHTD: torch.Tensor,
    k_BHKD: torch.Tensor,
    v_BHKD: torch.Tensor,
    slopes: tuple[float, ...] = (),
    start: int | tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Attention of T new positions over K cached ones, themselves included; used for decoding.

    Args:
        start: position of the first query, of all sequences or of each; keys from a query's own position on are masked, whatever
            they hold. None: the queries are the last T of K.
    Returns:
        (B, T, H * D).
    Memory: T * K scores per head.
    """
    batch, heads, time, width = q_BHTD.shape
    bias_BHTK = _cache_bias(q_BHTD, k_BHKD.shape[2], slopes, k_BHKD.shape[2] - time if start is None else start)
    with torch.autocast(autocast_kind(q_BHTD), enabled=False):
        if is_fake(q_BHTD):  # as on a device: meta tensors would take the path that keeps every score
            out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BHKD, v_BHKD, 0.0, False, attn_mask=bias_BHTK)[0]
        else:
            out = F.scaled_dot_product_attention(q_BHTD, k_BHKD, v_BHKD, attn_mask=bias_BHTK)
    return out.transpose(1, 2).reshape(batch, time, heads * width)


def _cache_bias(like: torch.Tensor, total: int, slopes: tuple[float, ...], start: int | tuple[int, ...]) -> torch.Tensor | None:
    """What is added to scores over a cache of `total` slots: ALiBi, and -inf for what comes later; None if that is nothing."""
    _, heads, time, _ = like.shape
    if isinstance(start, int):
        bias_HTK = alibi_bias(slopes, range(start, start + time), range(total), like) if slopes else None
        if time > 1:
            future = torch.ones(time, total, dtype=torch.bool, device=like.device).triu_(start + 1)
            bias_HTK = like.new_zeros(time, total).expand(heads, -1, -1) if bias_HTK is None else bias_HTK
            bias_HTK = bias_HTK.masked_fill(future, float("-inf"))
        return None if bias_HTK is None else bias_HTK.unsqueeze(0)
    distance_B1TK = (torch.arange(total, device=like.device) - token_positions(start, time, like.device).unsqueeze(-1)).unsqueeze(1)
    if slopes:
        wide = torch.promote_types(like.dtype, torch.float32)
        slope_H11 = torch.tensor(slopes, dtype=wide, device=like.device).view(-1, 1, 1)
        bias_BHTK = (slope_H11 * distance_B1TK).to(like.dtype)
    else:
        bias_BHTK = torch.zeros_like(distance_B1TK, dtype=like.dtype)
    return bias_BHTK.masked_fill(distance_B1TK > 0, float("-inf"))


def _prefers_fused(q_BHTD: torch.Tensor, slopes: tuple[float, ...]) -> bool:
    """Where the fused kernel wins: on a GPU; on a CPU in fp32 for narrow heads or long sequences, unless ALiBi would make it
    read a whole matrix of biases."""
    if device_kind(q_BHTD) != "cpu":
        return True
    time, width = q_BHTD.shape[2:]
    return q_BHTD.dtype in (torch.float32, torch.float64) and not slopes and (width < 64 or time > 1024)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: tuple[float, ...]) -> torch.Tensor:
    if not slopes:
        if is_fake(q):  # without a device PyTorch would choose the path that keeps every score
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    time = q.shape[2]
    future = torch.ones(time, time, dtype=torch.bool, device=q.device).triu_(1)
    bias = alibi_bias(slopes, range(time), range(time), q).masked_fill(future, float("-inf"))
    if is_fake(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias.unsqueeze(0))[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))


class _Blocks:
    """The order in which blocks of scores are visited, the same in forward and backward."""

    def __init__(self, like: torch.Tensor, slopes: tuple[float, ...], segments: torch.Tensor | None):
        batch, heads, self.time, width = like.shape
        self.segments = segments
        self.scale = width**-0.5
        wanted = -(-self.time // BLOCKS)
        self.size = min(max(-(-wanted // 16) * 16, MIN_BLOCK), MAX_BLOCK)
        self.count = -(-self.time // self.size)
        room = max(1, MAX_SCORES // (self.size * self.time))
        # with slopes or segments a group of heads lies within one sequence, so that it finds its own
        total = heads if slopes or segments is not None else batch * heads
        self.group = max(size for size in range(1, min(room, total) + 1) if total % size == 0)
        self.heads, self.slopes = heads, slopes
        self.future = like.new_full((self.size, self.size), float("-inf")).triu_(1)

    def groups(self, total: int) -> list[slice]:
        return [slice(start, start + self.group) for start in range(0, total, self.group)]

    def queries(self) -> list[tuple[int, int]]:
        """Last block first: it reaches every key, so its share of the gradients initialises them."""
        return [(start, min(start + self.size, self.time)) for start in reversed(range(0, self.time, self.size))]

    def probabilities(self, q: torch.Tensor, k: torch.Tensor, group: slice, start: int, stop: int) -> torch.Tensor:
        """(group, stop - start, stop) attention weights."""
        keys = k[group, :stop].transpose(1, 2)
        if self.slopes:
            first = group.start % self.heads
            bias = alibi_bias(self.slopes[first : first + self.group], range(start, stop), range(stop), q)
            scores = torch.baddbmm(bias, q[group, start:stop], keys, alpha=self.scale)
        else:
            scores = q.new_empty(self.group, stop - start, stop)
            torch.baddbmm(scores, q[group, start:stop], keys, beta=0, alpha=self.scale, out=scores)
        rows = stop - start
        scores[:, :, start:] += self.future[:rows, :rows]
        if self.segments is not None:
            mine = self.segments[group.start // self.heads]
            scores.masked_fill_(mine[start:stop, None] != mine[None, :stop], float("-inf"))
        return torch.softmax(scores, dim=-1)


class _BlockedAttention(torch.autograd.Function):
    """Saves q, k, v; the probabilities are computed again in backward, block by block."""

    @staticmethod
    def forward(ctx, q, k, v, slopes, segments):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, segments)
        ctx.slopes = slopes
        batch, heads, time, width = q.shape
        blocks = _Blocks(q, slopes, segments)
        out = q.new_empty(batch, time, heads, width)
        result = q.new_empty(batch * heads, time, width)
        q, k, v = (x.view(-1, time, width) for x in (q, k, v))
        for group in representative(blocks.groups(batch * heads), q):
            for start, stop in blocks.queries():
                weights = blocks.probabilities(q, k, group, start, stop)
                result[group, start:stop] = torch.bmm(weights, v[group, :stop])
        out.copy_(result.view(batch, heads, time, width).transpose(1, 2))
        return out.view(batch, time, heads * width)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTC):  # type: ignore[no-untyped-def]
        q, k, v, segments = ctx.saved_tensors
        batch, heads, time, width = shape = q.shape
        blocks = _Blocks(q, ctx.slopes, segments)
        grad = grad_BTC.view(batch, time, heads, width).transpose(1, 2).contiguous().view(-1, time, width)
        q, k, v = (x.view(-1, time, width) for x in (q, k, v))
        # few 16-bit terms may be summed in 16 bits, many may not
        wide = q.dtype if blocks.count <= BLOCKS else torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.empty_like(k, dtype=wide), torch.empty_like(v, dtype=wide)
        for group in representative(blocks.groups(batch * heads), q):
            for start, stop in blocks.queries():
                weights = blocks.probabilities(q, k, group, start, stop)
                grad_out = grad[group, start:stop]
                _accumulate(grad_v[group, :stop], weights.transpose(1, 2), grad_out, 1.0, first=stop == time)
                grad_weights = torch.bmm(grad_out, v[group, :stop].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                target = grad_q[group, start:stop]
                torch.baddbmm(target, grad_scores, k[group, :stop], beta=0, alpha=blocks.scale, out=target)
                _accumulate(grad_k[group, :stop], grad_scores.transpose(1, 2), q[group, start:stop], blocks.scale, first=stop == time)
        grads = (grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype))
        return *(x.view(shape) for x in grads), None, None


def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, first: bool) -> None:
    if total.dtype == a.dtype:
        torch.baddbmm(total, a, b, beta=0 if first else 1, alpha=alpha, out=total)
    elif first:
        torch.mul(torch.bmm(a, b), alpha, out=total)
    else:
        total.add_(torch.bmm(a, b), alpha=alpha)
