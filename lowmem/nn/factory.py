"""Chooses, layer by layer, between dense and low-rank weights."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from lowmem.config import LorptConfig
from lowmem.errors import ConfigError
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LoRPtLinear, LoRPtSplit


def lorpt_rank(lorpt: LorptConfig, group: str, name: str) -> int | Literal["auto"]:
    """Rank of one layer; 0 is dense.

    Args:
        group: attention, mlp or head; a group that is not in `lorpt.targets` stays dense.
        name: dotted module name that the patterns of `lorpt.ranks` are matched against.
    """
    if group not in lorpt.targets:
        return 0
    matches = (rank for pattern, rank in lorpt.ranks.items() if fnmatchcase(name, pattern))
    return next(matches, lorpt.rank)


def bottleneck_of(lorpt: LorptConfig) -> Literal["linear", "silu"]:
    """What stands between the factors of a model that is trained from scratch."""
    return "silu" if lorpt.bottleneck == "auto" else lorpt.bottleneck


def make_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    *,
    group: str,
    name: str,
    lorpt: LorptConfig,
    dense_std: float = 0.02,
    splits: Sequence[int] = (),
) -> Linear | LoRPtLinear:
    """The layer that `lorpt` asks for under this name.

    Raises:
        ConfigError: the rank is negative or saves nothing; the message names the layer.
    """
    rank = lorpt_rank(lorpt, group, name)
    if rank == 0:
        return Linear(in_features, out_features, bias, std=dense_std, splits=splits)
    try:
        return LoRPtLinear(in_features, out_features, rank, bias, bottleneck_of(lorpt), lorpt.init, dense_std, splits=splits)
    except ConfigError as error:
        raise ConfigError(f"model.lorpt, layer {name}: {error}") from None


class MixedSplit(nn.Module):
    """Several layers of one input, some dense and some low-rank, applied one after another."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., in) -> one (..., out) per layer."""
        return tuple(layer(x) for layer in self.children())


class LinearFactory:
    """Makes the linear layers of one model and remembers their names, so that a pattern without a match is refused.

    Args:
        lorpt: which layers are low-rank.
    """

    def __init__(self, lorpt: LorptConfig):
        self.lorpt = lorpt
        self._names: list[str] = []

    def linear(self, in_features: int, out_features: int, bias: bool, *, group: str, name: str, dense_std: float = 0.02) -> nn.Module:
        """One layer; see `make_linear`."""
        self.note(group, name)
        return make_linear(in_features, out_features, bias, group=group, name=name, lorpt=self.lorpt, dense_std=dense_std)

    def split(self, in_features: int, outputs: Mapping[str, int], bias: bool, *, group: str, name: str) -> nn.Module:
        """Several layers of one input, named `name.output`: one fused matrix where all are dense, computed together where all are
        low-rank. With `lorpt.share_down` they are one low-rank layer called `name`."""
        if self.lorpt.share_down and self.lorpt.rank and group in self.lorpt.targets:
            self.note(group, name)
            sizes = tuple(outputs.values())
            return make_linear(in_features, sum(sizes), bias, group=group, name=name, lorpt=self.lorpt, splits=sizes)
        names = {output: f"{name}.{output}" for output in outputs}
        for full_name in names.values():
            self.note(group, full_name)
        ranks = [lorpt_rank(self.lorpt, group, full_name) for full_name in names.values()]
        if not any(ranks):
            return Linear(in_features, sum(outputs.values()), bias, splits=tuple(outputs.values()))
        layers = {
            output: make_linear(in_features, size, bias, group=group, name=names[output], lorpt=self.lorpt)
            for output, size in outputs.items()
        }
        return LoRPtSplit(layers) if all(ranks) else MixedSplit(layers)  # type: ignore[arg-type]

    def note(self, group: str, name: str) -> None:
        """Remember a layer that the patterns may name."""
        if group in self.lorpt.targets:
            self._names.append(name)

    def check_patterns(self) -> None:
        """Call when every layer is made.

        Raises:
            ConfigError: a pattern of `lorpt.ranks` matches no layer of the targets.
        """
        idle = [pattern for pattern in self.lorpt.ranks if not any(fnmatchcase(name, pattern) for name in self._names)]
        if idle:
            known = ", ".join(dict.fromkeys(self._names)) if len(self._names) <= 12 else ", ".join(self._names[:12]) + ", ..."
            raise ConfigError(
                f"model.lorpt.ranks has {', '.join(idle)}, which matches no layer of model.lorpt.targets "
                f"({', '.join(self.lorpt.targets)}); layers: {known or 'none'}; correct the pattern or the targets"
            )
