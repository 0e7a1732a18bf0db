"""What a config.json of transformers says, as the shape of lowmem's decoder; what that does not have is refused by name."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.config import ModelConfig
from lowmem.errors import CheckpointError, ConfigError
from lowmem.export.plain import GPT2_ACTIVATIONS

_ACTIVATIONS: dict[str, Any] = {theirs: ours for ours, theirs in GPT2_ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class TheirModel:
    """A model of transformers.

    Attributes:
        family: llama or gpt2.
        shape: of lowmem's decoder; vocab_size and max_seq_len are set.
        missing_biases: ends of the names of biases that the directory does not have, and that are zero.
    """

    family: str
    shape: ModelConfig
    missing_biases: tuple[str, ...] = ()


def read_model_config(source: Path) -> TheirModel:
    """The model of a directory.

    Raises:
        ConfigError: there is no config.json, it lacks something, or it asks for what lowmem's decoder does not have.
    """
    path = source / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a directory that transformers' save_pretrained has written") from error
    family = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(family, str) or family not in ("llama", "gpt2"):
        remedy = "use the run it was exported from" if family == "lowmem" else "give a model of one of these"
        raise ConfigError(f"{path} has model_type {str(family)[:80]}, allowed: llama, gpt2; {remedy}")
    _check_types(values, path)
    try:
        model = _llama(values, path) if family == "llama" else _gpt2(values, path)
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error}; save the model again with save_pretrained") from error
    shape = model.shape
    if min(shape.dim, shape.num_heads, shape.num_layers, shape.vocab_size, shape.max_seq_len) < 1 or shape.dim % shape.num_heads:
        raise ConfigError(f"{path}: a width of {shape.dim} with {shape.num_heads} heads in {shape.num_layers} layers is no model; mend it")
    return model


# what may stand under a key, and whether null may: it is then as if the key were not there; under all other keys transformers refuses it
_COUNTS = {
    "hidden_size": False, "intermediate_size": False, "num_hidden_layers": False, "num_attention_heads": False, "vocab_size": False,
    "max_position_embeddings": False, "num_key_value_heads": True, "head_dim": True,
    "n_embd": False, "n_layer": False, "n_head": False, "n_positions": False, "n_inner": True,
}  # fmt: skip
_NUMBERS = {"rope_theta": True, "partial_rotary_factor": True, "rope rope_theta": False, "rms_norm_eps": False, "layer_norm_epsilon": False}
_SWITCHES = (
    "attention_bias", "mlp_bias", "tie_word_embeddings", "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "add_cross_attention",
)  # fmt: skip
_NAMES = ("hidden_act", "activation_function")
_LARGEST = {"num_hidden_layers": 10_000, "n_layer": 10_000}  # other sizes meet the shapes of the weights
_LARGEST_COUNT = 1 << 31


def _check_types(values: dict[str, Any], path: Path) -> None:
    """Refuse what no transformers writes under the keys that are read.

    Raises:
        CheckpointError: names the first such key.
    """
    rope = [values.get(key) for key in ("rope_parameters", "rope_scaling")]
    problems = [f"{part!r:.60}, expected an object or null" for part in rope if not isinstance(part, (dict, type(None)))]
    known = values | {f"rope {key}": part[key] for part in rope if isinstance(part, dict) for key in part}
    for key, value in known.items():
        name = key.removeprefix("rope ")
        if name in _COUNTS:
            most = _LARGEST.get(name, _LARGEST_COUNT)
            right, wanted = (type(value) is int and 1 <= value <= most) or (value is None and _COUNTS[name]), f"1 to {most}"
        elif name in _NUMBERS:
            right = (type(value) in (int, float) and 0 < value < math.inf) or (value is None and _NUMBERS.get(key, _NUMBERS[name]))
            wanted = "a number above 0"
        elif name in _SWITCHES:
            right, wanted = isinstance(value, bool), "true or false"
        elif name in _NAMES or key in ("rope rope_type", "rope type"):
            right, wanted = isinstance(value, str), "a name"
        else:
            continue
        found = "null" if value is None else f"{value!r:.60}"
        problems += [] if right else [f"{name} {found}, expected {wanted}"]
    if problems:
        raise CheckpointError(f"{path} has {problems[0]}; restore it")


def _llama(values: Mapping[str, Any], path: Path) -> TheirModel:
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # of both, transformers takes the older name
    kind = rope.get("rope_type", rope.get("type", "default"))
    width = values.get("head_dim") or dim // heads
    biases = {"self_attn": bool(values.get("attention_bias")), "mlp": bool(values.get("mlp_bias"))}
    _refuse(
        {
            f"rope_type {kind}": kind != "default",
            f"partial_rotary_factor {rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor") not in (None, 1, 1.0),
            f"head_dim {width} with hidden_size {dim} and {heads} heads": width * heads != dim,
            f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") != "silu",
            "quantization_config": bool(values.get("quantization_config")),
        },
        path,
    )
    shape = ModelConfig(
        dim=dim,
        hidden_dim=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or 0,
        vocab_size=values["vocab_size"],
        max_seq_len=values.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or ModelConfig.rope_theta),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        bias=any(biases.values()),
        tie_embeddings=bool(values.get("tie_word_embeddings")),
    )
    shape.num_kv_heads = 0 if shape.num_kv_heads == heads else shape.num_kv_heads
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    zero = tuple(f"{group}.{part}.bias" for group, there in biases.items() if shape.bias and not there for part in parts[group])
    return TheirModel("llama", shape, zero)


def _gpt2(values: Mapping[str, Any], path: Path) -> TheirModel:
    activation = values.get("activation_function", "gelu_new")
    _refuse(
        {
            f"activation_function {activation}": activation not in _ACTIVATIONS,
            "scale_attn_by_inverse_layer_idx": bool(values.get("scale_attn_by_inverse_layer_idx")),
            "scale_attn_weights false": not values.get("scale_attn_weights", True),
            "add_cross_attention": bool(values.get("add_cross_attention")),
            "quantization_config": bool(values.get("quantization_config")),
        },
        path,
    )
    shape = ModelConfig(
        dim=values["n_embd"],
        hidden_dim=values.get("n_inner") or 0,
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        vocab_size=values["vocab_size"],
        max_seq_len=values["n_positions"],
        positions="learned",
        norm="layernorm",
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        activation=_ACTIVATIONS[activation],
        bias=True,
        tie_embeddings=values.get("tie_word_embeddings", True),
    )
    return TheirModel("gpt2", shape)


def _refuse(problems: Mapping[str, bool], path: Path) -> None:
    if found := [name for name, is_so in problems.items() if is_so]:
        raise ConfigError(f"{path} has {', '.join(found)}, which lowmem's decoder does not have; give a model without")
