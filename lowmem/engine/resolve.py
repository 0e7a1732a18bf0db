"""Everything that a configuration leaves to lowmem, decided: device, precision, masks, sizes."""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from lowmem.config.schema import DataConfig, RunConfig
from lowmem.engine.run_model import is_model_directory, model_description
from lowmem.system.devices import cuda_problem, resolve_device, resolve_precision
from lowmem.system.errors import ConfigError
from lowmem.system.units import parse_bytes


def resolve(config: RunConfig, device: torch.device, *, vocab_size: int) -> RunConfig:
    """A copy in which everything "auto" or 0 is settled, as config.yaml records it.

    Args:
        device: from `chosen_device`; may be a GPU of another machine.
        vocab_size: of the tokenizer.
    Raises:
        ConfigError: the device cannot compute in the precision asked for, or a setting is for another device.
    """
    config = copy.deepcopy(config)
    train = config.train
    config.data.document_mask = keeps_documents_apart(config, device)
    rows = config.model.vocab_size
    config.model.vocab_size = max(rows, vocab_size) if config.data.add_tokens else rows or vocab_size
    config.model.max_seq_len = config.max_seq_len()
    train.precision = _precision(config, device)  # type: ignore[assignment]
    stored = train.weight_dtype
    if stored in ("bf16", "fp16") and train.precision != stored and (stored, train.precision) != ("bf16", "fp8"):
        raise ConfigError(
            f"train.weight_dtype={stored} needs a device that computes in {stored}, {device.type} here resolves to "
            f"{train.precision}; use train.weight_dtype=fp32, or train.precision={stored} to accept slow emulation"
        )
    if train.boundary_offload == "cpu" and device.type == "cpu":
        raise ConfigError("train.boundary_offload is cpu, but the run computes on a CPU, where they are in host memory already; use none")
    if train.weights_at == "host" and device.type == "cpu":
        raise ConfigError("train.weights_at is host, but the run computes on a CPU, whose weights are in host memory already; use disk")
    config.device = device.type  # type: ignore[assignment]
    return config


def _precision(config: RunConfig, device: torch.device) -> str:
    """What is computed in; of a GPU that is not here what the weights are stored in, else bf16."""
    train = config.train
    if device.type == "cpu" or not cuda_problem():
        return resolve_precision(train.precision, device)
    if train.precision != "auto":
        return train.precision
    return "bf16" if train.weight_dtype in ("fp32", "int8", "int4", "nf4") else train.weight_dtype


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
    if config.model.path and config.data.document_mask is True and not keeps_segments_apart(config):
        raise ConfigError(
            f"data.document_mask is true, but the model {config.model.path} cannot keep texts of a row apart; set it to false"
        )
    if config.data.document_mask != "auto":
        return config.data.document_mask
    teacher = config.train.distill.teacher
    if teacher and is_model_directory(Path(teacher)) and not model_description(Path(teacher)).keeps_segments_apart:
        return False  # where there is no teacher is told when it is loaded
    return keeps_segments_apart(config) and device.type == "cpu"


def keeps_segments_apart(config: RunConfig) -> bool:
    """Whether a row of the model may hold several texts.

    Raises:
        ConfigError, CheckpointError: see `settled_model`.
    """
    if config.model.path:
        from lowmem.engine.huggingface_files import model_facts

        return model_facts(config.model.path, config.model.revision).keeps_segments_apart
    return config.model.name != "i3"


def settled_model(config: RunConfig) -> RunConfig:
    """A copy in which everything is settled that the choice of the model decides: recomputation, and for a model of transformers its
    vocabulary, longest sequence and tokenizer.

    Raises:
        ConfigError: the settings contradict the model's own, or `model.path` names nothing.
        CheckpointError: it is no model that can be trained here.
    """
    model, train, data = config.model, config.train, config.data
    if train.activation_checkpointing == "auto":
        whole = model.path or train.weights_at != "device"
        train = replace(train, activation_checkpointing="block" if whole else "selective")
    if model.path:
        from lowmem.engine.huggingface_files import model_facts, resolve_model_path

        facts = model_facts(model.path, model.revision)
        rows = max(facts.vocab_size, model.vocab_size) if data.add_tokens else facts.vocab_size
        if model.vocab_size not in (0, rows):
            raise ConfigError(f"model.vocab_size is {model.vocab_size}, but {model.path} has {facts.vocab_size} rows; remove it")
        before = config.adapter.prefix_tokens()
        if 0 < facts.position_limit < data.seq_len + before:
            prefix = f" after adapter.num_virtual_tokens={before}" if before else ""
            raise ConfigError(
                f"data.seq_len is {data.seq_len}{prefix}, but the learned positions of {model.path} end at {facts.position_limit}; lower it"
            )
        longest = (facts.position_limit and facts.position_limit - before) or max(facts.max_seq_len, data.seq_len)
        model = replace(model, vocab_size=rows, max_seq_len=model.max_seq_len or longest)
        if data.tokenizer == DataConfig().tokenizer:
            data = replace(data, tokenizer=str(resolve_model_path(model.path, model.revision)))
    return replace(config, model=model, train=train, data=data)


def _is_zero(size: str) -> bool:
    return bool(size) and parse_bytes(size) == 0
