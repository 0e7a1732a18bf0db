"""The shape of a model in the configuration: a part of `lowmem.config`, which has the rest. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class LorptConfig:
    """Low-rank pretraining: which linear layers are stored as two thin factors (D1)."""

    rank: int | Literal["auto"] = 0
    """Rank of the factored layers; 0 keeps every layer dense. Must save parameters: below in*out/(in+out). auto: half of each dense
    layer's weights, which is a quarter of the width of a square one."""
    targets: list[Literal["attention", "mlp", "head"]] = field(default_factory=lambda: ["attention", "mlp"])
    """Which groups of linear layers are factored: attention (q, k, v, out), mlp, head (untied only)."""
    ranks: dict[str, int | Literal["auto"]] = field(default_factory=dict)
    """Rank by module-name pattern, such as {"blocks.0.*": 0, "*.down": 128}; first match wins over `rank`; 0 is dense."""
    bottleneck: Literal["auto", "linear", "silu"] = "auto"
    """Non-linearity between the two factors. silu learns far better, but cannot be merged into one matrix; linear can. auto: silu; for i3
    linear, as published."""
    init: Literal["original", "product_variance", "spectral"] = "product_variance"
    """original: 0.02 * randn for both factors, as published. product_variance: the product has the variance of a dense layer. spectral:
    the largest singular values of a random dense layer."""
    schedule: dict[int, int] = field(default_factory=dict)
    """Rank from a step on, such as {1000: 64, 2000: 128}. Growing leaves the function as it is, shrinking keeps its largest parts;
    optimizer states follow. Layers named in `ranks` keep theirs. May be changed when a run is resumed."""
    grow_to: int = 0
    """Double the rank, up to this, whenever `grow_patience` evaluations in a row were not 0.1 % better than the best before; 0 is never."""
    grow_patience: int = 3
    """Evaluations; see `grow_to`."""
    share_down: bool = False
    """Let gate and up share one downward factor, and q, k and v another: one latent for all that read the same input. Their rank is then
    that of the one layer they form."""

    def largest_rank(self) -> int:
        """The highest rank that the schedule or plateaus may reach; 0 without either."""
        return max([0, *self.schedule.values(), self.grow_to])


@dataclass
class ModelConfig:
    """The shape of the model. Defaults are a Llama-like decoder."""

    name: Literal["decoder", "i3"] = "decoder"
    """decoder: a transformer. i3: the recurrent-hybrid model with low-rank attention (a reconstruction of i3-12m)."""
    dim: int = 256
    """Width of the residual stream."""
    hidden_dim: int = 0
    """Width inside the MLP; 0 picks 8/3 * dim rounded up to a multiple of 64 for swiglu, 4 * dim for gelu."""
    num_layers: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads; must divide dim. i3 uses one."""
    num_kv_heads: int = 0
    """Heads of keys and values, each of which serves as many query heads as the others (grouped-query attention): fewer keep a smaller
    cache. Must divide num_heads; 0 takes num_heads."""
    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's size. Larger than the tokenizer's is allowed, smaller is not."""
    max_seq_len: int = 0
    """Longest sequence the model accepts; 0 takes data.seq_len. Only learned positions cost memory with it."""
    positions: Literal["rope", "alibi", "learned"] = "rope"
    """How order is told: rotary, a linear bias on attention scores, or a learned table."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before each sub-layer."""
    norm_eps: float = 0.0
    """Added to the variance; 0 takes 1e-6 for rmsnorm and 1e-5 for layernorm."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """swiglu has three matrices in the MLP, gelu two; gelu_tanh is gelu by tanh, as in GPT-2."""
    bias: bool = False
    """Biases in the linear layers of the blocks, as in GPT-2; i3 always has them."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    attention_rank: int = 0
    """Low-rank KQV: rank of the query, key and value maps, and width of what the KV cache keeps; 0 is full rank. Must be below dim / 2."""
    state_dim: int = 32
    """Width of the recurrent state of i3's hybrid cell."""
    lorpt: LorptConfig = field(default_factory=LorptConfig)
    """Low-rank pretraining of the linear layers."""
