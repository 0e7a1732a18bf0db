"""Which dtype an operation computes in."""

import torch

from lowmem.fake import autocast_kind


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for the device of `x`, else the dtype of `x`."""
    device_type = autocast_kind(x)
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower: what sums and statistics are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
