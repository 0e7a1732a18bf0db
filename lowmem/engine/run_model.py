"""The model and the tokenizer of any directory: a run, a directory of transformers, or an adapter of PEFT."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem.config.load import load_run_config
from lowmem.config.schema import ModelConfig, RunConfig, TrainConfig
from lowmem.data.decoding import irregular_kind
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import Tokenizer, tokenizer_sha256
from lowmem.engine.from_config import build_configured_model
from lowmem.engine.huggingface_files import (
    check_transformers,
    end_ids,
    first_generation_config,
    initial_model,
    model_facts,
    resolve_model_path,
)
from lowmem.engine.manifest import checkpoint_name, checkpoint_step, checkpoint_steps, recorded_tokenizer, verify_weights
from lowmem.engine.storage.blocks import Storage
from lowmem.engine.weights import (
    coded_weights,
    copy_weights,
    load_trained,
    load_weights,
    read_dtype,
    stored_weights,
    summary,
    weight_problems,
)
from lowmem.models.base import LanguageModel, Place, move_to, stays
from lowmem.models.registry import build_model
from lowmem.nn.quantized import WeightFormat
from lowmem.system.devices import device_has_native_bf16
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import CheckpointError, ConfigError
from lowmem.system.tensors import meta_tensors, read_tensors, weight_files

ADAPTER_CONFIG = "adapter_config.json"
_ACCEPTED = (
    "give the run_dir of a lowmem run (config.yaml, tokenizer.json, checkpoints/), a directory of transformers (config.json and "
    "safetensors), or an adapter of PEFT (adapter_config.json and adapter_model.safetensors)"
)


@dataclass(frozen=True)
class RunModel:
    """What generation and export need of a run, or of another directory with a model.

    Attributes:
        model: in evaluation mode, on its device, in the dtype it was stored in (fp32 where the device has no native bf16).
        config: as resolved by the run; of other directories one with model.path.
        step: optimizer steps behind the weights; 0 of other directories.
        path: the checkpoint's folder, or the directory.
        folders: where its chat template and its generation_config.json may be, the first counts.
        end_ids: tokens that end a text, beside the tokenizer's end of a document.
        generation: what its generation_config.json says.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: RunConfig
    step: int
    path: Path
    folders: tuple[Path, ...] = ()
    end_ids: frozenset[int] = frozenset()
    generation: dict[str, Any] | None = None


Kind = Literal["run", "adapter", "transformers"]


def directory_kind(directory: Path) -> Kind:
    """What a directory holds, by its files.

    Raises:
        CheckpointError: nothing that a model can be made of; the message lists what can.
    """
    if (directory / "config.yaml").is_file() and (directory / "tokenizer.json").is_file():
        return "run"
    if (directory / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (directory / "config.json").is_file():
        return "transformers"
    absent = [name for name in ("config.yaml", "tokenizer.json") if not (directory / name).is_file()]
    found = ", ".join(sorted(path.name for path in directory.iterdir())[:20]) or "nothing" if directory.is_dir() else "no such folder"
    raise CheckpointError(f"{directory} is no run directory: {absent[0]} is missing (found: {found}); {_ACCEPTED}")


def is_model_directory(directory: Path) -> bool:
    """Whether `directory_kind` finds anything."""
    return any((directory / name).is_file() for name in ("config.yaml", ADAPTER_CONFIG, "config.json"))


def load_run_model(
    run_dir: Path | str,
    checkpoint: int | Literal["latest", "best"] = "latest",
    device: torch.device | None = None,
    *,
    outline: bool = False,
    adapter: Path | str | None = None,
    storage: Storage | None = None,
) -> RunModel:
    """The model of a directory.

    Args:
        run_dir: a run, a directory of transformers, or an adapter of PEFT, which names its base.
        checkpoint: of a run: the newest, the one with the lowest validation loss, or a step.
        device: where the model goes; the CPU if None.
        outline: leave the model on the meta device: shapes and dtypes as they would be there, and no numbers.
        adapter: an adapter of PEFT, in place of the one that the run or the directory has.
        storage: takes over each block as soon as it is there; None leaves all on the device. An outline has none.
    Raises:
        CheckpointError: something is missing or damaged, or weights do not fit the run's configuration or its tokenizer; the message
            names it.
        ConfigError: the run's config.yaml cannot be read, `checkpoint` or `adapter` is given for a directory that has no such thing.
        DataError: the tokenizer.json is malformed.
        StorageError: a block cannot be written to where it is to live.
    Memory: the weights, and one tensor more while they are read; where blocks are elsewhere one block of them; of an outline nothing.
    """
    run_dir, device, storage = Path(run_dir), device or torch.device("cpu"), storage or Storage()
    kind = directory_kind(run_dir)
    if kind != "run" and checkpoint != "latest":
        raise ConfigError(f"--checkpoint is {checkpoint}, but {run_dir} is no lowmem run and has one state; leave it out")
    if kind == "run":
        run = _run_of_lowmem(run_dir, checkpoint, device, outline, None if adapter is None else Path(adapter), storage)
    else:
        run = _run_of_directory(run_dir, kind, device, outline, None if adapter is None else Path(adapter), storage)
    if not 0 < run.tokenizer.vocab_size <= run.model.vocab_size:
        raise CheckpointError(
            f"{run_dir}: the tokenizer has {run.tokenizer.vocab_size} tokens, the model {run.model.vocab_size} rows; the files belong to "
            "different models"
        )
    values, place = first_generation_config(run.folders)
    ends = end_ids(values, f"{place}/generation_config.json")
    return replace(run, model=(run.model if outline else move_to(run.model, device)).eval(), end_ids=ends, generation=values)


def _run_of_lowmem(run_dir: Path, checkpoint: Any, device: torch.device, outline: bool, adapter: Path | None, storage: Storage) -> RunModel:
    path = checkpoint_path(run_dir, checkpoint)
    config = load_run_config(run_dir / "config.yaml", check=False)
    shape = config.model
    if adapter is not None and not shape.path:
        raise ConfigError(f"--adapter is {adapter}, but {run_dir} is a model of lowmem's own, which takes none; leave it out")
    tokenizer = load_run_tokenizer(run_dir, path)
    if not 0 < tokenizer.vocab_size <= shape.vocab_size or shape.max_seq_len < 1:
        raise CheckpointError(
            f"{run_dir}: config.yaml says model.vocab_size {shape.vocab_size} and model.max_seq_len {shape.max_seq_len}, the tokenizer "
            f"has {tokenizer.vocab_size} tokens; the files belong to different runs"
        )
    folders: tuple[Path, ...] = (run_dir,)
    if shape.path:
        base = resolve_model_path(shape.path, shape.revision)
        folders = (run_dir, base)
        if adapter is not None and config.adapter.method != "none":  # the base with another adapter
            return _run_of_directory(base, "transformers", device, outline, adapter, storage)
    if not outline:
        verify_weights(path)
    added = range(tokenizer.vocab_size - len(config.data.add_tokens), tokenizer.vocab_size)  # the tokenizer has them after its own
    model = _trained_model(config, path / "model.safetensors", device, outline, added, storage)
    if adapter is not None:
        from lowmem.engine.peft_files import with_adapter

        model, tokenizer = with_adapter(model, adapter, tokenizer)
        folders = (adapter, *folders)
    return RunModel(model, tokenizer, config, checkpoint_step(path.name) or 0, path, folders)


def _trained_model(
    config: RunConfig, weights: Path, device: torch.device, outline: bool, added: Sequence[int], storage: Storage
) -> LanguageModel:
    """The model of a run with the weights of a checkpoint; where those are a part of it, the others are its base's."""
    native, train = device_has_native_bf16(device), config.train
    with on_meta() if outline else nullcontext():
        if config.adapter.method == "none" and storage.streams and not outline:
            return _streamed_model(config, weights, native, storage)
        if config.adapter.method == "none":
            model = _initial_model(config)
            load_weights(weights, model, keep_bf16=native, read=meta_tensors if outline else read_tensors)
            return model
        precision: Any = "fp32" if train.precision == "bf16" and not native else train.precision
        stored: Any = "fp32" if train.weight_dtype == "bf16" and not native else train.weight_dtype
        model = build_configured_model(replace(config, train=replace(train, precision=precision, weight_dtype=stored)), added, storage)
    load_trained(weights, model.saved_tensors(), storage)
    return model


def _streamed_model(config: RunConfig, weights: Path, keep_bf16: bool, storage: Storage) -> LanguageModel:
    """As `load_weights` makes it, with blocks that are elsewhere and are filled one by one."""
    if config.model.lorpt.schedule or config.model.lorpt.grow_to:
        raise ConfigError(
            "the blocks of a run with model.lorpt.schedule or grow_to, whose sizes change, cannot be elsewhere; keep them here"
        )
    model = _initial_model(config, read_dtype(weights, keep_bf16=keep_bf16), storage.place)
    load_trained(weights, model.state_dict(keep_vars=True), storage)
    return model


def _initial_model(config: RunConfig, dtype: torch.dtype = torch.float32, place: Place = stays) -> LanguageModel:
    """The model of a run, to be given all weights of a checkpoint."""
    shape = config.model
    if not shape.path:
        return build_model(
            shape, vocab_size=shape.vocab_size, max_seq_len=shape.max_seq_len, seed=config.train.seed, dtype=dtype, place=place
        )
    from lowmem.models.huggingface import HuggingFaceModel
    from lowmem.models.huggingface_weights import Kept

    kept = Kept(WeightFormat(dtype), lorpt=shape.lorpt, blank=True)
    model = initial_model(resolve_model_path(shape.path, shape.revision), dtype, kept=kept, place=place)
    if config.data.add_tokens and shape.vocab_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(shape.vocab_size, mean_resizing=False)
    return HuggingFaceModel(model, shape.max_seq_len)


def _run_of_directory(directory: Path, kind: Kind, device: torch.device, outline: bool, adapter: Path | None, storage: Storage) -> RunModel:
    """A model as transformers or PEFT have written it."""
    check_transformers()
    from lowmem.engine.peft_files import adapter_base, base_with_adapter
    from lowmem.models.huggingface import check_contract

    if kind == "adapter" and adapter is None:
        directory, adapter = adapter_base(directory), directory
    elif kind == "adapter":
        directory = adapter_base(directory)
    base = resolve_model_path(str(directory))
    tokenizer = load_model_tokenizer(base) if adapter is None or not (adapter / "tokenizer.json").is_file() else load_tokenizer(adapter)
    place = storage.place if storage.streams else stays
    model = base_with_adapter(base, files_dtype(base, device), adapter, rows=tokenizer.vocab_size, outline=outline, place=place)
    if not outline:
        check_contract(model, briefly=storage.streams)
    shape = ModelConfig(path=str(base), vocab_size=model.vocab_size, max_seq_len=model.max_seq_len)
    stored = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[next(model.parameters()).dtype]
    config = RunConfig(model=shape, train=TrainConfig(weight_dtype=stored))  # type: ignore[arg-type]
    return RunModel(model, tokenizer, config, 0, adapter or base, (base,) if adapter is None else (adapter, base))


def files_dtype(directory: Path, device: torch.device) -> torch.dtype:
    """What the weights of a directory are kept in: as most of its numbers are stored, fp32 where `device` is slow with that.

    Raises:
        CheckpointError: its files are missing or damaged.
    """
    numbers = stored_numbers(directory)
    most = max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)
    if most == torch.bfloat16 and device_has_native_bf16(device):
        return most
    return most if most == torch.float16 and device.type != "cpu" else torch.float32


def load_model_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer.json of a directory of transformers.

    Raises:
        CheckpointError: there is none.
        DataError: it is malformed.
    """
    if not (directory / "tokenizer.json").is_file():
        kept = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model") if (directory / name).is_file()]
        instead = f" (found {', '.join(kept)}, which AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) converts)" if kept else ""
        raise CheckpointError(f"{directory} has no tokenizer.json{instead}; put the model's own there")
    return load_tokenizer(directory)


def model_tokenizer(directory: Path) -> tuple[Tokenizer, Path]:
    """The tokenizer of a directory with a model, and its file.

    Raises:
        CheckpointError, DataError: it is missing or damaged, or is none that the run's weights were trained with.
    """
    if directory_kind(directory) == "run":
        return load_run_tokenizer(directory, checkpoint_path(directory, "latest")), directory / "tokenizer.json"
    return load_model_tokenizer(directory), directory / "tokenizer.json"


@dataclass(frozen=True)
class ModelDescription:
    """What a directory says of its model, without the weights.

    Attributes:
        config: that a model of its shape is built from.
        position_limit: where learned positions end; 0 where they are computed.
        keeps_segments_apart: whether a row may hold several texts.
    """

    config: RunConfig
    position_limit: int
    keeps_segments_apart: bool


def model_description(directory: Path) -> ModelDescription:
    """What a run or a directory of transformers says of its model.

    Raises:
        ConfigError: the run's config.yaml cannot be read, or the directory is an adapter.
        CheckpointError: the directory has no model that can be read.
    """
    kind = directory_kind(directory) if not (directory / "config.yaml").is_file() else "run"
    if kind == "adapter":
        raise ConfigError(f"{directory} is an adapter of PEFT; give the run that it is of, or its merged/")
    if kind == "run":
        config = load_run_config(directory / "config.yaml", check=False)
        if not config.model.path:
            shape = config.model
            ends = shape.positions == "learned" or shape.name == "i3"
            return ModelDescription(config, shape.max_seq_len if ends else 0, shape.name != "i3")
    else:
        config = RunConfig(model=ModelConfig(path=str(directory)))

    facts = model_facts(config.model.path, config.model.revision)
    if kind == "transformers":
        numbers = stored_numbers(directory)
        half = numbers and max(numbers, key=lambda dtype: numbers[dtype]) == torch.bfloat16
        config.train.weight_dtype = "bf16" if half else "fp32"
        config.model.vocab_size, config.model.max_seq_len = facts.vocab_size, facts.max_seq_len or facts.position_limit
    limit = facts.position_limit and max(1, facts.position_limit - config.adapter.prefix_tokens())
    return ModelDescription(config, limit, facts.keeps_segments_apart)


def stored_numbers(directory: Path) -> dict[torch.dtype, int]:
    """Numbers by dtype in the weights of a directory of transformers.

    Raises:
        CheckpointError: its files are missing or damaged.
    """
    found: dict[torch.dtype, int] = {}
    for file in weight_files(directory):
        for _, tensor in meta_tensors(file):
            if tensor.is_floating_point():
                found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.numel()
    return found


def load_run_tokenizer(run_dir: Path, checkpoint: Path) -> Tokenizer:
    """The tokenizer of a run, which is the one that a checkpoint's weights were trained with, as far as that has recorded it.

    Raises:
        CheckpointError: it is another one, or the checkpoint is damaged.
        DataError: tokenizer.json is missing or malformed.
    """
    path = run_dir / "tokenizer.json"
    tokenizer, recorded = load_tokenizer(path), recorded_tokenizer(checkpoint)
    if not recorded or recorded == (found := tokenizer.sha256()):
        return tokenizer
    # another version of the tokenizers library may write what it has read otherwise; the file is as it was written
    values = [tokenizer.to_json(), json.loads(path.read_text(encoding="utf-8"))]
    if recorded == tokenizer_sha256(values[1], tokenizer.eos_id, tokenizer.begin_ids):
        return tokenizer
    if recorded in [tokenizer_sha256(value, tokenizer.eos_id) for value in values]:  # earlier versions began no text with a token
        tokenizer.begin_ids = ()
        return tokenizer
    raise CheckpointError(
        f"{path} is not the tokenizer that {checkpoint} was trained with (SHA-256 {found[:12]}, expected {recorded[:12]}); "
        "restore the run's own"
    )


def checkpoint_path(run_dir: Path, checkpoint: int | Literal["latest", "best"]) -> Path:
    """Folder of a checkpoint of a run.

    Raises:
        CheckpointError: it does not exist; the message lists those that do.
    """
    root = run_dir / "checkpoints"
    steps = checkpoint_steps(root)
    available = ", ".join(map(str, steps)) or "none"
    if isinstance(checkpoint, int):
        if checkpoint not in steps:
            raise CheckpointError(f"{run_dir} has no checkpoint of step {checkpoint}; steps with one: {available}")
        return root / checkpoint_name(checkpoint)
    pointer = root / checkpoint
    try:
        kind = irregular_kind(pointer.stat().st_mode)
        name = "" if kind else pointer.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{pointer} holds no text, expected a folder's name; steps with a checkpoint: {available}") from error
    except OSError as error:
        raise CheckpointError(f"{pointer} is missing or unreadable ({error.strerror}); steps with a checkpoint: {available}") from error
    if kind:
        raise CheckpointError(f"{pointer} is {kind}, expected a file with a folder's name; steps with a checkpoint: {available}")
    if checkpoint_step(name) is None or not (root / name).is_dir():
        raise CheckpointError(f"{pointer} names {name[:80]!r}, which is no checkpoint; steps with one: {available}")
    return root / name


def load_initial_weights(source: str, model: LanguageModel, tokenizer: Tokenizer, storage: Storage) -> None:
    """Copy the newest weights of another run into `model`, in the form in which that keeps them.

    Args:
        storage: where its blocks are.
    Raises:
        ConfigError: another shape or another tokenizer; the message says which tensors differ.
        CheckpointError: its weights are missing or damaged, or its tokenizer is not theirs.
    Memory: one tensor.
    """
    path, weights = initial_weights(source)
    if load_run_tokenizer(path.parent, weights.parent).sha256() != tokenizer.sha256():
        raise ConfigError(f"train.init_from is {source}, which has another tokenizer than this run; set data.tokenizer={path}")
    verify_weights(weights.parent)
    targets = model.state_dict(keep_vars=True)
    stored = stored_weights(weights, targets)
    if coded := coded_weights({name: tensor for name, tensor in stored.items() if name in targets}):
        raise CheckpointError(f"{weights} does not hold the weights of a run: {summary(coded)}")
    if problems := weight_problems(stored, targets):
        raise ConfigError(
            f"train.init_from is {source}, a model of another shape: {summary(problems)}; take model.* from {source}/config.yaml"
        )
    for part in storage.each_part(targets, changed=True):
        copy_weights(weights, part)


def initial_weights(source: str) -> tuple[Path, Path]:
    """The files of the tokenizer and of the newest weights of the run that `train.init_from` names.

    Raises:
        ConfigError, CheckpointError: it is no run directory, or has no checkpoint.
    """
    path = Path(source) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"train.init_from is {source}, which is no run directory: it has no tokenizer.json")
    if not (Path(source) / "config.yaml").is_file() and (Path(source) / "config.json").is_file():
        raise ConfigError(f"train.init_from is {source}, a directory of transformers; set model.path={source} instead")
    return path, checkpoint_path(Path(source), "latest") / "model.safetensors"
