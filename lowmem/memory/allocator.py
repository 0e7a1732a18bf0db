"""The host's allocator: which freed memory is kept for the next step, and which goes back to the system."""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.system.devices import cxx_compiler

MAP_FROM_BYTES = 1024 * 1024  # blocks of this size are mapped one by one, and gone when freed
TRIM_FROM_BYTES = 4 * 1024 * 1024  # free memory at the end of the heap beyond this is given back
TOP_PAD_BYTES = 128 * 1024
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_MAX_MAPPINGS = 32768  # of the 65530 that Linux allows a process by default; glibc falls back to the heap beyond


def fix_malloc_thresholds() -> bool:
    """Fix the thresholds of this process's malloc; False where it has none (no glibc).

    The price is that the kernel zeroes the pages of every large block anew. Tensors do not pay it where `lowmem.memory.allocator` is in
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


KEEP_FROM_BYTES = 64 * 1024  # smaller blocks come from malloc's heap
_SOURCE = Path(__file__).with_name("csrc") / "block_cache.cpp"
_FLAGS = ("-O2", "-std=c++2a", "-shared", "-fPIC")
_WITHOUT = "without it small models train slower and take more memory"
_installed: ctypes.CDLL | None = None


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
        Why the cache is not in use, in one line; empty when it is. Training works without.
    """
    global _installed
    fix_malloc_thresholds()
    library, problem = block_cache_library(folder)
    if library is not None and _installed is None:
        library.lowmem_install_block_cache(ctypes.c_size_t(KEEP_FROM_BYTES))
        _installed = library
    return problem


def release_host_memory() -> None:
    """Give everything that is free back to the system: kept blocks, and malloc's free pages."""
    if _installed is not None:
        _installed.lowmem_release_block_cache()
    trim_malloc()


def block_counts() -> BlockCounts:
    """The cache's counts; all zero where it is not in use."""
    if _installed is None:
        return BlockCounts()
    counts = (ctypes.c_uint64 * 5)()
    _installed.lowmem_block_cache_counts(counts)
    return BlockCounts(*counts)


def limit_block_cache(limit_bytes: int) -> bool:
    """Refuse blocks that would take the resident memory of this process past `limit_bytes`; 0 lifts the limit.

    A refused block is PyTorch's error of memory that ran out; what is no block of the cache still comes from the system.

    Returns:
        Whether there is such a limit now: False where the cache is not in use.
    """
    return _installed is not None and bool(_installed.lowmem_limit_block_cache(ctypes.c_size_t(limit_bytes)))


@functools.cache
def block_cache_library(folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library for this PyTorch below `folder`, not yet in use, and why there is none; compiled if it is not there (about a second).

    A library is code: it is loaded only if nobody else could have written it, and if it is what was written.
    """
    import torch

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    versions = f"{torch.__version__} {platform.machine()} {platform.libc_ver()} {_FLAGS} {abi}"
    key = hashlib.sha256(_SOURCE.read_bytes() + versions.encode()).hexdigest()[:16]
    path = folder / f"block_cache-{key}.so"
    try:
        foreign = written_by_others(folder) if folder.exists() else ""
        if foreign and _make_private(folder):
            path.unlink(missing_ok=True)  # whoever wrote it
            foreign = ""
        if foreign:
            return None, f"the cache of memory blocks is not loaded: {foreign}; {_WITHOUT}; XDG_CACHE_HOME names another folder"
        if not _is_sound(path):
            problem = _compile(path, abi, Path(torch.__file__).parent)
            if problem:
                return None, problem
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        return (
            None,
            f"the cache of memory blocks cannot be compiled or loaded in {folder} ({error}); {_WITHOUT}; XDG_CACHE_HOME names another",
        )


def written_by_others(path: Path) -> str:
    """Why a file or folder may hold what another user wrote; empty if only this user, or root, can have.

    Raises:
        OSError: it is not there.
    """
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _make_private(folder: Path) -> bool:
    """Take the right to write from everyone else; False if the folder is not ours."""
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return False
    folder.chmod(stat.S_IMODE(status.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    return not written_by_others(folder)


def _is_sound(path: Path) -> bool:
    """Whether the library is there, was written by this user, and is whole: its last bytes are the hash of all before them."""
    if not path.is_file() or written_by_others(path):
        return False
    content = path.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _compile(path: Path, abi: str, torch_folder: Path) -> str:
    """Make the library, whole or not at all; what went wrong, in one line.

    Raises:
        OSError: the folder cannot be written.
    """
    compiler = cxx_compiler()
    if sys.platform != "linux" or compiler is None:
        return f"the cache of memory blocks needs Linux and a C++ compiler (g++ or clang++); {_WITHOUT}"
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _make_private(path.parent)  # whatever the umask
    with open(path.with_suffix(".lock"), "w") as lock, tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks wait for the one that compiles
        if _is_sound(path):
            return ""
        made = Path(temporary) / path.name
        command = [
            compiler, *_FLAGS, abi, f"-I{torch_folder / 'include'}", str(_SOURCE), f"-L{torch_folder / 'lib'}", "-lc10", "-o", str(made),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        if result.returncode:
            reason = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
            return f"the cache of memory blocks does not compile ({reason[:200]}); {_WITHOUT}"
        with open(made, "ab") as file:  # a loader reads what its headers name, and nothing behind it
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.chmod(0o755)
        made.replace(path)
    return ""
