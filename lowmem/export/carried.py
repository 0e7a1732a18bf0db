"""Models of no family that transformers knows: the configuration and the weights of `lowmem.export.modeling_lowmem`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lowmem.models.base import LanguageModel
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LoRPtLinear


def carried_config(model: Any) -> dict[str, Any]:
    """The fields of a LowmemConfig."""
    config = model.config
    return {
        "architecture": config.name, "vocab_size": model.vocab_size, "hidden_size": config.dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "max_position_embeddings": model.max_seq_len, "positions": config.positions,
        "rope_theta": config.rope_theta, "norm": config.norm, "norm_eps": model.norm.eps, "activation": config.activation,
        "attention_rank": config.attention_rank, "state_dim": config.state_dim, "layers": _layers(model),
        "tie_word_embeddings": model.head_is_tied(), "initializer_range": 0.02,
    }  # fmt: skip


def carried_weights(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by the names of LowmemForCausalLM: those of lowmem, with the factors of a low-rank layer as layers of their own."""
    factored = {name for name, layer in model.named_modules() if isinstance(layer, LoRPtLinear)}
    for name, tensor in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        yield (f"{layer}.up.bias" if part == "bias" else f"{name}.weight") if layer in factored else name, tensor


def _layers(model: LanguageModel) -> dict[str, dict[str, Any]]:
    """Every linear layer by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRPtLinear):
            silu = layer.bottleneck == "silu"
            found[name] = _layer(layer, rank=layer.rank, silu=silu)
        elif isinstance(layer, Linear | nn.Linear):
            found[name] = _layer(layer, rank=0, silu=False)
    return found


def _layer(layer: Any, *, rank: int, silu: bool) -> dict[str, Any]:
    return {"in": layer.in_features, "out": layer.out_features, "bias": layer.bias is not None, "rank": rank, "silu": silu}
