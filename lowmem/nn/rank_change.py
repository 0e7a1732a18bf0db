"""Changes the rank of a LoRPt layer: up without changing what it computes, down by its smallest parts.

Parameters stay the same objects, so that optimizers and names are undisturbed; only their shape changes.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from lowmem.errors import ConfigError
from lowmem.nn.lorpt import LoRPtLinear, break_even_rank


def following_layers(model: nn.Module, patterns: Mapping[str, object]) -> Iterator[tuple[str, LoRPtLinear]]:
    """The LoRPt layers whose rank is the model's: those that no pattern names, with their names."""
    for name, module in model.named_modules():
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
    for name, layer in model.named_modules():
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
