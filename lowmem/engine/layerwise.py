"""The layerwise update (D6): a block's gradient is summed over the whole global batch, applied and freed before the next one exists.

The forward pass keeps only what each block was given. Going back, a block is computed again and differentiated micro-batch by
micro-batch, so the gradient of one block is alive at a time and accumulation stays exact.

Source: the execution order of L2L, Pudipeddi et al. 2020, arXiv:2002.05645.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowmem.config import OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.devices import Precision
from lowmem.engine.base import StepResult
from lowmem.engine.boundaries import Boundaries
from lowmem.engine.clipping import BlockClipping
from lowmem.engine.local import LocalEngine
from lowmem.engine.loss_scale import LossScale
from lowmem.errors import MemoryBudgetError
from lowmem.memory.budget import is_out_of_memory
from lowmem.models.base import LanguageModel
from lowmem.models.counting import head_loss_options, largest_part
from lowmem.nn.loss import auto_chunk_tokens
from lowmem.nn.loss_by_rows import CrossEntropyByRows
from lowmem.nn.recompute import run_block
from lowmem.optim.build import build_optimizer
from lowmem.optim.low_bit import LowBitOptimizer

Graphs = list[tuple[torch.Tensor, torch.Tensor]]


class LayerwiseEngine(LocalEngine):
    """Updates head, blocks and embedding one after the other, from the last to the first.

    Clipping cannot use the global norm of the same step: see `lowmem.engine.clipping`. A loss that is not finite changes nothing; a
    gradient that turns non-finite on the way down leaves its block and those below unchanged, those above are updated already.

    Args:
        train: activation_checkpointing block computes every block twice; none and selective keep the whole forward pass instead.
        micro_batch_size: sequences of a block computed at once; the head takes the global batch in its own chunks.
    Memory: weights, states, the gradient of the largest block, head or embedding (in fp32 where several micro-batches are summed), one
        micro-batch of one block's activations, and (num_layers + 1) boundary activations of the whole global batch.
    """

    optimizer: LowBitOptimizer

    def __init__(
        self,
        model: LanguageModel,
        optim: OptimConfig,
        train: TrainConfig,
        *,
        device: torch.device,
        precision: Precision,
        micro_batch_size: int,
    ):
        super().__init__(model, optim, device=device, precision=precision, micro_batch_size=micro_batch_size, seed=train.seed)
        self.scaler = LossScale(enabled=precision == "fp16")
        self.optimizer.allocate_states()
        self.boundary_dtype, self.boundary_offload = train.boundary_dtype, train.boundary_offload
        self.block_micro_batches = [micro_batch_size] * len(model.blocks)
        in_blocks = {id(parameter) for parameter in model.blocks.parameters()}
        outer = [p for p in model.parameters() if p.requires_grad and id(p) not in in_blocks]
        self._embed_parameters = [p for p in model.embed_parameters() if p.requires_grad]
        embedding = {id(parameter) for parameter in self._embed_parameters}
        self._head_parameters = [p for p in outer if id(p) not in embedding or model.head_is_tied()]
        self.clipping = BlockClipping(optim.clip, "block" if optim.clip_by == "block" else "previous", len(model.blocks) + 2)

    def _build_optimizer(self, model: LanguageModel, optim: OptimConfig, seed: int) -> torch.optim.Optimizer:
        return build_optimizer(model, optim, seed=seed, partial=True)

    def step(self, batch: Batch, lr: float) -> StepResult:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens, targets = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in (batch.inputs, batch.targets))
        boundaries = Boundaries(len(batch), self.device, dtype=self.boundary_dtype, offload=self.boundary_offload)
        graphs = self._forward(tokens, boundaries)
        loss, grad, tied = self._head(boundaries, targets, max(1, batch.target_count()))
        finite = grad is not None
        for index in reversed(range(len(self.model.blocks))):
            if grad is not None:
                grad = self._block(index, boundaries, graphs.pop(index, []), grad)
        if grad is not None:
            self._embedding(tokens, grad, tied)
        norm = self.clipping.end_step() if finite else math.nan
        applied = math.isfinite(norm)
        self.scaler.update_after(applied)
        skipped = "" if applied else "loss_scale" if math.isfinite(loss) and self.scaler.may_shrink() else "nonfinite"
        return StepResult(loss, norm, skipped=skipped)  # type: ignore[arg-type]

    def _forward(self, tokens_BT: torch.Tensor, boundaries: Boundaries) -> dict[int, Graphs]:
        """Write every boundary; the graphs of all blocks, unless they are to be computed again."""
        with torch.no_grad(), self._autocast():
            for rows in self._slices(len(tokens_BT), self.micro_batch_size):
                boundaries.write(0, rows, self.model.embed(tokens_BT[rows]))
        mode = self.model.activation_checkpointing
        graphs: dict[int, Graphs] = {}
        for index, block in enumerate(self.model.blocks):
            slices = self._slices(len(tokens_BT), self.block_micro_batches[index])
            for rows, following in zip(slices, [*slices[1:], None], strict=True):
                hidden = boundaries.read(index, rows)
                if following is not None:
                    boundaries.prefetch(index, following)
                if mode == "block":
                    with torch.no_grad(), self._autocast():
                        output = block(hidden)
                else:
                    hidden = hidden.detach().requires_grad_()
                    with self._autocast():
                        output = run_block(block, hidden, mode)
                    graphs.setdefault(index, []).append((hidden, output))
                boundaries.write(index + 1, rows, output.detach())
        return graphs

    def _head(
        self, boundaries: Boundaries, targets_BT: torch.Tensor, denominator: float
    ) -> tuple[float, torch.Tensor | None, dict[nn.Parameter, torch.Tensor]]:
        """Loss, gradient of the last boundary (None if nothing may be updated), and the head's share of a tied embedding."""
        last = len(self.model.blocks)
        hidden = boundaries.read(last, slice(0, len(targets_BT))).detach().requires_grad_()
        boundaries.free(last)
        dense = self.model.dense_head()
        if dense is not None and self._by_rows(targets_BT.numel(), dense[1]):
            return *self._head_by_rows(*dense, hidden, targets_BT, denominator), {}
        with self._autocast():
            loss = self.model.head_loss(hidden, targets_BT, denominator)
        value = loss.item()
        if not math.isfinite(value):
            return value, None, {}
        grad, *gradients = torch.autograd.grad(self.scaler.scale(loss), [hidden, *self._head_parameters])
        embedding = {id(parameter) for parameter in self._embed_parameters}
        pairs = list(zip(self._head_parameters, gradients, strict=True))
        applied = self._apply([pair for pair in pairs if id(pair[0]) not in embedding])
        return value, grad if applied else None, {parameter: g for parameter, g in pairs if id(parameter) in embedding}

    def _by_rows(self, tokens: int, head: nn.Linear) -> bool:
        """Whether the head's gradient would have to be summed over several chunks of tokens: then it comes in rows instead.

        Not when blocks are clipped by their own norms: the head's is known only once all rows are there.
        """
        vocab_size, width = head.weight.shape
        chunk = self.model.loss_options.chunk_tokens or auto_chunk_tokens(vocab_size, width, head.weight.element_size())
        return tokens > chunk and self.clipping.mode == "previous"

    def _head_by_rows(
        self, norm: nn.Module, head: nn.Linear, hidden: torch.Tensor, targets_BT: torch.Tensor, denominator: float
    ) -> tuple[float, torch.Tensor | None]:
        """As `_head`, with a block of rows of the head updated before the gradient of the next one exists."""
        with self._autocast():
            normed = norm(hidden)
        work = CrossEntropyByRows(
            normed, head.weight, head.bias, targets_BT, head_loss_options(self.model), self.autocast_dtype or normed.dtype
        )
        value = work.loss.item() / denominator
        if not math.isfinite(value):
            return value, None
        self.optimizer.begin(head.weight)
        bias = []
        for first, grad_rows, grad_bias in work.gradients():
            factor = self.clipping.factor([grad_rows], 1 / denominator)
            if math.isnan(factor):
                return value, None
            self.optimizer.update(head.weight, grad_rows.view(-1), start=first * head.weight.shape[1], grad_scale=factor)
            bias += [] if grad_bias is None else [grad_bias]
        scale = self.scaler.get_scale() / denominator
        grad_normed = (work.grad_hidden * scale).to(normed.dtype).view_as(normed)
        grad, *gradients = torch.autograd.grad(normed, [hidden, *norm.parameters()], grad_normed)
        pairs = list(zip(norm.parameters(), gradients, strict=True))
        if head.bias is not None:
            pairs.append((head.bias, torch.cat(bias) * scale))
        return value, grad if self._apply(pairs) else None

    def _block(self, index: int, boundaries: Boundaries, graphs: Graphs, grad: torch.Tensor) -> torch.Tensor | None:
        """Update block `index`; the gradient of what it was given, or None if its own was not finite.

        When memory runs out the gradients so far are dropped, the block's micro-batch is halved, and the block is done again.
        """
        parameters = [p for p in self.model.blocks[index].parameters() if p.requires_grad]
        while True:
            try:
                grad_input, gradients = self._differentiate(index, boundaries, graphs, parameters, grad)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                micro = self.block_micro_batches[index]
                if micro == 1:
                    raise MemoryBudgetError(
                        f"memory ran out in block {index} with one sequence at a time ({str(error).splitlines()[0]}); "
                        "shorten data.seq_len, lower train.global_batch_size, or raise the budget"
                    ) from error
            graphs.clear()
            self.block_micro_batches[index] = micro // 2
        boundaries.free(index)
        return grad_input if self._apply(list(zip(parameters, gradients, strict=True))) else None

    def _differentiate(
        self, index: int, boundaries: Boundaries, graphs: Graphs, parameters: list[nn.Parameter], grad: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Gradients of one block over the whole global batch: of its input, and of its parameters.

        Memory: both, and one micro-batch of activations.
        """
        grad_input = torch.empty_like(grad)
        sums: list[torch.Tensor] = []
        slices = self._slices(len(grad), self.block_micro_batches[index])
        kept = bool(graphs)
        for position, rows in enumerate(slices):
            if kept:
                hidden, output = graphs.pop(0)
            else:
                hidden = boundaries.read(index, rows).detach().requires_grad_()
                if position + 1 < len(slices):
                    boundaries.prefetch(index, slices[position + 1])
                with self._autocast():
                    output = self.model.blocks[index](hidden)
            grad_input[rows], *gradients = torch.autograd.grad(output, [hidden, *parameters], grad[rows].to(output.dtype))
            del hidden, output
            sums = _add(sums, gradients, more=len(slices) > 1)
        return grad_input, sums

    def _embedding(self, tokens_BT: torch.Tensor, grad: torch.Tensor, tied: dict[nn.Parameter, torch.Tensor]) -> None:
        with self._autocast():
            hidden = self.model.embed(tokens_BT)
        gradients = torch.autograd.grad(hidden, self._embed_parameters, grad)
        del hidden
        pairs = list(zip(self._embed_parameters, gradients, strict=True))
        for parameter, gradient in pairs:
            if parameter in tied:
                gradient += tied[parameter]
        self._apply(pairs)

    def _apply(self, pairs: list[tuple[nn.Parameter, torch.Tensor]]) -> bool:
        """Clip and update; False, and no update, if a gradient is not finite."""
        factor = self.clipping.factor([gradient for _, gradient in pairs], 1 / self.scaler.get_scale())
        if math.isnan(factor):
            return False
        for parameter, gradient in pairs:
            self.optimizer.begin(parameter)
            self.optimizer.update(parameter, gradient, grad_scale=factor)
        return True

    @staticmethod
    def _slices(sequences: int, micro_batch_size: int) -> list[slice]:
        return [slice(start, min(start + micro_batch_size, sequences)) for start in range(0, sequences, micro_batch_size)]

    def save(self, directory: Any) -> dict:
        more = {"previous_norm": self.clipping.previous_norm, "block_micro_batches": self.block_micro_batches}
        return {**super().save(directory), "layerwise": more}

    def load(self, directory: Any, state: dict) -> None:
        super().load(directory, state)
        self.clipping.previous_norm = state["layerwise"]["previous_norm"]
        self.block_micro_batches = list(state["layerwise"]["block_micro_batches"])

    def memory_components(self) -> dict[str, int]:
        size = next(self.model.parameters()).element_size()
        return {**super().memory_components(), "gradients": largest_part(self.model) * size}


def _add(sums: list[torch.Tensor], gradients: list[torch.Tensor], more: bool) -> list[torch.Tensor]:
    """Running sums, in fp32 if there is more than one term."""
    if not sums:
        return [g.float() if more and g.dtype != torch.float64 else g for g in gradients]
    for total, gradient in zip(sums, gradients, strict=True):
        total += gradient
    return sums
