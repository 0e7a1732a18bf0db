"""Causal attention without a whole score matrix, forward and backward.

On a CPU the queries are taken in blocks, the keys above a block's diagonal are never touched, and every product is a
plain batched matrix product. In 16 bits oneDNN computes these several times faster than the fused kernel behind
F.scaled_dot_product_attention multiplies; in fp32 the two are close and the better one is taken by shape.

On a CPU scores, weights and sums are fp32 whatever the inputs are: in bf16 a score of 8 is off by up to 1.6 % of its weight. The products
of the backward pass other than scores take bf16 inputs where the CPU multiplies those; one that would emulate them is faster in fp32.

Shapes: B batch, H heads, T time, D head width, G the B * H heads one after another, Q and K blocks of queries and keys.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lowmem.nn.linear import accumulate_dtype
from lowmem.nn.positions import alibi_bias, token_positions
from lowmem.nn.recompute import follow
from lowmem.system.devices import cpu_has_native_bf16
from lowmem.system.dry_run import autocast_kind, device_kind, is_fake, representative

BLOCKS = 4  # 4 blocks of queries compute 62.5 % of the square, 8 would 56 % in twice as many calls
MIN_BLOCK, MAX_BLOCK = 32, 512
MAX_SCORES = 1 << 19  # scores alive at once: they stay in a core's cache


def causal_attention(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    slopes: tuple[float, ...] = (),
    segments_BT: torch.Tensor | None = None,
    *,
    first_BT: torch.Tensor | None = None,
    prefix: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, each token attending itself and what came before.

    Args:
        q_BHTD, k_BHTD, v_BHTD: same shape and dtype; keys and values may have fewer heads, each of which serves H / theirs queries in turn.
        slopes: H ALiBi slopes; empty for none.
        segments_BT: tokens attend only those with their own number; None lets them attend all.
        first_BT: (B, T) or (1, T) integers: the first key that a token attends, at most its own position; windows and segments are
            told so. Not together with `segments_BT`.
        prefix: so many keys at the beginning are attended by all that come after them, whatever `first_BT` says.
        scale: of the scores; None is 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them. Not together with `slopes`.
    Returns:
        (B, T, H * D), contiguous.
    Memory: saves q, k and v; the scores of one block are alive at once, in forward and in backward, in fp32; of 16-bit inputs so are
        the heads that the block belongs to.
    """
    batch, heads, time, width = q_BHTD.shape
    if k_BHTD.shape[1] != heads:
        k_BHTD, v_BHTD = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BHTD, v_BHTD))
    with torch.autocast(autocast_kind(q_BHTD), enabled=False):
        if segments_BT is not None or first_BT is not None or softcap:
            masked = {"first_BT": first_BT, "prefix": prefix, "scale": scale, "softcap": softcap}
            return blocked_attention(q_BHTD, k_BHTD, v_BHTD, slopes, segments_BT, **masked)  # type: ignore[arg-type]
        if _prefers_fused(q_BHTD, slopes):
            out_BHTD = _fused(q_BHTD, k_BHTD, v_BHTD, slopes, scale)
            return out_BHTD.transpose(1, 2).reshape(batch, time, heads * width)
        return blocked_attention(q_BHTD, k_BHTD, v_BHTD, slopes, scale=scale)


def blocked_attention(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    slopes: tuple[float, ...] = (),
    segments_BT: torch.Tensor | None = None,
    *,
    first_BT: torch.Tensor | None = None,
    prefix: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """`causal_attention` by blocks of queries, on any device and in any dtype, with as many heads of keys as of queries.

    Raises:
        ValueError: two masks, or ALiBi and a soft-cap.
    """
    if (segments_BT is not None and first_BT is not None) or (slopes and softcap):
        raise ValueError("found segments_BT and first_BT, or slopes and softcap; allowed: one of each pair")
    q, k, v = (follow(torch.Tensor.contiguous, x) for x in (q_BHTD, k_BHTD, v_BHTD))
    return _BlockedAttention.apply(q, k, v, segments_BT, first_BT, _Scores(slopes, scale, softcap, prefix))


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


def visible_attention(
    q_BHTD: torch.Tensor, k_BHKD: torch.Tensor, v_BHKD: torch.Tensor, visible: torch.Tensor, scale: float | None, softcap: float
) -> torch.Tensor:
    """Attention over K cached keys of which each query sees those that a mask names; used for decoding, without gradient.

    Args:
        k_BHKD, v_BHKD: may have fewer heads than the queries, each of which serves as many of them in turn.
        visible: (B or 1, 1, T, K) bool.
        scale, softcap: see `causal_attention`.
    Returns:
        (B, T, H * D).
    Memory: T * K scores per head in fp32.
    """
    batch, heads, time, width = q_BHTD.shape
    k_BHKD, v_BHKD = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BHKD, v_BHKD))
    with torch.autocast(autocast_kind(q_BHTD), enabled=False):
        wide = accumulate_dtype(q_BHTD.dtype)
        scores = (q_BHTD.to(wide) @ k_BHKD.to(wide).transpose(2, 3)).mul_(width**-0.5 if scale is None else scale)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        weights = torch.softmax(scores.masked_fill_(~visible, float("-inf")), dim=-1)
        out = weights.to(v_BHKD.dtype) @ v_BHKD
    return out.transpose(1, 2).reshape(batch, time, -1)


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


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: tuple[float, ...], scale: float | None) -> torch.Tensor:
    if not slopes:
        if is_fake(q):  # without a device PyTorch would choose the path that keeps every score
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)[0]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    time = q.shape[2]
    future = torch.ones(time, time, dtype=torch.bool, device=q.device).triu_(1)
    bias = alibi_bias(slopes, range(time), range(time), q).masked_fill(future, float("-inf"))
    if is_fake(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias.unsqueeze(0), scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0), scale=scale)


class _Scores(NamedTuple):
    """What is done to the products of queries and keys; see `causal_attention`."""

    slopes: tuple[float, ...] = ()
    scale: float | None = None
    softcap: float = 0.0
    prefix: int = 0


class _Blocks:
    """The order in which blocks of scores are visited, the same in forward and backward.

    Attributes:
        wide: dtype of scores and weights.
        products: dtype of what backward multiplies, scores aside.
    """

    def __init__(self, like: torch.Tensor, segments: torch.Tensor | None, first: torch.Tensor | None, how: _Scores):
        batch, heads, self.time, width = like.shape
        slopes, self.softcap, self.prefix = how.slopes, how.softcap, how.prefix
        self.segments, self.first = segments, None if first is None else first.expand(batch, -1)
        masked = segments is not None or first is not None
        self.scale = width**-0.5 if how.scale is None else how.scale
        self.wide = accumulate_dtype(like.dtype)
        self.products = like.dtype if _multiplies(like.dtype, device_kind(like)) else self.wide
        wanted = -(-self.time // BLOCKS)
        self.size = min(max(-(-wanted // 16) * 16, MIN_BLOCK), MAX_BLOCK)
        room = max(1, MAX_SCORES // (self.size * self.time))
        # with slopes or masks a group is heads of one sequence, or, with masks, whole sequences: so it finds its own
        total = heads if slopes or (masked and room < 2 * heads) else batch * heads
        unit = 1 if not masked or total == heads else heads
        self.group = max(size for size in range(unit, min(room, total) + 1, unit) if total % size == 0)
        self.heads, self.slopes = heads, slopes
        self.future = like.new_full((self.size, self.size), float("-inf"), dtype=self.wide).triu_(1)

    def groups(self, total: int) -> list[slice]:
        return [slice(start, start + self.group) for start in range(0, total, self.group)]

    def queries(self) -> list[tuple[int, int]]:
        """Last block first: it reaches every key, so its share of the gradients initialises them."""
        return [(start, min(start + self.size, self.time)) for start in reversed(range(0, self.time, self.size))]

    def exact(self, x_GTD: torch.Tensor) -> torch.Tensor:
        """What forward multiplies: fp32, unless the device has products of 16 bits with an fp32 result."""
        return x_GTD if device_kind(x_GTD) == "cuda" and not torch.version.hip else x_GTD.to(self.wide)

    def probabilities(
        self, q: torch.Tensor, k: torch.Tensor, group: slice, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(group, stop - start, stop) attention weights of a group's queries and keys, from `exact`, and the soft-cap's derivative."""
        queries, keys = q[:, start:stop], k[:, :stop].transpose(1, 2)
        if q.dtype != self.wide:
            scores = torch.bmm(queries, keys, out_dtype=self.wide).mul_(self.scale)
            if self.slopes:
                scores += self._bias(group, start, stop, scores)
        elif self.slopes:
            scores = torch.baddbmm(self._bias(group, start, stop, q), queries, keys, alpha=self.scale)
        else:
            scores = q.new_empty(self.group, stop - start, stop)
            torch.baddbmm(scores, queries, keys, beta=0, alpha=self.scale, out=scores)
        rows, damping = stop - start, None
        if self.softcap:
            scores.div_(self.softcap).tanh_()
            damping = 1 - scores * scores
            scores.mul_(self.softcap)
        hidden = self._hidden(group, start, stop)
        if hidden is None:
            scores[:, :, start:] += self.future[:rows, :rows]
        else:
            bias = scores.new_zeros(len(hidden), rows, stop)
            bias.masked_fill_(hidden, float("-inf"))
            bias[:, :, start:] += self.future[:rows, :rows]
            scores.view(len(hidden), -1, rows, stop).add_(bias.unsqueeze(1))
        return torch.softmax(scores, dim=-1), damping

    def _hidden(self, group: slice, start: int, stop: int) -> torch.Tensor | None:
        """(sequences of the group, stop - start, stop): earlier keys that a query does not attend; None if it attends all."""
        mine = slice(group.start // self.heads, -(-group.stop // self.heads))
        if self.segments is not None:
            return self.segments[mine, start:stop, None] != self.segments[mine, None, :stop]
        if self.first is not None:
            key = torch.arange(stop, device=self.first.device)
            early = key < self.first[mine, start:stop, None]
            return early & (key >= self.prefix) if self.prefix else early
        return None

    def _bias(self, group: slice, start: int, stop: int, like: torch.Tensor) -> torch.Tensor:
        first = group.start % self.heads
        return alibi_bias(self.slopes[first : first + self.group], range(start, stop), range(stop), like)


def _multiplies(dtype: torch.dtype, kind: str) -> bool:
    """Whether products of `dtype` are worth their rounding on this kind of device."""
    return kind != "cpu" or dtype.itemsize > 2 or (dtype == torch.bfloat16 and _native_bf16())


@cache
def _native_bf16() -> bool:
    return cpu_has_native_bf16()


class _BlockedAttention(torch.autograd.Function):
    """Saves q, k, v; the probabilities are computed again in backward, block by block."""

    @staticmethod
    def forward(ctx, q, k, v, segments, first, how):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, segments, first)
        ctx.how = how
        batch, heads, time, width = q.shape
        blocks = _Blocks(q, segments, first, how)
        out = q.new_empty(batch, time, heads, width)
        result = q.new_empty(batch * heads, time, width)
        q, k, v = (x.view(-1, time, width) for x in (q, k, v))
        for group in representative(blocks.groups(batch * heads), q):
            _group_output(blocks, group, [x[group] for x in (q, k, v)], result[group])
        out.copy_(result.view(batch, heads, time, width).transpose(1, 2))
        return out.view(batch, time, heads * width)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTC):  # type: ignore[no-untyped-def]
        q, k, v, segments, first = ctx.saved_tensors
        batch, heads, time, width = shape = q.shape
        blocks = _Blocks(q, segments, first, ctx.how)
        grad = grad_BTC.view(batch, time, heads, width).transpose(1, 2).contiguous().view(-1, time, width)
        q, k, v = (x.view(-1, time, width) for x in (q, k, v))
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for group in representative(blocks.groups(batch * heads), q):
            _group_gradients(blocks, group, [x[group] for x in (q, k, v, grad)], [x[group] for x in grads])
        return *(x.view(shape) for x in grads), None, None, None


def _group_output(blocks: _Blocks, group: slice, inputs: list[torch.Tensor], result: torch.Tensor) -> None:
    """Fill the output of one group of heads.

    Args:
        inputs: q, k and v of the group, (group, T, D).
    Memory: one block of scores, and 16-bit inputs in fp32.
    """
    queries, keys, values = (blocks.exact(x) for x in inputs)
    for start, stop in blocks.queries():
        weights = blocks.probabilities(queries, keys, group, start, stop)[0].to(values.dtype)
        result[:, start:stop] = torch.bmm(weights, values[:, :stop])


def _group_gradients(blocks: _Blocks, group: slice, inputs: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """Fill the gradients of q, k and v of one group of heads.

    Args:
        inputs: q, k, v and the gradient of the output, (group, T, D).
    Memory: one block of scores, and 16-bit gradients of k and v in fp32.
    """
    queries, keys = (blocks.exact(x) for x in inputs[:2])
    q, k, v, grad = (x.to(blocks.products) for x in inputs)
    grad_q, grad_k, grad_v = grads
    sum_k, sum_v = (x if x.dtype == blocks.wide else torch.empty_like(x, dtype=blocks.wide) for x in (grad_k, grad_v))
    for start, stop in blocks.queries():
        weights, damping = blocks.probabilities(queries, keys, group, start, stop)
        grad_out = grad[:, start:stop]
        _accumulate(sum_v[:, :stop], weights.to(blocks.products).transpose(1, 2), grad_out, 1.0, first=stop == blocks.time)
        grad_weights = torch.bmm(grad_out, v[:, :stop].transpose(1, 2)).to(blocks.wide)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, blocks.wide)
        grad_scores = (grad_scores if damping is None else grad_scores.mul_(damping)).to(blocks.products)
        _accumulate(grad_q[:, start:stop], grad_scores, k[:, :stop], blocks.scale, first=True)
        _accumulate(sum_k[:, :stop], grad_scores.transpose(1, 2), q[:, start:stop], blocks.scale, first=stop == blocks.time)
    for grad_x, sum_x in ((grad_k, sum_k), (grad_v, sum_v)):
        if sum_x is not grad_x:
            grad_x.copy_(sum_x)


def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, first: bool) -> None:
    """total = alpha * a @ b, or that added to it."""
    if total.dtype == a.dtype:
        torch.baddbmm(total, a, b, beta=0 if first else 1, alpha=alpha, out=total)
    elif first:
        total.copy_(torch.bmm(a, b).mul_(alpha))
    else:
        total.add_(torch.bmm(a, b), alpha=alpha)
