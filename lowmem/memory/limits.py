"""Memory limits that are enforced: a run past its budget meets an error it can report, not the kernel's OOM killer (D9).

Of host memory two limits are set. The cache of blocks refuses a tensor that would take the resident memory of the process past the
budget, and says so in a way that a step can be repeated after. The kernel's own limit stands behind it, wide enough never to be met by
the small requests of libraries: many of these do not look at what malloc gives them, and would end the process.
"""

import ctypes
import errno
import importlib.util
import os
import re
import signal

import torch

from lowmem.memory.allocator import limit_block_cache
from lowmem.memory.host import own_memory
from lowmem.memory.procfs import status_bytes
from lowmem.system.errors import MemoryBudgetError
from lowmem.system.units import format_bytes

RESERVE_BYTES = 8 << 20  # of a budget, for what is no tensor: the heap's growth and pages of code between two tensors
BEHIND_BYTES = 256 << 20  # from the limit of tensors to the kernel's: stacks of threads and other private memory that is never touched
CODE_BYTES = 16 << 20  # left of a budget that the kernel's limit holds alone: pages of code that the first step reads
_NEAR_BYTES = 64 << 20  # private memory this close to the kernel's limit is used up: the request that failed was larger than what is left
_OOM_TEXT = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|std::bad_alloc|out of memory|can't start new thread"
    r"|could not (create|execute) a (primitive|memory|stream|engine|reorder)|failed to map segment|cannot map zero-fill pages",
    re.IGNORECASE,
)
_limit_bytes = 0  # in force; 0: none
_before = 0  # the kernel's limit before


def limit_host_memory(limit_bytes: int) -> None:
    """Let this process have at most `limit_bytes` resident; beyond it tensors are refused with an error.

    Without the cache of blocks the limit is RLIMIT_DATA alone: private memory may grow by what is left of the budget now, touched or not.
    Where a library then dies of a malloc that it did not check, the process ends with exit code 3 and one line instead of a crash.

    Raises:
        MemoryBudgetError: the process already has more.
        ValueError: this system has no such limit.
    """
    global _limit_bytes, _before
    if importlib.util.find_spec("resource") is None:
        raise ValueError("this system cannot limit a process's memory; leave budget.ram empty")
    resident = own_memory()[0]
    if resident + RESERVE_BYTES > limit_bytes:
        raise MemoryBudgetError(
            f"this process already has {format_bytes(resident)} of memory before the run begins, its limit is {format_bytes(limit_bytes)}; "
            "use a larger budget.ram, or leave it empty"
        )
    import resource

    _before = _before if _limit_bytes else resource.getrlimit(resource.RLIMIT_DATA)[0]
    _limit_bytes = limit_bytes
    _set_limits()
    _end_in_order()


def _set_limits() -> None:
    """Both limits, from what is resident and what is private now."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resident = own_memory()[0]
    private = (status_bytes() or {}).get("VmData", resident)  # what the kernel compares with the limit; unknown outside Linux
    behind = BEHIND_BYTES if limit_block_cache(_limit_bytes - RESERVE_BYTES) else -CODE_BYTES
    soft = private + max(0, _limit_bytes - resident - RESERVE_BYTES + behind)
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def lift_host_limit() -> None:
    """Take the limit away: what reports a failure must not meet it again."""
    global _limit_bytes
    if not _limit_bytes:
        return
    import resource

    limit_block_cache(0)
    resource.setrlimit(resource.RLIMIT_DATA, (_before, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    _limit_bytes = 0


def check_host_limit() -> None:
    """See that what is resident stays below the limit in force, whatever it is that grew, and count anew how much is left of it.

    Raises:
        MemoryBudgetError: it does not.
    """
    if not _limit_bytes:
        return
    resident = own_memory()[0]
    if resident > _limit_bytes:
        raise MemoryBudgetError(
            f"memory ran out: {format_bytes(resident)} are resident, the limit is {format_bytes(_limit_bytes)}; "
            "use a smaller model, smaller micro-batches, or a larger budget"
        )
    _set_limits()


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
    """Whether an error, or one that it was raised from, says that host or device memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, (RuntimeError, ImportError)) and _OOM_TEXT.search(str(error)):
        return True
    if _limit_bytes and isinstance(error, SystemError):  # Python's own, where it could not even make the MemoryError
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def _end_in_order() -> None:
    """Have a crash for want of memory end the process with exit code 3 and one line; any other is what it is.

    The handlers are C functions: Python's own run only after the instruction that failed, which fails for ever.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        libc.signal(number, ctypes.cast(_on_crash, ctypes.c_void_p))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_crash(number: int) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    private = (status_bytes() or {}).get("VmData", 0)
    if _limit_bytes and private > soft - _NEAR_BYTES:
        os.write(2, f"lowmem: error: {crash_message(number)}\n".encode())
        os._exit(MemoryBudgetError.exit_code)
    ctypes.CDLL(None).signal(number, ctypes.c_void_p(None))  # SIG_DFL; returning repeats the instruction


def crash_message(number: int) -> str:
    """What is said of a crash under a limit."""
    return (
        f"memory ran out: a library ended with {signal.Signals(number).name} after {format_bytes(_limit_bytes)} were used up; "
        "use a smaller train.micro_batch_size, train.activation_checkpointing=block, or a larger budget"
    )
