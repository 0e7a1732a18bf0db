"""The layerwise update (D6): a block's gradient is summed over the whole global batch, applied and freed before the next one exists.

The forward pass keeps only what each block was given. Going back, a block is computed again and differentiated micro-batch by
micro-batch, so the gradient of one block is alive at a time and accumulation stays exact.

Source: the execution order of L2L, Pudipeddi et al. 2020, arXiv:2002.05645.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem.config import OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.devices import Precision
from lowmem.engine.base import StepResult
from lowmem.engine.boundaries import Boundaries
from lowmem.engine.clipping import BlockClipping
from lowmem.engine.layerwise_head import FirstUpdate, LayerwiseHead, Pairs, Tied
from lowmem.engine.local import LocalEngine
from lowmem.engine.loss_scale import LossScale
from lowmem.engine.random_state import random_state, restore_random_state
from lowmem.engine.recovery import HALF_APPLIED, cannot_be_repeated, first_line, once_more, release_memory, smaller_micro_batch
from lowmem.engine.transfer import Tensors, on_device
from lowmem.fake import representative
from lowmem.memory.budget import is_out_of_memory
from lowmem.models.base import LanguageModel
from lowmem.models.counting import largest_part
from lowmem.nn.recompute import run_block
from lowmem.optim.build import build_optimizer, set_learning_rate
from lowmem.optim.low_bit import LowBitOptimizer

Graphs = list[tuple[torch.Tensor, torch.Tensor]]


class LayerwiseEngine(LocalEngine):
    """Updates head, blocks and embedding one after the other, from the last to the first.

    Clipping goes by an estimate of the global norm, which is known too late: see `lowmem.engine.clipping`. A loss that is not finite
    changes nothing; a gradient that turns non-finite on the way down leaves its block and those below unchanged, those above are updated
    already.

    Memory that runs out before the first update restarts the step with a smaller micro-batch. Later each part repeats itself: a block
    with a smaller micro-batch of its own, the head's rows with fewer tokens at once, all else once more after memory was given back.

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
        self.boundary_dtype, self.boundary_offload = train.boundary_dtype, train.boundary_offload
        self.block_micro_batches = [micro_batch_size] * len(model.blocks)
        self.rehearsing = False
        self._embed_parameters = [p for p in model.embed_parameters() if p.requires_grad]
        self.clipping = BlockClipping(optim.clip, "block" if optim.clip_by == "block" else "previous", len(model.blocks) + 2)
        self.head = LayerwiseHead(self)
        _import_autograd()

    def _build_optimizer(self, model: LanguageModel, optim: OptimConfig, seed: int) -> torch.optim.Optimizer:
        return build_optimizer(model, optim, seed=seed, partial=True)

    def step(self, batch: Batch, lr: float) -> StepResult:
        self.model.train()
        set_learning_rate(self.optimizer, lr)
        loss, finite = self._pass(batch)
        norm = self.clipping.end_step() if finite else math.nan
        applied = math.isfinite(norm)
        self.scaler.update_after(applied)
        skipped = "" if applied else "loss_scale" if math.isfinite(loss) and self.scaler.may_shrink() else "nonfinite"
        return StepResult(loss, norm, skipped=skipped)  # type: ignore[arg-type]

    def rehearse(self, batch: Batch) -> None:
        random = random_state(self.device)
        self.rehearsing = True
        try:
            self.model.train()
            self._pass(batch)
            self._repeat(partial(self._try_evaluation, batch))
        finally:
            self.rehearsing = False
            self._discard()
            restore_random_state(random, self.device)

    def _pass(self, batch: Batch) -> tuple[float, bool]:
        """Forward, and backward with updates; the loss, and whether it was finite."""
        tensors, denominator = on_device(batch, self.device), max(1, batch.target_count())
        boundaries, graphs, loss, first_update = self._repeat(partial(self._to_first_update, tensors, denominator))
        tokens, _, segments = tensors
        if first_update is None:
            return loss, False
        with cannot_be_repeated(self, "in a rehearsal" if self.rehearsing else HALF_APPLIED):
            grad, tied = first_update()
            del first_update
            for index in reversed(range(len(self.model.blocks))):
                if grad is not None:
                    grad = self._block(index, boundaries, graphs.pop(index, []), grad, segments)
            if grad is not None:
                self._embedding(tokens, segments, grad, tied)
        return loss, True

    def _to_first_update(self, tensors: Tensors, denominator: float) -> tuple[Boundaries, dict[int, Graphs], float, FirstUpdate | None]:
        """The part of a step that can be done again from its beginning."""
        tokens_BT, targets_BT, segments_BT = tensors
        boundaries = Boundaries(len(tokens_BT), self.device, dtype=self.boundary_dtype, offload=self.boundary_offload)
        graphs = self._forward(tokens_BT, segments_BT, boundaries)
        last = len(self.model.blocks)
        hidden = boundaries.read(last, slice(0, len(targets_BT))).detach().requires_grad_()
        boundaries.free(last)
        return boundaries, graphs, *self.head.differentiate(hidden, targets_BT, denominator)

    def _forward(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, boundaries: Boundaries) -> dict[int, Graphs]:
        """Write every boundary; the graphs of all blocks, unless they are to be computed again."""
        with torch.no_grad(), self.autocast():
            for rows in representative(self._slices(tokens_BT, self.micro_batch_size), tokens_BT):
                boundaries.write(0, rows, self.model.embed(tokens_BT[rows], segments_BT=_part(segments_BT, rows)))
        mode = self.model.activation_checkpointing
        graphs: dict[int, Graphs] = {}
        for index in range(len(self.model.blocks)):
            slices = self._slices(tokens_BT, self.block_micro_batches[index])
            pairs = list(zip(slices, [*slices[1:], None], strict=True))
            for rows, following in representative(pairs, tokens_BT, distinct=2 if mode == "block" else len(pairs)):
                hidden, block = boundaries.read(index, rows), self.model.block(index, _part(segments_BT, rows))
                if following is not None:
                    boundaries.prefetch(index, following)
                if mode == "block":
                    with torch.no_grad(), self.autocast():
                        output = block(hidden)
                else:
                    hidden = hidden.detach().requires_grad_()
                    with self.autocast():
                        output = run_block(block, hidden, mode)
                    graphs.setdefault(index, []).append((hidden, output))
                boundaries.write(index + 1, rows, output.detach())
        return graphs

    def _block(
        self, index: int, boundaries: Boundaries, graphs: Graphs, grad: torch.Tensor, segments_BT: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Update block `index`; the gradient of what it was given, or None if its own was not finite.

        When memory runs out the gradients so far are dropped, and the block is done again with a smaller micro-batch.
        """
        parameters = [p for p in self.model.blocks[index].parameters() if p.requires_grad]
        while True:
            try:
                grad_input, gradients = self._differentiate(index, boundaries, graphs, parameters, grad, segments_BT)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                micro, smaller = self.block_micro_batches[index], smaller_micro_batch(self.block_micro_batches[index])
                if not smaller:
                    raise MemoryError(f"block {index} with one sequence at a time: {first_line(error)}") from error
            graphs.clear()
            boundaries.drop_fetched()
            release_memory(self.device)
            self.block_micro_batches[index] = smaller
            self.messages.append(f"memory ran out in block {index} with micro-batches of {micro}; this block goes on with {smaller}")
        boundaries.free(index)
        return grad_input if self.apply(list(zip(parameters, gradients, strict=True))) else None

    def _differentiate(
        self,
        index: int,
        boundaries: Boundaries,
        graphs: Graphs,
        parameters: list[nn.Parameter],
        grad: torch.Tensor,
        segments_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Gradients of one block over the whole global batch: of its input, and of its parameters.

        Memory: both, and one micro-batch of activations.
        """
        grad_input = torch.empty_like(grad)
        sums: list[torch.Tensor] = []
        slices = self._slices(grad, self.block_micro_batches[index])
        kept = bool(graphs)
        for position, rows in representative(list(enumerate(slices)), grad, distinct=len(slices) if kept else 2):
            if kept:
                hidden, output = graphs.pop(0)
            else:
                hidden = boundaries.read(index, rows).detach().requires_grad_()
                if position + 1 < len(slices):
                    boundaries.prefetch(index, slices[position + 1])
                with self.autocast():
                    output = self.model.block(index, _part(segments_BT, rows))(hidden)
            grad_input[rows], *gradients = torch.autograd.grad(output, [hidden, *parameters], grad[rows].to(output.dtype))
            del hidden, output
            sums = _add(sums, gradients, more=len(slices) > 1)
            del gradients  # else one more gradient of the block would live until the next is there
        return grad_input, sums

    def _embedding(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, grad: torch.Tensor, tied: Tied) -> None:
        def gradients() -> Pairs:
            with self.autocast():
                hidden = self.model.embed(tokens_BT, segments_BT=segments_BT)
            found = torch.autograd.grad(hidden, self._embed_parameters, grad)
            pairs = [(parameter, gradient.contiguous()) for parameter, gradient in zip(self._embed_parameters, found, strict=True)]
            for parameter, gradient in pairs:
                if parameter in tied:
                    gradient += tied[parameter]
            return pairs

        self.apply(once_more(gradients, self.device))

    def apply(self, pairs: Pairs) -> bool:
        """Clip and update; false, and no update, if a gradient is not finite."""
        return self.update(pairs, once_more(partial(self.factor, pairs), self.device))

    def factor(self, pairs: Pairs) -> float:
        """What clipping and loss scale multiply these gradients by; NaN if they are not finite."""
        return self.clipping.factor([gradient for _, gradient in pairs], 1 / self.scaler.get_scale())

    def update(self, pairs: Pairs, factor: float) -> bool:
        """Update, unless this is a rehearsal; false, and no update, if `factor` is NaN.

        Memory: none, as all gradients are contiguous: an update that has begun comes to its end.
        """
        if self.rehearsing:
            return True
        if math.isnan(factor):
            return False
        for parameter, gradient in pairs:
            self.optimizer.begin(parameter)
            self.optimizer.update(parameter, gradient, grad_scale=factor)
        return True

    def _discard(self) -> None:
        self.clipping.forget()

    def memory_remedies(self) -> list[str]:
        remedies = [remedy for remedy in super().memory_remedies() if not remedy.startswith("train.update=")]
        return [*remedies, "a smaller train.global_batch_size"]

    def set_micro_batch_size(self, size: int) -> None:
        super().set_micro_batch_size(size)
        self.block_micro_batches = [min(block, size) for block in self.block_micro_batches]

    def _slices(self, rows_BT: torch.Tensor, micro_batch_size: int) -> list[slice]:
        rows, at_once = len(rows_BT), self.rows_at_once(rows_BT.shape[1], micro_batch_size)
        return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]

    def save(self, directory: Any) -> dict:
        more = {
            "clipping": self.clipping.state(),
            "block_micro_batches": self.block_micro_batches,
            "head_block_tokens": self.head.block_tokens,
        }
        return {**super().save(directory), "layerwise": more}

    def load(self, directory: Any, state: dict) -> None:
        super().load(directory, state)
        self.clipping.load(state["layerwise"].get("clipping", {}))
        self.block_micro_batches = [min(size, self.micro_batch_size) for size in state["layerwise"]["block_micro_batches"]]
        self.head.block_tokens = state["layerwise"].get("head_block_tokens", 0)

    def memory_components(self) -> dict[str, int]:
        size = next(self.model.parameters()).element_size()
        return {**super().memory_components(), "gradients": largest_part(self.model) * size}


def _import_autograd() -> None:
    """torch imports sympy when a gradient is first given to torch.autograd.grad; an import that runs out of memory leaves ruins behind."""
    number = torch.zeros((), requires_grad=True)
    torch.autograd.grad(number * 1, number, torch.zeros(()))


def _part(segments_BT: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if segments_BT is None else segments_BT[rows]


def _add(sums: list[torch.Tensor], gradients: list[torch.Tensor], more: bool) -> list[torch.Tensor]:
    """Running sums, contiguous, in fp32 if there is more than one term."""
    if not sums:
        return [(g.float() if more and g.dtype != torch.float64 else g).contiguous() for g in gradients]
    for total, gradient in zip(sums, gradients, strict=True):
        total += gradient
    return sums
