"""The optimizer of a run from its configuration: which library, which parameters decay."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowmem.config.schema import STATE_WIDTHS, OptimConfig
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.positions import LearnedPositions
from lowmem.nn.quantized import QuantizedWeight
from lowmem.optim.adamw import AdamW
from lowmem.optim.lion import Lion
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.optim.spectron import Spectron
from lowmem.system.errors import ConfigError


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of one update.

    Args:
        step: 1-based count of updates, this one included.
        total_steps: updates of the whole run, or of its phase; the decay ends there. A longer warm-up is cut to it.
    Source: cosine, Loshchilov & Hutter 2017, arXiv:1608.03983; warm-up, stable, decay, Hu et al. 2024, arXiv:2404.06395.
    """
    warmup = min(optim.warmup_steps, total_steps)
    if step <= warmup:
        return optim.lr * step / warmup
    return optim.lr * _decay(optim, step, warmup, total_steps)


def _decay(optim: OptimConfig, step: int, warmup: int, total_steps: int) -> float:
    """Factor in [min_lr_ratio, 1] after warm-up; exactly min_lr_ratio at the last of `total_steps` unless constant."""
    if optim.schedule == "constant":
        return 1.0
    # wsd: a share of all steps, those of the warm-up too, but no step decays before the warm-up is over
    steps = min(optim.decay_fraction * total_steps, total_steps - warmup) if optim.schedule == "wsd" else total_steps - warmup
    progress = min(1.0, max(0.0, (step - (total_steps - steps)) / steps))
    low = optim.min_lr_ratio
    if optim.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (1 - low) * progress


_EXTRAS = {"bitsandbytes": "bnb", "lion_pytorch": "lion", "deepspeed": "deepspeed"}


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, seed: int = 0, offload: bool = False, partial: bool = False
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`, with decay only where it belongs.

    Args:
        seed: of stochastic rounding.
        offload: DeepSpeed keeps 32-bit states in host memory; its own CPU optimizers are used then, on CPU copies.
        partial: the engine updates tensor by tensor, or rows of one, which only lowmem's optimizers can.
    Returns:
        lowmem's AdamW or Lion where states or weights have fewer than 32 bits; otherwise torch's fused AdamW, lion-pytorch's Lion, or
        DeepSpeed's CPU forms; bitsandbytes' 8-bit forms if asked for.
    Raises:
        ConfigError: the library is not installed, or the combination does not exist.
    """
    if optim.name == "spectron":
        settings: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps, "state_bits": optim.state_bits, "seed": seed}
        return Spectron(spectron_groups(model, optim), lr=optim.lr, momentum=optim.momentum, **settings)
    groups = decay_groups(model, optim.weight_decay)
    if optim.backend == "bitsandbytes":
        return _bitsandbytes_optimizer(groups, optim)
    if offload and optim.state_bits == 32:
        return _deepspeed_cpu_optimizer(groups, optim)
    narrow = any(p.dtype != torch.float32 or isinstance(p, QuantizedWeight) for group in groups for p in group["params"])
    if partial or narrow or optim.state_bits != 32:
        own: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "state_bits": optim.state_bits, "seed": seed}
        return AdamW(groups, eps=optim.eps, **own) if optim.name == "adamw" else Lion(groups, **own)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    return _import("lion_pytorch").Lion(groups, lr=optim.lr, betas=optim.betas)


@torch.no_grad()
def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the states of every parameter as the optimizer's own first step would, so that no later step does; existing ones stay.

    Args:
        optimizer: lowmem's, torch's AdamW, lion-pytorch's Lion, or one of bitsandbytes.
    Raises:
        TypeError: another one.
    Memory: the states.
    """
    if isinstance(optimizer, LowBitOptimizer):
        optimizer.allocate_states()
        return
    allocate = _state_allocator(optimizer)
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if not optimizer.state[parameter]:
                allocate(group, parameter, group_index, index)


def _state_allocator(optimizer: torch.optim.Optimizer) -> Callable[[dict[str, Any], torch.Tensor, int, int], None]:
    """What allocates one parameter's states. Wrapped methods of torch's optimizers are left alone: see `lowmem.optim.low_bit`."""
    if hasattr(optimizer, "init_state"):
        return optimizer.init_state  # bitsandbytes'
    if isinstance(optimizer, torch.optim.AdamW):

        def adamw(group: dict[str, Any], parameter: torch.Tensor, group_index: int, index: int) -> None:
            optimizer.state[parameter].update(
                step=torch.zeros((), dtype=torch.float32, device=parameter.device),  # the fused form keeps it there
                exp_avg=torch.zeros_like(parameter, memory_format=torch.preserve_format),
                exp_avg_sq=torch.zeros_like(parameter, memory_format=torch.preserve_format),
            )

        return adamw
    if type(optimizer).__module__.partition(".")[0] == "lion_pytorch":

        def lion(group: dict[str, Any], parameter: torch.Tensor, group_index: int, index: int) -> None:
            optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)

        return lion
    raise TypeError(f"the states of {type(optimizer).__name__} cannot be allocated ahead of its first step")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; groups with an "lr_scale" take that multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups by decay: matrices; factors of LoRPt layers, half as much; norms, biases, other 1-D parameters and embeddings, none.

    What shall decay is the product up @ down, once: with half the decay each, it shrinks by (1 - lr * weight_decay / 2)^2 a step, which to
    first order is what a dense weight does. Learned positions are embeddings too. A tied head is the embedding's own matrix, so it does
    not decay either. A model of `lowmem.models` says which others do not, and which have a multiple of the learning rate.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | LearnedPositions)}
    factors = {id(p) for module in model.modules() if isinstance(module, LoRPtLinear) for p in (module.down, module.up)}
    embeddings |= getattr(model, "undecayed", set)()
    scales: dict[int, float] = getattr(model, "lr_scales", dict)()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    rest = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decayed if id(p) not in factors], "weight_decay": weight_decay},
        {"params": [p for p in decayed if id(p) in factors], "weight_decay": weight_decay / 2},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [part for group in groups for part in _by_lr_scale(group, scales) if part["params"]]


def _by_lr_scale(group: dict[str, Any], scales: dict[int, float]) -> list[dict[str, Any]]:
    """A group, and beside it those of its parameters that have another learning rate."""
    others = sorted({scales[id(p)] for p in group["params"] if id(p) in scales})
    usual = {**group, "params": [p for p in group["params"] if id(p) not in scales]}
    return [usual] + [{**group, "params": [p for p in group["params"] if scales.get(id(p)) == s], "lr_scale": s} for s in others]


def narrower_states(optim: OptimConfig) -> list[str]:
    """The setting that makes states as narrow as this optimizer's can be; nothing where they are."""
    narrowest = min(STATE_WIDTHS[optim.name])
    return [f"optim.state_bits={narrowest}"] if optim.state_bits > narrowest else []


def spectron_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups for `Spectron`: the factors of LoRPt layers in pairs, the matrices of other linear layers, and everything else, which is left
    to AdamW as `decay_groups` would: embeddings, a dense head, norms, biases.

    Factors have half the decay, as in `decay_groups`. Matrices and factors have `optim.matrix_lr` relative to `optim.lr` as "lr_scale".
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | LoRPtLinear)}
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | LearnedPositions)}
    head = next(reversed(linears), "") if "." not in next(reversed(linears), ".") else ""
    factors = [p for module in linears.values() if isinstance(module, LoRPtLinear) for p in (module.down, module.up)]
    dense = {name: module for name, module in linears.items() if isinstance(module, nn.Linear) and name != head}
    matrices = [module for module in dense.values() if id(module.weight) not in shared]
    scale = optim.matrix_lr / optim.lr if optim.matrix_lr else 1.0
    splits = [tuple(getattr(module, "splits", ())) for module in matrices]
    groups: list[dict[str, Any]] = [
        {"params": factors, "rule": "factors", "weight_decay": optim.weight_decay / 2, "lr_scale": scale},
        {
            "params": [module.weight for module in matrices],
            "rule": "matrix",
            "splits": splits,
            "weight_decay": optim.weight_decay,
            "lr_scale": scale,
        },
    ]
    taken = {id(p) for group in groups for p in group["params"]}
    for group in decay_groups(model, optim.weight_decay):
        groups.append({**group, "params": [p for p in group["params"] if id(p) not in taken]})
    return [group for group in groups if group["params"]]


def _bitsandbytes_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    library = _import("bitsandbytes").optim
    if optim.name == "adamw":
        return library.AdamW8bit(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return library.Lion8bit(groups, lr=optim.lr, betas=optim.betas)


def _deepspeed_cpu_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    library = _import("deepspeed").ops
    if optim.name == "adamw":
        return library.adam.DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return library.lion.DeepSpeedCPULion(groups, lr=optim.lr, betas=optim.betas)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = _EXTRAS[name]
        raise ConfigError(f"this optimizer needs {name}, which is not installed; run: pip install 'lowmem[{extra}]'") from error
