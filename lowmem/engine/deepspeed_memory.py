"""What a rank of a DeepSpeed engine keeps in memory, counted from its tensors."""

from collections.abc import Iterable
from typing import Any

import torch

from lowmem.engine.deepspeed_optimizers import partitions


def memory_components(ds_engine: Any) -> dict[str, int]:
    """Bytes of this rank by component: weights with the fp32 master copy, gradients, optimizer_states.

    Optimizer states exist from the first step on.
    """
    parameters = list(ds_engine.module.parameters())
    held = [parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter for parameter in parameters]
    master = list(partitions(ds_engine))
    inner = getattr(ds_engine.optimizer, "optimizer", ds_engine.optimizer)
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        "weights": _bytes(held) + _bytes(master),
        "gradients": _gradient_bytes(ds_engine, parameters, master),
        "optimizer_states": _bytes(states),
    }


def _gradient_bytes(ds_engine: Any, parameters: list[torch.Tensor], master: list[torch.Tensor]) -> int:
    """Gradients at the end of accumulation: whole below stage 2, this rank's share from there on, and the fp32 share to update with."""
    stage = ds_engine.zero_optimization_stage()
    whole = _bytes(parameters)
    if stage == 0:
        return whole
    accumulated = torch.finfo(ds_engine.get_data_types()[1]).bits // 8 * sum(partition.numel() for partition in master)
    if stage == 1:
        return whole + accumulated
    return accumulated + _bytes(master)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
