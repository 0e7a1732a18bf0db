"""Whole weights out of and into a DeepSpeed engine that keeps them in pieces: one parameter at a time, fp32 master first.

Names are those of the plain module, so a checkpoint's model.safetensors reads the same whichever engine wrote it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.engine.tensor_file import LazyTensor, read_tensors, write_tensors
from lowmem.errors import CheckpointError


def save_weights(ds_engine: Any, path: Path, *, write: bool) -> None:
    """Write every weight; all ranks call it, because gathering a parameter needs all of them.

    Args:
        ds_engine: what `deepspeed.initialize` returned.
        write: true on one rank.
    Raises:
        OSError: disk full or not writable, on the writing rank; the others return.
    Memory: one parameter in fp32.
    """
    tensors = {name: _whole(ds_engine, tensor) for name, tensor in _named_tensors(ds_engine.module)}
    # Ranks must gather in one order; this is the order in which write_tensors makes lazy tensors.
    pending = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    if not write:
        for name in pending:
            tensors[name].get()
        return
    waiting = iter(pending)
    try:
        write_tensors(path, {name: _counted(tensor, waiting) for name, tensor in tensors.items()})
    finally:
        for name in waiting:  # after a failed write the other ranks still wait for these
            tensors[name].get()


def load_weights(ds_engine: Any, path: Path) -> None:
    """Put whole weights back on every rank, into the fp32 master copies too where there are any.

    Raises:
        CheckpointError: the file is missing or damaged, or its names, shapes or dtypes are not those of the model.
    Memory: one parameter.
    """
    targets = dict(_named_tensors(ds_engine.module))
    missing = set(targets)
    partitioned = hasattr(ds_engine.optimizer, "parameter_offload")
    if partitioned:
        ds_engine.optimizer.checkpoint_event_prologue()
    for name, value in read_tensors(path):
        if name not in targets:
            raise CheckpointError(f"{path} holds {name}, which this model does not have; was it saved with another configuration?")
        _place(ds_engine, path, name, targets[name], value)
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; was it saved with another configuration?")
    if partitioned:
        _copy_master_to_partitions(ds_engine.optimizer)
        ds_engine.optimizer.checkpoint_event_epilogue()


def has_master_copy(ds_engine: Any, tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed keeps this parameter a second time, in fp32 and divided among the ranks."""
    return ds_engine.zero_optimization() and isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.state_dict(keep_vars=True).items()


def _whole(ds_engine: Any, tensor: torch.Tensor) -> LazyTensor:
    from deepspeed.utils import safe_get_full_fp32_param

    in_pieces = hasattr(tensor, "ds_id")
    if has_master_copy(ds_engine, tensor) and (in_pieces or tensor.dtype != torch.float32):
        return LazyTensor(_shape(tensor), torch.float32, lambda: safe_get_full_fp32_param(tensor))
    return LazyTensor(_shape(tensor), tensor.dtype, lambda: tensor)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO 3 empties the tensor and remembers its shape


def _counted(tensor: LazyTensor, waiting: Iterator[str]) -> LazyTensor:
    def get() -> torch.Tensor:
        next(waiting)
        return tensor.get()

    return LazyTensor(tensor.shape, tensor.dtype, get)


def _place(ds_engine: Any, path: Path, name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    master = has_master_copy(ds_engine, target)
    dtype = torch.float32 if master else target.dtype
    if _shape(target) != tuple(value.shape) or value.dtype != dtype:
        raise CheckpointError(
            f"{path}: {name} is {value.dtype} {tuple(value.shape)}, the model has {dtype} {_shape(target)}; "
            "was it saved with another configuration?"
        )
    with torch.no_grad():
        if master:
            safe_set_full_fp32_param(target, value)
        if not hasattr(target, "ds_id"):
            target.copy_(value)  # rounds to 16 bits exactly as DeepSpeed does after an update


def _copy_master_to_partitions(optimizer: Any) -> None:
    """ZeRO 3: this rank's share of the weights from its share of the master copy."""
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
