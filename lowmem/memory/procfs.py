"""Memory of processes as Linux tells it in /proc. Functions return None where the kernel does not say."""

import os
from pathlib import Path

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
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # no /proc, the process ended, or it belongs to someone else
        return None
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        parts = value.split()
        if len(parts) == 2 and parts[1] == "kB" and parts[0].isdecimal():
            fields[name] = int(parts[0]) * 1024
    return fields


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


def child_pids() -> list[int] | None:
    """Processes below this one, at any depth; tens of microseconds, where listing every process of the machine takes milliseconds."""
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return None  # no /proc, or a kernel without CONFIG_PROC_CHILDREN
    found: list[int] = []
    parents = [os.getpid()]
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
            try:
                text = Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii")
            except OSError:  # the thread ended
                continue
            children += map(int, text.split())
    except OSError:  # the process ended
        pass
    return children
