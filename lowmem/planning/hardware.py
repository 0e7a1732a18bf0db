"""Machines that plans are made for: presets, and what this one computes in a second."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch

from lowmem.config.schema import RunConfig
from lowmem.memory.procfs import cgroup_room_bytes
from lowmem.optim.adamw import AdamW
from lowmem.system.devices import cpu_model, usable_cores
from lowmem.system.errors import ConfigError
from lowmem.system.files import cache_root, cached_json, json_sha256
from lowmem.system.units import format_bytes

GIB = 1024**3


@dataclass(frozen=True)
class Rates:
    """Work a second.

    Attributes:
        matmul: floating point operations by dtype.
        bytes_per_s: read plus written by operators that compute little.
        call_s: seconds an operator costs whatever its size.
        updates: parameters a second, by bits of the optimizer states.
    """

    matmul: dict[str, float]
    bytes_per_s: float
    call_s: float
    updates: dict[str, float]

    def flops_per_s(self, dtype: str) -> float:
        """Of matrix products in `dtype`; those of fp32 where it was not measured."""
        return self.matmul.get(dtype, self.matmul["float32"])

    def updates_per_s(self, config: RunConfig) -> float:
        """Parameters that the optimizer updates in a second."""
        if config.optim.backend == "bitsandbytes" and config.device == "cpu":
            return self.updates["bitsandbytes"]
        return self.updates[str(config.optim.state_bits)]


@dataclass(frozen=True)
class StorageRates:
    """Bytes a second between where a model computes and where its blocks are.

    Attributes:
        disk_read, disk_written: past the page cache, in large pieces.
        copied: between host memory and a GPU, one way at a time; 0 where there is none.
        source: "measured" or "assumed".
    """

    disk_read: float
    disk_written: float
    copied: float
    source: str


@dataclass(frozen=True)
class Hardware:
    """A machine that a run may use.

    Attributes:
        ram_bytes, vram_bytes: 0 is no such device.
        bf16: whether the GPU multiplies bf16 in hardware.
        disk_bytes: 0 is not known.
        rates, storage: None is to be measured here.
    """

    ram_bytes: int
    vram_bytes: int
    bf16: bool = True
    disk_bytes: int = 0
    rates: Rates | None = None
    storage: StorageRates | None = None


# Shares of published peaks that are assumed to be reached: half of the products, three quarters of a GPU's bandwidth and of what joins it
# to its host, nine tenths of a disk's data sheet.
_PRODUCTS, _BANDWIDTH, _WIRES, _DISK = 0.5, 0.75, 0.75, 0.9


def _gpu(fp32: float, half: float, bandwidth: float, *, bf16: bool = True) -> Rates:
    """From a data sheet, in TFLOP/s and GB/s: dense products of fp32 and of 16 bits with sums in fp32.

    An update moves as many bytes a parameter as one of `GPU_RATES` does: 45 with states of 32 bits, 22 with narrower ones.
    """
    moved = bandwidth * 1e9 * _BANDWIDTH
    products = {"float32": fp32 * 1e12 * _PRODUCTS, "float16": half * 1e12 * _PRODUCTS}
    products["bfloat16"] = products["float16" if bf16 else "float32"]
    return Rates(products, moved, 6e-6, {"32": moved / 45, "8": moved / 22, "4": moved / 22, "bitsandbytes": moved / 22})


def _cpu(fp32: float, bandwidth: float) -> Rates:
    """Of a laptop without instructions for bf16, which it emulates: TFLOP/s, and GB/s of its memory, a third of what passes its caches.

    An update moves 28 bytes a parameter, and computes more than it moves where states are narrow.
    """
    moved = bandwidth * 1e9
    updates = {"32": moved / 28, "8": moved / 40, "4": moved / 45, "bitsandbytes": moved / 800}
    return Rates({"float32": fp32 * 1e12, "bfloat16": fp32 * 1e11}, 3 * moved, 3e-6, updates)


def _storage(disk: str, wires: float = 0.0) -> StorageRates:
    """Assumed: of a kind of disk, and of what joins a card to its host, in GB/s one way."""
    read, written = _DISKS[disk]
    return StorageRates(read * 1e9 * _DISK, written * 1e9 * _DISK, wires * 1e9 * _WIRES, "assumed")


# Data sheets, GB/s: SATA 6 Gbit/s (Samsung 870 EVO); NVMe on PCIe 3.0 x4 (Samsung 970 EVO Plus), written to beyond its fast cache;
# NVMe on PCIe 4.0 x4 (WD SN770), likewise; a cloud's network disk (AWS gp3 as it comes is 0.125, an instance's NVMe of a g5 1.5).
_DISKS = {"sata": (0.56, 0.45), "nvme3": (3.5, 1.5), "nvme4": (5.0, 2.0), "cloud": (1.5, 0.7)}
_PCIE_3, _PCIE_4 = 1.0, 2.0  # GB/s of one lane, one way

# All assumed, and overridden by --budget.ram, --budget.vram and --budget.disk. VRAM as the driver reports it, less what the context takes;
# RAM as such machines usually have, less what the system takes; a disk half empty. Data sheets of the cards: fp32 and 16-bit TFLOP/s
# (GeForce halves tensor products that are summed in fp32, which these are), GB/s, and lanes. NVIDIA: Turing, Ampere and Ada GA102/AD102
# architecture whitepapers, T4, V100, A10 and A100 data sheets; AMD and Intel laptops: DDR4-2666 with two channels, four or eight cores.
NAMED = {
    "t4": Hardware(12 * GIB, round(14.2 * GIB), False, 60 * GIB, _gpu(8.1, 65, 320, bf16=False), _storage("cloud", 16 * _PCIE_3)),
    "gtx1660": Hardware(16 * GIB, round(5.4 * GIB), False, 100 * GIB, _gpu(5.0, 10, 192, bf16=False), _storage("sata", 16 * _PCIE_3)),
    "rtx2080ti": Hardware(32 * GIB, round(10.3 * GIB), False, 200 * GIB, _gpu(13.4, 54, 616, bf16=False), _storage("nvme3", 16 * _PCIE_3)),
    "v100": Hardware(32 * GIB, round(15.2 * GIB), False, 200 * GIB, _gpu(14, 112, 900, bf16=False), _storage("cloud", 16 * _PCIE_3)),
    "rtx3050": Hardware(16 * GIB, round(3.4 * GIB), True, 100 * GIB, _gpu(5.5, 22, 192), _storage("nvme3", 8 * _PCIE_4)),
    "rtx3060": Hardware(16 * GIB, round(11.2 * GIB), True, 200 * GIB, _gpu(12.7, 25.5, 360), _storage("nvme3", 16 * _PCIE_4)),
    "rtx3090": Hardware(32 * GIB, round(23 * GIB), True, 400 * GIB, _gpu(35.6, 71, 936), _storage("nvme4", 16 * _PCIE_4)),
    "rtx4060": Hardware(28 * GIB, round(7.2 * GIB), True, 200 * GIB, _gpu(15.1, 30, 272), _storage("nvme4", 8 * _PCIE_4)),
    "rtx4070": Hardware(28 * GIB, round(11.2 * GIB), True, 200 * GIB, _gpu(29.1, 58, 504), _storage("nvme4", 16 * _PCIE_4)),
    "rtx4090": Hardware(64 * GIB, round(23 * GIB), True, 400 * GIB, _gpu(82.6, 165, 1008), _storage("nvme4", 16 * _PCIE_4)),
    "a10g": Hardware(28 * GIB, round(22 * GIB), True, 200 * GIB, _gpu(31, 70, 600), _storage("cloud", 16 * _PCIE_4)),
    "a100-40": Hardware(80 * GIB, round(39 * GIB), True, 400 * GIB, _gpu(19.5, 312, 1555), _storage("cloud", 16 * _PCIE_4)),
    "laptop-4": Hardware(3 * GIB, 0, True, 30 * GIB, _cpu(0.10, 8), _storage("sata")),
    "laptop-8": Hardware(6 * GIB, 0, True, 60 * GIB, _cpu(0.15, 10), _storage("sata")),
    "laptop-16": Hardware(13 * GIB, 0, True, 200 * GIB, _cpu(0.3, 20), _storage("nvme3")),
}


def named_hardware(name: str) -> Hardware:
    """A device by its name.

    Raises:
        ConfigError: an unknown name; the message has the nearest, and all.
    """
    if name not in NAMED:
        near = get_close_matches(name.lower().replace(" ", ""), NAMED, 1, cutoff=0.5)
        nearest = f"; the nearest is {near[0]}" if near else ""
        raise ConfigError(
            f"--hardware is {name!r}{nearest}; known: {', '.join(NAMED)}; or give --budget.ram, --budget.vram and --budget.disk"
        )
    return NAMED[name]


def this_hardware() -> Hardware:
    """What this process may use now: free memory, or what its control group leaves of it; the memory of its first GPU; what is free of
    the disk that it works on."""
    disk = shutil.disk_usage(Path.cwd()).free
    free = psutil.virtual_memory().available
    room = cgroup_room_bytes(0)
    if room is not None:
        free = min(free, room)
    if not torch.cuda.is_available():
        return Hardware(free, 0, disk_bytes=disk)
    return Hardware(free, torch.cuda.mem_get_info(0)[0], torch.cuda.get_device_capability(0) >= (8, 0), disk)


_planned_for: ContextVar[Hardware | None] = ContextVar("lowmem_planned_hardware", default=None)


@contextmanager
def planning_for(hardware: Hardware) -> Iterator[None]:
    """Have rates be those of a machine that is not this one, where it has any."""
    token = _planned_for.set(hardware)
    try:
        yield
    finally:
        _planned_for.reset(token)


def planned_hardware() -> Hardware | None:
    """The machine of `planning_for`; None is this one."""
    return _planned_for.get()


def describe(hardware: Hardware) -> str:
    """For people."""
    gpu = f"{format_bytes(hardware.vram_bytes)} of VRAM" if hardware.vram_bytes else "no GPU"
    disk = f", {format_bytes(hardware.disk_bytes)} of disk" if hardware.disk_bytes else ""
    return f"{format_bytes(hardware.ram_bytes)} of RAM, {gpu}{disk}{', assumed' if hardware.rates else ''}"


_TOKENS, _WIDTH, _HIDDEN = 1024, 1024, 2688
_SLOW_S = 0.05  # of one call; a product takes some milliseconds where the processor has it
_ROUNDS = 15
_WIDTHS = {"32", "8", "4", "bitsandbytes"}
_LOOK_S, _BUSY_PERCENT = 0.2, 25.0


# Published dense peaks and bandwidths of the devices, times the share that training usually reaches (half, and three quarters).
GPU_RATES = {
    "t4": Rates({"float32": 4.0e12, "float16": 26e12, "bfloat16": 4.0e12}, 240e9, 6e-6, {"32": 5e9, "8": 8e9, "4": 8e9}),
    "cuda": Rates({"float32": 8e12, "float16": 60e12, "bfloat16": 60e12}, 450e9, 6e-6, {"32": 1e10, "8": 2e10, "4": 2e10}),
}


def rates_for(config: RunConfig) -> Rates:
    """Measured for a CPU; of a device in `config` from its data sheet, because there may be none here."""
    named = planned_hardware()
    if named is not None and named.rates is not None:
        return named.rates
    if config.device == "cuda":
        return GPU_RATES["t4" if config.train.precision == "fp16" else "cuda"]
    key = json_sha256([torch.__version__, cpu_model(), usable_cores(), torch.get_num_threads()])
    path = cache_root(config.data.cache_dir) / "rates" / f"{key[:24]}.json"
    try:
        return cached_json(path, _rates, _measured_when_idle)
    except _Busy:
        return _rates_while_busy()


class _Busy(Exception):
    """Other programs use the cores."""


def _measured_when_idle() -> dict[str, Any]:
    if _is_busy():
        raise _Busy
    return asdict(measure_rates())


def _rates(value: Any) -> Rates:
    """What a file of the cache says.

    Raises:
        TypeError, ValueError: it says nothing that can be true.
    """
    rates = Rates(**value)
    by_kind = [rates.matmul, rates.updates]
    if not all(isinstance(kind, dict) for kind in by_kind) or {"float32"} - {*rates.matmul} or _WIDTHS - {*rates.updates}:
        raise ValueError("not the rates of every kind of work")
    numbers = [number for kind in by_kind for number in kind.values()] + [rates.bytes_per_s, rates.call_s]
    if not all(isinstance(number, float | int) and 0 < number < math.inf for number in numbers):
        raise ValueError("rates are positive numbers")
    return rates


def _is_busy() -> bool:
    """Whether other programs use the cores: threads then wait for each other, and a rate may come out a hundred times too low."""
    return psutil.cpu_percent(interval=_LOOK_S) > _BUSY_PERCENT


@cache
def _rates_while_busy() -> Rates:
    """For this process alone: not to be remembered."""
    return measure_rates()


def measure_rates() -> Rates:
    """Time each kind of work; about two seconds and 60 MB."""
    matmul = {str(dtype).removeprefix("torch."): _matmul_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    big = torch.zeros(1 << 18)  # of the size of a block of activations: part of the traffic stays in the caches
    small = torch.zeros(16)
    out = torch.empty_like(big)
    copied = 2 * big.numel() * 4 / _seconds(lambda: torch.mul(big, 1.5, out=out), repeats=50)
    updates = {str(bits): _update_rate(bits) for bits in (32, 8, 4)}
    updates["bitsandbytes"] = updates["8"] / 20  # profiling/results/bench_optimizers.json: 15 to 28 times slower
    return Rates(matmul, copied, _seconds(lambda: small.mul_(1.0), repeats=2000), updates)


def _matmul_rate(dtype: torch.dtype) -> float:
    """Of a product of `_TOKENS` rows; of few rows where those tell already that the processor does not multiply this dtype itself."""
    b, rate = torch.zeros(_WIDTH, _HIDDEN, dtype=dtype), 0.0
    for tokens in (_TOKENS // 32, _TOKENS):
        a = torch.zeros(tokens, _WIDTH, dtype=dtype)
        seconds = _seconds(partial(torch.matmul, a, b))
        rate = 2 * tokens * _WIDTH * _HIDDEN / seconds
        if seconds > _SLOW_S:
            break
    return rate


def _update_rate(bits: int) -> float:
    parameter = torch.zeros(15_625, 128, requires_grad=True)  # of one dimension it would have 32-bit states
    parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW([parameter], lr=1e-3, state_bits=bits)  # type: ignore[arg-type]
    return parameter.numel() / _seconds(optimizer.step)


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The quickest round's seconds a call, after a call that does not count: others are slowed by what else the machine does."""
    began = time.perf_counter()
    work()
    first = time.perf_counter() - began
    if first > 10 * _SLOW_S:
        return first
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        times.append((time.perf_counter() - began) / repeats)
    return min(times)
