"""What every committed measurement says of where it was taken."""

import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path

LIBRARIES = ("torch", "transformers", "deepspeed", "bitsandbytes", "torchao", "tokenizers", "numpy")


def describe_machine() -> dict:
    """CPU, cores, memory and versions, without names that identify the machine."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
