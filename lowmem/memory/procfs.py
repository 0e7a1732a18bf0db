"""Memory of processes as Linux tells it in /proc. Functions return None where the kernel does not say.

Imports next to nothing: `watch.py` runs it in a process that must stay thin.
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
