"""The tensors of a safetensors file, one at a time in memory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lowmem.engine.tensor_file import tensor_shapes
from lowmem.errors import CheckpointError


def stream_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a file in turn, mapped onto it: copy what is kept.

    One mapping for all would keep every page that was read resident until the last tensor: the whole model in the precision of the file,
    which a 4-bit base is to save.

    Raises:
        CheckpointError: the file is missing or damaged.
    Memory: one tensor.
    """
    for name in tensor_shapes(path):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); restore the file") from error
        yield name, tensor
        del tensor
