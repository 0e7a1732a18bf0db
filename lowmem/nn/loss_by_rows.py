"""Cross-entropy whose weight gradient comes in rows of the vocabulary, so that it never exists whole (nor does its fp32 sum).

Logits are computed twice: once for each token's largest logit and sum of exponentials, once more, rows by rows, for the gradients. That
is a third more work in the head than `lowmem.nn.loss`, and saves V * C numbers in fp32 and as many in the dtype of the weight.

Shapes: N tokens, C width, V vocabulary, R rows of the vocabulary, M tokens of a chunk.
"""

from collections.abc import Iterator

import torch

from lowmem.nn.loss import GRAD_BLOCK_ROWS, IGNORE_INDEX, CrossEntropyOptions, auto_chunk_tokens
from lowmem.nn.precision import accumulate_dtype


class CrossEntropyByRows:
    """Loss first, gradients afterwards, as in `lowmem.nn.loss.chunked_cross_entropy`.

    Args:
        hidden: (..., C).
        weight: (V, C); rows may be changed once their gradient was yielded.
        bias: (V,) or None.
        targets: (...) int64; IGNORE_INDEX where nothing is predicted.
        options: label smoothing, z-loss; chunk_tokens bounds the tokens whose logits are alive at once.
        dtype: what products are computed in.
    Attributes:
        loss: sum over the predicted tokens, fp32 (fp64 for fp64).
        grad_hidden: (N, C) fp32, whole once `gradients` is exhausted; of the sum, not the mean.
    Memory: one chunk of logits, four numbers a token, then `grad_hidden` and one block of rows.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        options: CrossEntropyOptions,
        dtype: torch.dtype,
    ):
        self.weight, self.bias, self.options, self.dtype = weight.detach(), bias, options, dtype
        self.wide = accumulate_dtype(dtype)
        self.hidden_NC = hidden.detach().reshape(-1, weight.shape[1]).to(dtype)
        self.targets_N1 = targets.reshape(-1, 1)
        self.live_N1 = self.targets_N1 != IGNORE_INDEX
        self.chunk = options.chunk_tokens or auto_chunk_tokens(weight.shape[0], weight.shape[1], dtype.itemsize)
        self.loss, self.max_N1, self.sum_N1 = self._first_pass()
        self.grad_hidden = torch.zeros(0)

    def _first_pass(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maxima, sums, total = [], [], torch.zeros((), dtype=self.wide, device=self.hidden_NC.device)
        weight = self.weight.to(self.dtype)
        for start in range(0, len(self.hidden_NC), self.chunk):
            tokens = slice(start, start + self.chunk)
            logits = self._logits(tokens, weight, self.bias)
            target = self.targets_N1[tokens].clamp_min(0)
            largest = logits.amax(1, keepdim=True)
            target_logit, mean = logits.gather(1, target), logits.mean(1, keepdim=True)
            total_exp = logits.sub_(largest).exp_().sum(1, keepdim=True)
            lse = largest + total_exp.log()
            losses = torch.lerp(lse - target_logit, lse - mean, self.options.label_smoothing) + self.options.z_loss * lse * lse
            total += losses.masked_fill(~self.live_N1[tokens], 0).sum()
            maxima.append(largest)
            sums.append(total_exp)
        return total, torch.cat(maxima), torch.cat(sums)

    def gradients(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """First row, (R, C) gradient of those rows of the weight and (R,) of the bias, in fp32; the sum's, not the mean's."""
        self.grad_hidden = torch.zeros_like(self.hidden_NC, dtype=self.wide)
        for first in range(0, len(self.weight), GRAD_BLOCK_ROWS):
            rows = slice(first, min(first + GRAD_BLOCK_ROWS, len(self.weight)))
            weight = self.weight[rows].to(self.dtype)
            bias = None if self.bias is None else self.bias[rows]
            grad_weight = torch.zeros_like(weight, dtype=self.wide)
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=self.wide)
            for start in range(0, len(self.hidden_NC), GRAD_BLOCK_ROWS):
                tokens = slice(start, start + GRAD_BLOCK_ROWS)
                grad_logits = self._logit_gradient(tokens, rows, weight, bias)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(self.dtype)
                grad_weight += grad_logits.t() @ self.hidden_NC[tokens]
                self.grad_hidden[tokens] += grad_logits @ weight
            yield first, grad_weight, grad_bias

    def _logits(self, tokens: slice, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = (self.hidden_NC[tokens] @ weight.t()).to(self.wide)
        return logits if bias is None else logits.add_(bias)

    def _logit_gradient(self, tokens: slice, rows: slice, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(M, R): softmax * (1 + 2 c lse) - (1 - s) * target - s / V, zero where nothing is predicted."""
        smoothing, z_loss = self.options.label_smoothing, self.options.z_loss
        largest, total = self.max_N1[tokens], self.sum_N1[tokens]
        grad = self._logits(tokens, weight, bias).sub_(largest).exp_().div_(total)
        if z_loss:
            grad.mul_(1 + 2 * z_loss * (largest + total.log()))
        if smoothing:
            grad.sub_(smoothing / len(self.weight))
        target = self.targets_N1[tokens]
        here = (target >= rows.start) & (target < rows.stop)
        column = (target - rows.start).clamp(0, rows.stop - rows.start - 1)
        grad.scatter_add_(1, column, here.to(self.wide) * (smoothing - 1))
        return grad.mul_(self.live_N1[tokens])
