"""The memory limit of the container or service this process runs in, which `free` does not show, and what its group uses.

Imports next to nothing: `watch.py` runs it in a process that must stay thin.
"""

import os

_ROOT = "/sys/fs/cgroup"
_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number near 2**63


def cgroup_limit_bytes(root: str | os.PathLike[str] = _ROOT, membership: str | os.PathLike[str] = "/proc/self/cgroup") -> int | None:
    """The lowest memory limit of this process's control group and those above it; None if there is none.

    Args:
        root, membership: where the kernel tells it; tests replace them.
    """
    limits = []
    for number, controllers, path in _groups(membership):
        if number == "0":
            folders, name = _upwards(os.fspath(root), path), "memory.max"
        elif "memory" in controllers.split(","):
            folders, name = _upwards(os.path.join(root, "memory"), path), "memory.limit_in_bytes"
        else:
            continue
        sizes = (_size(os.path.join(folder, name)) for folder in folders)
        limits += [size for size in sizes if size is not None and size < _UNLIMITED_BYTES]
    return min(limits, default=None)


def cgroup_bytes(
    name: str, pid: int | str = "self", root: str | os.PathLike[str] = _ROOT, membership: str | os.PathLike[str] = ""
) -> int | None:
    """A size that version 2 tells of the control group of a process, page cache of files included.

    Args:
        name: memory.current, or memory.peak: the most since the group began, by whatever process of it.
        root, membership: where the kernel tells it; tests replace them.
    Returns:
        None where there is no such group or it does not count memory. A group above it, with other processes, is never taken instead.
    """
    for number, _, path in _groups(membership or f"/proc/{pid}/cgroup"):
        if number == "0":
            # inside a container the path is the host's, of which only the root may be visible: then the root is the container's group
            folder = next(folder for folder in _upwards(os.fspath(root), path) if os.path.isdir(folder) or folder == os.fspath(root))
            return _size(os.path.join(folder, name))
    return None


def _groups(membership: str | os.PathLike[str]) -> list[list[str]]:
    """[hierarchy number, controllers, path] of every group of a process; [] without Linux."""
    try:
        with open(membership, encoding="utf-8") as file:
            return [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []


def _upwards(root: str, path: str) -> list[str]:
    """A group's folder and those above it, up to and including the root."""
    names = [name for name in path.split("/") if name]
    return [os.path.join(root, *names[:depth]) for depth in range(len(names), -1, -1)]


def _size(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
