"""From a resolved configuration to a model and the engine of one process."""

import torch

from lowmem.config.schema import RunConfig, TrainConfig
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.engine.teacher import Teacher
from lowmem.models.base import LanguageModel, LossOptions
from lowmem.models.registry import build_model
from lowmem.nn.float8 import use_float8
from lowmem.nn.quantized import WeightBits, WeightFormat
from lowmem.system.devices import Precision

_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUANTIZED: dict[str, WeightBits] = {"int8": 8, "int4": 4}


def build_configured_model(config: RunConfig) -> LanguageModel:
    """The model of a resolved configuration, in its stored dtype, with its loss and recomputation set.

    Memory: the weights.
    """
    train, model_config = config.train, config.model
    if model_config.path:
        model: LanguageModel = _model_of_transformers(config)
    else:
        model = _own_model(config)
    checkpointing = train.activation_checkpointing
    model.loss_options = LossOptions(train.loss_chunk_tokens, train.label_smoothing, train.z_loss)
    model.activation_checkpointing = ("block" if model_config.path else "selective") if checkpointing == "auto" else checkpointing
    return model


def _model_of_transformers(config: RunConfig) -> LanguageModel:
    """The model of `model.path` with its weights, checked; on the meta device its outline."""
    from lowmem.engine.huggingface_files import load_model, outline, quiet_transformers, resolve_model_path
    from lowmem.models.huggingface import HuggingFaceModel, check_contract

    quiet_transformers()
    directory, dtype = resolve_model_path(config.model.path, config.model.revision), stored_format(config.train).dtype
    if torch.get_default_device().type == "meta":
        return HuggingFaceModel(outline(directory, dtype), config.model.max_seq_len)
    model = HuggingFaceModel(load_model(directory, dtype), config.model.max_seq_len)
    check_contract(model)
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
    """What `train.weight_dtype` stores weights in; besides quantised matrices everything has the dtype that is computed in.

    Args:
        train: with its precision settled.
    """
    bits = _QUANTIZED.get(train.weight_dtype)
    return WeightFormat(_STORED[train.precision if bits else train.weight_dtype], bits)
