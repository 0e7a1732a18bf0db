"""What memory there is: read from this machine, or known by the name of a device."""

from dataclasses import dataclass

import psutil

from lowmem.errors import ConfigError
from lowmem.memory.cgroup import cgroup_room_bytes
from lowmem.units import format_bytes

GIB = 1024**3


@dataclass(frozen=True)
class Hardware:
    """Memory that a run may use.

    Attributes:
        ram_bytes, vram_bytes: 0 is no such device.
        bf16: whether the GPU multiplies bf16 in hardware.
    """

    ram_bytes: int
    vram_bytes: int
    bf16: bool = True


# VRAM as the driver reports it, less what the context takes; RAM as such machines usually have.
NAMED = {
    "t4": Hardware(12 * GIB, round(14.2 * GIB), bf16=False),
    "gtx1660": Hardware(16 * GIB, round(5.4 * GIB), bf16=False),
    "rtx2080ti": Hardware(32 * GIB, round(10.3 * GIB), bf16=False),
    "v100": Hardware(32 * GIB, round(15.2 * GIB), bf16=False),
    "rtx3050": Hardware(16 * GIB, round(3.4 * GIB)),
    "rtx3060": Hardware(16 * GIB, round(11.2 * GIB)),
    "rtx3090": Hardware(32 * GIB, round(23 * GIB)),
    "rtx4060": Hardware(16 * GIB, round(7.2 * GIB)),
    "rtx4090": Hardware(64 * GIB, round(23 * GIB)),
    "a100-40": Hardware(80 * GIB, round(39 * GIB)),
    "laptop-4": Hardware(3 * GIB, 0),
    "laptop-8": Hardware(6 * GIB, 0),
    "laptop-16": Hardware(13 * GIB, 0),
}


def named_hardware(name: str) -> Hardware:
    """The memory of a device by its name.

    Raises:
        ConfigError: an unknown name; the message lists all.
    """
    if name not in NAMED:
        raise ConfigError(f"--hardware is {name!r}; known: {', '.join(NAMED)}; or give --budget.ram and --budget.vram")
    return NAMED[name]


def this_hardware() -> Hardware:
    """What this process may use now: free memory, or what its control group leaves of it; the memory of its first GPU."""
    import torch

    free = psutil.virtual_memory().available
    room = cgroup_room_bytes(0)
    if room is not None:
        free = min(free, room)
    if not torch.cuda.is_available():
        return Hardware(free, 0)
    return Hardware(free, torch.cuda.mem_get_info(0)[0], torch.cuda.get_device_capability(0) >= (8, 0))


def describe(hardware: Hardware) -> str:
    """For people."""
    gpu = f"{format_bytes(hardware.vram_bytes)} of VRAM" if hardware.vram_bytes else "no GPU"
    return f"{format_bytes(hardware.ram_bytes)} of RAM, {gpu}"
