"""The merged model as a directory, written tensor by tensor: what was trained on a 4-bit base never exists whole in full precision."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowmem.finetune.hidden import inner_model
from lowmem.system.files import make_directory, storage_errors
from lowmem.system.tensors import LazyTensor, write_tensors


def write_model(model: Any, out: Path) -> None:
    """config.json, generation_config.json and model.safetensors.

    Args:
        model: of transformers, or a peft.PeftModel around one, whose 4-bit layers and new tokens are merged as they are written; other
            layers must be merged already.
    Raises:
        StorageError: the disk is full, or not writable.
    Memory: one tensor in full precision.
    """
    inner = inner_model(model)
    make_directory(out)
    tensors, seen = {}, set()
    for name, tensor in _merged_tensors(inner):
        if isinstance(tensor, torch.Tensor):
            if tensor.data_ptr() in seen:  # tied: transformers ties them again
                continue
            seen.add(tensor.data_ptr())
        tensors[name] = tensor
    inner.config.architectures = [type(inner).__name__]
    inner.config.dtype = _stored(inner)
    with storage_errors(out):
        inner.config.save_pretrained(out)
        if getattr(inner, "generation_config", None) is not None:
            inner.generation_config.save_pretrained(out)
        write_tensors(out / "model.safetensors", tensors, {"format": "pt"})


def _merged_tensors(inner: Any) -> Iterator[tuple[str, torch.Tensor | LazyTensor]]:
    """Weights and persistent buffers by the names of transformers."""
    done: list[str] = []
    for name, module in inner.named_modules():
        if any(name.startswith(prefix) for prefix in done):
            continue
        dot = f"{name}." if name else ""
        base = getattr(module, "base_layer", module)
        if type(base).__name__ == "Linear4bit":
            done.append(dot)
            yield f"{dot}weight", LazyTensor((base.out_features, base.in_features), _stored(inner), _Dense(module, base, _stored(inner)))
            if base.bias is not None:
                yield f"{dot}bias", base.bias
        elif base is not module and hasattr(module, "get_delta_weight"):
            done.append(dot)
            yield f"{dot}weight", LazyTensor(tuple(base.weight.shape), base.weight.dtype, _Merged(module, base))
            if getattr(base, "bias", None) is not None:
                yield f"{dot}bias", base.bias
        elif type(module).__name__ == "TrainableTokensWrapper":
            done.append(dot)
            yield f"{dot}weight", module.token_adapter.get_merged_weights(module.token_adapter.active_adapters).detach()
        else:
            yield from ((dot + key, value) for key, value in module._parameters.items() if value is not None)
            kept = set(module._buffers) - module._non_persistent_buffers_set
            yield from ((dot + key, value) for key, value in module._buffers.items() if key in kept and value is not None)


class _Dense:
    """The numbers that a 4-bit layer stands for, with its adapter multiplied in; made when called."""

    def __init__(self, layer: Any, base: Any, dtype: torch.dtype):
        self.layer, self.base, self.dtype = layer, base, dtype

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        import bitsandbytes

        dense = bitsandbytes.functional.dequantize_4bit(self.base.weight.data, self.base.weight.quant_state).float()
        for adapter in getattr(self.layer, "active_adapters", ()):
            dense += self.layer.get_delta_weight(adapter)
        return dense.to(self.dtype)


class _Merged:
    """The weight of a layer that is kept in full, with its adapter multiplied in; made when called."""

    def __init__(self, layer: Any, base: Any):
        self.layer, self.base = layer, base

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        dense = self.base.weight.float()
        for adapter in self.layer.active_adapters:
            dense = dense + self.layer.get_delta_weight(adapter)
        return dense.to(self.base.weight.dtype)


def _stored(inner: Any) -> torch.dtype:
    return inner.get_input_embeddings().weight.dtype
