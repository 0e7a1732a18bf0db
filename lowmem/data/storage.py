"""Files of the cache: where they are, written whole or not at all, by one process at a time."""

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem.errors import StorageError

HASH_BLOCK_BYTES = 1024 * 1024


def cache_root(cache_dir: str) -> Path:
    """Folder of the cache: `cache_dir`, or lowmem's below the user's cache directory when that is empty.

    Raises:
        StorageError: `cache_dir` is no path, or the user has no home directory and the temporary folder instead is another user's.
    """
    if "\0" in cache_dir:
        raise StorageError(f"data.cache_dir is {cache_dir!r}, which holds a NUL byte; remove it")
    try:
        if cache_dir:
            return Path(cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem"
    except RuntimeError as error:
        if cache_dir:
            raise StorageError(f"data.cache_dir is {cache_dir}: {error}; write it without ~") from error
        return _homeless_root()


def _homeless_root() -> Path:
    """A folder of this user's own among the temporary files, as containers need that run as a user without a name."""
    folder = Path(tempfile.gettempdir()) / f"lowmem-{os.getuid()}"
    with storage_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise StorageError(f"there is no home directory, and {folder} belongs to others; set XDG_CACHE_HOME to a folder of your own")
    return folder


def compiled_root() -> Path:
    """Folder of what was compiled on this machine, whatever run it was for."""
    return cache_root("") / "compiled"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into a StorageError; wrap writes only, a failed read is another matter.

    Raises:
        StorageError: the disk is full, or not writable.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space there, or name another folder with data.cache_dir"
        ) from error


def make_directory(path: Path) -> None:
    """Create a folder and those above it.

    Raises:
        StorageError: it cannot be created.
    """
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically: a reader sees the old file or the new one.

    Raises:
        StorageError: the disk is full, or not writable.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(value, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`; the kernel releases it when the process ends, however it ends.

    Args:
        on_wait: called once if another process holds the lock.
    Raises:
        StorageError: the lock file cannot be written or locked.
    """
    with storage_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with storage_errors(path):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """Hash of a JSON-ready value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
