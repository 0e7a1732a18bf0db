"""Models whose shape is Llama's or GPT-2's, as those: configuration and weights under the names that transformers gives them.

`model` is a Decoder with merged layers. Shapes: C width.
"""

from collections.abc import Iterator
from typing import Any

import torch

from lowmem.models.base import LanguageModel
from lowmem.models.decoder import Decoder
from lowmem.nn.attention import LowRankAttention
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.mlp import default_hidden_dim

GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def plain_family(model: LanguageModel) -> tuple[str, str]:
    """The family whose shape the model has, and else why it has none.

    Returns:
        ("llama", ""), ("gpt2", "") or ("", reason).
    """
    if not isinstance(model, Decoder):
        return "", f"{type(model).__name__} has a recurrent state, which no model of transformers has"
    config = model.config
    bent = [name for name, layer in model.named_modules() if isinstance(layer, LoRPtLinear) and layer.bottleneck != "linear"]
    if bent:
        return "", f"{bent[0]} has a non-linear bottleneck, which is no single matrix"
    shape = (config.positions, config.norm, config.activation)
    if shape == ("rope", "rmsnorm", "swiglu"):
        return "llama", ""
    if config.positions == "learned" and config.norm == "layernorm" and config.activation in GPT2_ACTIVATIONS:
        if config.num_kv_heads in (0, config.num_heads):
            return "gpt2", ""
        return "", f"{config.num_kv_heads} heads of keys and values for {config.num_heads} of queries are not GPT-2's"
    return "", "positions {}, norm {}, activation {} are neither Llama's nor GPT-2's".format(*shape)


def llama_config(model: Any) -> dict[str, Any]:
    """The fields of a LlamaConfig."""
    config = model.config
    block = model.blocks[0]
    return {
        "vocab_size": model.vocab_size, "hidden_size": config.dim, "num_hidden_layers": config.num_layers,
        "intermediate_size": config.hidden_dim or default_hidden_dim(config.activation, config.dim),
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.dim // config.num_heads,
        "max_position_embeddings": model.max_seq_len, "rms_norm_eps": block.mlp_norm.eps, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "rope_theta": config.rope_theta,
        "attention_bias": config.bias, "mlp_bias": config.bias, "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def gpt2_config(model: Any) -> dict[str, Any]:
    """The fields of a GPT2Config."""
    config = model.config
    return {
        "vocab_size": model.vocab_size, "n_positions": model.max_seq_len, "n_embd": config.dim, "n_layer": config.num_layers,
        "n_head": config.num_heads, "n_inner": config.hidden_dim or default_hidden_dim(config.activation, config.dim),
        "activation_function": GPT2_ACTIVATIONS[config.activation], "layer_norm_epsilon": model.blocks[0].mlp_norm.eps,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def llama_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by the names of LlamaForCausalLM; of a merged model. Those of a dense model are views of its own.

    Memory: one low-rank map of attention, multiplied out.
    """
    yield "model.embed_tokens.weight", model.embedding.weight
    for index, block in enumerate(model.blocks):
        name = f"model.layers.{index}"
        yield f"{name}.input_layernorm.weight", block.attention_norm.weight
        for part, (weight, bias) in zip("qkv", attention_maps(block.attention), strict=True):
            yield from _linear(f"{name}.self_attn.{part}_proj", weight, bias)
        yield from _linear(f"{name}.self_attn.o_proj", block.attention.out.weight, block.attention.out.bias)
        yield f"{name}.post_attention_layernorm.weight", block.mlp_norm.weight
        for part, (weight, bias) in zip(("gate", "up"), pieces(block.mlp.gate_up), strict=True):
            yield from _linear(f"{name}.mlp.{part}_proj", weight, bias)
        yield from _linear(f"{name}.mlp.down_proj", block.mlp.down.weight, block.mlp.down.bias)
    yield "model.norm.weight", model.norm.weight
    if not model.config.tie_embeddings:
        yield "lm_head.weight", model.head.weight


def gpt2_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by the names of GPT2LMHeadModel, whose matrices are transposed; missing biases are zero. See `llama_weights`."""
    yield "transformer.wte.weight", model.embedding.weight
    assert model.positions is not None
    yield "transformer.wpe.weight", model.positions.weight
    for index, block in enumerate(model.blocks):
        name = f"transformer.h.{index}"
        qkv = block.attention.qkv if not isinstance(block.attention, LowRankAttention) else None
        fused = (qkv.weight, qkv.bias) if qkv is not None else _one_below_the_other(attention_maps(block.attention))
        yield from _norm(f"{name}.ln_1", block.attention_norm)
        yield from _transposed(f"{name}.attn.c_attn", *fused)
        yield from _transposed(f"{name}.attn.c_proj", block.attention.out.weight, block.attention.out.bias)
        yield from _norm(f"{name}.ln_2", block.mlp_norm)
        yield from _transposed(f"{name}.mlp.c_fc", block.mlp.up.weight, block.mlp.up.bias)
        yield from _transposed(f"{name}.mlp.c_proj", block.mlp.down.weight, block.mlp.down.bias)
    yield from _norm("transformer.ln_f", model.norm)
    if not model.config.tie_embeddings:
        yield "lm_head.weight", model.head.weight


def attention_maps(attention: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight (out, C) and bias of the query, key and value maps; low-rank ones are multiplied out."""
    if not isinstance(attention, LowRankAttention):
        return pieces(attention.qkv)
    maps: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for up, (down, offset) in zip((attention.q_up, attention.k_up, attention.v_up), pieces(attention.latents), strict=True):
        bias = up.bias if offset is None else (up.weight @ offset + up.bias)
        maps.append((up.weight @ down, bias))
    return maps


def _one_below_the_other(maps: list[tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([weight for weight, _ in maps]), torch.cat([_or_zero(weight, bias) for weight, bias in maps])


def pieces(layer: Linear) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """A matrix of several layers one below the other, taken apart."""
    biases = [None] * len(layer.splits) if layer.bias is None else layer.bias.split(layer.splits)
    return list(zip(layer.weight.split(layer.splits), biases, strict=True))


def _linear(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", weight
    if bias is not None:
        yield f"{name}.bias", bias


def _transposed(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", weight.t()
    yield f"{name}.bias", _or_zero(weight, bias)


def _norm(name: str, norm: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", norm.weight
    yield f"{name}.bias", norm.bias


def _or_zero(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
