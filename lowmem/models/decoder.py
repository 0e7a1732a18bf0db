"""A decoder-only transformer with a choice of positions, norm, activation and low-rank weights (D2).

Shapes: B batch, T time, C width, V vocabulary.
"""

from typing import cast

import torch
from torch import nn

from lowmem.config.schema import ModelConfig
from lowmem.models.base import (
    LanguageModel,
    MatrixHead,
    Place,
    attention_flops,
    head_loss_options,
    matrix_parameters,
    parameters_by_component,
    stays,
    store_as,
)
from lowmem.nn.attention import Attention, LayerCache, LowRankAttention, ModelCache
from lowmem.nn.layers import DenseHead, Embedding, TiedHead, default_hidden_dim, make_head, make_mlp, make_norm
from lowmem.nn.lorpt import LinearFactory
from lowmem.nn.loss import SoftTargets
from lowmem.nn.positions import LearnedPositions, RotaryTable, alibi_slopes
from lowmem.nn.quantized import WeightFormat
from lowmem.nn.recompute import cheap, run_block
from lowmem.system.errors import ConfigError

INIT_STD = 0.02


def check_decoder(config: ModelConfig) -> None:
    """Refuse settings that the decoder so described would not use.

    Raises:
        ConfigError: all of them.
    """
    problems = []
    if config.state_dim != ModelConfig.state_dim:
        problems.append(f"model.state_dim is {config.state_dim}, but only i3 has a recurrent state; remove it or use model.name=i3")
    if config.positions != "rope" and config.rope_theta != ModelConfig.rope_theta:
        problems.append(f"model.rope_theta is {config.rope_theta}, but model.positions is {config.positions}; remove it or use rope")
    if config.attention_rank and config.num_kv_heads not in (0, config.num_heads):
        problems.append(
            f"model.num_kv_heads is {config.num_kv_heads}, but model.attention_rank is {config.attention_rank}: low-rank attention has "
            "num_heads of each; drop one of the two"
        )
    if config.tie_embeddings and config.lorpt.rank and "head" in config.lorpt.targets:
        problems.append("model.lorpt.targets has head, but model.tie_embeddings is true: a tied head has no factors; drop one of the two")
    if problems:
        raise ConfigError("\n".join(problems))


class DecoderBlock(nn.Module):
    """Pre-norm attention and feed-forward layer, each added to the residual stream.

    Memory: see `lowmem.nn.recompute`.
    """

    def __init__(self, config: ModelConfig, factory: LinearFactory, name: str, rotary: RotaryTable | None):
        super().__init__()
        out_std = INIT_STD / (2 * config.num_layers) ** 0.5
        slopes = alibi_slopes(config.num_heads) if config.positions == "alibi" else ()
        self.attention_norm = make_norm(config.norm, config.dim, config.norm_eps)
        attention = (config.dim, config.num_heads, factory, f"{name}.attention")
        if config.attention_rank:
            # two factors of this std multiply to a map of std INIT_STD
            factor_std = INIT_STD**0.5 * config.attention_rank**-0.25
            self.attention: Attention = LowRankAttention(
                *attention,
                rank=config.attention_rank,
                factor_std=factor_std,
                rotary=rotary,
                slopes=slopes,
                out_std=out_std,
                bias=config.bias,
            )
        else:
            self.attention = Attention(
                *attention, rotary=rotary, slopes=slopes, out_std=out_std, bias=config.bias, num_kv_heads=config.num_kv_heads
            )
        self.mlp_norm = make_norm(config.norm, config.dim, config.norm_eps)
        hidden_dim = config.hidden_dim or default_hidden_dim(config.activation, config.dim)
        self.mlp = make_mlp(config.activation, config.dim, hidden_dim, factory, f"{name}.mlp", out_std=out_std, bias=config.bias)

    def forward(self, hidden_BTC: torch.Tensor, cache: LayerCache | None = None, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); with a cache, the tokens continue what it holds; segments are kept apart."""
        hidden_BTC = hidden_BTC + self.attention(cheap(self.attention_norm, hidden_BTC), cache, segments_BT)
        return hidden_BTC + self.mlp(cheap(self.mlp_norm, hidden_BTC))


class Decoder(LanguageModel):
    """Embedding, blocks, norm, head.

    With rope, rmsnorm, swiglu and dense layers its weights are Llama's: `qkv` and `gate_up` are the separate matrices one
    below the other, and no layer has a bias. With learned positions, layernorm, gelu_tanh and biases they are GPT-2's.

    Args:
        config: the shape; `vocab_size` and `max_seq_len` are given apart because 0 there means "decided elsewhere".
        vocab_size: V.
        max_seq_len: longest sequence; only learned positions enforce it, rope and alibi go beyond.
        dtype: what is stored.
        place: is given each block as soon as it is there, and says where it lives.
    Raises:
        ConfigError: a rank saves nothing, a LoRPt pattern matches no layer, or a setting would be ignored.
    Memory: its weights in `dtype`; each block is cast as soon as it is there.
    """

    blocks: nn.ModuleList

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
        check_decoder(config)
        self.config, self.vocab_size, self.max_seq_len = config, vocab_size, max_seq_len
        factory = LinearFactory(config.lorpt)
        rotary = RotaryTable(config.dim // config.num_heads, config.rope_theta) if config.positions == "rope" else None
        self.embedding = Embedding(vocab_size, config.dim, _weight=torch.empty(vocab_size, config.dim))
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        store_as(self.embedding, dtype)
        self.positions = store_as(LearnedPositions(max_seq_len, config.dim), dtype) if config.positions == "learned" else None
        names = [f"blocks.{index}" for index in range(config.num_layers)]
        self.blocks = nn.ModuleList(
            place(store_as(DecoderBlock(config, factory, name, rotary), dtype), index) for index, name in enumerate(names)
        )
        self.norm = store_as(make_norm(config.norm, config.dim, config.norm_eps), dtype)
        head = TiedHead() if config.tie_embeddings else make_head(config.dim, vocab_size, False, factory)
        self.head = store_as(head, dtype)
        factory.check_patterns()

    def embed(self, tokens_BT: torch.Tensor, start: int | tuple[int, ...] = 0, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) -> (B, T, C), for positions from `start` on, or from 0 in each segment.

        Raises:
            ConfigError: learned positions end before the last token.
        """
        hidden_BTC = self.embedding(tokens_BT)
        return hidden_BTC if self.positions is None else self.positions(hidden_BTC, start, segments_BT)

    def head_loss(
        self,
        hidden_BTC: torch.Tensor,
        targets_BT: torch.Tensor,
        denominator: float | torch.Tensor = 1.0,
        soft_targets: SoftTargets | None = None,
    ) -> torch.Tensor:
        """Loss from the last block's output; see `forward`."""
        hidden_BTC = cheap(self.norm, hidden_BTC)
        return self.head(hidden_BTC, *self._head_weights(), targets_BT, denominator, head_loss_options(self, soft_targets))

    def logits(self, hidden_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, V)."""
        return self.head(self.norm(hidden_BTC), *self._head_weights())

    def head_is_tied(self) -> bool:
        """Whether the embedding is the head."""
        return self.config.tie_embeddings

    def dense_head(self) -> MatrixHead | None:
        """Norm and matrix, unless the head is LoRPt."""
        if self.config.tie_embeddings:
            return MatrixHead(self.norm, self.embedding.weight, None)  # type: ignore[arg-type]
        head = self.head
        return MatrixHead(self.norm, head.weight, head.bias) if isinstance(head, DenseHead) else None  # type: ignore[arg-type]

    def lookup_parameter(self) -> nn.Parameter | None:
        """The embedding's matrix."""
        return self.embedding.weight  # type: ignore[return-value]

    def _head_weights(self) -> tuple[torch.Tensor, ...]:
        return (self.embedding.weight,) if self.config.tie_embeddings else ()

    def forward(self, tokens_BT, targets_BT=None, denominator=1.0, cache=None, segments_BT=None, soft_targets=None):  # type: ignore[no-untyped-def, override]
        """See `LanguageModel.forward`."""
        hidden = self.embed(tokens_BT, 0 if cache is None else cache.start, segments_BT)
        mode = self.activation_checkpointing if self.training else "none"
        for index, block in enumerate(self.blocks):
            hidden = run_block(self.block(index, segments_BT), hidden, mode) if cache is None else block(hidden, cache.layers[index])
        return self.logits(hidden) if targets_BT is None else self.head_loss(hidden, targets_BT, denominator, soft_targets)

    def new_cache(self, batch_size: int, max_len: int) -> ModelCache[LayerCache]:
        """State for decoding up to `max_len` tokens.

        Memory: layers * batch_size * max_len * 2 * dim * num_kv_heads / num_heads (or 2 * attention_rank) elements of the weights' dtype.
        """
        weight = self.embedding.weight
        blocks = cast("list[DecoderBlock]", self.blocks)
        layers = [LayerCache(batch_size, max_len, block.attention.cache_widths, weight.dtype, weight.device) for block in blocks]
        return ModelCache(layers)

    def flops_per_token(self, seq_len: int) -> int:
        """6 per weight of every matrix product, and attention over the (seq_len + 1) / 2 keys a token sees on average."""
        tied = self.embedding.weight.numel() if self.config.tie_embeddings else 0
        matrices = matrix_parameters(self, exclude=("embedding", "positions")) + tied
        return 6 * matrices + self.config.num_layers * attention_flops(self.config.dim, seq_len)

    def component_parameters(self) -> dict[str, int]:
        """Parameters of embedding, positions, attention, mlp, norm and head; components without any are left out."""
        return parameters_by_component(self)
