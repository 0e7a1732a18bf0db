"""i3: a recurrent-hybrid model with low-rank attention; a reconstruction of i3-12m, whose code was never published.

At vocabulary 4,466, width 512, 12 layers, sequence 256 it has the published 12,691,186 parameters; 24 layers give the
22,640,626 of i3-22m. The order hybrid cell, attention, feed-forward is the natural reading of the model card.

Shapes: B batch, T time, C width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import nn

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.models.base import (
    LanguageModel,
    Place,
    attention_flops,
    head_loss_options,
    matrix_parameters,
    parameters_by_component,
    stays,
    store_as,
)
from lowmem.nn.attention import LayerCache, LowRankAttention, ModelCache
from lowmem.nn.layers import GELUMLP, Embedding, LayerNorm, make_head
from lowmem.nn.lorpt import LinearFactory
from lowmem.nn.loss import SoftTargets
from lowmem.nn.positions import LearnedPositions
from lowmem.nn.quantized import WeightFormat
from lowmem.nn.recompute import cheap, run_block
from lowmem.nn.recurrent import HybridCell, HybridState
from lowmem.system.dry_run import is_fake
from lowmem.system.errors import ConfigError

INIT_STD = 0.02
DEFAULT_RANK = 64
# what i3 has; a field may also stay at its default, which says nothing about i3
FIXED: dict[str, object] = {
    "num_heads": 1,
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "tie_embeddings": False,
    "rope_theta": None,
    "norm_eps": None,
    "num_kv_heads": None,
    "bias": True,
}
FIXED_TARGETS: list[Literal["attention", "mlp", "head"]] = ["mlp", "head"]


def resolve_i3(config: ModelConfig) -> ModelConfig:
    """The configuration with i3's own choices filled in.

    Raises:
        ConfigError: a field asks for something i3 does not have; the message lists all of them.
    """
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    problems = []
    for name, own in FIXED.items():
        value = getattr(config, name)
        if value not in (own, defaults[name]):
            has = "has none" if own is None else f"has {own}"
            problems.append(f"model.{name} is {value}, i3 {has}; remove it or use model.name=decoder")
    if config.lorpt.targets not in (FIXED_TARGETS, FIXED_TARGETS[::-1], LorptConfig().targets):
        problems.append(f"model.lorpt.targets is {config.lorpt.targets}, i3 has {FIXED_TARGETS}; remove it or use model.name=decoder")
    if problems:
        raise ConfigError("\n".join(problems))
    return replace(
        config,
        attention_rank=config.attention_rank or DEFAULT_RANK,
        hidden_dim=config.hidden_dim or 4 * config.dim,
        lorpt=replace(
            config.lorpt,
            rank=config.lorpt.rank or DEFAULT_RANK,
            targets=list(FIXED_TARGETS),
            bottleneck="linear" if config.lorpt.bottleneck == "auto" else config.lorpt.bottleneck,
        ),
        num_heads=1,
        positions="learned",
        norm="layernorm",
        activation="gelu",
    )


@dataclass
class I3LayerCache:
    """Recurrent state and latents of keys and values of one block."""

    hybrid: HybridState
    attention: LayerCache

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64: tokens that each sequence holds."""
        return self.attention.lengths

    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.hybrid.nbytes() + self.attention.nbytes()

    def rows(self, start: int, stop: int) -> "I3LayerCache":
        """Some of the sequences, sharing memory with this cache."""
        return I3LayerCache(self.hybrid.rows(start, stop), self.attention.rows(start, stop))

    def keep(self, rows: Sequence[int]) -> None:
        """Move the sequences `rows`, ascending, to the front, in place."""
        self.hybrid.keep(rows)
        self.attention.keep(rows)

    def reset(self) -> None:
        """Forget every sequence."""
        self.hybrid.reset()
        self.attention.reset()


class I3Block(nn.Module):
    """Hybrid cell, low-rank attention and low-rank feed-forward layer, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, factory: LinearFactory, name: str):
        super().__init__()
        out_std = INIT_STD / (2 * config.num_layers) ** 0.5
        rank = config.attention_rank
        self.hybrid_norm = LayerNorm(config.dim)
        self.hybrid = HybridCell(config.dim, config.state_dim)
        self.attention_norm = LayerNorm(config.dim)
        self.attention = LowRankAttention(
            config.dim, 1, factory, f"{name}.attention", rank=rank, factor_std=INIT_STD**0.5 * rank**-0.25, out_std=out_std, bias=True
        )
        self.mlp_norm = LayerNorm(config.dim)
        self.mlp = GELUMLP(config.dim, config.hidden_dim, factory, f"{name}.mlp", out_std=out_std, bias=True)

    def forward(self, hidden_BTC: torch.Tensor, cache: I3LayerCache | None = None, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); with a cache, the tokens continue what it holds. Segments are one a row: padding comes after."""
        normed = cheap(self.hybrid_norm, hidden_BTC)
        hidden_BTC = hidden_BTC + (self.hybrid(normed) if cache is None else self.hybrid.step(normed, cache.hybrid))
        latents = None if cache is None else cache.attention
        hidden_BTC = hidden_BTC + self.attention(cheap(self.attention_norm, hidden_BTC), latents)
        return hidden_BTC + self.mlp(cheap(self.mlp_norm, hidden_BTC))


class I3(LanguageModel):
    """Embedding with learned positions, blocks, norm, LoRPt head.

    Args:
        config: fields that i3 does not have must stay at their defaults.
        vocab_size: V.
        max_seq_len: longest sequence; the learned positions end there.
        dtype: what is stored.
        place: is given each block as soon as it is there, and says where it lives.
    Raises:
        ConfigError: a field asks for something i3 does not have, a rank saves nothing, or a LoRPt pattern matches no layer.
    Memory: its weights in `dtype`; each block is cast as soon as it is there.
    """

    blocks: nn.ModuleList
    keeps_segments_apart = False

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        max_seq_len: int,
        dtype: torch.dtype | WeightFormat = torch.float32,
        place: Place = stays,
    ):
        super().__init__()
        config = resolve_i3(config)
        self.config, self.vocab_size, self.max_seq_len = config, vocab_size, max_seq_len
        factory = LinearFactory(config.lorpt)
        self.embedding = Embedding(vocab_size, config.dim, _weight=torch.empty(vocab_size, config.dim))
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        store_as(self.embedding, dtype)
        self.positions = store_as(LearnedPositions(max_seq_len, config.dim), dtype)
        names = [f"blocks.{index}" for index in range(config.num_layers)]
        self.blocks = nn.ModuleList(place(store_as(I3Block(config, factory, name), dtype), index) for index, name in enumerate(names))
        self.norm = store_as(LayerNorm(config.dim), dtype)
        self.head = store_as(make_head(config.dim, vocab_size, True, factory), dtype)
        factory.check_patterns()

    def embed(self, tokens_BT: torch.Tensor, start: int | tuple[int, ...] = 0, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) -> (B, T, C), for positions from `start` on.

        Args:
            segments_BT: one segment a row, and padding.
        Raises:
            ConfigError: the positions end before the last token.
            ValueError: several segments in a row, which the recurrent state would mix.
        """
        if segments_BT is not None and not is_fake(segments_BT) and int(segments_BT.max()) > 1:
            raise ValueError("i3 takes one segment a row; its recurrent state would carry one over into the next")
        return self.positions(self.embedding(tokens_BT), start)

    def lookup_parameter(self) -> nn.Parameter | None:
        """The embedding's matrix."""
        return self.embedding.weight  # type: ignore[return-value]

    def head_loss(
        self,
        hidden_BTC: torch.Tensor,
        targets_BT: torch.Tensor,
        denominator: float | torch.Tensor = 1.0,
        soft_targets: SoftTargets | None = None,
    ) -> torch.Tensor:
        """Loss from the last block's output; see `forward`."""
        return self.head(cheap(self.norm, hidden_BTC), targets_BT, denominator, head_loss_options(self, soft_targets))

    def logits(self, hidden_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, V)."""
        return self.head(self.norm(hidden_BTC))

    def forward(self, tokens_BT, targets_BT=None, denominator=1.0, cache=None, segments_BT=None, soft_targets=None):  # type: ignore[no-untyped-def, override]
        """See `LanguageModel.forward`."""
        hidden = self.embed(tokens_BT, 0 if cache is None else cache.start, segments_BT)
        mode = self.activation_checkpointing if self.training else "none"
        for index, block in enumerate(self.blocks):
            hidden = run_block(self.block(index, segments_BT), hidden, mode) if cache is None else block(hidden, cache.layers[index])
        return self.logits(hidden) if targets_BT is None else self.head_loss(hidden, targets_BT, denominator, soft_targets)

    def new_cache(self, batch_size: int, max_len: int) -> ModelCache[I3LayerCache]:
        """State for decoding up to `max_len` tokens.

        Memory: layers * batch_size * max_len * 2 * attention_rank elements of the weights' dtype, and dim + state_dim
        fp32 numbers per layer and sequence.
        """
        weight = self.embedding.weight
        return ModelCache(
            [
                I3LayerCache(
                    block.hybrid.new_state(batch_size),
                    LayerCache(batch_size, max_len, block.attention.cache_widths, weight.dtype, weight.device),
                )
                for block in cast("list[I3Block]", self.blocks)
            ]
        )

    def flops_per_token(self, seq_len: int) -> int:
        """6 per weight of every matrix product, attention over (seq_len + 1) / 2 keys, and 18 per channel for the decaying average."""
        matrices = matrix_parameters(self, exclude=("embedding", "positions"))
        return 6 * matrices + self.config.num_layers * (attention_flops(self.config.dim, seq_len) + 18 * self.config.dim)

    def component_parameters(self) -> dict[str, int]:
        """Parameters of embedding, positions, hybrid, attention, mlp, norm and head."""
        return parameters_by_component(self)
