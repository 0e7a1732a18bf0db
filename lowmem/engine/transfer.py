"""A batch on the device."""

import torch

from lowmem.data.batch import Batch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def on_device(batch: Batch, device: torch.device) -> Tensors:
    """Inputs, targets and, where rows hold several conversations, segments."""
    inputs, targets = (torch.from_numpy(part).to(device, non_blocking=True) for part in (batch.inputs, batch.targets))
    return inputs, targets, None if batch.segments is None else torch.from_numpy(batch.segments).to(device, non_blocking=True)
