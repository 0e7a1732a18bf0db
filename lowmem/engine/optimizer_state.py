"""Optimizer states as named tensors plus JSON, and back, exactly.

`torch.optim.Optimizer.load_state_dict` casts floating states to the parameter's dtype, which would change fp32 states of
bf16 weights; here every state returns with the dtype it had.
"""

from typing import Any

import torch
from torch import nn

from lowmem.errors import CheckpointError
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.optim.resize import fit_states

Scalars = dict[str, dict[str, Any]]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Scalars]:
    """States by "parameter.state" name, and the states that are plain numbers by parameter.

    Raises:
        TypeError: a state is neither a tensor nor a plain JSON value.
    Memory: none; the tensors are the optimizer's own.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: Scalars = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}.{key}"] = value
            elif value is None or isinstance(value, (int, float, str, bool)):
                scalars.setdefault(name, {})[key] = value
            else:
                raise TypeError(f"optimizer state {key} of {name} is a {type(value).__name__}; only tensors and plain values are saved")
    return tensors, scalars


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], scalars: Scalars) -> None:
    """Put back copies of what `optimizer_tensors` returned, each on the device of its parameter.

    Nothing refers to `tensors` afterwards: those of a safetensors file are mapped onto it, and training would fault, or
    compute with another run's states, once the file is truncated or rewritten.

    Args:
        tensors: consumed: each entry is removed as it is placed, so that host copies do not add up.
    Raises:
        CheckpointError: a state names a parameter that the model does not have.
    Memory: the states; they grow as `tensors` shrinks.
    """
    host_only = {"step"} if not any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups) else set()
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name in list(tensors):
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"the checkpoint has optimizer state for {name}, which this model does not have")
        parameter, value = parameters[name], tensors.pop(full_name)
        device = value.device if key in host_only else parameter.device
        optimizer.state[parameter][key] = value.to(device, copy=True)
    for name, values in scalars.items():
        if name not in parameters:
            raise CheckpointError(f"the checkpoint has optimizer state for {name}, which this model does not have")
        optimizer.state[parameters[name]].update(values)
    if isinstance(optimizer, LowBitOptimizer):
        fit_states(optimizer)
