"""The memory of tensors kept when it is freed, for the next tensor of that size: no page faults, no fragments, not a byte more at the peak.

With malloc's thresholds fixed (`lowmem.memory.malloc`) a freed block goes back to the system at once, and the next one costs a page fault
for every 4 KiB: a small model trains 1.5 times slower; the smaller blocks fragment a heap they share with everything else. The cache ends
both, and keeps blocks in use and blocks kept together below the peak of those in use (csrc/block_cache.cpp; `profiling/bench_malloc.py`
measures it). It is compiled once per version of PyTorch, with the C++ compiler that is there, against PyTorch's headers.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lowmem.memory.malloc import fix_malloc_thresholds, trim_malloc

KEEP_FROM_BYTES = 64 * 1024  # smaller blocks come from malloc's heap
_SOURCE = Path(__file__).with_name("csrc") / "block_cache.cpp"
_library: ctypes.CDLL | None = None


@dataclass(frozen=True)
class BlockCounts:
    """What the cache holds now, and what it has done.

    Attributes:
        in_use_bytes, kept_bytes: of blocks from KEEP_FROM_BYTES on, in whole pages.
        peak_bytes: of those in use, since the last release.
        reused, mapped: blocks handed out from the cache, and from the system.
    """

    in_use_bytes: int = 0
    kept_bytes: int = 0
    peak_bytes: int = 0
    reused: int = 0
    mapped: int = 0


def set_up_host_memory(folder: Path) -> str:
    """Fix malloc's thresholds, and put the cache before PyTorch's CPU allocator; for the rest of this process.

    Args:
        folder: where the compiled library is kept, or goes.
    Returns:
        Why the cache is not in use, in one line; empty when it is. Training works without: memory is the same, small models are slower.
    """
    global _library
    fix_malloc_thresholds()
    if _library is None:
        path, problem = compiled_library(folder)
        if problem:
            return problem
        _library = ctypes.CDLL(str(path))
        _library.lowmem_install_block_cache(ctypes.c_size_t(KEEP_FROM_BYTES))
    return ""


def release_host_memory() -> None:
    """Give everything that is free back to the system: kept blocks, and malloc's free pages."""
    if _library is not None:
        _library.lowmem_release_block_cache()
    trim_malloc()


def block_counts() -> BlockCounts:
    """The cache's counts; all zero where it is not in use."""
    if _library is None:
        return BlockCounts()
    counts = (ctypes.c_uint64 * 5)()
    _library.lowmem_block_cache_counts(counts)
    return BlockCounts(*counts)


@functools.cache
def compiled_library(folder: Path) -> tuple[Path, str]:
    """The library for this PyTorch below `folder`, compiled if it is not there (some seconds), and why there is none; empty if there is."""
    import torch

    key = hashlib.sha256(_SOURCE.read_bytes() + f"{torch.__version__} {platform.machine()}".encode()).hexdigest()[:16]
    path = folder / f"block_cache-{key}.so"
    if path.exists():
        return path, ""
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or compiler is None:
        return path, "the cache of memory blocks needs Linux and a C++ compiler (g++ or clang++); without it small models train slower"
    headers, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            command = [
                compiler, "-O2", "-std=c++2a", "-shared", "-fPIC", f"-I{headers}",
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                str(_SOURCE), f"-L{libraries}", "-lc10", "-o", str(made),
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                reason = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
                return path, f"the cache of memory blocks does not compile ({reason[:200]}); without it small models train slower"
            made.replace(path)  # whole or not at all, whoever else compiles it now
    except OSError as error:
        return path, f"the cache of memory blocks cannot be compiled in {folder} ({error}); without it small models train slower"
    return path, ""
