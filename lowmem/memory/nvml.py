"""Memory of processes on NVIDIA devices, as the driver counts it: PyTorch's allocator, the CUDA context, and whatever else."""

import os
from typing import Any

_library: Any = None  # pynvml once it works, False once it is known not to


def process_bytes(pids: list[int] | None = None) -> int | None:
    """Device bytes of processes, summed over devices.

    Args:
        pids: default: this process.
    Returns:
        None without a GPU, a driver or pynvml (`pip install 'lowmem[nvidia]'`), and where the driver does not show these
        processes: inside a container it knows them under other numbers.
    """
    wanted = [os.getpid()] if pids is None else pids
    pynvml = _nvml()
    if not pynvml:
        return None
    found = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
                if process.pid in wanted and process.usedGpuMemory is not None:
                    found.append(process.usedGpuMemory)
    except pynvml.NVMLError:  # the driver went away, or refuses
        return None
    return sum(found) if found else None


def _nvml() -> Any:
    """The library, initialised once for the life of the process (some 10 ms)."""
    global _library
    if _library is None:
        try:
            import pynvml
        except ImportError:
            _library = False
            return _library
        try:
            pynvml.nvmlInit()
            _library = pynvml
        except pynvml.NVMLError:
            _library = False
    return _library
