"""Files of the cache: where they are, written whole or not at all, by one process at a time."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from lowmem.system.errors import StorageError

_SHOWN_CHARACTERS = 60  # of a key, in a message
HASH_BLOCK_BYTES = 1024 * 1024
T = TypeVar("T")
UNFINISHED = ".writing-"  # begins the name of a folder that is being written
WRITE_ERRNOS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR,
    }
)  # fmt: skip


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


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


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


def replace_file(path: Path, text: str) -> None:
    """Replace `path` atomically: a reader sees the old file or the new one, and what cannot be written leaves nothing.

    Raises:
        OSError: the disk is full, or not writable.
    """
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe is written to, not replaced
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def written_whole(out: Path, earlier: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write into; what is in it moves to `out` at the end of the block, or is gone if anything failed.

    Args:
        out: created if absent; files of other names that are there stay.
        earlier: files of an earlier content, which go when the new one is there.
    Raises:
        StorageError: the disk is full, or not writable; `out` is as it was.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    writing = out / f"{UNFINISHED}{os.getpid()}"
    try:
        if out.is_dir():
            for left in out.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
        writing.mkdir(parents=True)
        yield writing
        names = sorted(path.name for path in writing.iterdir())
        for name in names:
            if (out / name).is_dir() and not (out / name).is_symlink():
                shutil.rmtree(out / name)
            os.replace(writing / name, out / name)
        for name in set(earlier) - set(names):
            (out / name).unlink(missing_ok=True)
        created = []
    except Exception as error:
        reason = write_failure(error)
        if not reason:
            raise
        raise StorageError(f"cannot write {out}: {reason}; nothing new is left there; free space, or choose another folder") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        for folder in created:
            with suppress(OSError):  # it holds what is not ours
                folder.rmdir()


def write_failure(error: BaseException) -> str:
    """Why a file could not be written, if that is what an error, or one that it was raised from, says; else empty."""
    if isinstance(error, OSError) and error.errno in WRITE_ERRNOS:
        return error.strerror or str(error)
    code = re.search(r"\(os error (\d+)\)", str(error))  # of libraries in Rust: safetensors, tokenizers
    if code and int(code[1]) in WRITE_ERRNOS:
        return os.strerror(int(code[1]))
    return write_failure(error.__cause__) if error.__cause__ is not None else ""


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, in which NaN and infinity, which it does not have, are null."""
    return json.dumps(_without_nonfinite(value), indent=indent, allow_nan=False)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    return [_without_nonfinite(item) for item in value] if isinstance(value, (list, tuple)) else value


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of json: JSON leaves open which of two equal keys counts, and Python would take the last without a word.

    Raises:
        ValueError: a key occurs twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:_SHOWN_CHARACTERS]!r} occurs twice in one object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically: a reader sees the old file or the new one.

    Raises:
        StorageError: the disk is full, or not writable.
    """
    with storage_errors(path):
        replace_file(path, json_text(value, indent=1) + "\n")


def cached_json(path: Path, read: Callable[[Any], T], make: Callable[[], Any]) -> T:
    """What `read` makes of the JSON in a file of the cache; of what `make` returns, which is kept there, if the file is missing or damaged.

    A cache that cannot be written ends nothing: a line on standard error, and the next run makes the value again.

    Args:
        read: raises KeyError, TypeError or ValueError at a value that cannot be true.
        make: a JSON-ready value.
    """
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # damaged files are as good as none
        value = make()
    try:
        make_directory(path.parent)
        write_json(path, value)
    except (StorageError, OSError) as error:
        print(f"lowmem: {error}; not kept for the next time", file=sys.stderr)
    return read(value)


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


def malformed(error: Exception) -> str:
    """What is wrong with a value read from JSON, in words, from the error that using it raised."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


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
