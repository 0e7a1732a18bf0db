"""Output head and cross-entropy, chunk by chunk: the logits of a batch never exist at once (D3).

Loss and gradients are formed together in the forward pass, so that each logit is computed once and thrown away.

Shapes: N tokens, C width of what the head multiplies (the rank, for a LoRPt head), V vocabulary, M tokens of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lowmem.nn.linear import accumulate_dtype, compute_dtype
from lowmem.nn.quantized import CodedWeight, dense
from lowmem.nn.rows import MatrixRows
from lowmem.system.dry_run import autocast_kind, device_kind, is_fake, representative

IGNORE_INDEX = -100
AUTO_LOGIT_BYTES = 16 << 20
CPU_BLOCK_BYTES = 4 << 20  # wide rows of logits alive at once: small enough for the cache
GPU_BLOCK_BYTES = 64 << 20  # large enough that launching kernels takes no time
GRAD_BLOCK_ROWS = 2048  # rows of the weight gradient that are added to the wide sum at once
BLOCK_TOKENS = 1024  # tokens that meet such rows at once where a head goes by rows


@dataclass(frozen=True)
class CrossEntropyOptions:
    """See `lowmem.models.base.LossOptions`.

    Attributes:
        scale: what the products of hidden states and weights are multiplied by.
        softcap: what comes of that is softcap * tanh(it / softcap); 0 leaves it.
    """

    chunk_tokens: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_targets: Any = None
    scale: float = 1.0
    softcap: float = 0.0

    def reshapes(self) -> bool:
        """Whether logits are more than a product."""
        return self.scale != 1 or self.softcap != 0

    def reshape_(self, products: torch.Tensor) -> torch.Tensor:
        """Logits, in place of the products."""
        if self.scale != 1:
            products.mul_(self.scale)
        return products.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else products

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Derivative of `reshape_` where it gave these logits."""
        return (logits / self.softcap).square_().neg_().add_(1).mul_(self.scale) if self.softcap else self.scale


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
            slope = self.options.slope(self.options.reshape_(wide)) if self.options.reshapes() else None
            target_logit = wide.gather(1, targets)
            largest = wide.amax(1, keepdim=True)
            mean = wide.mean(1, keepdim=True) if self.options.label_smoothing else None
            torch.softmax(wide, 1, out=wide)
            # the largest probability is 1 / sum(exp(z - max)): at least 1/V, so its logarithm is safe
            lse = largest - wide.amax(1, keepdim=True).log_()
            total += self._token_losses(lse, target_logit, mean).masked_fill_(~live, 0).sum()
            if self.needs_grad:
                self._softmax_to_gradient(wide, targets, lse, live.to(self.wide))
                if slope is not None:
                    wide.mul_(slope)
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


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's predictions, not yet multiplied out: logits = hidden @ weight.T + bias.

    Attributes:
        hidden: (..., C), for the same tokens as the student's.
        weight: (V, C).
        bias: (V,) or None.
        share: a, of the loss.
        temperature: T.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    share: float
    temperature: float

    def chunks(self, *arguments: Any) -> "SoftChunks":
        """The pass over the tokens that computes the loss; for `lowmem.nn.loss`."""
        return SoftChunks(self, *arguments)


class SoftChunks(Chunks):
    """Per token (1 - a) * (usual loss) + a * T^2 * KL(softmax(teacher / T) || softmax(student / T)).

    Memory: one chunk of the teacher's logits more than `Chunks`, and one block in fp32.
    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(self, soft: SoftTargets, *arguments: Any):
        super().__init__(*arguments)
        self.soft = soft
        hidden_NC = soft.hidden.detach().reshape(-1, soft.hidden.shape[-1]).to(self.dtype)
        self.teacher_NC = hidden_NC if self.rows is None else hidden_NC[self.rows]

    def loss_and_logit_gradient(self, logits_MV: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
        """See `Chunks`."""
        soft, rows = self.soft, logits_MV.shape[0]
        bias = None if soft.bias is None else soft.bias.to(self.dtype)
        teacher_MV = torch.nn.functional.linear(self.teacher_NC[self.start : self.start + rows], soft.weight.to(self.dtype), bias)
        distance = logits_MV.new_zeros((), dtype=self.wide)
        live = (targets_M != IGNORE_INDEX).unsqueeze(1)
        for first in representative(range(0, rows, self.wide_rows), logits_MV):
            block = slice(first, first + self.wide_rows)
            distance += self._soft_block(logits_MV[block], teacher_MV[block], live[block])
        total_bias, self.grad_bias = self.grad_bias, None  # summed below, from the whole gradient
        loss = super().loss_and_logit_gradient(logits_MV, targets_M)
        self.grad_bias = total_bias
        if self.needs_grad:
            logits_MV.mul_(1 - soft.share).add_(teacher_MV)
            if total_bias is not None:
                total_bias += logits_MV.sum(0, dtype=self.wide)
        return loss.mul_(1 - soft.share).add_(distance, alpha=soft.share * soft.temperature**2)

    def _soft_block(self, student: torch.Tensor, teacher: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """Sum of the distances; the teacher's logits are overwritten with the gradient a * T * (q - p) of the student's."""
        temperature = self.soft.temperature
        log_q = torch.log_softmax(student.to(self.wide) / temperature, 1)
        log_p = torch.log_softmax(teacher.to(self.wide) / temperature, 1)
        p = log_p.exp()
        distance = (log_p - log_q).mul_(p).sum(1, keepdim=True).masked_fill_(~live, 0).sum()
        if self.needs_grad:
            teacher.copy_(log_q.exp_().sub_(p).mul_(self.soft.share * temperature).mul_(live))
        return distance


def _attempt(cell: Callable[[], None]) -> bool:
    cell()
    return True


def row_blocks(count: int) -> list[slice]:
    """The rows of a matrix of so many, `GRAD_BLOCK_ROWS` at a time."""
    return [slice(first, min(first + GRAD_BLOCK_ROWS, count)) for first in range(0, count, GRAD_BLOCK_ROWS)]


class CrossEntropyByRows:
    """Loss first, gradients afterwards, as in `lowmem.nn.loss.chunked_cross_entropy`. The matrix is read twice, a block of rows at a time:
    the first pass keeps for each token the largest logit so far and the sum of the exponentials beside it.

    Args:
        hidden: (..., C).
        matrix: (V, C); rows may be changed once their gradient was yielded.
        bias: (V,) or None.
        targets: (...) int64; IGNORE_INDEX where nothing is predicted.
        options: label smoothing, z-loss; no more logits are alive at once than chunk_tokens tokens have.
        dtype: what products are computed in.
        block_tokens: tokens that meet a block of rows at once; 0 is BLOCK_TOKENS.
        attempt: calls a function that takes one block of rows over one block of tokens into account, all of it or nothing. False says
            that its memory was not there: it is done again with half the tokens, and so are the others after it.
    Attributes:
        loss: sum over the predicted tokens, fp32 (fp64 for fp64).
        grad_hidden: (N, C) fp32, whole once `gradients` is exhausted; of the sum, not the mean.
        grad_bias: (V,) fp32, likewise; None without bias.
        block_tokens: as it is now.
        ran_out: whether it had to be lowered.
    Raises:
        MemoryError: a single token is too much.
    Memory: a block of rows of the matrix, if it is stored in another dtype, the logits of a block of rows and of tokens, and five numbers
        a token; from `allocate` on `grad_hidden` and a block of rows of the matrix's gradient.
    Source: the running maximum and sum, Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        matrix: MatrixRows,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        options: CrossEntropyOptions,
        dtype: torch.dtype,
        block_tokens: int = 0,
        attempt: Callable[[Callable[[], None]], bool] = _attempt,
    ):
        self.matrix, self.bias, self.options, self.dtype = matrix, None if bias is None else bias.detach(), options, dtype
        self.vocab_size, width = matrix.shape
        self.blocks = row_blocks(self.vocab_size)
        self.wide = accumulate_dtype(dtype)
        self.hidden_NC = hidden.detach().reshape(-1, width).to(dtype)
        self.targets_N1 = targets.reshape(-1, 1)
        self.live_N1 = self.targets_N1 != IGNORE_INDEX
        most = options.chunk_tokens * self.vocab_size // self.blocks[0].stop if options.chunk_tokens else BLOCK_TOKENS
        self.block_tokens, self.attempt, self.ran_out = block_tokens or max(1, min(most, BLOCK_TOKENS)), attempt, False
        as_it_is = matrix.dtype == dtype or isinstance(matrix.parameter, CodedWeight)
        self.weight_RC = None if as_it_is else self.hidden_NC.new_empty(self.blocks[0].stop, width)
        self.loss = self._first_pass()
        self.grad_hidden = self.hidden_NC.new_empty(0)
        self.grad_bias: torch.Tensor | None = None

    def _first_pass(self) -> torch.Tensor:
        """The loss; from here on `max_N1` and `sum_N1` are what softmax needs."""
        zeros = torch.zeros_like(self.targets_N1, dtype=self.wide)
        # the lowest finite number: beside it the sum of nothing is 0, where -inf would make it NaN
        self.max_N1, self.sum_N1 = torch.full_like(zeros, torch.finfo(self.wide).min), zeros
        self.target_N1, self.total_N1 = torch.zeros_like(zeros), torch.zeros_like(zeros) if self.options.label_smoothing else None
        for rows in representative(self.blocks, self.hidden_NC, distinct=self.matrix.distinct(self.blocks)):
            self._over_tokens(partial(self._observe, rows, self._read(rows)))
        lse = self.max_N1 + self.sum_N1.log()
        losses = lse - self.target_N1
        if self.total_N1 is not None:
            losses = torch.lerp(losses, lse - self.total_N1 / self.vocab_size, self.options.label_smoothing)
        losses = losses + self.options.z_loss * lse * lse
        del self.target_N1, self.total_N1
        return losses.masked_fill(~self.live_N1, 0).sum()

    def _read(self, rows: slice) -> torch.Tensor:
        """Rows of the matrix in the dtype of products; the next ones may overwrite them."""
        stored = self.matrix.read(rows)
        return dense(stored, self.dtype) if self.weight_RC is None else self.weight_RC[: len(stored)].copy_(stored)

    def _observe(self, rows: slice, weight: torch.Tensor, tokens: slice) -> None:
        """Take the logits of `rows` into account for `tokens`; nothing is allocated once the first number is changed.

        Memory: the logits of the cell.
        """
        logits = self._logits(tokens, rows, weight)
        before, here, column = self.max_N1[tokens], *self._targets_in(tokens, rows)
        largest = torch.maximum(before, logits.amax(1, keepdim=True))
        target_logit = torch.where(here, logits.gather(1, column), 0)
        total = None if self.total_N1 is None else logits.sum(1, keepdim=True)
        of_block = logits.sub_(largest).exp_().sum(1, keepdim=True)
        shrunk = (before - largest).exp_()
        self.sum_N1[tokens].mul_(shrunk).add_(of_block)
        before.copy_(largest)
        self.target_N1[tokens].add_(target_logit)
        if self.total_N1 is not None and total is not None:
            self.total_N1[tokens].add_(total)

    def _targets_in(self, tokens: slice, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens have their target among `rows`, and which of them that is; any other where they do not."""
        target = self.targets_N1[tokens]
        here = (target >= rows.start) & (target < rows.stop)
        return here, (target - rows.start).clamp_(0, rows.stop - rows.start - 1)

    def _over_tokens(self, cell: Callable[[slice], None]) -> None:
        """Call `cell` for all tokens, for as many at once as fit."""
        start = 0
        while start < len(self.hidden_NC):
            tokens = slice(start, start + self.block_tokens)
            if self.attempt(partial(cell, tokens)):
                start = tokens.stop
            else:
                self._halve_tokens()

    def _halve_tokens(self) -> None:
        tokens = min(self.block_tokens, len(self.hidden_NC))
        if tokens == 1:
            raise MemoryError(f"one token and {self.blocks[0].stop} rows of the head do not fit")
        self.block_tokens, self.ran_out = tokens // 2, True

    def allocate(self) -> None:
        """Allocate all that `gradients` fills, if that was not done yet."""
        if self.grad_hidden.numel():
            return
        self.grad_weight_RC = self.hidden_NC.new_empty(self.blocks[0].stop, self.matrix.shape[1], dtype=self.wide)
        if self.bias is not None:
            self.grad_bias = torch.zeros_like(self.bias, dtype=self.wide)
        self.grad_hidden = torch.zeros_like(self.hidden_NC, dtype=self.wide)

    def gradients(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """First row, (R, C) gradient of those rows of the matrix and (R,) of the bias, in fp32; the sum's, not the mean's.

        The gradient of the matrix is overwritten by the next one.

        Raises:
            MemoryError: a single token is too much.
        """
        self.allocate()
        for rows in representative(self.blocks, self.hidden_NC, distinct=self.matrix.distinct(self.blocks)):
            weight = self._read(rows)
            grad_weight = self.grad_weight_RC[: len(weight)].zero_()
            self._over_tokens(partial(self._add_cell, rows, weight, grad_weight))
            yield rows.start, grad_weight, None if self.grad_bias is None else self.grad_bias[rows]

    def _add_cell(self, rows: slice, weight: torch.Tensor, grad_weight: torch.Tensor, tokens: slice) -> None:
        """Add to the gradients of `rows` and of `tokens` what each has from the other; nothing is allocated between the additions.

        Memory: the logits of the cell, and one more gradient of `rows` and of `tokens`.
        """
        grad_logits = self._logit_gradient(tokens, rows, weight)
        of_bias = None if self.grad_bias is None else grad_logits.sum(0)
        grad_logits = grad_logits.to(self.dtype)
        of_hidden = (grad_logits @ weight).to(self.wide)
        of_weight = (grad_logits.t() @ self.hidden_NC[tokens]).to(self.wide)
        if self.grad_bias is not None and of_bias is not None:
            self.grad_bias[rows].add_(of_bias)
        grad_weight.add_(of_weight)
        self.grad_hidden[tokens].add_(of_hidden)

    def _logits(self, tokens: slice, rows: slice, weight: torch.Tensor) -> torch.Tensor:
        logits = (self.hidden_NC[tokens] @ weight.t()).to(self.wide)
        logits = logits if self.bias is None else logits.add_(self.bias[rows])
        return self.options.reshape_(logits) if self.options.reshapes() else logits

    def _logit_gradient(self, tokens: slice, rows: slice, weight: torch.Tensor) -> torch.Tensor:
        """(M, R): softmax * (1 + 2 c lse) - (1 - s) * target - s / V, zero where nothing is predicted."""
        smoothing, z_loss = self.options.label_smoothing, self.options.z_loss
        largest, total = self.max_N1[tokens], self.sum_N1[tokens]
        logits = self._logits(tokens, rows, weight)
        slope = self.options.slope(logits) if self.options.reshapes() else None
        grad = logits.sub_(largest).exp_().div_(total)
        if z_loss:
            grad.mul_(1 + 2 * z_loss * (largest + total.log()))
        if smoothing:
            grad.sub_(smoothing / self.vocab_size)
        here, column = self._targets_in(tokens, rows)
        grad.scatter_add_(1, column, here.to(self.wide) * (smoothing - 1))
        if slope is not None:
            grad.mul_(slope)
        return grad.mul_(self.live_N1[tokens])
