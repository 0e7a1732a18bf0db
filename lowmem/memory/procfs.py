"""Memory of processes and of control groups, as Linux tells it in /proc and /sys; None where the kernel does not say.

Imports os alone: `watch.py` runs it in a process that must stay thin.
"""

import os

_RESET_HIGH_WATER_MARK = "5"


def status_bytes(pid: int | str = "self") -> dict[str, int] | None:
    """Sizes from /proc/PID/status in bytes: VmRSS (resident now), VmHWM (most ever resident), VmSwap, ..."""
    return _kib_fields(f"/proc/{pid}/status")


def rollup_bytes(pid: int | str = "self") -> dict[str, int] | None:
    """Sums over all mappings of a process in bytes: Rss, Pss, Pss_Anon, Anonymous, ...

    Pss counts a page shared by n processes as 1/n in each. Costs about 15 ms per GiB resident: the kernel walks the page tables.
    """
    return _kib_fields(f"/proc/{pid}/smaps_rollup")


def _kib_fields(path: str) -> dict[str, int] | None:
    """The "Name:   123 kB" lines of a file, in bytes."""
    text = _read(path)
    if text is None:
        return None
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        parts = value.split()
        if len(parts) == 2 and parts[1] == "kB" and parts[0].isdecimal():
            fields[name] = int(parts[0]) * 1024
    return fields


def _read(path: str) -> str | None:
    """A file's text; None without /proc, when the process ended, or when it belongs to someone else."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def reset_high_water_mark() -> bool:
    """Set this process's VmHWM to what is resident now; False where the kernel does not allow it.

    Source: Linux, Documentation/filesystems/proc.rst, clear_refs.
    """
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write(_RESET_HIGH_WATER_MARK)
    except OSError:
        return False
    return True


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the number it names a process for good. None once it has ended.

    Source: proc(5), /proc/PID/stat, fields 3 (state) and 22 (starttime).
    """
    text = _read(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text[text.rindex(")") + 1 :].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def child_pids(parent: int | None = None) -> list[int] | None:
    """Processes below `parent`, at any depth; tens of microseconds, where listing every process of the machine takes milliseconds.

    Args:
        parent: default: this process.
    """
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return None  # no /proc, or a kernel without CONFIG_PROC_CHILDREN
    found: list[int] = []
    parents = [os.getpid() if parent is None else parent]
    while parents:
        children = _children_of(parents.pop())
        found += children
        parents += children
    return found


def _children_of(pid: int) -> list[int]:
    """Direct children; a child belongs to the thread that started it, so every thread is asked."""
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            text = _read(f"/proc/{pid}/task/{thread}/children")
            children += map(int, (text or "").split())  # the thread may have ended
    except OSError:  # the process ended
        pass
    return children


_ROOT = "/sys/fs/cgroup"
_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number near 2**63


def cgroup_limit_bytes(root: str | os.PathLike[str] = _ROOT, membership: str | os.PathLike[str] = "/proc/self/cgroup") -> int | None:
    """The lowest memory limit of this process's control group and those above it; None if there is none.

    Args:
        root, membership: where the kernel tells it; tests replace them.
    """
    return min((limit for limit, _, _ in _limits(root, membership)), default=None)


def cgroup_room_bytes(
    own_bytes: int, root: str | os.PathLike[str] = _ROOT, membership: str | os.PathLike[str] = "/proc/self/cgroup"
) -> int | None:
    """What this process may have under the limits of its control group and those above it; None if there is none.

    Args:
        own_bytes: what it has now, without pages of files.
        root, membership: where the kernel tells it; tests replace them.
    Returns:
        The least, over the groups, of the limit less what others in the group have and the kernel cannot take back: no pages of files.
    """
    rooms = []
    for limit, folder, kept in _limits(root, membership):
        used = sum(_statistics(os.path.join(folder, "memory.stat")).get(name, 0) for name in kept)
        rooms.append(max(0, limit - max(0, used - own_bytes)))
    return min(rooms, default=None)


def _limits(root: str | os.PathLike[str], membership: str | os.PathLike[str]) -> list[tuple[int, str, tuple[str, ...]]]:
    """Limit, folder, and the names in memory.stat of what cannot be reclaimed, for each group with a limit."""
    found: list[tuple[int, str, tuple[str, ...]]] = []
    kept: tuple[str, ...]
    for number, controllers, path in _groups(membership):
        if number == "0":
            folders, name, kept = _upwards(os.fspath(root), path), "memory.max", ("anon", "shmem", "slab_unreclaimable")
        elif "memory" in controllers.split(","):
            folders, name, kept = _upwards(os.path.join(root, "memory"), path), "memory.limit_in_bytes", ("total_rss", "total_shmem")
        else:
            continue
        for folder in folders:
            limit = _size(os.path.join(folder, name))
            if limit is not None and limit < _UNLIMITED_BYTES:
                found.append((limit, folder, kept))
    return found


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


def _statistics(path: str) -> dict[str, int]:
    """The "name number" lines of a file; {} without one."""
    try:
        with open(path, encoding="ascii") as file:
            pairs = [line.split() for line in file]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _size(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
