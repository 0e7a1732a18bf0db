"""What every model of lowmem offers to engines, generation and reports."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lowmem.nn.attention import ModelCache
from lowmem.nn.layers import DenseHead, LoRPtHead
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.loss import CrossEntropyOptions, SoftTargets
from lowmem.nn.quantized import MIN_QUANTIZED_NUMEL, WeightBits, WeightFormat, quantize, stored_bytes

Checkpointing = Literal["none", "block", "selective", "low_rank"]


@dataclass(frozen=True)
class LossOptions:
    """How a model computes its training loss.

    Attributes:
        chunk_tokens: tokens whose logits are alive at once; 0 picks about 16 MiB of logits, but no fewer
            than dim / 2 tokens.
        label_smoothing: share of the probability spread over the vocabulary; training mode only.
        z_loss: weight of log(Z)^2; training mode only.
    """

    chunk_tokens: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


Place = Callable[[nn.Module, int], nn.Module]  # what becomes of a block, by its number, once it has its weights


def stays(block: nn.Module, index: int) -> nn.Module:
    """The `Place` of blocks that live where they are made."""
    return block


@dataclass(frozen=True)
class MatrixHead:
    """A head whose logits are norm(hidden) @ weight.T + bias, scaled and capped as the model's options say.

    Attributes:
        norm: what comes before the matrix.
        weight: (V, C); the embedding's where the head is tied.
        bias: (V,) or None.
    """

    norm: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None


class LanguageModel(nn.Module, ABC):
    """Embedding, a list of blocks, a final norm and a head.

    The parts are separate so that an engine may drive them one by one:
    `hidden = embed(tokens)`, then each of `blocks`, then `head_loss(hidden, targets, denominator)`.

    Attributes:
        keeps_segments_apart: whether a row may hold several segments.
        blocks_take_caches: whether `blocks` can be called with the layers of a cache; else only `forward` can decode.
        logit_scale, logit_softcap: what the head does to its products; see `lowmem.nn.loss.CrossEntropyOptions`.
    """

    keeps_segments_apart: bool = True
    blocks_take_caches: bool = True
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    vocab_size: int
    max_seq_len: int
    loss_options: LossOptions = LossOptions()
    activation_checkpointing: Checkpointing = "none"

    @abstractmethod
    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        denominator: float | torch.Tensor = 1.0,
        cache: Any = None,
        segments_BT: torch.Tensor | None = None,
        soft_targets: SoftTargets | None = None,
    ) -> torch.Tensor:
        """Loss if `targets_BT` is given, else logits.

        Args:
            tokens_BT: (batch, time) int64.
            targets_BT: (batch, time) int64, IGNORE_INDEX where nothing is predicted. The loss is the sum over predicted
                tokens divided by `denominator`: micro-batches of one global batch share its denominator.
            cache: from `new_cache`; tokens_BT continue what it holds, and it is extended in place.
            segments_BT: int32; tokens of one number see none of another, and positions begin anew. Not together with a cache.
            soft_targets: a teacher's predictions for these tokens, which the loss learns from, too; training mode only.
        Returns:
            fp32 scalar loss, or (batch, time, vocab) logits.
        """

    @abstractmethod
    def embed(self, tokens_BT: torch.Tensor, start: int | tuple[int, ...] = 0, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, time) -> (batch, time, width), for positions from `start` on (one for all sequences, or one for each), or from 0 in
        each segment."""

    def block(self, index: int, segments_BT: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """Block number `index` as a function of its input alone."""
        block = self.blocks[index]
        return block if segments_BT is None else partial(block, segments_BT=segments_BT)

    @abstractmethod
    def head_loss(
        self,
        hidden_BTC: torch.Tensor,
        targets_BT: torch.Tensor,
        denominator: float | torch.Tensor = 1.0,
        soft_targets: SoftTargets | None = None,
    ) -> torch.Tensor:
        """Loss from the last block's output; see `forward`."""

    @abstractmethod
    def new_cache(self, batch_size: int, max_len: int) -> ModelCache[Any]:
        """State for decoding `batch_size` sequences of up to `max_len` tokens each; its memory is allocated here."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> int:
        """Floating point operations per token of forward plus backward, recomputation not counted."""

    @abstractmethod
    def component_parameters(self) -> dict[str, int]:
        """Parameters by component (embedding, attention, mlp, norm, head, ...); they sum to `num_parameters()`."""

    def embed_parameters(self) -> list[nn.Parameter]:
        """What `embed` uses: the embedding, and learned positions where there are any."""
        parts = [getattr(self, name, None) for name in ("embedding", "positions")]
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def head_is_tied(self) -> bool:
        """Whether `head_loss` uses the embedding, too."""
        return False

    def tied_parameters(self) -> list[nn.Parameter]:
        """Those of `embed_parameters` that `head_loss` uses, too."""
        return [self.embedding.weight] if self.head_is_tied() else []  # type: ignore[union-attr, list-item]

    def dense_head(self) -> "MatrixHead | None":
        """The final norm and the matrix, where `head_loss` is that of products with one plain matrix, its own or the embedding's."""
        return None

    def lookup_parameter(self) -> nn.Parameter | None:
        """The matrix of which `embed` looks up a row for each token, where it uses the token ids for nothing else."""
        return None

    def head_product(self, hidden_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, weight and bias of which the logits of the last block's output are the product: x @ weight.T + bias."""
        normed = self.norm(hidden_BTC)
        if self.head_is_tied():
            return normed, self.embedding.weight, None  # type: ignore[return-value, union-attr]
        if isinstance(self.head, LoRPtHead):
            return self.head.latent(normed), self.head.up, self.head.bias
        return normed, self.head.weight, self.head.bias  # type: ignore[return-value, union-attr]

    def num_parameters(self) -> int:
        """All parameters, frozen ones included, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_trained_parameters(self) -> int:
        """Those that are trained."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def lr_scales(self) -> dict[int, float]:
        """By id of a parameter: how many times the learning rate it has; 1 where it is not named."""
        return {}

    def undecayed(self) -> set[int]:
        """Ids of parameters that never decay, besides those that `lowmem.optim.from_config.decay_groups` knows by their kind."""
        return set()

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module by the name that settings, messages and files have for it."""
        return self.named_modules()

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds; see `saved_tensors`."""
        return saved_tensors(self)

    def component_bytes(self) -> dict[str, int]:
        """Bytes of the weights by component, as they are stored now."""
        return bytes_by_component(self)


def padding_rows(model: nn.Module, parameter: nn.Parameter) -> set[int]:
    """Rows of an embedding's matrix that get no gradient from being looked up."""
    found = {getattr(module, "padding_idx", None) for module, _ in _holders(model, parameter)}
    return {row % parameter.shape[0] for row in found if row is not None}


@contextmanager
def stand_in(model: nn.Module, parameter: nn.Parameter, value: torch.Tensor) -> Iterator[nn.Parameter]:
    """Have the modules that hold `parameter` hold `value` in its place, as a parameter of its own, all rows of which get gradients."""
    replacement, holders = nn.Parameter(value), _holders(model, parameter)
    padding = [getattr(module, "padding_idx", None) for module, _ in holders]
    try:
        for module, name in holders:
            module._parameters[name] = replacement
            if hasattr(module, "padding_idx"):
                module.padding_idx = None  # type: ignore[assignment]
        yield replacement
    finally:
        for (module, name), row in zip(holders, padding, strict=True):
            module._parameters[name] = parameter
            if hasattr(module, "padding_idx"):
                module.padding_idx = row  # type: ignore[assignment]


def _holders(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    return [(module, name) for module in model.modules() for name, held in module._parameters.items() if held is parameter]


_MATRICES = {nn.Linear: ("weight",), nn.Embedding: ("weight",), LoRPtLinear: ("down", "up")}  # what may be quantised
_OUTER = (nn.Embedding, DenseHead, LoRPtHead)
OUTER_BITS: WeightBits = 8  # of these, never fewer: at 4 they cost more in loss than all blocks together
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
                value: torch.Tensor = quantize(parameter.detach().to(form.dtype), OUTER_BITS if isinstance(part, _OUTER) else form.bits)
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


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of `model` holds, by name: all of it where everything is trained; else what is trained, as the rest is read again
    from where it came from. Parameters are the model's own.

    Memory: none.
    """
    named = model.state_dict(keep_vars=True)
    if all(parameter.requires_grad for parameter in model.parameters()):
        return named
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def weight_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the weights have, which is what adapters of another one must compute in."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


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


def largest_part_bytes(model: LanguageModel) -> int:
    """Bytes of what is trained of the largest block, of the head or of the embedding: a layerwise update has one gradient of them."""

    def trained(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad)

    embedding = trained(model.embed_parameters())
    blocks = [trained(block.parameters()) for block in model.blocks]
    head = trained(model.parameters()) - sum(blocks) - embedding + trained(model.tied_parameters())
    return max(*blocks, embedding, head)


def attention_flops(dim: int, seq_len: int) -> int:
    """Forward and backward, per token and layer: two products forward, four backward, over (seq_len + 1) / 2 keys."""
    return 6 * dim * (seq_len + 1)


def head_loss_options(model: LanguageModel, soft_targets: SoftTargets | None = None) -> CrossEntropyOptions:
    """The model's options; label smoothing, z-loss and a teacher's predictions in training mode only."""
    options, reshaped = model.loss_options, {"scale": model.logit_scale, "softcap": model.logit_softcap}
    if model.training:
        return CrossEntropyOptions(options.chunk_tokens, options.label_smoothing, options.z_loss, soft_targets, **reshaped)
    return CrossEntropyOptions(options.chunk_tokens, **reshaped)
