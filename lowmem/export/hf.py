"""A lowmem model as a model of transformers, in memory or as a directory."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lowmem.engine.huggingface_files import GENERATION_CONFIG, read_generation_config
from lowmem.engine.run_model import RunModel
from lowmem.export.tokenizer_files import TOKENIZER_FILES, export_tokenizer
from lowmem.models.base import LanguageModel
from lowmem.models.decoder import Decoder
from lowmem.nn.attention import LowRankAttention
from lowmem.nn.layers import default_hidden_dim
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.lorptize import merge_lorpt
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import CheckpointError, ConfigError
from lowmem.system.files import UNFINISHED, write_json, written_whole
from lowmem.system.tensors import all_finite, meta_tensors, write_tensors

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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CODE = [Path(__file__).parent / name for name in ("configuration_lowmem.py", "modeling_lowmem.py")]
_AUTO = {"AutoConfig": "configuration_lowmem.LowmemConfig", "AutoModelForCausalLM": "modeling_lowmem.LowmemForCausalLM"}
_FILES = (
    "config.json", "generation_config.json", "model.safetensors", *(path.name for path in _CODE), *TOKENIZER_FILES,
)  # fmt: skip
_PLAIN: dict[str, tuple[Any, Any, str]] = {
    "llama": (llama_config, llama_weights, "LlamaForCausalLM"),
    "gpt2": (gpt2_config, gpt2_weights, "GPT2LMHeadModel"),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        family: llama, gpt2, or lowmem for a directory that carries its model file.
        reason: why it is no plain family.
        model_code, tokenizer_code: whether transformers asks for trust_remote_code, and for what.
        parameters: numbers in the weights.
        weight_bytes: size of model.safetensors.
    """

    family: Literal["llama", "gpt2", "lowmem"]
    reason: str
    model_code: bool
    tokenizer_code: bool
    parameters: int
    weight_bytes: int


@torch.no_grad()
def converted(model: LanguageModel, *, keep_factors: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor], str, str]:
    """Configuration and weights for transformers.

    Args:
        model: its low-rank layers are merged in place where that makes it a plain family.
        keep_factors: leave low-rank layers as they are.
    Returns:
        config.json without tokens and dtype, weights by name, the family, and why it is not a plain one.
    Memory: low-rank layers, multiplied out.
    """
    family, reason = ("", "its factors are kept") if keep_factors else plain_family(model)
    if not family:
        config = {"model_type": "lowmem", "architectures": ["LowmemForCausalLM"], "auto_map": _AUTO, **carried_config(model)}
        return config, dict(carried_weights(model)), "lowmem", reason
    merge_lorpt(model)
    make_config, weights, architecture = _PLAIN[family]
    return {"model_type": family, "architectures": [architecture], **make_config(model)}, dict(weights(model)), family, ""


def export_run_model(
    run: RunModel,
    out: Path | str,
    *,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    keep_factors: bool = False,
    overwrite: bool = False,
    run_dir: Path | None = None,
) -> Exported:
    """Write the directory that `transformers.pipeline("text-generation", model=out)` runs.

    Args:
        run: its model is changed: see `converted`.
        dtype: of the weights; None takes that of the checkpoint's, and fp32 for quantised ones.
        overwrite: take a folder that is not empty: an earlier export there is replaced, and other files are left alone.
        run_dir: where the run's chat template is; None takes that of the checkpoint.
    Raises:
        ConfigError: `out` is not empty, or no folder.
        CheckpointError: weights are not finite, or not in `dtype`.
        StorageError: it cannot be written.
    """
    out = Path(out)
    check_out(out, overwrite=overwrite)
    config, weights, family, reason = converted(run.model, keep_factors=keep_factors)
    stored = DTYPES[dtype] if dtype else _stored_dtype(run)
    weights = {name: tensor.to(stored) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if not all_finite(tensor):
            raise CheckpointError(
                f"{run.path} holds weights that are not finite in {stored} ({name}); choose another --checkpoint, or --dtype=fp32"
            )
    tokens = {"eos_token_id": run.tokenizer.eos_id, "pad_token_id": run.tokenizer.eos_id}
    template = run_dir or run.path.parent.parent
    generation = read_generation_config(template)  # of an imported run
    with written_whole(out, earlier=_FILES) as folder:  # what an earlier export wrote and this one does not is gone then
        tokenizer_code = export_tokenizer(run.tokenizer, folder, run_dir=template, max_seq_len=run.model.max_seq_len)
        write_json(folder / "config.json", {**config, **tokens, "bos_token_id": None, "dtype": str(stored).removeprefix("torch.")})
        write_json(folder / GENERATION_CONFIG, {**tokens, "use_cache": True, **generation})
        if family == "lowmem":
            for code in _CODE:
                shutil.copyfile(code, folder / code.name)
        write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    numbers = sum(tensor.numel() for tensor in weights.values())
    size = (out / "model.safetensors").stat().st_size
    return Exported(family, reason, family == "lowmem", tokenizer_code, numbers, size)  # type: ignore[arg-type]


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that cannot be written, or that holds what is not to be lost.

    Raises:
        ConfigError: it is a file, or a folder that is not empty.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out is {out}, which is a file; choose a folder")
    if out.is_dir() and not overwrite and any(not path.name.startswith(UNFINISHED) for path in out.iterdir()):
        raise ConfigError(f"--out is {out}, which is not empty; choose another folder, or --overwrite")


def _stored_dtype(run: RunModel) -> torch.dtype:
    """What the checkpoint holds, which on a device without bf16 is not what was loaded."""
    path = run.path / "model.safetensors"
    if not path.is_file():
        return DTYPES.get(run.config.train.weight_dtype, torch.float32)
    found = {tensor.dtype for _, tensor in meta_tensors(path)}
    return found.pop() if len(found) == 1 else torch.float32


def hf_model(run: RunModel, *, keep_factors: bool = False) -> Any:
    """The model as a transformers.PreTrainedModel in memory, which shares its weights where it can.

    Args:
        run: its model is changed: see `converted`.
    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError("this needs transformers; pip install 'lowmem[hf]'") from error
    config, weights, family, _ = converted(run.model, keep_factors=keep_factors)
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    values |= {"eos_token_id": run.tokenizer.eos_id, "pad_token_id": run.tokenizer.eos_id, "bos_token_id": None}
    with on_meta():
        if family == "lowmem":
            from lowmem.export.modeling_lowmem import LowmemConfig, LowmemForCausalLM

            LowmemConfig.register_for_auto_class()  # save_pretrained then writes the model file beside the weights
            LowmemForCausalLM.register_for_auto_class("AutoModelForCausalLM")
            model: Any = LowmemForCausalLM(LowmemConfig(**values))
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    return fill(model, weights)


def fill(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """Give a model on the meta device its weights; buffers are computed anew."""
    config = model.config
    model.load_state_dict({name: tensor.detach() for name, tensor in weights.items()}, strict=False, assign=True)
    model.tie_weights()
    with torch.device("cpu"):
        buffers = {name for name, buffer in model.named_buffers() if buffer.is_meta}
        for owner in {name.rpartition(".")[0] for name in buffers}:
            module = model.get_submodule(owner)
            fresh = type(module)(config)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, missing
    return model.eval()
