"""Tensors of safetensors files that are read one at a time, when they are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowmem.system.errors import CheckpointError
from lowmem.system.tensors import all_finite

_NUMBERS = {"F64", "F32", "F16", "BF16"}
_MASKS = ("bias", "mask")  # ends of names of what older files hold beside weights, in other dtypes


class StoredTensor:
    """A tensor of a file, which transformers reads by `tensor[...]`; what it gives is mapped onto the file only if it is to be converted.

    One mapping for all would keep every page that was read resident until the last tensor: the whole model in the precision of the file,
    which a 4-bit base is to save.

    Attributes:
        dtype: as the file names it.
        coded_and_read: it was asked for, and its numbers are no weights but codes of them.
        finite: what was asked for has neither NaN nor infinity in the dtype that is computed in.
    Memory: one tensor.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], dtype: str, wanted: torch.dtype):
        self.path, self.name, self.dtype = path, name, dtype
        self.coded_and_read, self.finite = False, True
        self._shape, self._wanted = shape, wanted

    def get_shape(self) -> list[int]:
        """As slices of safetensors give it."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """As slices of safetensors give it."""
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.coded_and_read = self.dtype not in _NUMBERS and not self.name.endswith(_MASKS)
        with _reading(self.path), safe_open(self.path, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)[index]
        if self.dtype in _NUMBERS and not self.name.endswith("mask"):
            self.finite = self.finite and all_finite(tensor, self._wanted)
        # a copy: the file may be rewritten while the model is in use
        return tensor.clone() if tensor.dtype == self._wanted else tensor


def stored_tensors(path: Path, wanted: torch.dtype) -> dict[str, StoredTensor]:
    """Each tensor of a file by name, unread.

    Args:
        wanted: what the model computes in.
    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with _reading(path), safe_open(path, framework="pt", device="cpu") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        return {name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype(), wanted) for name, part in parts.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report a file that cannot be read."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore the file") from error
