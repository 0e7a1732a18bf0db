"""Cross-entropy whose weight gradient comes in rows of the vocabulary, so that it never exists whole (nor does its fp32 sum).

Logits are computed twice: once for each token's largest logit and sum of exponentials, once more, rows by rows, for the gradients. That
is a third more work in the head than `lowmem.nn.loss`, and saves V * C numbers in fp32 and as many in the dtype of the weight.

Shapes: N tokens, C width, V vocabulary, R rows of the vocabulary, M tokens of a chunk.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from lowmem.fake import representative
from lowmem.nn.loss import GRAD_BLOCK_ROWS, IGNORE_INDEX, CrossEntropyOptions, auto_chunk_tokens
from lowmem.nn.precision import accumulate_dtype
from lowmem.nn.quantized import QuantizedWeight, dense, dense_rows


def _attempt(cell: Callable[[], None]) -> bool:
    cell()
    return True


class CrossEntropyByRows:
    """Loss first, gradients afterwards, as in `lowmem.nn.loss.chunked_cross_entropy`.

    Args:
        hidden: (..., C).
        weight: (V, C); rows may be changed once their gradient was yielded.
        bias: (V,) or None.
        targets: (...) int64; IGNORE_INDEX where nothing is predicted.
        options: label smoothing, z-loss; chunk_tokens bounds the tokens whose logits are alive at once.
        dtype: what products are computed in.
        block_tokens: tokens whose gradient is added at once; 0 is GRAD_BLOCK_ROWS.
        attempt: calls a function that adds the gradient of one block of rows over one block of tokens, all of it or nothing. False says
            that its memory was not there: it is done again with half the tokens, and so are the others after it.
    Attributes:
        loss: sum over the predicted tokens, fp32 (fp64 for fp64).
        grad_hidden: (N, C) fp32, whole once `gradients` is exhausted; of the sum, not the mean.
        grad_bias: (V,) fp32, likewise; None without bias.
        block_tokens: as it is now.
    Memory: one chunk of logits and four numbers a token; from `allocate` on `grad_hidden`, and a block of rows of the weight's
        gradient and, if its dtype is another, of the weight.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        options: CrossEntropyOptions,
        dtype: torch.dtype,
        block_tokens: int = 0,
        attempt: Callable[[Callable[[], None]], bool] = _attempt,
    ):
        self.weight, self.bias, self.options, self.dtype = weight.detach(), bias, options, dtype
        self.wide = accumulate_dtype(dtype)
        self.hidden_NC = hidden.detach().reshape(-1, weight.shape[1]).to(dtype)
        self.targets_N1 = targets.reshape(-1, 1)
        self.live_N1 = self.targets_N1 != IGNORE_INDEX
        self.chunk = options.chunk_tokens or auto_chunk_tokens(weight.shape[0], weight.shape[1], dtype.itemsize)
        self.loss, self.max_N1, self.sum_N1 = self._first_pass()
        self.block_tokens, self.attempt = block_tokens or GRAD_BLOCK_ROWS, attempt
        self.grad_hidden = self.hidden_NC.new_empty(0)
        self.grad_bias: torch.Tensor | None = None

    def _first_pass(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maxima, sums, total = [], [], torch.zeros((), dtype=self.wide, device=self.hidden_NC.device)
        weight = dense(self.weight, self.dtype)
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

    def allocate(self) -> None:
        """Allocate all that `gradients` fills, if that was not done yet."""
        if self.grad_hidden.numel():
            return
        rows, width = min(GRAD_BLOCK_ROWS, len(self.weight)), self.weight.shape[1]
        self.grad_weight_RC = self.weight.new_empty(rows, width, dtype=self.wide)
        as_it_is = self.weight.dtype == self.dtype or isinstance(self.weight, QuantizedWeight)
        self.weight_RC = None if as_it_is else self.weight.new_empty(rows, width, dtype=self.dtype)
        if self.bias is not None:
            self.grad_bias = torch.zeros_like(self.bias, dtype=self.wide)
        self.grad_hidden = torch.zeros_like(self.hidden_NC, dtype=self.wide)

    def gradients(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """First row, (R, C) gradient of those rows of the weight and (R,) of the bias, in fp32; the sum's, not the mean's.

        The gradient of the weight is overwritten by the next one.

        Raises:
            MemoryError: a single token is too much.
        """
        self.allocate()
        for first in representative(range(0, len(self.weight), GRAD_BLOCK_ROWS), self.weight):
            rows = slice(first, min(first + GRAD_BLOCK_ROWS, len(self.weight)))
            if self.weight_RC is None:
                weight = dense_rows(self.weight, rows, self.dtype)
            else:
                weight = self.weight_RC[: len(self.weight[rows])].copy_(self.weight[rows])
            grad_weight = self.grad_weight_RC[: len(weight)].zero_()
            start = 0
            while start < len(self.hidden_NC):
                tokens = slice(start, start + self.block_tokens)
                if self.attempt(partial(self._add_cell, tokens, rows, weight, grad_weight)):
                    start = tokens.stop
                else:
                    self._halve_tokens()
            yield first, grad_weight, None if self.grad_bias is None else self.grad_bias[rows]

    def _halve_tokens(self) -> None:
        tokens = min(self.block_tokens, len(self.hidden_NC))
        if tokens == 1:
            raise MemoryError(f"the head's gradient of one token and {min(GRAD_BLOCK_ROWS, len(self.weight))} rows does not fit")
        self.block_tokens = tokens // 2

    def _add_cell(self, tokens: slice, rows: slice, weight: torch.Tensor, grad_weight: torch.Tensor) -> None:
        """Add to the gradients of `rows` and of `tokens` what each has from the other; nothing is allocated between the additions.

        Memory: the logits of the cell, and one more gradient of `rows` and of `tokens`.
        """
        grad_logits = self._logit_gradient(tokens, rows, weight, None if self.bias is None else self.bias[rows])
        of_bias = None if self.grad_bias is None else grad_logits.sum(0)
        grad_logits = grad_logits.to(self.dtype)
        of_hidden = (grad_logits @ weight).to(self.wide)
        of_weight = (grad_logits.t() @ self.hidden_NC[tokens]).to(self.wide)
        if self.grad_bias is not None and of_bias is not None:
            self.grad_bias[rows].add_(of_bias)
        grad_weight.add_(of_weight)
        self.grad_hidden[tokens].add_(of_hidden)

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
