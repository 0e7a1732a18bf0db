"""What a layerwise step does with gradients: loss scale, clipping and update of one part after the other, and the head, whose loss comes
first and whose updates come later; where its gradient would be a sum over chunks, in blocks of rows.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from lowmem.engine.recovery import fits, once_more
from lowmem.models.base import LanguageModel, head_loss_options
from lowmem.nn.gradients import gradients_of
from lowmem.nn.loss import CrossEntropyByRows, auto_chunk_tokens
from lowmem.optim.clipping import BlockClipping
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.system.dry_run import note

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
    Attributes:
        rehearsing: nothing is updated; clipping goes on as in a step.
    """

    def __init__(self, optimizer: LowBitOptimizer, clipping: BlockClipping, scale: LossScale, device: torch.device):
        self.optimizer, self.clipping, self.scale, self.device = optimizer, clipping, scale, device
        self.rehearsing = False

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

    def begin_rows(self, parameter: torch.Tensor) -> None:
        """Prepare the update of a matrix that comes in rows."""
        if not self.rehearsing:
            self.optimizer.begin(parameter)

    def apply_rows(self, parameter: torch.Tensor, first: int, gradient: torch.Tensor, unscale: float) -> bool:
        """Clip and update some rows of a matrix; false, and no update, if their gradient is not finite.

        Args:
            first: number of the first row.
            gradient: of whole rows.
            unscale: what the gradient is to be multiplied by.
        """
        factor = once_more(partial(self.clipping.factor, [gradient], unscale), self.device)
        if self.rehearsing:
            return True
        if math.isnan(factor):
            return False
        note(gradient, "gradients")
        self.optimizer.update(parameter, gradient.view(-1), start=first * parameter.shape[1], grad_scale=factor)
        return True


Tied = dict[nn.Parameter, torch.Tensor]
FirstUpdate = Callable[[], tuple[torch.Tensor | None, Tied]]


class LayerwiseHead:
    """Loss, gradient and update of everything above the last block.

    Args:
        updates: what becomes of gradients.
        autocast: computes in the precision of the run.
        dtype: of that precision where it differs from what is stored.
        tell: is told what a person should know of memory that ran out.
    Attributes:
        block_tokens: tokens whose gradient is added at once where the head goes by rows; 0 leaves it to `CrossEntropyByRows`.
    """

    def __init__(
        self,
        model: LanguageModel,
        updates: Updates,
        autocast: Callable[[], AbstractContextManager],
        dtype: torch.dtype | None,
        tell: Callable[[str], None],
    ):
        self.model, self.updates, self.autocast, self.dtype, self.tell = model, updates, autocast, dtype, tell
        self.block_tokens = 0
        self.in_embedding = {id(parameter) for parameter in model.embed_parameters()}
        inside = {id(parameter) for parameter in model.blocks.parameters()}
        outer = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
        tied = {id(parameter) for parameter in model.tied_parameters()}
        self.parameters = [p for p in outer if id(p) not in self.in_embedding or id(p) in tied]

    def differentiate(self, hidden: torch.Tensor, targets_BT: torch.Tensor, denominator: float) -> tuple[float, FirstUpdate | None]:
        """Loss, and a function that updates the head; None if nothing may be updated. Nothing is changed before that function is called.

        The function returns the gradient of `hidden`, None if one of the head's was not finite, and the head's share of a tied embedding.

        Args:
            hidden: (B, T, C) of the last block, a leaf; where it requires no gradient, because nothing below is trained, it is returned
                as its gradient.
        """
        dense = self.model.dense_head()
        if dense is not None and self._by_rows(targets_BT.numel(), dense[1]):
            return self._differentiate_by_rows(*dense, hidden, targets_BT, denominator)
        with self.autocast():
            loss = self.model.head_loss(hidden, targets_BT, denominator)
        value = loss.item()
        if not math.isfinite(value):
            return value, None
        grad, gradients = _gradients(self.updates.scale.scale(loss), hidden, self.parameters)
        both = [(parameter, gradient.contiguous()) for parameter, gradient in zip(self.parameters, gradients, strict=True)]
        pairs = [pair for pair in both if id(pair[0]) not in self.in_embedding]
        tied = {parameter: gradient for parameter, gradient in both if id(parameter) in self.in_embedding}
        factor = self.updates.factor(pairs)
        return value, lambda: (grad if self.updates.update(pairs, factor) else None, tied)

    def _by_rows(self, tokens: int, head: nn.Linear) -> bool:
        """Whether the head's gradient, if it has one, would have to be summed over several chunks of tokens: then it comes in rows instead.

        Not when blocks are clipped by their own norms: the head's is known only once all rows are there.
        """
        vocab_size, width = head.weight.shape
        chunk = self.model.loss_options.chunk_tokens or auto_chunk_tokens(vocab_size, width, head.weight.element_size())
        return head.weight.requires_grad and tokens > chunk and self.updates.clipping.mode == "previous"

    def _differentiate_by_rows(
        self, norm: nn.Module, head: nn.Linear, hidden: torch.Tensor, targets_BT: torch.Tensor, denominator: float
    ) -> tuple[float, FirstUpdate | None]:
        """As `differentiate`, with a block of rows of the head updated before the gradient of the next one exists."""
        device = self.updates.device
        with self.autocast():
            normed = norm(hidden)
        options, dtype = head_loss_options(self.model), self.dtype or normed.dtype
        fit = partial(fits, device=device)
        work = CrossEntropyByRows(normed, head.weight, head.bias, targets_BT, options, dtype, self.block_tokens, fit)
        value = work.loss.item() / denominator
        if not math.isfinite(value):
            return value, None
        work.allocate()
        trained = [parameter for parameter in norm.parameters() if parameter.requires_grad]

        def first_update() -> tuple[torch.Tensor | None, Tied]:
            if not self._update_rows(work, head, denominator):
                return None, {}
            scale = self.updates.scale.get_scale() / denominator

            def norm_gradients() -> tuple[torch.Tensor, Pairs]:
                grad_normed = (work.grad_hidden * scale).to(normed.dtype).view_as(normed)
                # the graph is kept, because this may be done twice
                grad, gradients = _gradients(normed, hidden, trained, grad_normed, retain_graph=True)
                pairs = list(zip(trained, gradients, strict=True))
                return grad, pairs if work.grad_bias is None else [*pairs, (head.bias, work.grad_bias * scale)]

            grad, pairs = once_more(norm_gradients, device)
            return grad if self.updates.apply(pairs) else None, {}

        return value, first_update

    def _update_rows(self, work: CrossEntropyByRows, head: nn.Linear, denominator: float) -> bool:
        """False, and no more updates, from the first rows on whose gradient is not finite."""
        before = work.block_tokens
        self.updates.begin_rows(head.weight)
        for first, grad_rows, _ in work.gradients():
            if not self.updates.apply_rows(head.weight, first, grad_rows, 1 / denominator):
                return False
        if work.block_tokens != before:
            self.block_tokens = work.block_tokens
            self.tell(f"memory ran out in the head; its gradient goes on with {work.block_tokens} tokens at once")
        return True


def _gradients(
    output: torch.Tensor,
    hidden: torch.Tensor,
    parameters: list[nn.Parameter],
    grad_output: torch.Tensor | None = None,
    retain_graph: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of `hidden`, or itself where it requires none, and of parameters."""
    wanted: list[torch.Tensor] = [*([hidden] if hidden.requires_grad else []), *parameters]
    found = gradients_of(output, wanted, grad_output, retain_graph=retain_graph) if wanted else []
    return found.pop(0) if hidden.requires_grad else hidden, found
