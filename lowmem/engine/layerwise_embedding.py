"""The embedding in a layerwise step: its gradient is never as large as its matrix, which is updated in blocks of rows.

Shapes: B sequences, T time, C width of the matrix, V rows, n different tokens of a batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from lowmem.engine.layerwise_head import Pairs, Tied, Updates
from lowmem.engine.recovery import once_more
from lowmem.models.base import LanguageModel, padding_rows, stand_in
from lowmem.nn.gradients import gradients_of
from lowmem.nn.layers import embedding_gradient
from lowmem.nn.linear import accumulate_dtype
from lowmem.nn.loss import row_blocks
from lowmem.nn.rows import GradientRows
from lowmem.system.dry_run import is_fake, note, representative


class LayerwiseEmbedding:
    """Gradient and update of everything below the first block.

    Args:
        updates: what becomes of gradients.
        parameters: those that are trained.
        lookup: the one among them whose gradient goes by rows; None where there is no such matrix.
        autocast: computes in the precision of the run.
    Memory: n * C numbers in fp32, and a block of rows. Without `lookup` the gradient of the whole matrix.
    """

    def __init__(
        self,
        model: LanguageModel,
        updates: Updates,
        parameters: list[nn.Parameter],
        lookup: nn.Parameter | None,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.model, self.updates, self.parameters, self.lookup, self.autocast = model, updates, parameters, lookup, autocast
        self.others = [parameter for parameter in parameters if parameter is not lookup]

    def embed(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None) -> torch.Tensor:
        """What the model's `embed` returns, wherever its matrix lives.

        Memory: where that is elsewhere, a row for each token.
        """
        if self.lookup is None or not self.updates.storage.has_matrix(self.lookup):
            return self.model.embed(tokens_BT, segments_BT=segments_BT)
        rows = self.updates.rows_of(self.lookup).gather(tokens_BT.flatten())
        with stand_in(self.model, self.lookup, rows):
            return self.model.embed(_own_rows(tokens_BT), segments_BT=segments_BT)

    def update(
        self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, grad: torch.Tensor, tied: Tied, slices: list[slice]
    ) -> None:
        """Update what is trained, nothing of it if a gradient is not finite.

        Args:
            grad: (B, T, width of the first block), of what `embed` returned; may be overwritten.
            tied: the head's share.
            slices: the sequences that are embedded at once.
        """
        if self.lookup is None:
            self.updates.apply(once_more(partial(self._whole, tokens_BT, segments_BT, grad, tied), self.updates.device))
            return
        of_lookups, others = self._of_lookups(tokens_BT, segments_BT, grad, slices)
        padding = padding_rows(self.model, self.lookup)
        ids, sums = once_more(partial(_row_sums, tokens_BT, of_lookups, self.lookup.shape[0], padding), self.updates.device)
        note(sums, "gradients")
        if self.updates.is_finite(sums) and (not others or self.updates.apply(others)):
            self._update_rows(ids, sums, tied.get(self.lookup))

    def _whole(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, grad: torch.Tensor, tied: Tied) -> Pairs:
        with self.autocast():
            hidden = self.model.embed(tokens_BT, segments_BT=segments_BT)
        found = gradients_of(hidden, self.parameters, grad)
        pairs = [(parameter, gradient.contiguous()) for parameter, gradient in zip(self.parameters, found, strict=True)]
        for parameter, gradient in pairs:
            if parameter in tied:
                gradient += tied[parameter].read(slice(0, len(parameter)))
        return pairs

    def _of_lookups(
        self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None, grad: torch.Tensor, slices: list[slice]
    ) -> tuple[torch.Tensor, Pairs]:
        """(B, T, C) gradients of the row that each token looked up, in place of `grad` where they fit there; and those of `others`."""
        assert self.lookup is not None
        matrix, width = self.updates.rows_of(self.lookup), self.lookup.shape[1]
        fitting = grad.shape[-1] == width and grad.dtype == self.lookup.dtype and grad.is_contiguous()
        of_lookups = grad if fitting else once_more(partial(_empty, grad, width, self.lookup.dtype), self.updates.device)
        sums: list[torch.Tensor] = []

        def differentiate(rows: slice) -> None:
            """Nothing is changed before all of it is there."""
            tokens = tokens_BT[rows]
            ids = _own_rows(tokens)
            with stand_in(self.model, self.lookup, matrix.gather(tokens.flatten())) as looked_up, self.autocast():  # type: ignore[arg-type]
                hidden = self.model.embed(ids, segments_BT=None if segments_BT is None else segments_BT[rows])
                found, *more = gradients_of(hidden, [looked_up, *self.others], grad[rows])
            more = [gradient.to(accumulate_dtype(gradient.dtype)).contiguous() for gradient in more] if not sums else more
            of_lookups[rows] = found.view(*tokens.shape, width)
            if not sums:
                sums.extend(more)
                return
            for total, gradient in zip(sums, more, strict=True):
                total += gradient

        for rows in representative(slices, tokens_BT, distinct=2):
            once_more(partial(differentiate, rows), self.updates.device)
        return of_lookups, list(zip(self.others, sums, strict=True))

    def _update_rows(self, ids: torch.Tensor, sums: torch.Tensor, tied: GradientRows | None) -> None:
        """Update all rows, those without a token as with a gradient of zero.

        Args:
            ids: (n,) tokens, ascending.
            sums: (n, C) their gradients.
            tied: those of all rows from the head.
        """
        assert self.lookup is not None
        matrix, device = self.updates.rows_of(self.lookup), self.updates.device
        blocks = row_blocks(matrix.shape[0])
        bounds = once_more(partial(_bounds, ids, blocks), device)
        grad_RC = once_more(partial(sums.new_empty, (blocks[0].stop, matrix.shape[1])), device)

        def fill(grad: torch.Tensor, rows: slice, here: slice) -> None:
            grad.zero_() if tied is None else grad.copy_(tied.read(rows))
            grad.index_add_(0, ids[here] - rows.start, sums[here])

        self.updates.begin_rows(matrix)
        for index, rows in representative(list(enumerate(blocks)), sums, distinct=matrix.distinct(blocks)):
            grad = grad_RC[: rows.stop - rows.start]
            once_more(partial(fill, grad, rows, slice(bounds[index], bounds[index + 1])), device)
            if not self.updates.apply_rows(matrix, rows.start, grad, 1 / self.updates.scale.get_scale()):
                return


def _own_rows(tokens: torch.Tensor) -> torch.Tensor:
    """In place of token ids: each token has a row of its own."""
    return torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)


def _empty(like: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    return like.new_empty(*like.shape[:-1], width, dtype=dtype)


def _row_sums(tokens_BT: torch.Tensor, of_lookups: torch.Tensor, rows: int, padding: set[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) the different tokens, ascending, and the (n, C) sum of the gradients of each in fp32, zero where it is `padding`.

    A dry run, which has no tokens to look at, has as many different ones as there can be.
    """
    if is_fake(tokens_BT):
        ids, inverse = tokens_BT.new_empty(min(tokens_BT.numel(), rows)), torch.empty_like(tokens_BT)
    else:
        ids, inverse = tokens_BT.unique(return_inverse=True)
    sums = embedding_gradient(inverse, of_lookups, len(ids), dtype=accumulate_dtype(of_lookups.dtype))
    for row in padding:
        sums.masked_fill_((ids == row).unsqueeze(1), 0)
    return ids, sums


def _bounds(ids: torch.Tensor, blocks: list[slice]) -> list[int]:
    """Where in `ids` each block of rows begins, and the end; in a dry run the first has all that it can have."""
    if is_fake(ids):
        return [0, *(min(len(ids), block.stop) for block in blocks)]
    starts = torch.tensor([*(block.start for block in blocks), blocks[-1].stop], device=ids.device)
    return [int(bound) for bound in torch.searchsorted(ids, starts).tolist()]
