"""Checkpoints under DeepSpeed: weights gathered from all ranks, and optimizer states of every rank as safetensors and JSON."""

import copy
import io
import json
import os
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.models.base import saved_tensors
from lowmem.system.errors import CheckpointError
from lowmem.system.tensors import LazyTensor, read_tensors, write_tensors


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
    yield from saved_tensors(module).items()


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


# Entries of DeepSpeed's states that loading does not need, with what it finds in their place. The weights among them are in
# model.safetensors; the rest serves DeepSpeed's own conversion scripts.
_LEFT_OUT: dict[str, Any] = {
    "module": {}, "single_partition_of_fp32_groups": [], "fp32_flat_groups": [], "param_shapes": None, "param_slice_mappings": None,
    "buffer_names": None, "shared_params": None, "frozen_param_shapes": None, "frozen_param_fragments": None, "ds_config": None,
}  # fmt: skip
_LOSS_SCALER_KEYS = (
    "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window", "min_scale", "delayed_shift",
    "cur_hysteresis", "consecutive_hysteresis", "dynamic",
)  # fmt: skip
_PLAIN = (bool, int, float, str, type(None))
_TAG = "$type"
_NOT_SAVED_BY_DEEPSPEED = "grad_scaler"


def plug_in(ds_engine: Any, rank: int) -> None:
    """Make `ds_engine` save and load through safetensors and JSON, under names of ours.

    Args:
        ds_engine: what `deepspeed.initialize` returned.
        rank: global rank, part of this rank's file names.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class SafetensorsCheckpointEngine(CheckpointEngine):
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            save_state(state_dict, Path(path))

        def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
            return load_state(Path(path), getattr(ds_engine.optimizer, "loss_scaler", None))

        def commit(self, info: Any) -> bool:
            return True

    ds_engine.checkpoint_engine = SafetensorsCheckpointEngine()
    # DeepSpeed fixes its file names in methods, ending in .pt; these are no pickles and must not look like it.
    partitioned = ds_engine.zero_optimization_partition_weights()
    engine_file = f"engine-rank{rank if partitioned else 0}.json"

    def engine_name(self: Any, path: str, tag: str, mp_placeholder: Any = None, pp_placeholder: Any = None) -> str:
        return os.path.join(path, engine_file)

    def zero_name(self: Any, checkpoints_path: str, tag: str, mp_rank: int, dp_rank: int, bf16_mode: bool) -> str:
        return os.path.join(checkpoints_path, f"zero-rank{dp_rank}.json")

    def engine_names(self: Any, path: str, tag: str) -> list[str]:
        return [engine_name(self, path, tag)]

    ds_engine._get_ckpt_name = types.MethodType(engine_name, ds_engine)
    ds_engine._get_all_ckpt_names = types.MethodType(engine_names, ds_engine)  # DeepSpeed globs, and takes [] in a path for a class
    ds_engine._get_rank_zero_ckpt_name = types.MethodType(zero_name, ds_engine)
    # Scripts that turn DeepSpeed's pickles into weights; model.safetensors has them already.
    ds_engine._copy_recovery_script = types.MethodType(lambda self, path: None, ds_engine)


def save_optimizer(ds_engine: Any, directory: Path) -> None:
    """Write the optimizer states and counters; every rank calls it.

    Raises:
        OSError: disk full or not writable.
        TypeError: DeepSpeed's state holds something this file does not know.
    Memory: one tensor.
    """
    scaler = ds_engine.torch_autocast_z0_gradscaler
    client_state = {_NOT_SAVED_BY_DEEPSPEED: scaler.state_dict()} if scaler is not None else {}
    ds_engine.save_checkpoint(str(directory), tag=".", client_state=client_state, save_latest=False)


def load_optimizer(ds_engine: Any, directory: Path) -> None:
    """Restore what `save_optimizer` wrote, bit for bit; every rank calls it, after the weights are in place.

    Raises:
        CheckpointError: a file is missing or damaged.
    Memory: this rank's states.
    """
    names = [ds_engine._get_ckpt_name(str(directory), ".")]
    if ds_engine.zero_optimization():
        names.append(ds_engine._get_zero_ckpt_name(str(directory), "."))
    for name in names:
        if not Path(name).is_file():
            raise CheckpointError(f"{name} is missing; resume from an older checkpoint with --resume=last_valid")
    with redirect_stdout(io.StringIO()):  # DeepSpeed's BF16_Optimizer left a print() in its loading code
        _, client_state = ds_engine.load_checkpoint(str(directory), tag=".", custom_load_fn=_keep_weights)
    if ds_engine.torch_autocast_z0_gradscaler is not None:
        ds_engine.torch_autocast_z0_gradscaler.load_state_dict(client_state[_NOT_SAVED_BY_DEEPSPEED])


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write one nested state: `path` in JSON, its tensors beside it in a safetensors file.

    Raises:
        OSError: disk full or not writable.
        TypeError: a value has a type that is not written; the message says where it is.
    Memory: one tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    document = _encode(state, "", tensors)
    if tensors:
        write_tensors(path.with_suffix(".safetensors"), tensors)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())


def load_state(path: Path, loss_scaler: Any = None) -> dict[str, Any]:
    """Read back what `save_state` wrote.

    Args:
        loss_scaler: the engine's own; it takes over the saved values and stands in their place.
    Raises:
        CheckpointError: a file is missing or damaged.
    Memory: all its tensors.
    """
    tensor_path = path.with_suffix(".safetensors")
    # clone: the library may map the file instead of reading it, and these tensors live as long as the run.
    tensors = {name: tensor.clone() for name, tensor in read_tensors(tensor_path)} if tensor_path.exists() else {}
    try:
        return _decode(json.loads(path.read_text(encoding="utf-8")), tensors, loss_scaler)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); resume from an older checkpoint with --resume=last_valid") from error


def _keep_weights(src: Any, dst: Any) -> None:
    """DeepSpeed's hook for loading module weights, which are in place already."""


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    if type(value) in _PLAIN:
        return value  # json writes infinities and NaN as Python reads them back
    if isinstance(value, torch.Tensor):
        tensors[where] = value
        return {_TAG: "tensor", "name": where}
    if isinstance(value, torch.dtype):
        return {_TAG: "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, Enum) and type(value.value) in _PLAIN:
        return value.value
    if type(value) in (list, tuple, torch.Size):
        items = [_encode(item, f"{where}/{index}", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {_TAG: type(value).__name__, "items": items}
    if type(value) in (dict, OrderedDict):
        kept = {key: item for key, item in value.items() if key not in _LEFT_OUT}
        pairs = [[_encode(key, f"key of {where}", tensors), _encode(item, f"{where}/{key}", tensors)] for key, item in kept.items()]
        left_out = [key for key in value if key in _LEFT_OUT]
        return {_TAG: "dict", "items": pairs} | ({"left_out": left_out} if left_out else {})
    if type(value).__name__ in ("LossScaler", "DynamicLossScaler"):
        found = {key: getattr(value, key) for key in _LOSS_SCALER_KEYS if hasattr(value, key)}
        return {_TAG: "loss_scaler", "values": found}
    raise TypeError(
        f"DeepSpeed's state holds a {type(value).__module__}.{type(value).__qualname__} at {where or '/'}, which has no JSON form"
    )


def _decode(value: Any, tensors: dict[str, torch.Tensor], loss_scaler: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors, loss_scaler) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value[_TAG]
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "dtype":
        dtype = getattr(torch, value["name"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['name']} is no dtype")
        return dtype
    if kind == "loss_scaler":
        for key in _LOSS_SCALER_KEYS:
            if key in value["values"]:
                setattr(loss_scaler, key, value["values"][key])
        return loss_scaler
    items = [_decode(item, tensors, loss_scaler) for item in value["items"]]
    if kind == "dict":
        return dict(items) | {key: copy.copy(_LEFT_OUT[key]) for key in value.get("left_out", ())}
    if kind in ("tuple", "Size"):
        return tuple(items) if kind == "tuple" else torch.Size(items)
    raise ValueError(f"unknown type {kind!r}")
