"""From dense layers to LoRPt ones and back, and from one rank to another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import nn

from lowmem.nn.arrival import on_arrival
from lowmem.nn.layers import DenseHead, LoRPtHead
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LoRPtLinear, LoRPtSplit, MixedSplit, break_even_rank, top_singular
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import ConfigError


class LoRPtConv1D(LoRPtLinear):
    """In the place of the transposed layer of Hugging Face's GPT-2, whose files hold its weight as (in, out)."""


@dataclass(frozen=True)
class Converted:
    """One layer that `lorptize` replaced.

    Attributes:
        name: dotted module name.
        in_features, out_features, rank: its shape.
        retained_energy: share of the sum of squared singular values that the rank keeps; None if the factors were drawn anew.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    retained_energy: float | None


@torch.no_grad()
def lorptize(
    model: nn.Module,
    rank: int | Literal["auto"] = "auto",
    targets: Sequence[str] = ("*",),
    ranks: Mapping[str, int | Literal["auto"]] | None = None,
    *,
    method: Literal["svd", "scratch"] = "svd",
    bottleneck: Literal["linear", "silu"] = "linear",
) -> list[Converted]:
    """Replace linear layers of `model` by LoRPt layers, in place.

    nn.Linear and the transposed Conv1D of Hugging Face's GPT-2 are replaced. Embeddings, norms and layers whose weight another module
    shares stay as they are, and so does the output layer (`model.get_output_embeddings()`) unless a pattern names it without wildcards.

    Args:
        model: any module, for example a Hugging Face causal language model.
        rank: of every layer that no pattern of `ranks` names.
        targets: patterns of module names, such as "*.mlp.*"; a name or the last part of one suffices.
        ranks: rank by pattern; the first match wins, 0 leaves the layer dense.
        method: svd: the best approximation of the layer's present weight. scratch: factors whose product has the std of that weight.
        bottleneck: silu is for training from scratch: it makes the layer another function.
    Returns:
        The layers that were replaced, in the order of the model.
    Raises:
        ConfigError: a pattern matches nothing, a rank saves nothing (the message names the layer and the break-even), or silu with svd.
    Memory: one dense layer and its singular vectors at a time.
    """
    if method == "svd" and bottleneck != "linear":
        raise ConfigError(f"bottleneck is {bottleneck}, which cannot reproduce trained weights; use method=scratch, or linear")
    ranks = dict(ranks or {})
    layers = dict(_candidates(model))
    _check_patterns([*targets, *ranks], list(layers))
    output = _output_name(model)
    plan = []
    for name, layer in layers.items():
        if not _matches(name, targets) or (name == output and not {name, name.rpartition(".")[2]} & {*targets, *ranks}):
            continue
        chosen = next((r for pattern, r in ranks.items() if _matches(name, [pattern])), rank)
        if chosen != 0:
            plan.append((name, layer, _empty(name, layer, chosen, bottleneck)))  # refused before anything is replaced
    return [_replace(model, name, layer, empty, method) for name, layer, empty in plan]


@torch.no_grad()
def merge_lorpt(model: nn.Module) -> list[str]:
    """Replace every LoRPt layer of `model` by the nn.Linear that computes the same, in place; layers of one input become one matrix.

    Returns:
        Names of the layers that were merged.
    Raises:
        ConfigError: a layer has a non-linear bottleneck; nothing is changed then.
    Memory: one dense layer more at a time.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRPtLinear)]
    for name, layer in layers:
        if layer.bottleneck != "linear":
            raise ConfigError(
                f"{name} has a LoRPt bottleneck={layer.bottleneck}, is no single matrix and cannot be merged; "
                "train with model.lorpt.bottleneck=linear, or keep the factors"
            )
    for name, layer in layers:
        _set(model, name, _dense(layer))
    for name, group in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRPtSplit | MixedSplit)]:
        _set(model, name, _one_below_the_other([child for child in group.children() if isinstance(child, nn.Linear)]))
    return [name for name, _ in layers]


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if name and linear and owners[id(module.weight)] == 1:
            yield name, module


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's layer in Hugging Face transformers: y = x @ weight + bias."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", torch.empty(0)).ndim == 2


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or name.endswith(f".{pattern}") for pattern in patterns)


def _check_patterns(patterns: Sequence[str], names: list[str]) -> None:
    idle = [pattern for pattern in patterns if not any(_matches(name, [pattern]) for name in names)]
    if idle:
        known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise ConfigError(f"{', '.join(idle)} matches no linear layer of {known or 'this model, which has none'}; correct the pattern")


def _output_name(model: nn.Module) -> str:
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else getattr(model, "head", None)
    return next((name for name, module in model.named_modules() if module is output), "")


def _weight(layer: nn.Module) -> torch.Tensor:
    """(out, in)."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().t() if is_conv1d(layer) else weight.detach()


def _empty(name: str, layer: nn.Module, rank: int | Literal["auto"], bottleneck: Literal["linear", "silu"]) -> LoRPtLinear:
    """The replacement, without storage."""
    out_features, in_features = _weight(layer).shape
    kind = LoRPtHead if isinstance(layer, DenseHead) else LoRPtConv1D if is_conv1d(layer) else LoRPtLinear
    with on_meta():
        try:
            return kind(
                in_features, out_features, rank, layer.bias is not None, bottleneck, splits=tuple(getattr(layer, "splits", ()))
            )  # fmt: skip
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from None


def _replace(model: nn.Module, name: str, layer: nn.Module, new: LoRPtLinear, method: str) -> Converted:
    weight = _weight(layer)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    energy = None
    if method == "svd":
        down, up, values = _best_factors(wide, new.rank)
        energy = (values.square().sum() / wide.square().sum().clamp_min(torch.finfo(wide.dtype).tiny)).item()
    else:
        std = wide.std().sqrt() * new.rank**-0.25
        down, up = (torch.randn(p.shape, dtype=wide.dtype, device=wide.device) * std for p in (new.down, new.up))
    new.down, new.up = (nn.Parameter(factor.to(weight.dtype).contiguous()) for factor in (down, up))
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone())  # type: ignore[operator]
    new.train(layer.training)
    _set(model, name, new)
    return Converted(name, new.in_features, new.out_features, new.rank, energy)


def _best_factors(wide: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sqrt(S) V, U sqrt(S) and S of the best approximation of an (out, in) matrix."""
    left, values, right = top_singular(wide, rank)
    root = values.sqrt()
    return root.unsqueeze(1) * right, left * root, values


def factoring_workspace(layer: LoRPtLinear) -> None:
    """On a device without numbers allocate what `factor_on_arrival` takes beside the factors of a layer."""
    wide = torch.empty(layer.out_features, layer.in_features, dtype=torch.float32)
    _best_factors(wide, layer.rank)


def low_rank_shapes(model: nn.Module, ranks: Mapping[str, int | Literal["auto"]]) -> dict[str, LoRPtLinear]:
    """The LoRPt layers that are to take the places of linear layers, by name, without storage.

    Args:
        ranks: by full name of a linear layer.
    Raises:
        ConfigError: a rank saves nothing; the message names the layer.
    """
    return {name: _empty(name, model.get_submodule(name), rank, "linear") for name, rank in ranks.items()}


def replace_shapes(model: nn.Module, layers: Mapping[str, LoRPtLinear]) -> None:
    """Put layers of `low_rank_shapes` into a model without numbers, in the dtype that its weights have there."""
    for name, new in layers.items():
        _set(model, name, new.to(model.get_submodule(name).weight.dtype))  # type: ignore[arg-type]


@torch.no_grad()
def factor_on_arrival(
    model: nn.Module, layers: Mapping[str, LoRPtLinear], store: Callable[[LoRPtLinear], object], *, blank: bool = False
) -> Callable[[], None]:
    """Have each layer of a model factor the weight that it is given next, by truncated SVD: a model is never whole while it is read.

    Args:
        layers: see `low_rank_shapes`.
        store: what becomes of a layer's factors once they are there.
        blank: leave the factors zero, for those of a checkpoint.
    Returns:
        What puts the low-rank layers into their places, once all weights are read.
    Memory: the factors, and at a time one dense layer and its singular vectors in fp32.
    """

    def take(new: LoRPtLinear, layer: nn.Module, weight: nn.Parameter) -> None:
        if blank:
            new.down, new.up = (nn.Parameter(torch.zeros(factor.shape, dtype=weight.dtype)) for factor in (new.down, new.up))
            return
        matrix = weight.detach().t() if is_conv1d(layer) else weight.detach()
        wide = matrix.to(torch.promote_types(weight.dtype, torch.float32))
        if not torch.isfinite(wide).all():  # refused once everything is read
            wide = torch.zeros_like(wide)
        down, up, _ = _best_factors(wide, new.rank)
        new.down, new.up = (nn.Parameter(factor.to(weight.dtype).contiguous()) for factor in (down, up))
        store(new)

    for name, new in layers.items():
        on_arrival(model.get_submodule(name), partial(take, new))

    def finish() -> None:
        for name, new in layers.items():
            dense = model.get_submodule(name)
            new.bias = dense.bias  # type: ignore[assignment]
            _set(model, name, new.train(dense.training))

    return finish


def _dense(layer: LoRPtLinear) -> nn.Linear:
    bias = layer.bias is not None
    with on_meta():
        if isinstance(layer, LoRPtHead):
            dense: nn.Linear = DenseHead(layer.in_features, layer.out_features, bias)
        elif layer.splits:
            dense = Linear(layer.in_features, layer.out_features, bias, splits=layer.splits)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias)
    dense.weight = nn.Parameter(layer.merged_weight())
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().clone())
    return dense.train(layer.training)


def _one_below_the_other(layers: list[nn.Linear]) -> Linear:
    biases = [layer.bias for layer in layers]
    with on_meta():
        fused = Linear(layers[0].in_features, sum(layer.out_features for layer in layers), biases[0] is not None,
                       splits=[layer.out_features for layer in layers])  # fmt: skip
    fused.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))
    if biases[0] is not None:
        fused.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]))
    return fused.train(layers[0].training)


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def _named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """By the names that settings and files have for them, where those are not the modules' own."""
    return getattr(model, "named_layers", model.named_modules)()


def following_layers(model: nn.Module, patterns: Mapping[str, object]) -> Iterator[tuple[str, LoRPtLinear]]:
    """The LoRPt layers whose rank is the model's: those that no pattern names, with their names."""
    for name, module in _named_layers(model):
        if isinstance(module, LoRPtLinear) and not any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name, module


def check_rank(layers: list[tuple[str, LoRPtLinear]], rank: int) -> None:
    """Refuse a rank before anything changes.

    Raises:
        ConfigError: it saves nothing in some layer, or no layer would follow.
    """
    if not layers:
        raise ConfigError("no low-rank layer of this model follows model.lorpt.rank; set it, or drop the rank schedule")
    for name, layer in layers:
        limit = break_even_rank(layer.in_features, layer.out_features)
        if not 1 <= rank < limit:
            raise ConfigError(
                f"the rank schedule asks for {rank}, layer {name} ({layer.out_features}x{layer.in_features}) allows 1 to below "
                f"in*out/(in+out) = {limit:.1f}; lower the rank, or give that layer a rank of its own in model.lorpt.ranks"
            )


def adopt_ranks(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give every LoRPt layer the rank that a file of weights holds for it; its numbers are to be read next.

    Args:
        shapes: of the file's tensors, by name. What does not fit a layer is left to whoever reads the file.
    """
    for name, layer in _named_layers(model):
        if not isinstance(layer, LoRPtLinear):
            continue
        down, up = shapes.get(f"{name}.down", ()), shapes.get(f"{name}.up", ())
        if len(down) == len(up) == 2 and down[1] == layer.in_features and up == (layer.out_features, down[0]) and down[0] != layer.rank:
            layer.down.data, layer.up.data = layer.down.new_empty(down), layer.up.new_empty(up)
            layer.forget_product()


@torch.no_grad()
def change_rank(layer: LoRPtLinear, rank: int, generator: torch.Generator) -> None:
    """Grow or shrink one layer to `rank`.

    Growing: new rows of `down` are drawn with the std of the old ones, new columns of `up` are zero, so the layer computes what it did.
    Shrinking: the best approximation of the product, as U sqrt(S) and sqrt(S) V; with a bottleneck the latents of largest weight stay.

    Args:
        generator: of the new rows, on the CPU.
    Raises:
        ValueError: a gradient is alive.
    Memory: the new factors; rank-sized matrices while shrinking.
    """
    if layer.down.grad is not None or layer.up.grad is not None:
        raise ValueError("the rank of a layer cannot change while its gradients are alive; call zero_grad(set_to_none=True) first")
    layer.forget_product()
    old = layer.rank
    if rank > old:
        std = layer.down.float().square().mean().sqrt()
        rows = torch.randn(rank - old, layer.in_features, generator=generator).to(layer.down.device) * std
        layer.down.data = torch.cat([layer.down, rows.to(layer.down.dtype)])
        layer.up.data = torch.cat([layer.up, layer.up.new_zeros(layer.out_features, rank - old)], dim=1)
    elif rank < old and layer.bottleneck == "linear":
        layer.up.data, layer.down.data = _best_product(layer.up, layer.down, rank)
    elif rank < old:
        weight = layer.up.float().norm(dim=0) * layer.down.float().norm(dim=1)
        kept = weight.topk(rank).indices.sort().values
        layer.up.data, layer.down.data = layer.up[:, kept].contiguous(), layer.down[kept].contiguous()


def _best_product(up: torch.Tensor, down: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors of `rank` of up @ down, balanced, without the product: QR of both, SVD of the small core."""
    q_up, r_up = torch.linalg.qr(up.float())
    q_down, r_down = torch.linalg.qr(down.float().t())
    left, values, right = torch.linalg.svd(r_up @ r_down.t())
    root = values[:rank].sqrt()
    new_up, new_down = (q_up @ left[:, :rank]) * root, (q_down @ right[:rank].t()).t() * root.unsqueeze(1)
    return new_up.to(up.dtype).contiguous(), new_down.to(down.dtype).contiguous()
