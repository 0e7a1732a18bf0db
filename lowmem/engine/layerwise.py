"""The layerwise update (D6): a block's gradient is summed over the whole global batch, applied and freed before the next one exists.

The forward pass keeps only what each block was given. Going back, a block is computed again and differentiated micro-batch by
micro-batch, so the gradient of one block is alive at a time and accumulation stays exact.

Source: the execution order of L2L, Pudipeddi et al. 2020, arXiv:2002.05645.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lowmem.config.schema import OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.base import StepResult, Tensors, on_device
from lowmem.engine.layerwise_head import FirstUpdate, LayerwiseHead, LossScale, Pairs, Tied, Updates
from lowmem.engine.local import LocalEngine
from lowmem.engine.recovery import HALF_APPLIED, cannot_be_repeated, first_line, once_more, release_memory, smaller_micro_batch
from lowmem.engine.state import random_state, restore_random_state
from lowmem.memory.limits import is_out_of_memory
from lowmem.models.base import LanguageModel, largest_part_bytes
from lowmem.nn.gradients import gradients_of
from lowmem.nn.recompute import run_block
from lowmem.optim.clipping import BlockClipping
from lowmem.optim.from_config import build_optimizer, set_learning_rate
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.system.devices import Precision
from lowmem.system.dry_run import note, representative


class Boundaries:
    """One (B, T, C) tensor per boundary, in device memory or in pinned host memory.

    Args:
        dtype: what is stored; "same" is the dtype of what is written.
        offload: "cpu" keeps them in host memory, copied on a stream of their own while the device computes (CUDA only).
    Memory: B * T * C numbers for each boundary that was written and not freed; with offload that much host memory, and on the device
        two micro-batches.
    """

    def __init__(
        self, sequences: int, device: torch.device, *, dtype: Literal["same", "bf16"] = "same", offload: Literal["none", "cpu"] = "none"
    ):
        self.sequences, self.device = sequences, device
        self.stored_dtype = torch.bfloat16 if dtype == "bf16" else None
        self.stream = torch.cuda.Stream(device) if offload == "cpu" and device.type == "cuda" else None
        self.dtype = torch.float32
        self._kept: dict[int, torch.Tensor] = {}
        self._fetched: dict[tuple[int, int, int], torch.Tensor] = {}

    def write(self, index: int, rows: slice, hidden: torch.Tensor) -> None:
        """Keep `hidden` as rows of boundary `index`."""
        kept = self._kept.get(index)
        if kept is None:
            self.dtype = hidden.dtype
            shape = (self.sequences, *hidden.shape[1:])
            place = {"device": "cpu", "pin_memory": True} if self.stream else {"device": self.device}
            kept = self._kept[index] = torch.empty(shape, dtype=self.stored_dtype or hidden.dtype, **place)  # type: ignore[arg-type]
            note(kept, "boundaries")
        if self.stream is None:
            kept[rows] = hidden
            return
        narrowed = hidden.to(kept.dtype)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            kept[rows].copy_(narrowed, non_blocking=True)
        narrowed.record_stream(self.stream)

    def prefetch(self, index: int, rows: slice) -> None:
        """Start bringing rows to the device; `read` then finds them there. Nothing without offload."""
        key = (index, rows.start, rows.stop)
        if self.stream is None or key in self._fetched or index not in self._kept or rows.start >= self.sequences:
            return
        with torch.cuda.stream(self.stream):
            self._fetched[key] = self._kept[index][rows].to(self.device, non_blocking=True)

    def read(self, index: int, rows: slice) -> torch.Tensor:
        """Rows of boundary `index` on the device, in the dtype they were written in; not to be changed."""
        if self.stream is None:
            return self._kept[index][rows].to(self.dtype)
        self.prefetch(index, rows)
        fetched = self._fetched.pop((index, rows.start, rows.stop))
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        fetched.record_stream(torch.cuda.current_stream(self.device))
        return fetched.to(self.dtype)

    def free(self, index: int) -> None:
        """Give back the memory of boundary `index`."""
        self._kept.pop(index, None)
        for key in [key for key in self._fetched if key[0] == index]:
            del self._fetched[key]

    def drop_fetched(self) -> None:
        """Give back the device memory of rows that were prefetched and not read; what was written stays."""
        self._fetched.clear()

    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept.values())


Graphs = list[tuple[torch.Tensor, torch.Tensor]]


class LayerwiseEngine(LocalEngine):
    """Updates head, blocks and embedding one after the other, from the last to the first.

    Clipping goes by an estimate of the global norm, which is known too late: see `lowmem.optim.clipping`. A loss that is not finite
    changes nothing; a gradient that turns non-finite on the way down leaves its block and those below unchanged, those above are updated
    already.

    Memory that runs out before the first update restarts the step with a smaller micro-batch. Later each part repeats itself: a block
    with a smaller micro-batch of its own, the head's rows with fewer tokens at once, all else once more after memory was given back.

    Where a part is frozen, a step goes down no further than the lowest part that is trained, and keeps no boundary below it.

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
        self._embed_parameters = [p for p in model.embed_parameters() if p.requires_grad]
        trained = [index for index, block in enumerate(model.blocks) if any(p.requires_grad for p in block.parameters())]
        self._lowest = -1 if self._embed_parameters else min(trained, default=len(model.blocks))  # the part below which nothing is trained
        parts = len(trained) + 1 + bool(self._embed_parameters)
        self.clipping = BlockClipping(optim.clip, "block" if optim.clip_by == "block" else "previous", parts)
        self.updates = Updates(self.optimizer, self.clipping, self.scaler, device)
        self.head = LayerwiseHead(model, self.updates, self.autocast, self.autocast_dtype, self.messages.append)

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
        self.updates.rehearsing = True
        try:
            self.model.train()
            self._pass(batch)
            self._repeat(partial(self._try_evaluation, batch))
        finally:
            self.updates.rehearsing = False
            self._discard()
            restore_random_state(random, self.device)

    def _pass(self, batch: Batch) -> tuple[float, bool]:
        """Forward, and backward with updates; the loss, and whether it was finite."""
        tensors, denominator = on_device(batch, self.device), max(1, batch.target_count())
        boundaries, graphs, loss, first_update = self._repeat(partial(self._to_first_update, tensors, denominator))
        tokens, _, segments = tensors
        if first_update is None:
            return loss, False
        with cannot_be_repeated(self, "in a rehearsal" if self.updates.rehearsing else HALF_APPLIED):
            grad, tied = first_update()
            del first_update
            for index in reversed(range(max(self._lowest, 0), len(self.model.blocks))):
                if grad is not None:
                    grad = self._block(index, boundaries, graphs.pop(index, []), grad, segments)
            if grad is not None and self._embed_parameters:
                self._embedding(tokens, segments, grad, tied)
        return loss, True

    def _to_first_update(self, tensors: Tensors, denominator: float) -> tuple[Boundaries, dict[int, Graphs], float, FirstUpdate | None]:
        """The part of a step that can be done again from its beginning."""
        tokens_BT, targets_BT, segments_BT = tensors
        boundaries = Boundaries(len(tokens_BT), self.device, dtype=self.boundary_dtype, offload=self.boundary_offload)
        graphs = self._forward(tokens_BT, segments_BT, boundaries)
        last = len(self.model.blocks)
        hidden = boundaries.read(last, slice(0, len(targets_BT))).detach().requires_grad_(self._lowest < last)
        boundaries.free(last)
        return boundaries, graphs, *self.head.differentiate(hidden, targets_BT, denominator)

    def _forward(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, boundaries: Boundaries) -> dict[int, Graphs]:
        """Write every boundary; the graphs of all blocks, unless they are to be computed again."""
        with torch.no_grad(), self.autocast():
            for rows in representative(self._slices(tokens_BT, self.micro_batch_size), tokens_BT):
                boundaries.write(0, rows, self.model.embed(tokens_BT[rows], segments_BT=_part(segments_BT, rows)))
        graphs: dict[int, Graphs] = {}
        for index in range(len(self.model.blocks)):
            mode = self.model.activation_checkpointing if index >= self._lowest else "block"
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
                    hidden = hidden.detach().requires_grad_(index > self._lowest)
                    with self.autocast():
                        output = run_block(block, hidden, mode)
                    graphs.setdefault(index, []).append((hidden, output))
                boundaries.write(index + 1, rows, output.detach())
            if index < self._lowest:
                boundaries.free(index)
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
        if not parameters:
            return grad_input
        return grad_input if self.updates.apply(list(zip(parameters, gradients, strict=True))) else None

    def _differentiate(
        self,
        index: int,
        boundaries: Boundaries,
        graphs: Graphs,
        parameters: list[nn.Parameter],
        grad: torch.Tensor,
        segments_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Gradients of one block over the whole global batch: of its input, and of its parameters. The first is `grad` itself, which means
        nothing, for the lowest block that is trained.

        Memory: both, and one micro-batch of activations.
        """
        goes_on = index > self._lowest
        grad_input = torch.empty_like(grad) if goes_on else grad
        sums: list[torch.Tensor] = []
        slices = self._slices(grad, self.block_micro_batches[index])
        kept = bool(graphs)
        for position, rows in representative(list(enumerate(slices)), grad, distinct=len(slices) if kept else 2):
            if kept:
                hidden, output = graphs.pop(0)
            else:
                hidden = boundaries.read(index, rows).detach().requires_grad_(goes_on)
                if position + 1 < len(slices):
                    boundaries.prefetch(index, slices[position + 1])
                with self.autocast():
                    output = self.model.block(index, _part(segments_BT, rows))(hidden)
            wanted = [hidden, *parameters] if goes_on else parameters
            found = gradients_of(output, wanted, grad[rows].to(output.dtype))
            if goes_on:
                grad_input[rows] = found.pop(0)
            del hidden, output
            sums = _add(sums, found, more=len(slices) > 1)
            del found  # else one more gradient of the block would live until the next is there
        return grad_input, sums

    def _embedding(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, grad: torch.Tensor, tied: Tied) -> None:
        def gradients() -> Pairs:
            with self.autocast():
                hidden = self.model.embed(tokens_BT, segments_BT=segments_BT)
            found = gradients_of(hidden, self._embed_parameters, grad)
            pairs = [(parameter, gradient.contiguous()) for parameter, gradient in zip(self._embed_parameters, found, strict=True)]
            for parameter, gradient in pairs:
                if parameter in tied:
                    gradient += tied[parameter]
            return pairs

        self.updates.apply(once_more(gradients, self.device))

    def _discard(self) -> None:
        self.clipping.forget()

    def describe(self) -> list[str]:
        which = "its own norm" if self.clipping.mode == "block" else "the global norm as estimated by then"
        return [*super().describe(), *([f"layerwise: each block is clipped by {which}"] if self.optim.clip else [])]

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
        return {**super().memory_components(), "gradients": largest_part_bytes(self.model)}


def _part(segments_BT: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if segments_BT is None else segments_BT[rows]


def _add(sums: list[torch.Tensor], gradients: list[torch.Tensor], more: bool) -> list[torch.Tensor]:
    """Running sums, contiguous, in fp32 if there is more than one term."""
    if not sums:
        return [(g.float() if more and g.dtype != torch.float64 else g).contiguous() for g in gradients]
    for total, gradient in zip(sums, gradients, strict=True):
        total += gradient
    return sums
