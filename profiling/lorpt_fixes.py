"""What has been proposed against the weaknesses of low-rank pretraining and is no setting of lowmem: for `study_lorpt.py` alone.

Each is a function (model, optimizer, optim, steps) -> a function of the step just done.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lowmem.nn.lorpt import LoRPtLinear, LoRPtSplit, MixedSplit
from lowmem.optim.from_config import learning_rate

RESETS = 4  # refactorisations in a run, its end included
GUIDED_SHARE = 0.5  # of the run


def low_rank_layers(model: nn.Module) -> list[LoRPtLinear]:
    """Every LoRPt layer."""
    return [module for module in model.modules() if isinstance(module, LoRPtLinear)]


def decay_on_product(model, optimizer, optim, steps) -> Callable[[int], None]:  # type: ignore[no-untyped-def]
    """lambda / 2 * |up down|^2 instead of decay of each factor. Source: Khodak et al. 2021, arXiv:2105.01029."""
    factors = {id(p) for layer in low_rank_layers(model) for p in (layer.down, layer.up)}
    for group in list(optimizer.param_groups):
        chosen = [p for p in group["params"] if id(p) in factors]
        group["params"] = [p for p in group["params"] if id(p) not in factors]
        if chosen:
            optimizer.param_groups.append({**group, "params": chosen, "weight_decay": 0.0})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]

    @torch.no_grad()
    def after(step: int) -> None:
        weight = learning_rate(optim, step, steps) * optim.weight_decay
        for layer in low_rank_layers(model):
            up, down = layer.up @ (layer.down @ layer.down.t()), (layer.up.t() @ layer.up) @ layer.down
            layer.up.sub_(up, alpha=weight)
            layer.down.sub_(down, alpha=weight)

    return after


def refactorize_and_reset(model, optimizer, optim, steps) -> Callable[[int], None]:  # type: ignore[no-untyped-def]
    """After each quarter of the run: the same product from balanced factors U sqrt(S), sqrt(S) V, and momenta of zero."""

    @torch.no_grad()
    def after(step: int) -> None:
        if step % (steps // RESETS) or step == steps:
            return
        for layer in low_rank_layers(model):
            q_up, r_up = torch.linalg.qr(layer.up)
            q_down, r_down = torch.linalg.qr(layer.down.t())
            left, values, right = torch.linalg.svd(r_up @ r_down.t())
            layer.up.copy_(q_up @ left * values.sqrt())
            layer.down.copy_((q_down @ right.t() * values.sqrt()).t())
            for factor in (layer.up, layer.down):
                for state in optimizer.state[factor].values():
                    if isinstance(state, torch.Tensor) and state.shape == factor.shape:
                        state.zero_()

    return after


class _SelfGuided(LoRPtLinear):
    share = 1.0

    def forward(self, x):  # type: ignore[no-untyped-def]
        low = super().forward(x)
        return low if self.share == 0 else self.share * F.linear(x, self.dense) + (1 - self.share) * low


def self_guided(model, optimizer, optim, steps) -> Callable[[int], None]:  # type: ignore[no-untyped-def]
    """A dense layer of the same product beside each, faded out by a cosine over the first half. Source: arXiv:2406.16450."""
    for module in list(model.modules()):
        if isinstance(module, LoRPtSplit):
            module.__class__ = MixedSplit
    guided = low_rank_layers(model)
    for layer in guided:
        layer.__class__ = _SelfGuided
        layer.dense = nn.Parameter((layer.up @ layer.down).detach())
    optimizer.add_param_group({"params": [layer.dense for layer in guided], "weight_decay": optim.weight_decay})

    def after(step: int) -> None:
        progress = min(1.0, step / (GUIDED_SHARE * steps))
        for layer in guided:
            layer.share = 0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else 0.0

    return after


def larger_up_lr(model, optimizer, optim, steps) -> Callable[[int], None]:  # type: ignore[no-untyped-def]
    """Twice the learning rate for `up`. Source: LoRA+, arXiv:2402.12354."""
    ups = {id(layer.up) for layer in low_rank_layers(model)}
    for group in list(optimizer.param_groups):
        chosen = [p for p in group["params"] if id(p) in ups]
        group["params"] = [p for p in group["params"] if id(p) not in ups]
        if chosen:
            optimizer.param_groups.append({**group, "params": chosen, "lr_scale": 2.0})
    return lambda step: None


FIXES = {
    "decay on the product": decay_on_product,
    "refactorise and reset": refactorize_and_reset,
    "self-guided start": self_guided,
    "twice the lr for up": larger_up_lr,
}
