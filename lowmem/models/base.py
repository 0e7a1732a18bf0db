"""What every model of lowmem offers to engines, generation and reports."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lowmem.nn.distill import SoftTargets
from lowmem.nn.head import LoRPtHead
from lowmem.nn.kv_cache import ModelCache

Checkpointing = Literal["none", "block", "selective", "low_rank"]


@dataclass(frozen=True)
class LossOptions:
    """How a model computes its training loss.

    Attributes:
        chunk_tokens: tokens whose logits are alive at once; 0 picks about 16 MiB of logits, but no fewer
            than dim / 2 tokens.
        label_smoothing: share of the probability spread over the vocabulary; training mode only.
        z_loss: weight of log(Z)^2; training mode only.
        soft_targets: a teacher's predictions for the tokens of the coming forward pass; training mode only.
    """

    chunk_tokens: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_targets: SoftTargets | None = None


class LanguageModel(nn.Module, ABC):
    """Embedding, a list of blocks, a final norm and a head.

    The parts are separate so that an engine may drive them one by one:
    `hidden = embed(tokens)`, then each of `blocks`, then `head_loss(hidden, targets, denominator)`.

    Attributes:
        keeps_segments_apart: whether a row may hold several segments.
    """

    keeps_segments_apart: bool = True

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    vocab_size: int
    max_seq_len: int
    loss_options: LossOptions = LossOptions()
    activation_checkpointing: Checkpointing = "none"

    @abstractmethod
    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        denominator: float | torch.Tensor = 1.0,
        cache: Any = None,
        segments_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss if `targets_BT` is given, else logits.

        Args:
            tokens_BT: (batch, time) int64.
            targets_BT: (batch, time) int64, IGNORE_INDEX where nothing is predicted. The loss is the sum over predicted
                tokens divided by `denominator`: micro-batches of one global batch share its denominator.
            cache: from `new_cache`; tokens_BT continue what it holds, and it is extended in place.
            segments_BT: int32; tokens of one number see none of another, and positions begin anew. Not together with a cache.
        Returns:
            fp32 scalar loss, or (batch, time, vocab) logits.
        """

    @abstractmethod
    def embed(self, tokens_BT: torch.Tensor, start: int | tuple[int, ...] = 0, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, time) -> (batch, time, width), for positions from `start` on (one for all sequences, or one for each), or from 0 in
        each segment."""

    def block(self, index: int, segments_BT: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """Block number `index` as a function of its input alone."""
        block = self.blocks[index]
        return block if segments_BT is None else partial(block, segments_BT=segments_BT)

    @abstractmethod
    def head_loss(self, hidden_BTC: torch.Tensor, targets_BT: torch.Tensor, denominator: float | torch.Tensor = 1.0) -> torch.Tensor:
        """Loss from the last block's output; see `forward`."""

    @abstractmethod
    def new_cache(self, batch_size: int, max_len: int) -> ModelCache[Any]:
        """State for decoding `batch_size` sequences of up to `max_len` tokens each; its memory is allocated here."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> int:
        """Floating point operations per token of forward plus backward, recomputation not counted."""

    @abstractmethod
    def component_parameters(self) -> dict[str, int]:
        """Parameters by component (embedding, attention, mlp, norm, head, ...); they sum to `num_parameters()`."""

    def embed_parameters(self) -> list[nn.Parameter]:
        """What `embed` uses: the embedding, and learned positions where there are any."""
        parts = [getattr(self, name, None) for name in ("embedding", "positions")]
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def head_is_tied(self) -> bool:
        """Whether `head_loss` uses the embedding, too."""
        return False

    def dense_head(self) -> tuple[nn.Module, nn.Linear] | None:
        """The final norm and the head, where `head_loss` is one plain matrix of its own after that norm."""
        return None

    def head_product(self, hidden_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, weight and bias of which the logits of the last block's output are the product: x @ weight.T + bias."""
        normed = self.norm(hidden_BTC)
        if self.head_is_tied():
            return normed, self.embedding.weight, None  # type: ignore[return-value, union-attr]
        if isinstance(self.head, LoRPtHead):
            return self.head.latent(normed), self.head.up, self.head.bias
        return normed, self.head.weight, self.head.bias  # type: ignore[return-value, union-attr]

    def num_parameters(self) -> int:
        """Trainable numbers, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def component_bytes(self) -> dict[str, int]:
        """Bytes of the weights by component, as they are stored now."""
        from lowmem.models.counting import bytes_by_component  # which needs this module

        return bytes_by_component(self)
