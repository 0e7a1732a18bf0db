"""The shape of a lowmem model for transformers; goes with modeling_lowmem.py."""
# mypy: ignore-errors

from transformers import PretrainedConfig


class LowmemConfig(PretrainedConfig):
    """The shape of a lowmem model.

    Attributes:
        architecture: decoder or i3.
        layers: every linear layer by name: {"in": I, "out": O, "bias": bool, "rank": R or 0, "silu": bool}.
    """

    model_type = "lowmem"

    def __init__(
        self,
        architecture="decoder",
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=None,
        max_position_embeddings=256,
        positions="rope",
        rope_theta=10000.0,
        norm="rmsnorm",
        norm_eps=1e-6,
        activation="swiglu",
        attention_rank=0,
        state_dim=32,
        layers=None,
        tie_word_embeddings=False,
        use_cache=True,
        **kwargs,
    ):
        self.architecture, self.vocab_size, self.hidden_size = architecture, vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings, self.positions, self.rope_theta = max_position_embeddings, positions, rope_theta
        self.norm, self.norm_eps, self.activation = norm, norm_eps, activation
        self.attention_rank, self.state_dim, self.layers = attention_rank, state_dim, layers or {}
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
