"""Weights of a file into a model: compared by the file's header first, then read tensor by tensor."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from lowmem.engine.storage.blocks import Storage
from lowmem.models.base import LanguageModel
from lowmem.nn.lorptize import adopt_ranks
from lowmem.nn.quantized import CODES, SCALE, assign, dequantized
from lowmem.system.errors import CheckpointError
from lowmem.system.tensors import WEIGHT_DTYPES, meta_tensors, read_tensors

_SHOWN = 5


def weight_problems(stored: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> list[str]:
    """How the names and shapes of a file differ from those that a model has.

    Args:
        stored: of the file's header, by name; quantised ones as what they stand for.
        targets: of the model; tied weights may have two names, of which the file holds one.
    """
    problems, missing = [], set(targets)
    for name, tensor in stored.items():
        target = targets.get(name)
        if target is None:
            problems.append(f"{name} is unknown")
            continue
        missing -= {other for other in missing if targets[other] is target}
        if target.shape != tensor.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
    return problems + [f"{name} is missing" for name in sorted(missing)]


def coded_weights(stored: Mapping[str, torch.Tensor]) -> list[str]:
    """Which tensors of a file are no weights, by their dtype."""
    allowed = ", ".join(map(str, WEIGHT_DTYPES))
    return [f"{name} is {tensor.dtype}, expected one of {allowed}" for name, tensor in stored.items() if tensor.dtype not in WEIGHT_DTYPES]


def summary(problems: Sequence[str]) -> str:
    """The first few in one line, and how many there are besides."""
    return "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")


def stored_weights(path: Path, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file on the meta device, quantised ones as what they stand for.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; choose another checkpoint with --checkpoint=STEP")
    return dict(dequantized(meta_tensors(path), {name: target.shape for name, target in targets.items()}))


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
    raw = dict(meta_tensors(path)) if path.is_file() else {}
    adopt_ranks(model, {name: tuple(tensor.shape) for name, tensor in raw.items()})
    targets = model.state_dict(keep_vars=True)
    _check(path, targets)
    several = len({tensor.dtype for tensor in raw.values()}) > 1  # one of these are the codes of quantised weights
    for name, tensor in dequantized(read(path), {name: target.shape for name, target in targets.items()}):
        widen = several or (tensor.dtype == torch.bfloat16 and not keep_bf16)
        targets[name].data = tensor.float() if widen else tensor


@torch.no_grad()
def load_trained(path: Path, targets: Mapping[str, torch.Tensor], storage: Storage | None = None) -> None:
    """Copy the tensors of a file, which are those that were trained, into a model whose other weights are there.

    Args:
        targets: what the model's checkpoints hold, by name.
        storage: where its blocks are; None has all of them here.
    Raises:
        CheckpointError: see `load_weights`.
        StorageError: a block cannot be written.
    Memory: one tensor.
    """
    _check(path, targets)
    if not any(target.is_meta for target in targets.values()):
        for part in (storage or Storage()).each_part(targets, changed=True):
            copy_weights(path, part)


def read_dtype(path: Path, *, keep_bf16: bool) -> torch.dtype:
    """The dtype that `load_weights` gives a model; fp32 where there is no such file."""
    found = {tensor.dtype for _, tensor in meta_tensors(path)} if path.is_file() else set()
    dtype = found.pop() if len(found) == 1 else torch.float32
    return dtype if dtype in WEIGHT_DTYPES and (keep_bf16 or dtype != torch.bfloat16) else torch.float32


@torch.no_grad()
def copy_weights(path: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy the tensors of a file, in the form in which the targets are kept.

    Args:
        targets: with names and shapes of the file, of which it may hold more.
    Memory: one tensor.
    """
    stored = {name + suffix for name in targets for suffix in ("", CODES, SCALE)}
    shapes = {name: target.shape for name, target in targets.items()}
    for name, tensor in dequantized(read_tensors(path, only=stored), shapes) if targets else ():
        assign(targets[name], tensor)


def _check(path: Path, targets: Mapping[str, torch.Tensor]) -> None:
    stored = stored_weights(path, targets)
    if problems := weight_problems(stored, targets) or coded_weights(stored):
        raise CheckpointError(f"{path} does not hold the model of the run's config.yaml: {summary(problems)}")
