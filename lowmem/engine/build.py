"""From a resolved configuration to a model and the engine of one process."""

from pathlib import Path

import torch

from lowmem.config import RunConfig, TrainConfig
from lowmem.config_load import load_run_config
from lowmem.devices import Precision, resolve_device
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.engine.teacher import Teacher
from lowmem.models.base import LanguageModel, LossOptions
from lowmem.models.registry import build_model
from lowmem.nn.float8 import use_float8
from lowmem.nn.quantized import WeightFormat
from lowmem.nn.weight_codes import WeightBits
from lowmem.units import parse_bytes

_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUANTIZED: dict[str, WeightBits] = {"int8": 8, "int4": 4}


def chosen_device(config: RunConfig, *, check: bool = True) -> torch.device:
    """Where the run computes; budget.vram=0 says that there is no GPU.

    Args:
        check: that the device is here; false for a plan for another machine.
    """
    if config.device == "cuda" and not check:
        return torch.device("cuda")
    return resolve_device("cpu" if _is_zero(config.budget.vram) and config.device == "auto" else config.device)


def keeps_documents_apart(config: RunConfig, device: torch.device) -> bool:
    """What `data.document_mask` says; where it is auto: whether the model, and its teacher, can do so at no great cost.

    Raises:
        ConfigError: the teacher's configuration cannot be read.
    """
    if config.data.document_mask != "auto":
        return config.data.document_mask
    teacher = Path(config.train.distill.teacher) / "config.yaml"
    names = {config.model.name}
    if config.train.distill.teacher and teacher.is_file():  # where there is none is told when it is loaded
        names.add(load_run_config(teacher, check=False).model.name)
    return names == {"decoder"} and device.type == "cpu"


def build_configured_model(config: RunConfig) -> LanguageModel:
    """The model of a resolved configuration, in its stored dtype, with its loss and recomputation set.

    Memory: the weights.
    """
    train, model_config = config.train, config.model
    model = build_model(
        model_config,
        vocab_size=model_config.vocab_size,
        max_seq_len=model_config.max_seq_len,
        seed=train.seed,
        dtype=stored_format(train),
    )
    model.loss_options = LossOptions(train.loss_chunk_tokens, train.label_smoothing, train.z_loss)
    model.activation_checkpointing = train.activation_checkpointing
    return model


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


def _is_zero(size: str) -> bool:
    return bool(size) and parse_bytes(size) == 0
