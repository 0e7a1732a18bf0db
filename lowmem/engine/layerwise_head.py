"""The head of a layerwise step: its loss first, its updates later; where its gradient would be a sum over chunks, in blocks of rows."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowmem.engine.recovery import fits, once_more
from lowmem.models.counting import head_loss_options
from lowmem.nn.loss import auto_chunk_tokens
from lowmem.nn.loss_by_rows import CrossEntropyByRows

if TYPE_CHECKING:
    from lowmem.engine.layerwise import LayerwiseEngine

Pairs = list[tuple[nn.Parameter, torch.Tensor]]
Tied = dict[nn.Parameter, torch.Tensor]
FirstUpdate = Callable[[], tuple[torch.Tensor | None, Tied]]


class LayerwiseHead:
    """Loss, gradient and update of everything above the last block.

    Args:
        engine: whose model, optimizer, clipping and loss scale these are.
    Attributes:
        block_tokens: tokens whose gradient is added at once where the head goes by rows; 0 leaves it to `CrossEntropyByRows`.
    """

    def __init__(self, engine: "LayerwiseEngine"):
        self.engine, self.block_tokens = engine, 0
        model = engine.model
        self.in_embedding = {id(parameter) for parameter in model.embed_parameters()}
        inside = {id(parameter) for parameter in model.blocks.parameters()}
        outer = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
        self.parameters = [p for p in outer if id(p) not in self.in_embedding or model.head_is_tied()]

    def differentiate(self, hidden: torch.Tensor, targets_BT: torch.Tensor, denominator: float) -> tuple[float, FirstUpdate | None]:
        """Loss, and a function that updates the head; None if nothing may be updated. Nothing is changed before that function is called.

        The function returns the gradient of `hidden`, None if one of the head's was not finite, and the head's share of a tied embedding.

        Args:
            hidden: (B, T, C) of the last block, a leaf that requires a gradient.
        """
        engine = self.engine
        dense = engine.model.dense_head()
        if dense is not None and self._by_rows(targets_BT.numel(), dense[1]):
            return self._differentiate_by_rows(*dense, hidden, targets_BT, denominator)
        with engine.autocast():
            loss = engine.model.head_loss(hidden, targets_BT, denominator)
        value = loss.item()
        if not math.isfinite(value):
            return value, None
        grad, *gradients = torch.autograd.grad(engine.scaler.scale(loss), [hidden, *self.parameters])
        both = [(parameter, gradient.contiguous()) for parameter, gradient in zip(self.parameters, gradients, strict=True)]
        pairs = [pair for pair in both if id(pair[0]) not in self.in_embedding]
        tied = {parameter: gradient for parameter, gradient in both if id(parameter) in self.in_embedding}
        factor = engine.factor(pairs)
        return value, lambda: (grad if engine.update(pairs, factor) else None, tied)

    def _by_rows(self, tokens: int, head: nn.Linear) -> bool:
        """Whether the head's gradient would have to be summed over several chunks of tokens: then it comes in rows instead.

        Not when blocks are clipped by their own norms: the head's is known only once all rows are there.
        """
        vocab_size, width = head.weight.shape
        chunk = self.engine.model.loss_options.chunk_tokens or auto_chunk_tokens(vocab_size, width, head.weight.element_size())
        return tokens > chunk and self.engine.clipping.mode == "previous"

    def _differentiate_by_rows(
        self, norm: nn.Module, head: nn.Linear, hidden: torch.Tensor, targets_BT: torch.Tensor, denominator: float
    ) -> tuple[float, FirstUpdate | None]:
        """As `differentiate`, with a block of rows of the head updated before the gradient of the next one exists."""
        engine = self.engine
        with engine.autocast():
            normed = norm(hidden)
        options, dtype = head_loss_options(engine.model), engine.autocast_dtype or normed.dtype
        fit = partial(fits, device=engine.device)
        work = CrossEntropyByRows(normed, head.weight, head.bias, targets_BT, options, dtype, self.block_tokens, fit)
        value = work.loss.item() / denominator
        if not math.isfinite(value):
            return value, None
        work.allocate()

        def first_update() -> tuple[torch.Tensor | None, Tied]:
            if not self._update_rows(work, head, denominator):
                return None, {}
            scale = engine.scaler.get_scale() / denominator

            def norm_gradients() -> tuple[torch.Tensor, Pairs]:
                grad_normed = (work.grad_hidden * scale).to(normed.dtype).view_as(normed)
                # the graph is kept, because this may be done twice
                grad, *gradients = torch.autograd.grad(normed, [hidden, *norm.parameters()], grad_normed, retain_graph=True)
                pairs = list(zip(norm.parameters(), gradients, strict=True))
                return grad, pairs if work.grad_bias is None else [*pairs, (head.bias, work.grad_bias * scale)]

            grad, pairs = once_more(norm_gradients, engine.device)
            return grad if engine.apply(pairs) else None, {}

        return value, first_update

    def _update_rows(self, work: CrossEntropyByRows, head: nn.Linear, denominator: float) -> bool:
        """False, and no more updates, from the first rows on whose gradient is not finite."""
        engine, before = self.engine, work.block_tokens
        if not engine.rehearsing:
            engine.optimizer.begin(head.weight)
        for first, grad_rows, _ in work.gradients():
            factor = once_more(partial(engine.clipping.factor, [grad_rows], 1 / denominator), engine.device)
            if engine.rehearsing:
                continue
            if math.isnan(factor):
                return False
            engine.optimizer.update(head.weight, grad_rows.view(-1), start=first * head.weight.shape[1], grad_scale=factor)
        if work.block_tokens != before:
            self.block_tokens = work.block_tokens
            engine.messages.append(f"memory ran out in the head; its gradient goes on with {work.block_tokens} tokens at once")
        return True
