"""What a step leaves besides weights: optimizer states and random number generators, to be saved and put back exactly."""

import base64
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from lowmem.optim.low_bit import LowBitOptimizer, fit_states
from lowmem.system.errors import CheckpointError


def random_state(device: torch.device) -> dict[str, str]:
    """States of the generators that a step on `device` may use."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_random_state(state: dict[str, str], device: torch.device) -> None:
    """Put back what `random_state` returned; a generator that this machine does not have is left out."""

    def tensor(name: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(state[name])), dtype=torch.uint8)

    torch.set_rng_state(tensor("cpu"))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(tensor("cuda"), device)


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


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Iterable[tuple[str, torch.Tensor]],
    scalars: Scalars,
    elsewhere: Collection[str] = (),
) -> None:
    """Put back what `optimizer_tensors` returned, each on the device of its parameter.

    Args:
        tensors: names and states, which become the optimizer's own.
        elsewhere: names of states that are not on the device, and not in `tensors`.
    Raises:
        CheckpointError: a state names a parameter that the model does not have, or is not of the shape and the dtype that it must be.
    Memory: the states.
    """
    host_only = {"step"} if not any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups) else set()
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, value in tensors:
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"the checkpoint has optimizer state for {name}, which this model does not have")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(value.device if key in host_only else parameter.device)
    if not isinstance(scalars, dict) or not all(isinstance(values, dict) for values in scalars.values()):
        raise CheckpointError("the checkpoint has optimizer states that are no objects; its state.json is damaged")
    for name, values in scalars.items():
        if name not in parameters:
            raise CheckpointError(f"the checkpoint has optimizer state for {name}, which this model does not have")
        optimizer.state[parameters[name]].update(values)
    if isinstance(optimizer, LowBitOptimizer):
        try:
            fit_states(optimizer)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"the checkpoint has optimizer states that do not belong together ({error})") from error
    for name, parameter in parameters.items():
        if optimizer.state.get(parameter):
            expected = _expected_states(optimizer, parameter)
            here = {key: wanted for key, wanted in expected.items() if f"{name}.{key}" not in elsewhere}
            _check_states(name, optimizer.state[parameter], here)


def _expected_states(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    """What is known of the states of a parameter: all of them of lowmem's optimizers, moments in full of others."""
    if isinstance(optimizer, LowBitOptimizer):
        return optimizer.fresh_states(parameter)
    found = optimizer.state[parameter]
    moments = [key for key in ("exp_avg", "exp_avg_sq") if isinstance(found.get(key), torch.Tensor) and found[key].is_floating_point()]
    return {key: torch.empty(parameter.shape, dtype=found[key].dtype, device="meta") for key in moments}


def _check_states(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Kernels trust the sizes of what they are given.

    Raises:
        CheckpointError: a state is missing, or of another shape or dtype.
    """
    for key, wanted in expected.items():
        value = found.get(key)
        if isinstance(wanted, torch.Tensor):
            right = isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
            what = f"{wanted.dtype} {tuple(wanted.shape)}"
        else:
            right, what = value is not None and type(value) is type(wanted) and value >= 0, "a count"
        if not right:
            shown = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:40]
            raise CheckpointError(
                f"the checkpoint has optimizer state {name}.{key} of {shown}, expected {what}; was it saved with another configuration?"
            )
