"""The C library's malloc, told to give large freed blocks back to the system.

Left alone, glibc raises the size from which blocks are mapped and unmapped one by one to the largest block freed so far, up to 32 MiB.
Tensors then share one heap with everything small and long-lived, which fragments: a training step was measured to keep about 10 % more
resident than its tensors take, growing over steps and differing between runs. With fixed thresholds it keeps what it uses.

Source: mallopt(3).
"""

import ctypes
import functools
from typing import Any

MAP_FROM_BYTES = 1024 * 1024  # blocks of this size are mapped one by one, and gone when freed
TRIM_FROM_BYTES = 4 * 1024 * 1024  # free memory at the end of the heap beyond this is given back
TOP_PAD_BYTES = 128 * 1024
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_MAX_MAPPINGS = 32768  # of the 65530 that Linux allows a process by default; glibc falls back to the heap beyond


def fix_malloc_thresholds() -> bool:
    """Fix the thresholds of this process's malloc; False where it has none (no glibc).

    The price is that the kernel zeroes the pages of every large block anew. Tensors do not pay it where `lowmem.memory.block_cache` is in
    use: they do not come from malloc then.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    settings = {
        _M_MMAP_THRESHOLD: MAP_FROM_BYTES,
        _M_TRIM_THRESHOLD: TRIM_FROM_BYTES,
        _M_TOP_PAD: TOP_PAD_BYTES,
        _M_MMAP_MAX: _MAX_MAPPINGS,
    }
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings.items())


def trim_malloc() -> None:
    """Give all free pages back to the system; nothing where malloc cannot."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


@functools.cache
def _function(name: str) -> Any:
    """A function of glibc; other C libraries have none."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
