"""Machines that plans are made for: presets, and what is measured on this one."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
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


_TOKENS, _WIDTH, _HIDDEN = 1024, 1024, 2688
_SLOW_S = 0.05  # of one call; a product takes some milliseconds where the processor has it
_ROUNDS = 15
_WIDTHS = {"32", "8", "4", "bitsandbytes"}
_LOOK_S, _BUSY_PERCENT = 0.2, 25.0


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


# Published dense peaks and bandwidths of the devices, times the share that training usually reaches (half, and three quarters).
GPU_RATES = {
    "t4": Rates({"float32": 4.0e12, "float16": 26e12, "bfloat16": 4.0e12}, 240e9, 6e-6, {"32": 5e9, "8": 8e9, "4": 8e9}),
    "cuda": Rates({"float32": 8e12, "float16": 60e12, "bfloat16": 60e12}, 450e9, 6e-6, {"32": 1e10, "8": 2e10, "4": 2e10}),
}


def rates_for(config: RunConfig) -> Rates:
    """Measured for a CPU; of a device in `config` from its data sheet, because there may be none here."""
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
