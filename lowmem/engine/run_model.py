"""The model and the tokenizer of a finished or running run, read back from its run directory."""

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lowmem.config.load import load_run_config
from lowmem.config.schema import RunConfig
from lowmem.data.decoding import irregular_kind
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import Tokenizer
from lowmem.engine.manifest import checkpoint_name, checkpoint_step, checkpoint_steps, recorded_tokenizer, verify_weights
from lowmem.models.base import LanguageModel
from lowmem.models.registry import build_model
from lowmem.nn.lorptize import adopt_ranks
from lowmem.nn.quantized import assign, dequantized
from lowmem.system.devices import device_has_native_bf16
from lowmem.system.errors import CheckpointError, ConfigError
from lowmem.system.files import json_sha256
from lowmem.system.tensors import WEIGHT_DTYPES, meta_tensors, read_tensors


@dataclass(frozen=True)
class RunModel:
    """What generation and export need of a run.

    Attributes:
        model: in evaluation mode, on its device, in the dtype it was stored in (fp32 where the device has no native bf16).
        config: as resolved by the run.
        step: optimizer steps behind the weights.
        path: the checkpoint's folder.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: RunConfig
    step: int
    path: Path


def load_run_model(
    run_dir: Path | str,
    checkpoint: int | Literal["latest", "best"] = "latest",
    device: torch.device | None = None,
    *,
    outline: bool = False,
) -> RunModel:
    """The model of a run directory.

    Args:
        checkpoint: the newest, the one with the lowest validation loss, or a step.
        device: where the model goes; the CPU if None.
        outline: leave the model on the meta device: shapes and dtypes as they would be there, and no numbers.
    Raises:
        CheckpointError: something is missing or damaged, or weights do not fit the run's configuration or its tokenizer; the message
            names it.
        ConfigError: the run's config.yaml cannot be read.
        DataError: the run's tokenizer.json is malformed.
    Memory: the weights, and one tensor more while they are read; of an outline nothing.
    """
    run_dir, device = Path(run_dir), device or torch.device("cpu")
    for name in ("config.yaml", "tokenizer.json"):
        if not (run_dir / name).is_file():
            found = ", ".join(sorted(path.name for path in run_dir.iterdir())) or "nothing" if run_dir.is_dir() else "no such folder"
            raise CheckpointError(f"{run_dir} is no run directory: {name} is missing (found: {found}); {_remedy(run_dir)}")
    path = checkpoint_path(run_dir, checkpoint)
    config = load_run_config(run_dir / "config.yaml", check=False)
    tokenizer = load_run_tokenizer(run_dir, path)
    shape = config.model
    if not 0 < tokenizer.vocab_size <= shape.vocab_size or shape.max_seq_len < 1:
        raise CheckpointError(
            f"{run_dir}: config.yaml says model.vocab_size {shape.vocab_size} and model.max_seq_len {shape.max_seq_len}, the tokenizer "
            f"has {tokenizer.vocab_size} tokens; the files belong to different runs"
        )
    with torch.device("meta") if outline else nullcontext():
        model = _initial_model(config)
    if not outline:
        verify_weights(path)
    read = meta_tensors if outline else read_tensors
    load_weights(path / "model.safetensors", model, keep_bf16=device_has_native_bf16(device), read=read)
    return RunModel((model if outline else model.to(device)).eval(), tokenizer, config, checkpoint_step(path.name) or 0, path)


def _initial_model(config: RunConfig) -> LanguageModel:
    """The model of a run, to be given the weights of a checkpoint."""
    shape = config.model
    if not shape.path:
        return build_model(shape, vocab_size=shape.vocab_size, max_seq_len=shape.max_seq_len, seed=config.train.seed)
    from lowmem.engine.huggingface_files import initial_model, resolve_model_path
    from lowmem.models.huggingface import HuggingFaceModel

    return HuggingFaceModel(initial_model(resolve_model_path(shape.path, shape.revision), torch.float32), shape.max_seq_len)


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
    if recorded != json_sha256([json.loads(path.read_text(encoding="utf-8")), tokenizer.eos_id]):
        raise CheckpointError(
            f"{path} is not the tokenizer that {checkpoint} was trained with (SHA-256 {found[:12]}, expected {recorded[:12]}); "
            "restore the run's own"
        )
    return tokenizer


def _remedy(folder: Path) -> str:
    """What to do with a folder that is no run, by what it is instead."""
    if (folder / "adapter_config.json").is_file() or (folder / "finetune.json").is_file():
        return "it was written by fine-tuning: transformers reads its merged/, PEFT its adapter/; give the run_dir of a lowmem run"
    if (folder / "config.json").is_file():
        return f"it is a directory of transformers: lowmem import {folder} --out RUN makes a run of it, or read it with transformers"
    return "give the run_dir of a lowmem run"


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


def load_weights(
    path: Path, model: LanguageModel, *, keep_bf16: bool, read: Callable[[Path], Iterable[tuple[str, torch.Tensor]]] = read_tensors
) -> None:
    """Read a model.safetensors into `model`, which takes on the dtype of the file, or fp32 where the file has quantised weights or several.

    Args:
        keep_bf16: leave bf16 weights as they are; false widens them to fp32, which loses nothing and is faster without bf16 hardware.
        read: gives the tensors of a file, on the device of `model`.
    Raises:
        CheckpointError: the file is missing or damaged, or lacks tensors, or has others, or other shapes or dtypes; the message names them.
    Memory: the file's tensors take the place of the model's one by one.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; choose another checkpoint with --checkpoint=STEP")
    stored = dict(meta_tensors(path))
    adopt_ranks(model, {name: tuple(tensor.shape) for name, tensor in stored.items()})
    targets = model.state_dict(keep_vars=True)
    several = len({tensor.dtype for tensor in stored.values()}) > 1  # one of these are the codes of quantised weights
    problems, missing = [], set(targets)
    for name, tensor in dequantized(read(path), {name: target.shape for name, target in targets.items()}):
        target = targets.get(name)
        if target is None:
            problems.append(f"{name} is unknown")
            continue
        missing -= {other for other in missing if targets[other] is target}  # tied weights have two names and one entry
        if target.shape != tensor.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
        elif tensor.dtype not in WEIGHT_DTYPES:
            problems.append(f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}")
        else:
            widen = several or (tensor.dtype == torch.bfloat16 and not keep_bf16)
            target.data = tensor.float() if widen else tensor
    problems += [f"{name} is missing" for name in sorted(missing)]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{path} does not hold the model of the run's config.yaml: {shown}")


def load_initial_weights(source: str, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Copy the newest weights of another run into `model`, in the form in which that keeps them.

    Raises:
        ConfigError: another shape or another tokenizer; the message says which tensor differs.
        CheckpointError: its weights are missing or damaged, or its tokenizer is not theirs.
    Memory: one tensor.
    """
    path, weights = initial_weights(source)
    if load_run_tokenizer(path.parent, weights.parent).sha256() != tokenizer.sha256():
        raise ConfigError(f"train.init_from is {source}, which has another tokenizer than this run; set data.tokenizer={path}")
    verify_weights(weights.parent)
    targets = model.state_dict()
    wanted = {name: target.shape for name, target in targets.items()}
    stored = dict(dequantized(meta_tensors(weights), wanted))
    found = {name: tensor.shape for name, tensor in stored.items()}
    if coded := [f"{name} is {tensor.dtype}" for name, tensor in stored.items() if name in wanted and tensor.dtype not in WEIGHT_DTYPES]:
        raise CheckpointError(
            f"{weights} does not hold the weights of a run: {coded[0]}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}"
        )
    if found != wanted:
        name = next(name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name))
        raise ConfigError(
            f"train.init_from is {source}, a model of another shape: {name} is {_sizes(found.get(name))} there, "
            f"{_sizes(wanted.get(name))} here; take model.* from {source}/config.yaml"
        )
    with torch.no_grad():
        for name, tensor in dequantized(read_tensors(weights), wanted):
            assign(targets[name], tensor)


def initial_weights(source: str) -> tuple[Path, Path]:
    """The files of the tokenizer and of the newest weights of the run that `train.init_from` names.

    Raises:
        ConfigError, CheckpointError: it is no run directory, or has no checkpoint.
    """
    path = Path(source) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"train.init_from is {source}, which is no run directory: it has no tokenizer.json")
    return path, checkpoint_path(Path(source), "latest") / "model.safetensors"


def _sizes(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
