"""DeepSpeed's optimizer states as safetensors and JSON instead of pickles, through a checkpoint engine plugged into DeepSpeed (D8).

A state is a nest of dictionaries and lists. Its tensors go into `NAME.safetensors`, everything else, with the tensors' places,
into `NAME.json`. Only the types listed here are written; reading builds nothing else and runs no code from the files.
Weights are not among them: `model.safetensors` holds them whole, see `lowmem.engine.deepspeed_weights`.
"""

import copy
import io
import json
import os
import types
from collections import OrderedDict
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from lowmem.engine.tensor_file import read_tensors, write_tensors
from lowmem.errors import CheckpointError

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
