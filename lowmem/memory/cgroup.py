"""The memory limit of the container or service this process runs in, which `free` does not show."""

from pathlib import Path

_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as a number near 2**63


def cgroup_limit_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The lowest memory limit of this process's control group and those above it; None if there is none.

    Args:
        root, membership: where the kernel tells it; tests replace them.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return None
    limits = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            limits += _limits_upwards(root, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_upwards(root / "memory", path, "memory.limit_in_bytes")
    return min(limits, default=None)


def _limits_upwards(root: Path, path: str, file_name: str) -> list[int]:
    """Limits of a group and its parents. Inside a container the path is the host's, of which only the root may be visible."""
    folder, limits = root / path.lstrip("/"), []
    for level in (folder, *folder.parents):
        try:
            text = (level / file_name).read_text(encoding="ascii").strip()
        except OSError:
            text = ""
        if text.isdecimal() and int(text) < _UNLIMITED_BYTES:
            limits.append(int(text))
        if level == root:
            break
    return limits
