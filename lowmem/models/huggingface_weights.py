"""How the weights of a model of transformers are kept: as they are, in codes, in NF4, or as low-rank factors of them.

A model on the meta device gets the layers of its kind at once; one whose weights are read gets each layer as that is given its weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem.config.schema import LorptConfig
from lowmem.models.base import OUTER_BITS, store_as
from lowmem.models.huggingface import component_of
from lowmem.models.huggingface_body import find_blocks, find_body
from lowmem.nn.arrival import on_arrival
from lowmem.nn.linear import CodedLinear
from lowmem.nn.lorpt import LinearFactory, LoRPtLinear, lorpt_rank
from lowmem.nn.lorptize import factor_on_arrival, factoring_workspace, is_conv1d, low_rank_shapes, replace_shapes
from lowmem.nn.nf4 import Nf4, plain_linears, quantise_on_arrival, store_linears_as_nf4
from lowmem.nn.quantized import MIN_QUANTIZED_NUMEL, QuantizedWeight, WeightBits, WeightFormat, quantize
from lowmem.system.errors import ConfigError

# kernels of these families read the weight of the layer of that name past the layer
FUSED = {"out_proj": ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")}


@dataclass(frozen=True)
class Kept:
    """What becomes of the weights of a model.

    Attributes:
        form: of all that nothing else is said of.
        nf4: how linear layers of the blocks are kept in NF4.
        lorpt: which linear layers of the blocks are factored, and at which rank.
        blank: factors are left zero, for those of a checkpoint.
    """

    form: WeightFormat
    nf4: Nf4 | None = None
    lorpt: LorptConfig | None = None
    blank: bool = False

    def changes_layers(self) -> bool:
        """Whether some weights are kept otherwise than as tensors of their own shapes."""
        return self.nf4 is not None or self.form.bits is not None or self.factors_layers()

    def factors_layers(self) -> bool:
        """Whether some layers become low-rank ones."""
        return self.lorpt is not None and (self.lorpt.rank != 0 or any(self.lorpt.ranks.values()))


def convert_shapes(model: Any, kept: Kept) -> None:
    """Give a model on the meta device the layers of its kind, in place.

    Raises:
        ConfigError: there are no such layers, or a rank saves nothing.
    """
    if kept.nf4 is not None:
        store_linears_as_nf4(_blocks(model), kept.nf4.double)
    replace_shapes(model, _low_rank_layers(model, kept))
    for layer in _blocks(model).modules():
        if isinstance(layer, LoRPtLinear):
            store_as(layer, kept.form)
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for module, bits in _coded_layers(model, kept):
        weight: Any = module.weight
        if weight not in shared:
            shared[weight] = _coded(model, bits, module, weight)
        module.weight = shared[weight]


def convert_on_arrival(model: Any, kept: Kept) -> Callable[[], None]:
    """Have the layers of a model whose weights are read next keep them in its kind.

    Returns:
        What is to be called when all are read.
    Raises:
        ConfigError: see `convert_shapes`.
    Memory: what is kept, and at a time one tensor; where layers are factored also its singular vectors in fp32.
    """
    if kept.nf4 is not None:
        quantise_on_arrival(_blocks(model), kept.nf4.double)
    layers = _low_rank_layers(model, kept)
    factored = {id(model.get_submodule(name)) for name in layers}
    coded = [(module, bits) for module, bits in _coded_layers(model, kept) if id(module) not in factored]
    settle = [on_arrival(module, partial(_coded, model, bits)) for module, bits in coded]
    place = factor_on_arrival(model, layers, partial(store_as, stored=kept.form), blank=kept.blank)

    def finish() -> None:
        place()
        for each in settle:
            each()

    return finish


def reading_workspace(model: Any, kept: Kept) -> None:
    """On a device without numbers allocate for a moment what reading the largest layer takes beside what is kept of it.

    Args:
        model: converted.
    """
    layers = {layer: layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, LoRPtLinear)}
    coded = [parameter.numel() for parameter in model.parameters() if isinstance(parameter, QuantizedWeight)]
    if layers or coded:
        read = torch.empty(max([*layers.values(), *coded]), dtype=kept.form.dtype)
        if layers:
            factoring_workspace(max(layers, key=lambda layer: layers[layer]))
        del read


def _blocks(model: Any) -> nn.ModuleList:
    return find_blocks(find_body(model), model.config)[1]


def _low_rank_layers(model: Any, kept: Kept) -> dict[str, LoRPtLinear]:
    """By name the layers that take the places of linear ones, without storage."""
    lorpt = kept.lorpt
    if lorpt is None or not kept.factors_layers():
        return {}
    blocks, factory = _blocks(model), LinearFactory(lorpt)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    family = str(model.config.model_type)
    ranks = {}
    for inner, layer in blocks.named_modules():
        linear = type(layer) is nn.Linear or is_conv1d(layer)
        if not linear or family in FUSED.get(inner.rpartition(".")[2], ()):
            continue
        name, group = f"{prefix}.{inner}", component_of(f"{inner}.weight")
        factory.note(group, name)
        rank = lorpt_rank(lorpt, group, name)
        if rank != 0:
            ranks[name] = rank
    factory.check_patterns()
    if not ranks:
        raise ConfigError(
            f"model.lorpt factors no layer of this {family} model: its blocks have no linear layers of model.lorpt.targets "
            f"({', '.join(lorpt.targets)}) with a rank; change them, or drop model.lorpt"
        )
    try:
        return low_rank_shapes(model, ranks)
    except ConfigError as error:
        raise ConfigError(f"model.lorpt, {error}") from None


def _coded_layers(model: Any, kept: Kept) -> list[tuple[nn.Module, WeightBits]]:
    """The layers whose weights are kept in codes, and of how many bits: embedding, head and what else is outside of blocks have 8."""
    if kept.form.bits is None:
        return []
    blocks = _blocks(model)
    if not kept.factors_layers():
        plain_linears(blocks, f"int{kept.form.bits}")
    inside = {id(module) for module in blocks.modules()}
    words = model.get_input_embeddings()
    return [
        (module, kept.form.bits if id(module) in inside else OUTER_BITS)
        for module in model.modules()
        if type(module) in (nn.Linear, CodedLinear) or module is words
    ]


def _coded(model: Any, bits: WeightBits, layer: nn.Module, weight: nn.Parameter) -> nn.Parameter:
    """The weight as `layer` keeps it; a linear layer becomes one that multiplies by codes, the head is left to `HuggingFaceModel`."""
    if weight.numel() < MIN_QUANTIZED_NUMEL:
        return weight
    if type(layer) is nn.Linear and layer is not model.get_output_embeddings():
        layer.__class__ = CodedLinear
    return nn.Parameter(quantize(weight.detach(), bits))
