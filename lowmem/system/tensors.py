"""Tensors in safetensors files, written and read one at a time, so that a checkpoint needs no second copy in memory.

The library's own writer wants every tensor's bytes at once; the format is simple enough to stream: eight bytes of header
length, a JSON header, then the raw tensors. Reading goes through the library.
Source: https://github.com/huggingface/safetensors, section Format.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowmem.system.errors import CheckpointError

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_READ_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "C64": torch.complex64,
}  # fmt: skip
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that are no codes
_WRITE_BYTES = 16 * 1024 * 1024
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that exists only while it is written, such as a parameter gathered from other ranks.

    Attributes:
        shape, dtype: known before it exists.
        get: makes it; called once, in the order of the file.
        copy_to: appends its bytes to the file of a descriptor instead, where they lie in another file.
        pieces: makes it in parts of its first dimension, in their order, instead.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], torch.Tensor]
    copy_to: Callable[[int], None] | None = None
    pieces: Callable[[], Iterator[torch.Tensor]] | None = None


@dataclass(frozen=True)
class Slice:
    """A part of a tensor of a file.

    Attributes:
        tensor: the elements first, first + 1, ... of the first dimension.
    """

    tensor: torch.Tensor
    first: int


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | LazyTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and flush it to the disk.

    Args:
        tensors: by name; any device, strides and shape. Lazy ones are made one by one, sorted by element size, then name.
        metadata: for other readers; transformers asks for {"format": "pt"}.
    Raises:
        OSError: disk full or not writable.
        TypeError: a dtype that safetensors has no name for.
    Memory: one contiguous host copy of a tensor, or of its piece, that is not already contiguous on the host.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # large elements first keeps all aligned
    for name in order:
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if dtype not in _DTYPE_NAMES:
            raise TypeError(f"{name} has dtype {dtype}, which safetensors cannot hold")
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(len(encoded).to_bytes(8, "little") + encoded))
        for name in order:
            value = tensors[name]
            if isinstance(value, LazyTensor) and value.copy_to is not None:
                value.copy_to(file.fileno())
                continue
            rows = 0
            for tensor in _pieces(value):
                rows += len(tensor) if tensor.dim() else 1
                if tuple(tensor.shape[1:]) != tuple(value.shape[1:]) or tensor.dtype != value.dtype:
                    raise TypeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {value.dtype} {tuple(value.shape)}")
                if tensor.numel():
                    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
                    _write_all(file, memoryview(flat.view(torch.uint8).numpy().data))
            if rows != (value.shape[0] if value.shape else 1):
                raise TypeError(f"{name} has {rows} rows, announced as {tuple(value.shape)}")
        os.fsync(file.fileno())


def _pieces(value: torch.Tensor | LazyTensor) -> Iterator[torch.Tensor]:
    if not isinstance(value, LazyTensor):
        yield value
    elif value.pieces is not None:
        yield from value.pieces()
    else:
        yield value.get()


def read_tensors(path: Path, only: Collection[str] = (), skip: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a safetensors file in turn, on the host.

    Args:
        only: names of those that are read, where they are there; none is all of them.
        skip: names of those that are not.
    Raises:
        CheckpointError: the file is missing or damaged.
    Memory: one tensor.
    """
    for name, place in tensor_places(path).items():
        if (not only or name in only) and name not in skip:
            yield name, read_place(path, place)


def all_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no number of a tensor is NaN or infinite; with `dtype`, none once it is converted to that. Codes always are.

    Memory: two numbers.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(bound.to(dtype or bound.dtype).item()) for bound in torch.aminmax(tensor.detach()))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, by name; nothing else is read.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return {name: place.shape for name, place in tensor_places(path).items()}


def meta_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a safetensors file on the meta device: its shape and dtype; nothing else is read.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    dtypes = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
    for name, place in tensor_places(path).items():
        if place.dtype not in dtypes:
            raise CheckpointError(f"{path}: {name} is {place.dtype}, allowed: {', '.join(dtypes)}; save it in one of these")
        yield name, torch.empty(place.shape, dtype=dtypes[place.dtype], device="meta")


@dataclass(frozen=True)
class FilePlace:
    """Where a tensor lies in a file.

    Attributes:
        dtype: as safetensors names it.
        offset, nbytes: in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def tensor_places(path: Path) -> dict[str, FilePlace]:
    """Where each tensor of a safetensors file lies; nothing else is read.

    The library checks the header. It is not asked for tensors: it would map the whole file as memory of this process, which counts against
    a limit on that however little of it is read.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="np") as file, open(path, "rb") as raw:
            names = list(file.keys())
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        entries = {name: header[name] for name in names}
        return {
            name: FilePlace(
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or missing ({error}); restore the file, or use another checkpoint") from error


def read_place(path: Path, place: FilePlace, first: int = 0, count: int | None = None) -> torch.Tensor:
    """A tensor of a file, or some of its rows, in memory of its own.

    Args:
        first, count: of the first dimension; all of it by default.
    Raises:
        CheckpointError: the file cannot be read, or the dtype is one that this torch does not have.
    Memory: what is read.
    """
    if place.dtype not in _READ_DTYPES:
        raise CheckpointError(f"{path} has a tensor of {place.dtype}, which PyTorch does not have; save it in fp32, bf16 or fp16")
    shape, offset = place.shape, place.offset
    if count is not None:
        offset += first * (place.nbytes // shape[0])
        shape = (count, *shape[1:])
    tensor = torch.empty(shape, dtype=_READ_DTYPES[place.dtype])
    view, done = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), 0  # type: ignore[arg-type]
    try:
        with open(path, "rb", buffering=0) as file:
            while done < len(view):
                moved = os.preadv(file.fileno(), [view[done : done + _WRITE_BYTES]], offset + done)
                if not moved:
                    raise OSError("the file ends early")
                done += moved
    except OSError as error:
        raise CheckpointError(f"{path} is damaged or missing ({error}); restore the file, or use another checkpoint") from error
    return tensor


def weight_files(directory: Path) -> list[Path]:
    """The files with the weights of a directory of transformers: model.safetensors, else the shards that its index names; never others.

    Raises:
        CheckpointError: there are none, or the index is damaged or names what is not there.
    """
    index = directory / INDEX_NAME
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} cannot be read ({error}); save the model again with save_pretrained") from error
        if missing := [name for name in names if not _is_plain_file(directory, name)]:
            raise CheckpointError(f"{index} names {missing[0][:80]!r}, which is not there; copy the whole directory")
        if not names:
            raise CheckpointError(f"{index} names no file; save the model again with save_pretrained")
        return [directory / name for name in names]
    suffixes = (".bin", ".pt", ".pth", ".safetensors", ".gguf", ".h5", ".msgpack")
    found = ", ".join(sorted(path.name for path in directory.iterdir() if path.suffix in suffixes)[:5]) if directory.is_dir() else ""
    raise CheckpointError(
        f"{directory} has no model.safetensors (weights found: {found or 'none'}); save the model there with "
        "save_pretrained(safe_serialization=True); other formats are not read, for some can carry code"
    )


def _is_plain_file(directory: Path, name: str) -> bool:
    """Whether `name` is a safetensors file of that very folder."""
    whole = name.endswith(".safetensors") and len(name.encode(errors="replace")) < 256 and "\0" not in name and Path(name).name == name
    return whole and (directory / name).is_file()


def load_into(path: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy every tensor of a file into the target of the same name, in place.

    Raises:
        CheckpointError: see `check_tensors`.
    Memory: one tensor.
    """
    check_tensors(path, targets)
    copy_tensors(path, targets)


@torch.no_grad()
def copy_tensors(path: Path, targets: Mapping[str, torch.Tensor | Slice]) -> None:
    """Copy some tensors of a file, which was checked, into the targets of the same names, in place.

    Raises:
        CheckpointError: the file is missing or damaged.
    Memory: one tensor.
    """
    places = tensor_places(path) if targets else {}
    for name, target in targets.items():
        if name in places and isinstance(target, Slice):
            target.tensor.copy_(read_place(path, places[name], target.first, len(target.tensor)))
        elif name in places:
            target.copy_(read_place(path, places[name]))  # type: ignore[union-attr]


def check_tensors(path: Path, targets: Mapping[str, torch.Tensor | LazyTensor], *, more: bool = False) -> None:
    """Compare the header of a file with what it is to be read into.

    Args:
        more: the file may hold others besides.
    Raises:
        CheckpointError: the file is missing or damaged, or its names, shapes or dtypes are not those of `targets`.
    Memory: none.
    """
    missing = set(targets)
    for name, tensor in meta_tensors(path):
        target = targets.get(name)
        if target is None and more:
            continue
        if target is None:
            raise CheckpointError(f"{path} holds {name}, which this model does not have; was it saved with another configuration?")
        if tuple(target.shape) != tuple(tensor.shape) or target.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the model has {target.dtype} {tuple(target.shape)}; was it saved with another configuration?"
            )
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; was it saved with another configuration?")


def _write_all(file, view: memoryview) -> None:
    """Unbuffered files may write less than asked; a write beyond 2 GiB always does."""
    position = 0
    while position < len(view):
        position += file.write(view[position : position + _WRITE_BYTES])
