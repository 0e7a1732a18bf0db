"""From a resolved configuration to a model and the engine of one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowmem.config.schema import RunConfig, TrainConfig
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine, Teacher
from lowmem.models.base import LanguageModel, LossOptions
from lowmem.models.registry import build_model
from lowmem.nn.float8 import use_float8
from lowmem.nn.nf4 import Nf4, store_linears_as_nf4
from lowmem.nn.quantized import WeightBits, WeightFormat, stored_tensors
from lowmem.system.devices import Precision
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import ConfigError

_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUANTIZED: dict[str, WeightBits] = {"int8": 8, "int4": 4}


def build_configured_model(config: RunConfig, new_tokens: Sequence[int] = ()) -> LanguageModel:
    """The model of a resolved configuration, in its stored dtype, with its adapter, its loss and recomputation set.

    Args:
        new_tokens: ids of the rows that data.add_tokens needs.
    Raises:
        ConfigError, CheckpointError: see `lowmem.engine.huggingface_files` and `lowmem.models.adapters`.
    Memory: the weights.
    """
    train, model_config = config.train, config.model
    if model_config.path:
        model: LanguageModel = _model_of_transformers(config, new_tokens)
    elif new_tokens or config.adapter.method != "none":
        what = "data.add_tokens" if new_tokens else f"adapter.method={config.adapter.method}"
        raise ConfigError(f"{what} needs a model of transformers; set model.path, or remove it")
    else:
        model = _own_model(config)
    checkpointing = train.activation_checkpointing
    model.loss_options = LossOptions(train.loss_chunk_tokens, train.label_smoothing, train.z_loss)
    model.activation_checkpointing = ("block" if model_config.path else "selective") if checkpointing == "auto" else checkpointing
    return model


def _model_of_transformers(config: RunConfig, new_tokens: Sequence[int]) -> LanguageModel:
    """The model of `model.path` with its weights, checked, and its adapter; on the meta device its outline."""
    from lowmem.engine.huggingface_files import load_model, outline, quiet_transformers, resolve_model_path
    from lowmem.models.adapters import apply_adapter, check_adapter_is_used
    from lowmem.models.huggingface import HuggingFaceModel, check_contract

    quiet_transformers()
    directory, dtype = resolve_model_path(config.model.path, config.model.revision), stored_format(config.train).dtype
    nf4 = Nf4(config.train.double_quant) if config.train.weight_dtype == "nf4" else None
    if torch.get_default_device().type == "meta":
        model = HuggingFaceModel(_nf4_outline(directory, dtype, nf4) if nf4 else outline(directory, dtype), config.model.max_seq_len)
    else:
        model = HuggingFaceModel(load_model(directory, dtype, nf4=nf4), config.model.max_seq_len)
        check_contract(model)
    apply_adapter(model, config.adapter, seed=config.train.seed, new_tokens=new_tokens)
    if model.device.type != "meta":
        check_adapter_is_used(model)
    return model


def _nf4_outline(directory: Path, dtype: torch.dtype, nf4: Nf4) -> Any:
    """An outline with linear layers in NF4; a dry run sees only what stays, as a model is never whole while it is read."""
    from torch.utils._python_dispatch import _disable_current_modes

    from lowmem.engine.huggingface_files import outline
    from lowmem.models.huggingface_body import find_blocks, find_body

    with _disable_current_modes(), on_meta():
        model = outline(directory, dtype)
        store_linears_as_nf4(find_blocks(find_body(model), model.config)[1], nf4.double)
    for tensor in stored_tensors(dict(model.named_parameters()) | dict(model.named_buffers())).values():
        tensor.detach()
    return model


def _own_model(config: RunConfig) -> LanguageModel:
    train, model_config = config.train, config.model
    return build_model(
        model_config,
        vocab_size=model_config.vocab_size,
        max_seq_len=model_config.max_seq_len,
        seed=train.seed,
        dtype=stored_format(train),
    )


def build_local_engine(
    config: RunConfig,
    model: LanguageModel,
    device: torch.device,
    precision: Precision,
    micro_batch_size: int,
    teacher: LanguageModel | None = None,
) -> LocalEngine:
    """The engine of one process that `train.update` asks for.

    Args:
        teacher: what `train.distill` names, on `device`.
    """
    engine: LocalEngine
    if precision == "fp8":
        use_float8(model.blocks)
    if config.train.update == "layerwise":
        engine = LayerwiseEngine(model, config.optim, config.train, device=device, precision=precision, micro_batch_size=micro_batch_size)
    else:
        engine = LocalEngine(
            model,
            config.optim,
            device=device,
            precision=precision,
            micro_batch_size=micro_batch_size,
            seed=config.train.seed,
            teacher=None if teacher is None else Teacher(teacher, config.train.distill),
        )
    engine.longest_seq_len = config.data.seq_len
    return engine


def stored_format(train: TrainConfig) -> WeightFormat:
    """What `train.weight_dtype` stores weights in, nf4 aside; besides quantised matrices everything has the dtype that is computed in.

    Args:
        train: with its precision settled.
    """
    bits = _QUANTIZED.get(train.weight_dtype)
    return WeightFormat(_STORED[train.weight_dtype if train.weight_dtype in _STORED else train.precision], bits)
