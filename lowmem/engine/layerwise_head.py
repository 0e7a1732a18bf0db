"""What a layerwise step does with gradients: loss scale, clipping and update of one part after the other, and the head, whose loss comes
first and whose updates come later; where its gradient would be a sum over chunks, in blocks of rows. Those of a head that is the embedding
wait for the end of the step.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lowmem.engine.recovery import fits, once_more
from lowmem.engine.storage.blocks import Storage
from lowmem.models.base import LanguageModel, MatrixHead, head_loss_options
from lowmem.nn.gradients import gradients_of
from lowmem.nn.linear import accumulate_dtype
from lowmem.nn.loss import CrossEntropyByRows, auto_chunk_tokens
from lowmem.nn.rows import GradientRows, MatrixRows, ResidentGradient
from lowmem.optim.clipping import BlockClipping, global_norm
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.system.dry_run import note, representative

Pairs = list[tuple[nn.Parameter, torch.Tensor]]

MIN_LOSS_SCALE = 1.0


class LossScale:
    """Halved after a step with a gradient that is not finite, doubled after `growth_interval` steps without one.

    Args:
        enabled: otherwise the scale is 1 for good.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; the numbers are GradScaler's.
    """

    def __init__(self, enabled: bool, initial: float = 2.0**16, growth_interval: int = 2000):
        self.enabled, self.growth_interval = enabled, growth_interval
        self._scale, self._good_steps = initial if enabled else 1.0, 0

    def get_scale(self) -> float:
        """What losses are multiplied by."""
        return self._scale

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The scaled loss."""
        return loss * self._scale if self.enabled else loss

    def may_shrink(self) -> bool:
        """Whether a smaller scale could help."""
        return self.enabled and self._scale > MIN_LOSS_SCALE

    def update_after(self, applied: bool) -> None:
        """Count one step."""
        if not self.enabled:
            return
        self._good_steps = self._good_steps + 1 if applied else 0
        if not applied:
            self._scale = max(self._scale / 2, MIN_LOSS_SCALE)
        elif self._good_steps == self.growth_interval:
            self._scale, self._good_steps = self._scale * 2, 0

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint; empty when not enabled."""
        return {"scale": self._scale, "good_steps": self._good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self._scale, self._good_steps = state["scale"], int(state["good_steps"])


class Updates:
    """Clips the gradients of one part after the other by what is known of the global norm, and updates their parameters.

    Args:
        scale: what the loss was multiplied by.
        device: where memory is given back if clipping runs out of it.
        storage: where matrices are.
    Attributes:
        rehearsing: nothing is updated; clipping goes on as in a step.
    """

    def __init__(self, optimizer: LowBitOptimizer, clipping: BlockClipping, scale: LossScale, device: torch.device, storage: Storage):
        self.optimizer, self.clipping, self.scale, self.device, self.storage = optimizer, clipping, scale, device, storage
        self.rehearsing = False

    def rows_of(self, parameter: nn.Parameter) -> MatrixRows:
        """The rows of a matrix, from where they are."""
        return self.storage.rows_of(parameter, self.optimizer)

    def gradient_rows_of(self, matrix: MatrixRows, dtype: torch.dtype) -> GradientRows:
        """Where the gradient of a matrix is kept until the end of the step."""
        return self.storage.gradient_rows_of(matrix, dtype, self.device)

    def apply(self, pairs: Pairs) -> bool:
        """Clip and update; false, and no update, if a gradient is not finite."""
        return self.update(pairs, once_more(partial(self.factor, pairs), self.device))

    def factor(self, pairs: Pairs) -> float:
        """What clipping and loss scale multiply these gradients by; NaN if they are not finite."""
        return self.clipping.factor([gradient for _, gradient in pairs], 1 / self.scale.get_scale())

    def update(self, pairs: Pairs, factor: float) -> bool:
        """Update, unless this is a rehearsal; false, and no update, if `factor` is NaN.

        Memory: none, as all gradients are contiguous: an update that has begun comes to its end.
        """
        if self.rehearsing:
            return True
        if math.isnan(factor):
            return False
        for parameter, gradient in pairs:
            note(gradient, "gradients")
            self.optimizer.begin(parameter)
            self.optimizer.update(parameter, gradient, grad_scale=factor)
        return True

    def is_finite(self, gradient: torch.Tensor) -> bool:
        """Whether a gradient that is to be applied later is finite; if it is not, this step has no norm."""
        norm = once_more(partial(global_norm, [gradient]), self.device).item()
        if not math.isfinite(norm):
            self.clipping.factor([gradient], math.nan)
        return self.rehearsing or math.isfinite(norm)

    def begin_rows(self, matrix: MatrixRows) -> None:
        """Prepare the update of a matrix that comes in rows."""
        if not self.rehearsing:
            self.optimizer.begin(matrix.parameter)

    def apply_rows(self, matrix: MatrixRows, first: int, gradient: torch.Tensor, unscale: float) -> bool:
        """Clip and update some rows of a matrix; false, and no update, if their gradient is not finite.

        Args:
            first: number of the first row.
            gradient: of whole rows, contiguous.
            unscale: what the gradient is to be multiplied by.
        """
        factor = once_more(partial(self.clipping.factor, [gradient], unscale), self.device)
        if self.rehearsing:
            return True
        if math.isnan(factor):
            return False
        note(gradient, "gradients")
        with matrix.updating(slice(first, first + len(gradient))) as window:
            self.optimizer.apply(matrix.parameter, window, gradient.view(-1), start=first * matrix.shape[1], grad_scale=factor)
        return True


Tied = dict[nn.Parameter, GradientRows]
FirstUpdate = Callable[[], tuple[torch.Tensor | None, Tied]]


@dataclass(frozen=True)
class HiddenParts:
    """(B, T, C) of the last block, read in parts.

    Attributes:
        read: some sequences of it, not to be changed.
        slices: the sequences that are read at once.
        goes_on: whether its gradient is wanted, because something below is trained.
    """

    read: Callable[[slice], torch.Tensor]
    slices: list[slice]
    goes_on: bool


class LayerwiseHead:
    """Loss, gradient and update of everything above the last block.

    Args:
        updates: what becomes of gradients.
        lookup: the embedding's matrix, where its gradient goes by rows; a head that is tied to it may, too.
        autocast: computes in the precision of the run.
        dtype: of that precision where it differs from what is stored.
        tell: is told what a person should know of memory that ran out.
    Attributes:
        block_tokens: tokens that meet a block of rows at once where the head goes by rows; 0 leaves it to `CrossEntropyByRows`.
    """

    def __init__(
        self,
        model: LanguageModel,
        updates: Updates,
        lookup: nn.Parameter | None,
        autocast: Callable[[], AbstractContextManager],
        dtype: torch.dtype | None,
        tell: Callable[[str], None],
    ):
        self.model, self.updates, self.autocast, self.dtype, self.tell = model, updates, autocast, dtype, tell
        self.lookup, self.block_tokens = lookup, 0
        self.in_embedding = {id(parameter) for parameter in model.embed_parameters()}
        inside = {id(parameter) for parameter in model.blocks.parameters()}
        outer = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
        tied = {id(parameter) for parameter in model.tied_parameters()}
        self.parameters = [p for p in outer if id(p) not in self.in_embedding or id(p) in tied]

    def differentiate(self, hidden: HiddenParts, targets_BT: torch.Tensor, denominator: float) -> tuple[float, FirstUpdate | None]:
        """Loss, and a function that updates the head; None if nothing may be updated. Nothing is changed before that function is called.

        The function returns the gradient of `hidden`, None if one of the head's was not finite, and the head's share of a tied embedding.

        Args:
            hidden: of the last block; where nothing below is trained, what is returned as its gradient means nothing.
        """
        head = self.model.dense_head()
        if head is not None and self._by_rows(targets_BT.numel(), head.weight):
            return self._differentiate_by_rows(head, hidden, targets_BT, denominator)
        whole = hidden.read(slice(0, len(targets_BT))).detach().requires_grad_(hidden.goes_on)
        with self.autocast():
            loss = self.model.head_loss(whole, targets_BT, denominator)
        value = loss.item()
        if not math.isfinite(value):
            return value, None
        grad, gradients = _gradients(self.updates.scale.scale(loss), whole, self.parameters)
        both = [(parameter, gradient.contiguous()) for parameter, gradient in zip(self.parameters, gradients, strict=True)]
        pairs = [pair for pair in both if id(pair[0]) not in self.in_embedding]
        tied: Tied = {parameter: ResidentGradient(gradient) for parameter, gradient in both if id(parameter) in self.in_embedding}
        factor = self.updates.factor(pairs)
        return value, lambda: (grad if self.updates.update(pairs, factor) else None, tied)

    def loss(self, hidden: torch.Tensor, targets_BT: torch.Tensor) -> float:
        """Sum of the losses of the predicted tokens, computed as a step computes them."""
        head = self.model.dense_head()
        with self.autocast():
            if head is None or not self._may_go_by_rows(head.weight):
                return self.model.head_loss(hidden, targets_BT, 1.0).item()
            normed = head.norm(hidden)
        options, dtype = head_loss_options(self.model), self.dtype or normed.dtype
        matrix, fit = self.updates.rows_of(head.weight), partial(fits, device=self.updates.device)
        return CrossEntropyByRows(normed, matrix, head.bias, targets_BT, options, dtype, self.block_tokens, fit).loss.item()

    def _by_rows(self, tokens: int, weight: nn.Parameter) -> bool:
        """Whether the head's gradient, if it has one, would have to be summed over several chunks of tokens: then it comes in rows instead.
        So does a matrix that is elsewhere.

        Not when blocks are clipped by their own norms: the head's is known only once all rows are there. Nor where the head is an
        embedding whose gradient does not come in rows.
        """
        vocab_size, width = weight.shape
        chunk = self.model.loss_options.chunk_tokens or auto_chunk_tokens(vocab_size, width, weight.element_size())
        return self.updates.storage.has_matrix(weight) or (tokens > chunk and self._may_go_by_rows(weight))

    def _may_go_by_rows(self, weight: nn.Parameter) -> bool:
        possible = self.updates.clipping.mode == "previous" and (id(weight) not in self.in_embedding or weight is self.lookup)
        return weight.requires_grad and possible

    def _differentiate_by_rows(
        self, head: MatrixHead, hidden: HiddenParts, targets_BT: torch.Tensor, denominator: float
    ) -> tuple[float, FirstUpdate | None]:
        """As `differentiate`, with a block of rows of the head updated, or handed on, before the gradient of the next one exists."""
        normed = self._normed(head, hidden, targets_BT)
        options, dtype = head_loss_options(self.model), self.dtype or normed.dtype
        matrix, fit = self.updates.rows_of(head.weight), partial(fits, device=self.updates.device)
        work = CrossEntropyByRows(normed, matrix, head.bias, targets_BT, options, dtype, self.block_tokens, fit)
        value = work.loss.item() / denominator
        if not math.isfinite(value):
            self._remember(work)
            return value, None
        work.allocate()
        tied: Tied = {head.weight: self.updates.gradient_rows_of(matrix, work.wide)} if head.weight is self.lookup else {}

        def first_update() -> tuple[torch.Tensor | None, Tied]:
            if not self._update_rows(work, denominator, tied.get(head.weight)):
                return None, {}
            scale = self.updates.scale.get_scale() / denominator
            # what was normalised is not needed any more: the gradient takes its place
            pairs = once_more(partial(self._below_matrix, head, hidden, work.grad_hidden, scale, normed), self.updates.device)
            if head.bias is not None and work.grad_bias is not None and head.bias.requires_grad:
                pairs.append((head.bias, work.grad_bias * scale))
            return normed if self.updates.apply(pairs) else None, tied

        return value, first_update

    def _normed(self, head: MatrixHead, hidden: HiddenParts, targets_BT: torch.Tensor) -> torch.Tensor:
        """(B, T, C), in the dtype of the last block's output where the norm keeps that."""
        made: torch.Tensor | None = None
        for rows in representative(hidden.slices, targets_BT, distinct=2):
            with torch.no_grad(), self.autocast():
                part = head.norm(hidden.read(rows))
            if made is None:
                made = part.new_empty(*targets_BT.shape, part.shape[-1])
            made[rows] = part
        assert made is not None
        return made

    def _below_matrix(
        self, head: MatrixHead, hidden: HiddenParts, grad_hidden: torch.Tensor, scale: float, grad_BTC: torch.Tensor
    ) -> Pairs:
        """Gradients of the norm's parameters; that of the last block's output is written to `grad_BTC`, where one is asked for.

        Args:
            grad_hidden: (N, C), of what the matrix is multiplied by, before `scale`.
        """
        trained = [parameter for parameter in head.norm.parameters() if parameter.requires_grad]
        wide = grad_hidden.view(*grad_BTC.shape[:-1], -1)
        sums: list[torch.Tensor] = []
        for rows in representative(hidden.slices, grad_BTC, distinct=2):
            part = hidden.read(rows).detach().requires_grad_(hidden.goes_on)
            with self.autocast():
                normed = head.norm(part)
            grad, found = _gradients(normed, part, trained, (wide[rows] * scale).to(normed.dtype))
            if hidden.goes_on:
                grad_BTC[rows] = grad
            if not sums:
                sums = [gradient.to(accumulate_dtype(gradient.dtype)).contiguous() for gradient in found]
                continue
            for total, gradient in zip(sums, found, strict=True):
                total += gradient
        return list(zip(trained, sums, strict=True))

    def _update_rows(self, work: CrossEntropyByRows, denominator: float, tied: GradientRows | None) -> bool:
        """False, and no more updates, from the first rows on whose gradient is not finite.

        Args:
            tied: takes the gradient, scaled as that of the embedding is, in place of an update.
        """
        scale = self.updates.scale.get_scale() / denominator
        if tied is None:
            self.updates.begin_rows(work.matrix)
        for first, grad_rows, _ in work.gradients():
            if tied is None:
                finite = self.updates.apply_rows(work.matrix, first, grad_rows, 1 / denominator)
            else:
                finite = self.updates.is_finite(grad_rows.mul_(scale))
                tied.write(slice(first, first + len(grad_rows)), grad_rows)
            if not finite:
                return False
        self._remember(work)
        return True

    def _remember(self, work: CrossEntropyByRows) -> None:
        """Begin with what fitted from now on."""
        if work.ran_out:
            self.block_tokens = work.block_tokens
            self.tell(f"memory ran out in the head; it goes on with {work.block_tokens} tokens at once")


def _gradients(
    output: torch.Tensor,
    hidden: torch.Tensor,
    parameters: list[nn.Parameter],
    grad_output: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of `hidden`, or itself where it requires none, and of parameters."""
    wanted: list[torch.Tensor] = [*([hidden] if hidden.requires_grad else []), *parameters]
    found = gradients_of(output, wanted, grad_output) if wanted else []
    return found.pop(0) if hidden.requires_grad else hidden, found
