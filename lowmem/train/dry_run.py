"""What a configuration needs, known without training: parameters, and bytes of weights, gradients and states by arithmetic."""

from dataclasses import asdict
from typing import Any

import torch

from lowmem.config import RunConfig
from lowmem.data.simple_tokenizers import ByteTokenizer
from lowmem.devices import resolve_precision
from lowmem.errors import ConfigError
from lowmem.models.counting import largest_part
from lowmem.models.registry import build_model
from lowmem.optim.kernels.formats import state_bytes
from lowmem.train.setup import chosen_device

_STATES = {"adamw": 2, "lion": 1}


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Resolved configuration, parameters by component, and bytes that are known beforehand.

    Raises:
        ConfigError: the device cannot do what is asked, or the vocabulary is not known before the text is read.
    Memory: none for the model; it is built without storage.
    """
    device = chosen_device(config)
    config.train.precision = resolve_precision(config.train.precision, device)
    config.device = device.type  # type: ignore[assignment]
    config.model.vocab_size = config.model.vocab_size or _vocab_size(config)
    config.model.max_seq_len = config.max_seq_len()
    with torch.device("meta"):
        model = build_model(config.model, vocab_size=config.model.vocab_size, max_seq_len=config.model.max_seq_len, seed=config.train.seed)
    parameters = model.num_parameters()
    weight_bytes = 4 if config.train.weight_dtype == "fp32" else 2
    sizes = [parameter.numel() for parameter in model.parameters()]
    return {
        "config": asdict(config),
        "budget": asdict(config.budget),
        "parameters": parameters,
        "parameters_by_component": model.component_parameters(),
        "flops_per_token": model.flops_per_token(config.data.seq_len),
        "predicted": {
            "components": {
                "weights": parameters * weight_bytes,
                "gradients": (largest_part(model) if config.train.update == "layerwise" else parameters) * weight_bytes,
                "optimizer_states": sum(state_bytes(size, config.optim.state_bits) for size in sizes) * _STATES[config.optim.name],
            }
        },
    }


def _vocab_size(config: RunConfig) -> int:
    """Rows the tokenizer will have: its configured size for those that are trained."""
    name = config.data.tokenizer
    if name in ("bpe", "chunk"):
        return config.data.tokenizer_vocab_size
    if name == "bytes":
        return ByteTokenizer().vocab_size
    raise ConfigError(f"data.tokenizer={name} has a size that only the text or the file tells; set model.vocab_size for a dry run")
