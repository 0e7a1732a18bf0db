"""What the NVIDIA driver tells of processes, with a driver made up for the test."""

import sys
import types

import pytest

from lowmem.memory import measure


class NVMLError(Exception):
    pass


def driver(devices, *, fails: str = "") -> types.SimpleNamespace:
    """A pynvml with devices, each a list of (pid, bytes or None)."""

    def call(name, value):
        if name == fails:
            raise NVMLError(name)
        return value

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: call("init", None),
        nvmlDeviceGetCount=lambda: call("count", len(devices)),
        nvmlDeviceGetHandleByIndex=lambda index: devices[index],
        nvmlDeviceGetComputeRunningProcesses=lambda device: [types.SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in device],
    )


@pytest.mark.parametrize(
    "library, expected",
    [
        (driver([[(5, 100), (6, 30)], [(5, 10), (9, 1000)]]), 140),
        (driver([[(9, 1000)]]), None),  # a container, where the driver knows other numbers
        (driver([[(5, None)]]), None),
        (driver([[(5, 100)]], fails="count"), None),
        (driver([[(5, 100)]], fails="init"), None),
        (None, None),
    ],
)
def test_bytes_of_processes_over_all_devices(library, expected, monkeypatch):
    monkeypatch.setattr(measure, "_library", None)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert measure.process_bytes([5, 6]) == expected
    assert measure.process_bytes([5, 6]) == expected  # initialised once, or known not to work
