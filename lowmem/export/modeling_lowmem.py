"""A lowmem model for transformers: `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`.

This file and configuration_lowmem.py need torch and transformers alone and are copied into exported directories. Weights have the
names that lowmem gives them, except that the factors of a low-rank layer are the linear layers `down` and `up`.

Shapes: B batch, T time, K keys, C width, H heads, D head width, V vocabulary.
"""
# mypy: ignore-errors

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_lowmem import LowmemConfig


class LowmemCache(DynamicCache):
    """Keys and values, and what each hybrid cell of i3 remembers: by layer (h, s)."""

    def __init__(self):
        super().__init__()
        self.states = {}

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.states = {index: tuple(part.index_select(0, beam_idx) for part in state) for index, state in self.states.items()}


class LowRank(nn.Module):
    """up(act(down(x)))."""

    def __init__(self, layer):
        super().__init__()
        self.down = nn.Linear(layer["in"], layer["rank"], bias=False)
        self.up = nn.Linear(layer["rank"], layer["out"], bias=layer["bias"])
        self.silu = layer["silu"]

    def forward(self, x):
        latent = self.down(x)
        return self.up(F.silu(latent) if self.silu else latent)


class Parts(nn.Module):
    """Several layers of one input; their outputs one after the other."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


def make_linear(config, name):
    """The layer called `name`, or the layers below that name."""
    layer = config.layers.get(name)
    if layer is None:
        inner = [part for part in ("q", "k", "v", "gate", "up") if f"{name}.{part}" in config.layers]
        return Parts({part: make_linear(config, f"{name}.{part}") for part in inner})
    return LowRank(layer) if layer["rank"] else nn.Linear(layer["in"], layer["out"], bias=layer["bias"])


def make_norm(config):
    """The normalisation layer of the model."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def rotate(x_BHTD, positions_BT, theta):
    """Rotary positions in the halves layout."""
    width = x_BHTD.shape[-1]
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=x_BHTD.device) / width
    angles = (positions_BT.double().unsqueeze(-1) * theta**-exponents).float().unsqueeze(1)
    cos, sin = angles.cos().to(x_BHTD.dtype), angles.sin().to(x_BHTD.dtype)
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def alibi_slopes(heads):
    """2^(-8/n), 2^(-16/n), ..., those of the next power of two interleaved."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return (slopes + [2 ** (-4 * (i + 1) / whole) for i in range(0, 2 * whole, 2)])[:heads]


class LowmemAttention(nn.Module):
    """Causal attention; low-rank maps where `attention_rank` is set."""

    def __init__(self, config, index):
        super().__init__()
        self.config, self.index, name = config, index, f"blocks.{index}.attention"
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.low_rank = config.attention_rank > 0
        for part in ("latents", "q_up", "k_up", "v_up", "out") if self.low_rank else ("qkv", "out"):
            setattr(self, part, make_linear(config, f"{name}.{part}"))

    def forward(self, x, positions_BT, bias_BHTK, past):
        batch, time, width = x.shape
        if self.low_rank:
            latents = self.latents(x).chunk(3, dim=-1)
            parts = [up(latent) for up, latent in zip((self.q_up, self.k_up, self.v_up), latents)]  # noqa: B905
        else:
            shared = self.config.num_key_value_heads * self.head_dim
            parts = self.qkv(x).split((width, shared, shared), dim=-1)
        q, k, v = (part.view(batch, time, -1, self.head_dim).transpose(1, 2) for part in parts)
        if self.config.positions == "rope":
            q, k = (rotate(part, positions_BT, self.config.rope_theta) for part in (q, k))
        if past is not None:
            k, v = past.update(k, v, self.index)
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHTK.to(q.dtype))
        return self.out(out.transpose(1, 2).reshape(batch, time, width))


class LowmemMLP(nn.Module):
    """swiglu or gelu."""

    def __init__(self, config, index):
        super().__init__()
        self.activation, name = config.activation, f"blocks.{index}.mlp"
        for part in ("gate_up", "down") if config.activation == "swiglu" else ("up", "down"):
            setattr(self, part, make_linear(config, f"{name}.{part}"))

    def forward(self, x):
        if self.activation == "swiglu":
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.activation == "gelu_tanh" else "none"))


def stable_decay(w_mix):
    """w itself from -1 to 1, and 1 / w beyond."""
    beyond = w_mix.abs() > 1
    return torch.where(beyond, torch.where(beyond, w_mix, 1).reciprocal(), w_mix)


def contraction(transition):
    """A itself where no vector becomes longer by it, else A divided by its largest singular value."""
    if transition.is_meta or not 1 < torch.linalg.vector_norm(transition.detach()).item() < torch.inf:
        return transition
    return transition / torch.linalg.matrix_norm(transition, 2).clamp_min(1)


class HybridCell(nn.Module):
    """h_t = w h_{t-1} + (1 - w) x_t; s_t = A s_{t-1} + B x_t; y_t = C s_t + D h_t, step by step in fp32.

    w and A are what `stable_decay` and `contraction` make of the weights.
    """

    def __init__(self, config, index):
        super().__init__()
        self.index, dim, state = index, config.hidden_size, config.state_dim
        self.w_mix, self.skip = nn.Parameter(torch.full((dim,), 0.5)), nn.Parameter(torch.full((dim,), 0.1))
        self.transition = nn.Parameter(torch.zeros(state, state))
        self.w_in, self.w_out = nn.Parameter(torch.zeros(state, dim)), nn.Parameter(torch.zeros(dim, state))

    def forward(self, x, past):
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        w_mix, transition, w_in, w_out, skip = (
            weight.to(wide.dtype) for weight in (self.w_mix, self.transition, self.w_in, self.w_out, self.skip)
        )
        w_mix, transition = stable_decay(w_mix), contraction(transition)
        before = None if past is None else past.states.get(self.index)
        h, s = before or (torch.zeros_like(wide[:, 0]), wide.new_zeros(len(x), w_in.shape[0]))
        outputs = []
        driven, inputs = wide * (1 - w_mix), wide @ w_in.t()
        for step in range(x.shape[1]):
            h = w_mix * h + driven[:, step]
            s = s @ transition.t() + inputs[:, step]
            outputs.append(s @ w_out.t() + h * skip)
        if past is not None:
            past.states[self.index] = h, s
        return torch.stack(outputs, dim=1).to(x.dtype)


class LowmemBlock(nn.Module):
    """Hybrid cell (i3 only), attention and feed-forward layer, each normalised before and added to the residual stream."""

    def __init__(self, config, index):
        super().__init__()
        if config.architecture == "i3":
            self.hybrid_norm, self.hybrid = make_norm(config), HybridCell(config, index)
        self.attention_norm, self.attention = make_norm(config), LowmemAttention(config, index)
        self.mlp_norm, self.mlp = make_norm(config), LowmemMLP(config, index)

    def forward(self, hidden, positions_BT, bias_BHTK, present_BT1, past):
        if hasattr(self, "hybrid"):
            hidden = hidden + self.hybrid(self.hybrid_norm(hidden) * present_BT1, past)
        hidden = hidden + self.attention(self.attention_norm(hidden), positions_BT, bias_BHTK, past)
        return hidden + self.mlp(self.mlp_norm(hidden))


class LowmemForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, norm, head."""

    config_class = LowmemConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LowmemBlock"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(LowmemBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        if not config.tie_word_embeddings:
            self.head = make_linear(config, "head")
        self.gradient_checkpointing = False
        self._is_stateful = config.architecture == "i3"
        self.post_init()

    def _init_weights(self, module):
        """Weights come from the file."""

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def get_output_embeddings(self):
        head = getattr(self, "head", None)
        return head if isinstance(head, nn.Linear) else None

    def set_output_embeddings(self, value):
        self.head = value

    def _reorder_cache(self, past_key_values, beam_idx):
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def _cache(self, past):
        """The cache to go on with: i3 needs one that holds its states."""
        if self.config.architecture != "i3" or isinstance(past, LowmemCache):
            return DynamicCache() if past is None else past
        if past is not None and past.get_seq_length():
            raise ValueError("this cache has no recurrent states; give i3 the past_key_values that it returned, or use_cache=False")
        return LowmemCache()

    def _bias(self, present_BK, allowed_BHTK, time, like):
        """What is added to the scores: nothing, -slope * distance with ALiBi, -inf where a token may not look."""
        key = torch.arange(present_BK.shape[1], device=like.device)
        distance = key[-time:].unsqueeze(1) - key
        seen = (distance >= 0) & (present_BK.unsqueeze(1) | (distance == 0))
        seen = seen.unsqueeze(1) if allowed_BHTK is None else seen.unsqueeze(1) & allowed_BHTK
        bias = torch.zeros(seen.shape, dtype=torch.float32, device=like.device).masked_fill(~seen, float("-inf"))
        if self.config.positions == "alibi":
            slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=like.device).view(1, -1, 1, 1)
            bias = bias - slopes * distance
        return bias

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """See transformers.LlamaForCausalLM. A mask of four dimensions keeps tokens apart; i3, which has a state, takes none."""
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch, time = hidden.shape[:2]
        again = self.gradient_checkpointing and self.training  # blocks run twice, and a cache would grow twice
        past = self._cache(past_key_values) if (self.config.use_cache if use_cache is None else use_cache) and not again else None
        keys = time + (0 if past is None else past.get_seq_length())
        present_BK, allowed = torch.ones(batch, keys, dtype=torch.bool, device=hidden.device), None
        if attention_mask is not None and attention_mask.dim() == 4:
            if self.config.architecture == "i3":
                raise ValueError("i3 takes an attention_mask of two dimensions: its recurrent state goes through the whole row")
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        elif attention_mask is not None:
            present_BK = attention_mask.bool()
        bias = self._bias(present_BK, allowed, time, hidden)
        if position_ids is None:
            position_ids = (present_BK.long().cumsum(1) - 1).clamp_min(0)[:, -time:]
        position_ids = position_ids.expand(batch, -1)
        if self.config.positions == "learned":
            if int(position_ids.max()) >= len(self.positions.weight):
                raise ValueError(f"the text has more tokens than the {len(self.positions.weight)} positions that the model has learned")
            hidden = hidden + self.positions(position_ids)
        arguments = (position_ids, bias, present_BK[:, -time:].unsqueeze(-1).to(hidden.dtype), past)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(block, hidden, *arguments, use_reentrant=False)
            else:
                hidden = block(hidden, *arguments)
        hidden = self.norm(hidden)
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = F.linear(hidden, self.embedding.weight) if self.config.tie_word_embeddings else self.head(hidden)
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
