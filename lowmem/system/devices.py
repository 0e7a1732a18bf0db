"""Which device a run computes on, and what that device computes natively."""

import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Literal

import torch

from lowmem.system.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16", "fp8"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "fp8")
# Names of the instructions that multiply bf16, in torch.cpu.get_capabilities() and in /proc/cpuinfo alike
# (x86: AVX512_BF16 and AMX; ARM: NEON and SVE).
_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16")
_CUDA_BF16_CAPABILITY = (8, 0)
_CUDA_FP8_CAPABILITY = (8, 9)


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA if there is a device this PyTorch can use, else the CPU.

    Args:
        name: auto, cpu, cuda or cuda:N.
    Raises:
        ConfigError: an unknown name, or CUDA was asked for and cannot be used; the message says why.
    """
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index_text = name.partition(":")
    if name != "auto" and (kind != "cuda" or (index_text and not index_text.isdecimal()) or name.endswith(":")):
        raise ConfigError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if index_text:
        index = int(index_text)
    else:
        # An explicit index, because torch.device("cuda") compares unequal to the device of a tensor on it.
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    problem = cuda_problem(index)
    if not problem:
        return torch.device("cuda", index)
    if name == "auto":
        return torch.device("cpu")
    raise ConfigError(f"device is {name}, but {problem}; use device=cpu or auto")


def cuda_problem(index: int = 0) -> str:
    """Why CUDA device `index` cannot be used here; empty when it can."""
    if not torch.backends.cuda.is_built():
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device or no working driver"
    count = torch.cuda.device_count()
    if index >= count:
        return f"this machine has {count} CUDA device(s), numbered from 0"
    if torch.version.hip:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    if not _has_kernels_for(major, minor, torch.cuda.get_arch_list()):
        return (
            f"this PyTorch has no kernels for {torch.cuda.get_device_name(index)} (compute capability {major}.{minor}; "
            f"it was built for {' '.join(torch.cuda.get_arch_list())})"
        )
    return ""


def _has_kernels_for(major: int, minor: int, architectures: list[str]) -> bool:
    """Whether a build for `architectures` ("sm_75", "sm_90a", "compute_90") runs on capability major.minor."""
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = "".join(filter(str.isdigit, number))
        if len(digits) < 2:
            continue
        built_major, built_minor = int(digits[:-1]), int(digits[-1])
        exact_only = number.endswith("a")
        if exact_only:
            fits = (built_major, built_minor) == (major, minor)
        elif kind == "compute":  # PTX, compiled for any newer device when first used
            fits = (built_major, built_minor) <= (major, minor)
        else:
            fits = built_major == major and built_minor <= minor
        if fits:
            return True
    return not architectures


def cpu_features() -> dict[str, bool]:
    """Instruction sets of this CPU by PyTorch's name, such as avx2, avx512_f, avx512_bf16, amx_bf16, neon, bf16."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return {name: value for name, value in get_capabilities().items() if isinstance(value, bool)}
    return dict.fromkeys(_cpuinfo_flags(_read_cpuinfo()), True)


def _read_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo_flags(text: str) -> list[str]:
    """The instruction sets in a /proc/cpuinfo: the line is called flags on x86 and Features on ARM."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return ["avx512_f" if flag == "avx512f" else flag for flag in value.split()]
    return []


def cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; without that bf16 is emulated, and slower than fp32."""
    features = cpu_features()
    return any(features.get(name, False) for name in _BF16_FEATURES)


def cuda_has_native_bf16(index: int = 0) -> bool:
    """Whether a CUDA device multiplies bf16 in hardware: NVIDIA from Ampere (8.0) on, every AMD device PyTorch supports."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(index) >= _CUDA_BF16_CAPABILITY


def cuda_has_native_fp8(index: int = 0) -> bool:
    """Whether an NVIDIA device multiplies fp8 in hardware: from Ada (8.9) and Hopper on."""
    return not torch.version.hip and torch.cuda.get_device_capability(index) >= _CUDA_FP8_CAPABILITY


def fp8_problem(device: torch.device) -> str:
    """Why `device` cannot train in fp8, and what to do instead; empty when it can. Does not import torchao."""
    needs = "fp8 needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper)"
    if device.type != "cuda":
        bf16 = "native" if cpu_has_native_bf16() else "emulated"
        return f"{needs}; this run computes on a CPU, which has fp32 and bf16 ({bf16}): use train.precision=auto"
    if not cuda_has_native_fp8(device.index or 0):
        major, minor = torch.cuda.get_device_capability(device.index or 0)
        usable = "bf16, fp16 and fp32" if cuda_has_native_bf16(device.index or 0) else "fp16 and fp32"
        return f"{needs}; this GPU has capability {major}.{minor}, with {usable}: use train.precision=auto"
    if importlib.util.find_spec("torchao") is None:
        return "torchao, which multiplies it, is not installed; run: pip install 'lowmem[fp8]', or use train.precision=bf16"
    return ""


def device_has_native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware."""
    return cuda_has_native_bf16(device.index or 0) if device.type == "cuda" else cpu_has_native_bf16()


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """What a run computes in on `device`.

    Args:
        precision: fp32, bf16, fp16, fp8 or auto: bf16 where the device has it natively, else fp16 on a GPU and fp32 on a CPU.
    Raises:
        ConfigError: an unknown precision, fp16 on a CPU, fp8 where the device does not multiply it or torchao is missing.
    """
    if precision == "auto":
        if device_has_native_bf16(device):
            return "bf16"
        return "fp16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision is fp16 on a CPU, which has no fast fp16 and would need loss scaling for nothing; "
            "allowed there: fp32, bf16 (same exponent range as fp32), auto"
        )
    if precision == "fp8":
        problem = fp8_problem(device)
        if problem:
            raise ConfigError(f"train.precision is fp8, but {problem}")
    for known in PRECISIONS:
        if precision == known:
            return known
    raise ConfigError(f"train.precision is {precision!r}; allowed: auto, {', '.join(PRECISIONS)}")


def cxx_compiler() -> str | None:
    """Path of the C++ compiler: the environment variable CXX, or what is installed; None without one."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")


def usable_cores() -> int:
    """Cores this process may run on, by its affinity."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name; \"unknown\" where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
