"""The layerwise update (D6): a block's gradient is summed over the whole global batch, applied and freed before the next one exists.

The forward pass keeps only what each block was given. Going back, a block is computed again and differentiated micro-batch by
micro-batch, so the gradient of one block is alive at a time and accumulation stays exact.

Source: the execution order of L2L, Pudipeddi et al. 2020, arXiv:2002.05645.
"""

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lowmem.config.schema import OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.base import StepResult, Tensors, on_device
from lowmem.engine.boundaries import Boundaries
from lowmem.engine.layerwise_embedding import LayerwiseEmbedding
from lowmem.engine.layerwise_head import FirstUpdate, HiddenParts, LayerwiseHead, LossScale, Tied, Updates
from lowmem.engine.local import LocalEngine
from lowmem.engine.recovery import HALF_APPLIED, cannot_be_repeated, first_line, release_memory, smaller_micro_batch
from lowmem.engine.state import random_state, restore_random_state
from lowmem.engine.storage.backing import Backing
from lowmem.engine.storage.blocks import Storage, StreamedBlocks, Visit
from lowmem.engine.storage.disk_file import DiskFile
from lowmem.memory.limits import is_out_of_memory
from lowmem.models.base import LanguageModel, largest_part_bytes
from lowmem.nn.gradients import gradients_of
from lowmem.nn.linear import accumulate_dtype
from lowmem.nn.recompute import run_block
from lowmem.optim.clipping import BlockClipping
from lowmem.optim.from_config import build_optimizer, set_learning_rate
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.system.devices import Precision
from lowmem.system.dry_run import representative
from lowmem.system.units import format_bytes

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
        storage: see `LocalEngine`; blocks that are elsewhere are here one at a time, and computed twice.
        disk: where boundary activations are kept, instead of in memory.
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
        storage: Storage | None = None,
        disk: Backing | None = None,
    ):
        settings: dict[str, Any] = {"device": device, "precision": precision, "micro_batch_size": micro_batch_size, "seed": train.seed}
        super().__init__(model, optim, **settings, storage=storage)
        self.disk, self._moved = disk, (0, 0)
        self.scaler = LossScale(enabled=precision == "fp16")
        self.boundary_dtype, self.boundary_offload = train.boundary_dtype, train.boundary_offload
        self.block_micro_batches = [micro_batch_size] * len(model.blocks)
        self._embed_parameters = [p for p in model.embed_parameters() if p.requires_grad]
        trained = [index for index, block in enumerate(model.blocks) if any(p.requires_grad for p in block.parameters())]
        self._lowest = -1 if self._embed_parameters else min(trained, default=len(model.blocks))  # the part below which nothing is trained
        parts = len(trained) + 1 + bool(self._embed_parameters)
        self.clipping = BlockClipping(optim.clip, "block" if optim.clip_by == "block" else "previous", parts)
        self.updates = Updates(self.optimizer, self.clipping, self.scaler, device, self.storage)
        lookup = model.lookup_parameter() if self.clipping.mode == "previous" else None
        lookup = lookup if any(lookup is parameter for parameter in self._embed_parameters) else None
        matrix = model.dense_head() if self.clipping.mode == "previous" else None
        for weight in (lookup, None if matrix is None else matrix.weight):
            if weight is not None and weight.requires_grad and (weight is lookup or id(weight) not in map(id, model.embed_parameters())):
                tied = matrix is not None and weight is lookup is matrix.weight
                self.storage.adopt_matrix(weight, self.optimizer, accumulate_dtype(weight.dtype) if tied else None)
        self.head = LayerwiseHead(model, self.updates, lookup, self.autocast, self.autocast_dtype, self.messages.append)
        self.embedding = LayerwiseEmbedding(model, self.updates, self._embed_parameters, lookup, self.autocast)

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
            boundaries.free(len(self.model.blocks))
            for index in reversed(range(max(self._lowest, 0), len(self.model.blocks))):
                if grad is not None:
                    grad = self._block(index, boundaries, graphs.pop(index, []), grad, segments)
            if grad is not None and self._embed_parameters:
                self._embedding(tokens, segments, grad, tied)
        return loss, True

    def _to_first_update(self, tensors: Tensors, denominator: float) -> tuple[Boundaries, dict[int, Graphs], float, FirstUpdate | None]:
        """The part of a step that can be done again from its beginning."""
        tokens_BT, targets_BT, segments_BT = tensors
        boundaries = self._boundaries(len(tokens_BT), self.boundary_dtype)
        graphs = self._forward(tokens_BT, segments_BT, boundaries)
        last = len(self.model.blocks)
        hidden = HiddenParts(partial(boundaries.read, last), self._slices(tokens_BT, self.micro_batch_size), self._lowest < last)
        return boundaries, graphs, *self.head.differentiate(hidden, targets_BT, denominator)

    def _boundaries(self, sequences: int, dtype: Literal["same", "bf16"] = "same") -> Boundaries:
        return Boundaries(sequences, self.device, dtype=dtype, offload=self.boundary_offload, disk=self.disk)

    def _losses(self, batch: Batch) -> list[float]:
        """See `LocalEngine`; blocks that are elsewhere come once for the whole batch."""
        if not self.storage.streams:
            return [self._loss_of(micro_batch) for micro_batch in self._micro_batches(batch)]
        tokens, targets, segments = on_device(batch, self.device)
        boundaries, last = self._boundaries(len(batch)), len(self.model.blocks)
        self._forward(tokens, segments, boundaries, keep=False)
        losses = []
        for rows in representative(self._slices(tokens, self.micro_batch_size), tokens, distinct=2):
            losses.append(self.head.loss(boundaries.read(last, rows), targets[rows]))
        return losses

    def _loss_of(self, batch: Batch) -> float:
        tokens, targets, segments = on_device(batch, self.device)
        with self.autocast():
            hidden = self.embedding.embed(tokens, segments)
        for index in range(len(self.model.blocks)):
            with self.autocast():
                hidden = self.model.block(index, segments)(hidden)
        return self.head.loss(hidden, targets)

    def _forward(
        self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, boundaries: Boundaries, *, keep: bool = True
    ) -> dict[int, Graphs]:
        """Write every boundary; the graphs of all blocks, unless they are to be computed again.

        Args:
            keep: boundaries for a backward pass; without one only the last is kept.
        """
        with torch.no_grad(), self.autocast():
            for rows in representative(self._slices(tokens_BT, self.micro_batch_size), tokens_BT):
                boundaries.write(0, rows, self.embedding.embed(tokens_BT[rows], _part(segments_BT, rows)))
        graphs: dict[int, Graphs] = {}
        for index in range(len(self.model.blocks)):
            kept = keep and index >= self._lowest
            with self.storage.block(index, ahead=index + 1):
                self._forward_block(index, tokens_BT, segments_BT, boundaries, graphs if kept else None)
            if not kept:
                boundaries.free(index)
        return graphs

    def _forward_block(
        self,
        index: int,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor | None,
        boundaries: Boundaries,
        graphs: dict[int, Graphs] | None,
    ) -> None:
        """Write the boundary after block `index`.

        Args:
            graphs: get those of the block, unless it is to be computed again; None if nothing goes back through it.
        """
        mode = "block" if graphs is None else self.model.activation_checkpointing
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
                assert graphs is not None
                hidden = hidden.detach().requires_grad_(index > self._lowest)
                with self.autocast():
                    output = run_block(block, hidden, mode)
                graphs.setdefault(index, []).append((hidden, output))
            boundaries.write(index + 1, rows, output.detach())

    def _block(
        self, index: int, boundaries: Boundaries, graphs: Graphs, grad: torch.Tensor, segments_BT: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Update block `index`; the gradient of what it was given, or None if its own was not finite.

        When memory runs out the block goes on with a smaller micro-batch.
        """
        lowest = max(self._lowest, 0)
        with self.storage.block(index, states=True, ahead=index - 1 if index > lowest else None) as visit:
            return self._update_block(index, boundaries, graphs, grad, segments_BT, visit)

    def _update_block(
        self, index: int, boundaries: Boundaries, graphs: Graphs, grad: torch.Tensor, segments_BT: torch.Tensor | None, visit: Visit
    ) -> torch.Tensor | None:
        """`_block`, with the block on the device."""
        parameters, sums = [p for p in self.model.blocks[index].parameters() if p.requires_grad], GradientSums()
        while True:
            try:
                self._differentiate(index, boundaries, graphs, parameters, grad, segments_BT, sums)
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
            return grad
        applied = self.updates.apply(list(zip(parameters, sums.totals, strict=True)))
        visit.changed = applied and not self.updates.rehearsing
        return grad if applied else None

    def _differentiate(
        self,
        index: int,
        boundaries: Boundaries,
        graphs: Graphs,
        parameters: list[nn.Parameter],
        grad: torch.Tensor,
        segments_BT: torch.Tensor | None,
        sums: "GradientSums",
    ) -> None:
        """Gradients of one block over the whole global batch: those of its input take the place of those of its output, `grad`, unless it
        is the lowest that is trained; those of its parameters are added up.

        Args:
            sums: of the sequences that were done before memory ran out; the others are done now.
        Memory: the sums, and one micro-batch of activations.
        """
        goes_on = index > self._lowest
        slices = self._slices(grad, self.block_micro_batches[index], first=sums.sequences)
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
            of_input = found.pop(0) if goes_on else None
            del hidden, output
            sums.add(found, rows, more=len(slices) > 1)
            if of_input is not None:
                grad[rows] = of_input
            del found, of_input  # else one more gradient of the block would live until the next is there

    def _embedding(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, grad: torch.Tensor, tied: Tied) -> None:
        self.embedding.update(tokens_BT, segments_BT, grad, tied, self._slices(tokens_BT, self.micro_batch_size))

    def _discard(self) -> None:
        self.clipping.forget()

    def traffic(self) -> dict[str, int]:
        places = [*([self.storage.backing] if isinstance(self.storage, StreamedBlocks) else []), *([self.disk] if self.disk else [])]
        if not places:
            return {}
        counts = sum(place.bytes_read for place in places), sum(place.bytes_written for place in places)
        before, self._moved = self._moved, counts
        return {"storage_read_bytes": counts[0] - before[0], "storage_written_bytes": counts[1] - before[1]}

    def describe(self) -> list[str]:
        which = "its own norm" if self.clipping.mode == "block" else "the global norm as estimated by then"
        clipped = [f"layerwise: each block is clipped by {which}"] if self.optim.clip else []
        kept = self.storage.component_bytes().get("elsewhere", 0)
        place = "on disk" if isinstance(getattr(self.storage, "backing", None), DiskFile) else "in host memory"
        return [*super().describe(), *clipped, *([f"weights and states of blocks {place}: {format_bytes(kept)}"] if kept else [])]

    def memory_remedies(self) -> list[str]:
        remedies = [remedy for remedy in super().memory_remedies() if not remedy.startswith("train.update=")]
        return [*remedies, "a smaller train.global_batch_size"]

    def set_micro_batch_size(self, size: int) -> None:
        super().set_micro_batch_size(size)
        self.block_micro_batches = [min(block, size) for block in self.block_micro_batches]

    def _slices(self, rows_BT: torch.Tensor, micro_batch_size: int, first: int = 0) -> list[slice]:
        rows, at_once = len(rows_BT), self.rows_at_once(rows_BT.shape[1], micro_batch_size)
        return [slice(start, min(start + at_once, rows)) for start in range(first, rows, at_once)]

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


class GradientSums:
    """Gradients of the parameters of a block, summed over sequences, contiguous; in fp32 if there is more than one term.

    Attributes:
        totals: one for each parameter.
        sequences: that were added; the next term is of those that follow.
    """

    def __init__(self) -> None:
        self.totals: list[torch.Tensor] = []
        self.sequences = 0

    def add(self, gradients: list[torch.Tensor], rows: slice, *, more: bool) -> None:
        """Add one term, all of it or nothing: memory is taken for the first alone.

        Args:
            more: there are others.
        """
        if not self.totals:
            self.totals = [(g.float() if more and g.dtype != torch.float64 else g).contiguous() for g in gradients]
        else:
            for total, gradient in zip(self.totals, gradients, strict=True):
                total += gradient
        self.sequences = rows.stop
