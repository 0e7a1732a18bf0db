"""What models share in counting themselves, and in passing loss options on."""

import torch
from torch import nn

from lowmem.models.base import LanguageModel
from lowmem.nn.head import DenseHead, LoRPtHead
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.loss import CrossEntropyOptions
from lowmem.nn.quantized import MIN_QUANTIZED_NUMEL, WeightFormat, quantize, stored_bytes

_MATRICES = {nn.Linear: ("weight",), nn.Embedding: ("weight",), LoRPtLinear: ("down", "up")}  # what may be quantised
_OUTER = (nn.Embedding, DenseHead, LoRPtHead)  # never below 8 bits: at 4 they cost more in loss than all blocks together
COMPONENTS = ("embedding", "positions", "attention", "hybrid", "mlp", "norm", "head")


def store_as(module: nn.Module, stored: torch.dtype | WeightFormat) -> nn.Module:
    """`module` with its parameters in another dtype or format; unlike Module.to it also works on fake tensors.

    Memory: one parameter more at a time.
    """
    form = stored if isinstance(stored, WeightFormat) else WeightFormat(stored)
    for part in module.modules():
        matrices = {name for kind, names in _MATRICES.items() if isinstance(part, kind) for name in names}
        for name, parameter in part.named_parameters(recurse=False):
            if form.bits and name in matrices and parameter.numel() >= MIN_QUANTIZED_NUMEL:
                value: torch.Tensor = quantize(parameter.detach().to(form.dtype), 8 if isinstance(part, _OUTER) else form.bits)
            elif parameter.dtype != form.dtype:
                value = parameter.detach().to(form.dtype)
            else:
                continue
            setattr(part, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    return module


def move_to(model: LanguageModel, device: torch.device) -> LanguageModel:
    """`model` on `device`; unlike Module.to it leaves fake tensors that are there already alone."""
    return model if next(model.parameters()).device == device else model.to(device)


def parameters_by_component(model: nn.Module) -> dict[str, int]:
    """Parameters under the module name that says what they are for; shared ones once."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        component = _component(name)
        counts[component] = counts.get(component, 0) + parameter.numel()
    return counts


def bytes_by_component(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights as they are stored, by component."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        sizes[_component(name)] = sizes.get(_component(name), 0) + stored_bytes([parameter])
    return sizes


def _component(name: str) -> str:
    parts = name.split(".")
    parts = parts[2:] if parts[0] == "blocks" else parts
    top = parts[0]
    if top.endswith("norm"):
        return "norm"
    return top if top in COMPONENTS else "other"


def matrix_parameters(model: nn.Module, exclude: tuple[str, ...]) -> int:
    """Weights that every token is multiplied by: those of two dimensions, `exclude`d components aside."""
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and _component(name) not in exclude)


def largest_part(model: LanguageModel) -> int:
    """Parameters of the largest block, of the head or of the embedding: what a layerwise update has a gradient of at a time."""
    embedding = sum(parameter.numel() for parameter in model.embed_parameters())
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    head = model.num_parameters() - sum(blocks) - (0 if model.head_is_tied() else embedding)
    return max(*blocks, embedding, head)


def attention_flops(dim: int, seq_len: int) -> int:
    """Forward and backward, per token and layer: two products forward, four backward, over (seq_len + 1) / 2 keys."""
    return 6 * dim * (seq_len + 1)


def head_loss_options(model: LanguageModel) -> CrossEntropyOptions:
    """The model's options; label smoothing and z-loss in training mode only."""
    options = model.loss_options
    if model.training:
        return CrossEntropyOptions(options.chunk_tokens, options.label_smoothing, options.z_loss, options.soft_targets)
    return CrossEntropyOptions(options.chunk_tokens)
