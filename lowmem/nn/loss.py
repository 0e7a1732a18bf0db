"""Output head and cross-entropy, chunk by chunk: the logits of a batch never exist at once (D3).

Loss and gradients are formed together in the forward pass, so that each logit is computed once and thrown away.

Shapes: N tokens, C width of what the head multiplies (the rank, for a LoRPt head), V vocabulary, M tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lowmem.fake import autocast_kind, device_kind, is_fake, representative
from lowmem.nn.precision import accumulate_dtype, compute_dtype
from lowmem.nn.quantized import dense

IGNORE_INDEX = -100
AUTO_LOGIT_BYTES = 16 << 20
CPU_BLOCK_BYTES = 4 << 20  # wide rows of logits alive at once: small enough for the cache
GPU_BLOCK_BYTES = 64 << 20  # large enough that launching kernels takes no time
GRAD_BLOCK_ROWS = 2048  # rows of the weight gradient that are added to the wide sum at once


@dataclass(frozen=True)
class CrossEntropyOptions:
    """See `lowmem.models.base.LossOptions`."""

    chunk_tokens: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_targets: Any = None


def auto_chunk_tokens(vocab_size: int, width: int, itemsize: int) -> int:
    """About 16 MiB of logits, but no fewer tokens than half of `width`: each chunk adds its weight gradient to an fp32 sum,
    which costs as much as multiplying some 50 tokens and is to stay small beside the rest."""
    tokens = max(AUTO_LOGIT_BYTES // (vocab_size * itemsize), width // 2, 1)
    return tokens if tokens < 64 else tokens // 64 * 64  # matrix products are fastest on whole tiles


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    denominator: float | torch.Tensor = 1.0,
    options: CrossEntropyOptions = CrossEntropyOptions(),
) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of `hidden @ weight.T + bias`, divided by `denominator`.

    Per token: (1 - s) * (lse - z_target) + s * (lse - mean(z)) + c * lse^2, with label smoothing s and z-loss weight c.

    Args:
        hidden: (..., C).
        weight: (V, C).
        bias: (V,) or None.
        targets: (...) int64; IGNORE_INDEX rows count nothing and, on a CPU, cost nothing.
        denominator: a number, or a tensor without gradient.
    Returns:
        Scalar, fp32 (fp64 for fp64 input).
    Memory: one chunk of logits in the computing dtype; gradients of `hidden`, `weight` and `bias` from the forward pass
        on; with more than one chunk an fp32 sum of the weight's gradient, if the weight is narrower, until it is done.
    Source: softmax gradient in closed form; z-loss from Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets.reshape(-1), denominator, options, compute_dtype(hidden))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are kept undivided until backward: divided by a large batch they would underflow fp16."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets_N, denominator, options, dtype):  # type: ignore[no-untyped-def]
        with torch.autocast(autocast_kind(hidden), enabled=False):
            chunks = Chunks if options.soft_targets is None else options.soft_targets.chunks
            work = chunks(hidden, weight, bias, targets_N, options, dtype, ctx.needs_input_grad[:3])
            total = work.run()
        ctx.grads = work.gradients(hidden, weight, bias)
        ctx.denominator = denominator
        return total / denominator

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        if ctx.grads is None:
            raise RuntimeError("the loss was differentiated twice, its gradients are kept for one backward only; compute the loss again")
        scale = grad_output / ctx.denominator
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(scale) for grad in grads), None, None, None, None


class Chunks:
    """One pass over the tokens.

    Attributes:
        start: first token of the present chunk, among those that are predicted.
    """

    start = 0

    def __init__(self, hidden, weight, bias, targets_N, options, dtype, needs):  # type: ignore[no-untyped-def]
        self.options, self.dtype = options, dtype
        self.wide = accumulate_dtype(dtype)
        self.weight = dense(weight.detach(), dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.vocab_size, width = weight.shape
        hidden_NC = hidden.detach().reshape(-1, width).to(dtype)
        self.tokens = hidden_NC.shape[0]
        self.rows = None
        # looking at the targets would wait for a GPU, and a dry run has no data to look at
        self.may_be_ignored = device_kind(targets_N) != "cpu" or is_fake(targets_N)
        if not self.may_be_ignored:
            self.rows = _live_rows(targets_N)
        if self.rows is not None:
            hidden_NC, targets_N = hidden_NC[self.rows], targets_N[self.rows]
        self.hidden_NC, self.targets_N = hidden_NC, targets_N
        live = hidden_NC.shape[0]
        self.chunk = min(options.chunk_tokens or auto_chunk_tokens(self.vocab_size, width, dtype.itemsize), max(live, 1))
        needs_hidden, needs_weight, needs_bias = needs
        self.needs_grad = any(needs)
        self.grad_hidden = torch.empty_like(hidden_NC) if needs_hidden else None
        self.grad_bias = hidden_NC.new_zeros(self.vocab_size, dtype=self.wide) if needs_bias else None
        self.grad_weight = None
        if needs_weight:
            # one chunk: a single product, nothing is summed, so the computing dtype does
            self.grad_weight = torch.empty_like(self.weight, dtype=dtype if live <= self.chunk else self.wide)

    def run(self) -> torch.Tensor:
        total = self.hidden_NC.new_zeros((), dtype=self.wide)
        live = self.hidden_NC.shape[0]
        if live == 0:
            for grad in (self.grad_weight, self.grad_bias):
                if grad is not None:
                    grad.zero_()
            return total
        buffer = self.hidden_NC.new_empty(self.chunk, self.vocab_size)
        block_bytes = CPU_BLOCK_BYTES if device_kind(buffer) == "cpu" else GPU_BLOCK_BYTES
        self.wide_rows = min(self.chunk, max(1, block_bytes // (self.vocab_size * self.wide.itemsize)))
        # made once: fresh memory for every block would cost more than the arithmetic on it
        self.wide_buffer = None if self.dtype == self.wide else buffer.new_empty(self.wide_rows, self.vocab_size, dtype=self.wide)
        for start in representative(range(0, live, self.chunk), buffer, distinct=2):
            stop = min(start + self.chunk, live)
            self.start = start
            logits = buffer[: stop - start]
            hidden = self.hidden_NC[start:stop]
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            total += self.loss_and_logit_gradient(logits, self.targets_N[start:stop])
            if self.grad_hidden is not None:
                torch.mm(logits, self.weight, out=self.grad_hidden[start:stop])
            if self.grad_weight is not None:
                _add_weight_gradient(self.grad_weight, logits, hidden, first=start == 0)
        return total

    def loss_and_logit_gradient(self, logits_MV: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
        """The summed loss; the logits are overwritten with its gradient, if one is needed."""
        total = logits_MV.new_zeros((), dtype=self.wide)
        step = self.wide_rows
        for start in representative(range(0, logits_MV.shape[0], step), logits_MV):
            block = logits_MV[start : start + step]
            targets = targets_M[start : start + step].unsqueeze(1)
            live = targets != IGNORE_INDEX
            targets = targets.masked_fill(~live, 0)
            wide = block if self.wide_buffer is None else self.wide_buffer[: block.shape[0]].copy_(block)
            target_logit = wide.gather(1, targets)
            largest = wide.amax(1, keepdim=True)
            mean = wide.mean(1, keepdim=True) if self.options.label_smoothing else None
            torch.softmax(wide, 1, out=wide)
            # the largest probability is 1 / sum(exp(z - max)): at least 1/V, so its logarithm is safe
            lse = largest - wide.amax(1, keepdim=True).log_()
            total += self._token_losses(lse, target_logit, mean).masked_fill_(~live, 0).sum()
            if self.needs_grad:
                self._softmax_to_gradient(wide, targets, lse, live.to(self.wide))
                if self.grad_bias is not None:
                    self.grad_bias += wide.sum(0)
                if wide is not block:
                    block.copy_(wide)
        return total

    def _token_losses(self, lse: torch.Tensor, target_logit: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
        smoothing, z_loss = self.options.label_smoothing, self.options.z_loss
        losses = lse - target_logit
        if mean is not None:
            losses = torch.lerp(losses, lse - mean, smoothing)
        return losses.addcmul_(lse, lse, value=z_loss) if z_loss else losses

    def _softmax_to_gradient(self, wide: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, live: torch.Tensor) -> None:
        smoothing, z_loss = self.options.label_smoothing, self.options.z_loss
        if z_loss:
            wide.mul_(lse.mul(2 * z_loss).add_(1))
        if smoothing:
            wide.sub_(smoothing / self.vocab_size)
        wide.scatter_add_(1, targets, torch.full_like(lse, smoothing - 1))
        if self.may_be_ignored:
            wide.mul_(live)

    def gradients(self, hidden, weight, bias) -> tuple[torch.Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradients in the shapes and dtypes of the inputs."""
        grad_hidden = self.grad_hidden
        if grad_hidden is not None:
            if self.rows is not None:
                grad_hidden = grad_hidden.new_zeros(self.tokens, grad_hidden.shape[1]).index_copy_(0, self.rows, grad_hidden)
            grad_hidden = grad_hidden.view(hidden.shape).to(hidden.dtype)
        grad_weight = None if self.grad_weight is None else self.grad_weight.to(weight.dtype)
        grad_bias = None if self.grad_bias is None else self.grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias


def _add_weight_gradient(total_VC: torch.Tensor, grad_logits_MV: torch.Tensor, hidden_MC: torch.Tensor, first: bool) -> None:
    if total_VC.dtype == hidden_MC.dtype:
        torch.addmm(total_VC, grad_logits_MV.t(), hidden_MC, beta=0 if first else 1, out=total_VC)
        return
    for start in representative(range(0, total_VC.shape[0], GRAD_BLOCK_ROWS), total_VC):
        rows = slice(start, start + GRAD_BLOCK_ROWS)
        product = grad_logits_MV[:, rows].t() @ hidden_MC
        if first:
            total_VC[rows] = product
        else:
            total_VC[rows] += product


def _live_rows(targets_N: torch.Tensor) -> torch.Tensor | None:
    """Indices of the predicted tokens; None if that is all of them."""
    live = targets_N != IGNORE_INDEX
    return None if bool(live.all()) else live.nonzero().squeeze(1)
