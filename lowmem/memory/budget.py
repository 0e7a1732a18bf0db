"""Memory limits that are enforced: a run past its budget meets an error it can report, not the kernel's OOM killer (D9)."""

import re

import torch

from lowmem.memory.procfs import status_bytes
from lowmem.units import format_bytes

_OOM_TEXT = re.compile(r"can't allocate memory|cannot allocate memory|not enough memory|std::bad_alloc|out of memory", re.IGNORECASE)


def limit_host_memory(limit_bytes: int) -> None:
    """Let this process have at most `limit_bytes` of private memory; beyond it allocations fail with an error.

    The limit is RLIMIT_DATA: private writable memory, touched or not, which bounds the resident memory from above.

    Raises:
        ValueError: the process already uses more, or this system has no such limit.
    """
    try:
        import resource
    except ImportError as error:
        raise ValueError("this system cannot limit a process's memory; leave budget.ram empty") from error
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY and limit_bytes > hard:
        limit_bytes = hard
    used_bytes = (status_bytes() or {}).get("VmData", 0)  # what the kernel compares with the limit; unknown outside Linux
    if used_bytes > limit_bytes:
        raise ValueError(
            f"this process already has {format_bytes(used_bytes)} of private memory, its limit is {format_bytes(limit_bytes)}; "
            "use a larger budget.ram, or leave it empty"
        )
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


def limit_cuda_memory(limit_bytes: int, device: torch.device) -> None:
    """Let this process's CUDA allocator reserve at most `limit_bytes` on `device`.

    Raises:
        ValueError: the device has less.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    if limit_bytes > total:
        raise ValueError(f"budget.vram is {format_bytes(limit_bytes)}, the device has {format_bytes(total)}")
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OOM_TEXT.search(str(error)))
