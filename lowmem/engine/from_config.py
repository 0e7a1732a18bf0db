"""From a resolved configuration to a model and the engine of one process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem.config.schema import RunConfig, TrainConfig
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine, Teacher
from lowmem.engine.storage.backing import NoBacking
from lowmem.engine.storage.blocks import Storage, StreamedBlocks
from lowmem.engine.storage.disk_file import DiskFile
from lowmem.engine.storage.host_memory import HostMemory
from lowmem.models.base import LanguageModel, LossOptions, stays
from lowmem.models.registry import build_model
from lowmem.nn.float8 import use_float8
from lowmem.nn.nf4 import Nf4
from lowmem.nn.quantized import WeightBits, WeightFormat, stored_tensors
from lowmem.system.devices import Precision
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import ConfigError

if TYPE_CHECKING:
    from lowmem.models.huggingface_weights import Kept

_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUANTIZED: dict[str, WeightBits] = {"int8": 8, "int4": 4}


def open_storage(config: RunConfig, device: torch.device) -> Storage:
    """Where the blocks of a model will live, empty.

    Args:
        device: that computes; on the meta device nothing is kept.
    Raises:
        StorageError: `train.storage_dir` cannot be written.
    """
    place = config.train.weights_at
    if place == "device":
        return Storage()
    return StreamedBlocks(
        _open_disk(config, device) if place == "disk" else HostMemory(device) if device.type != "meta" else NoBacking(), device
    )


@contextmanager
def temporary_storage(place: Literal["device", "host", "disk"], directory: Path, device: torch.device) -> Iterator[Storage]:
    """Where the blocks of a model live that is read for one use, empty.

    Args:
        directory: of the scratch file, on a disk; nothing is left there.
    Raises:
        StorageError: it cannot be written.
    """
    if place == "disk":
        storage: Storage = StreamedBlocks(DiskFile(directory, option="--storage_dir"), device)
    else:
        storage = open_storage(RunConfig(train=TrainConfig(weights_at=place)), device)
    try:
        yield storage
    finally:
        storage.close()


def _open_disk(config: RunConfig, device: torch.device) -> DiskFile | NoBacking:
    if device.type == "meta":
        return NoBacking()
    return DiskFile(Path(config.train.storage_dir or config.run_dir))


def build_configured_model(config: RunConfig, new_tokens: Sequence[int] = (), storage: Storage | None = None) -> LanguageModel:
    """The model of a resolved configuration, in its stored dtype, with its adapter, its loss and recomputation set.

    Args:
        new_tokens: ids of the rows that data.add_tokens needs.
        storage: takes over each block as soon as it is there; None leaves all where they are made.
    Raises:
        ConfigError, CheckpointError: see `lowmem.engine.huggingface_files` and `lowmem.models.adapters`.
    Memory: the weights.
    """
    train, model_config = config.train, config.model
    if model_config.path:
        model: LanguageModel = _model_of_transformers(config, new_tokens, storage or Storage())
    elif new_tokens or config.adapter.method != "none":
        what = "data.add_tokens" if new_tokens else f"adapter.method={config.adapter.method}"
        raise ConfigError(f"{what} needs a model of transformers; set model.path, or remove it")
    else:
        model = _own_model(config, storage or Storage())
    checkpointing = train.activation_checkpointing
    model.loss_options = LossOptions(train.loss_chunk_tokens, train.label_smoothing, train.z_loss)
    whole = model_config.path or train.weights_at != "device"
    model.activation_checkpointing = ("block" if whole else "selective") if checkpointing == "auto" else checkpointing
    return model


def _model_of_transformers(config: RunConfig, new_tokens: Sequence[int], storage: Storage) -> LanguageModel:
    """The model of `model.path` with its weights, checked, and its adapter; on the meta device its outline."""
    from lowmem.engine.huggingface_files import load_model, outline, quiet_transformers, resolve_model_path
    from lowmem.models.adapters import apply_adapter, check_adapter_is_used
    from lowmem.models.huggingface import HuggingFaceModel, check_contract
    from lowmem.models.huggingface_weights import Kept

    quiet_transformers()
    directory, form = resolve_model_path(config.model.path, config.model.revision), stored_format(config.train)
    kept = Kept(form, Nf4(config.train.double_quant) if config.train.weight_dtype == "nf4" else None, config.model.lorpt)
    if torch.get_default_device().type == "meta":
        in_parts = kept.changes_layers() or storage.streams
        described = _outline_in_parts(directory, kept, storage) if in_parts else outline(directory, form.dtype)
        model = HuggingFaceModel(described, config.model.max_seq_len)
    else:
        place = storage.place if storage.streams else stays
        model = HuggingFaceModel(load_model(directory, form.dtype, kept=kept, place=place), config.model.max_seq_len)
        check_contract(model, briefly=storage.streams)
    apply_adapter(model, config.adapter, seed=config.train.seed, new_tokens=new_tokens)
    if model.device.type != "meta":
        check_adapter_is_used(model)
    return model


def _outline_in_parts(directory: Path, kept: "Kept", storage: Storage) -> Any:
    """An outline with the layers of its kind, of which a dry run sees what there is at a time and what reading one layer takes, as such a
    model is never whole while it is read."""
    from torch.utils._python_dispatch import _disable_current_modes

    from lowmem.engine.huggingface_files import outline
    from lowmem.models.huggingface_body import find_blocks, find_body
    from lowmem.models.huggingface_weights import convert_shapes, reading_workspace

    with _disable_current_modes(), on_meta():
        model = outline(directory, kept.form.dtype)
        convert_shapes(model, kept)
        blocks = find_blocks(find_body(model), model.config)[1]
    inside = {id(tensor) for tensor in blocks.parameters()}
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    _see({name: tensor for name, tensor in everything.items() if id(tensor) not in inside})
    for index, block in enumerate(blocks):
        _see(dict(block.named_parameters()))
        storage.place(block, index)
    reading_workspace(model, kept)
    return model


def _see(tensors: dict[str, torch.Tensor]) -> None:
    """Have a dry run know that tensors are there."""
    for tensor in stored_tensors(tensors).values():
        tensor.detach()


def _own_model(config: RunConfig, storage: Storage) -> LanguageModel:
    train, model_config = config.train, config.model
    return build_model(
        model_config,
        vocab_size=model_config.vocab_size,
        max_seq_len=model_config.max_seq_len,
        seed=train.seed,
        dtype=stored_format(train),
        place=storage.place,
    )


def build_local_engine(
    config: RunConfig,
    model: LanguageModel,
    device: torch.device,
    precision: Precision,
    micro_batch_size: int,
    teacher: LanguageModel | None = None,
    storage: Storage | None = None,
) -> LocalEngine:
    """The engine of one process that `train.update` asks for.

    Args:
        storage: where the model's blocks are.
        teacher: what `train.distill` names, on `device`.
    """
    engine: LocalEngine
    if precision == "fp8":
        use_float8(model.blocks)
    if config.train.update == "layerwise":
        disk = _open_disk(config, device) if config.train.boundary_offload == "disk" else None
        settings: dict[str, Any] = {"device": device, "precision": precision, "micro_batch_size": micro_batch_size}
        engine = LayerwiseEngine(model, config.optim, config.train, **settings, storage=storage, disk=disk)
    else:
        engine = LocalEngine(
            model,
            config.optim,
            device=device,
            precision=precision,
            micro_batch_size=micro_batch_size,
            seed=config.train.seed,
            teacher=None if teacher is None else Teacher(teacher, config.train.distill),
        )
    engine.longest_seq_len = config.data.seq_len
    return engine


def stored_format(train: TrainConfig) -> WeightFormat:
    """What `train.weight_dtype` stores weights in, nf4 aside; besides quantised matrices everything has the dtype that is computed in.

    Args:
        train: with its precision settled.
    """
    bits = _QUANTIZED.get(train.weight_dtype)
    return WeightFormat(_STORED[train.weight_dtype if train.weight_dtype in _STORED else train.precision], bits)
