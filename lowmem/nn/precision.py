"""Which dtype an operation computes in."""

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for the device of `x`, else the dtype of `x`."""
    device_type = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower: what sums and statistics are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_fake(x: torch.Tensor) -> bool:
    """True for tensors without data, whose values must not be asked for."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta
