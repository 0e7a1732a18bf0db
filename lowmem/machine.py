"""What this machine has, as plain dictionaries that go into JSON as they are: processors, memory, disks, libraries."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from lowmem.data.storage import cache_root, compiled_root
from lowmem.devices import (
    cpu_features,
    cpu_has_native_bf16,
    cpu_model,
    cuda_has_native_bf16,
    cuda_has_native_fp8,
    cuda_problem,
    cxx_compiler,
    usable_cores,
)
from lowmem.memory.block_cache import block_cache_library
from lowmem.memory.cgroup import cgroup_limit_bytes
from lowmem.optim.kernels import cpu as cpu_kernels

# Distribution, the extra that installs it ("" for what lowmem always needs), and what it is for.
LIBRARIES = (
    ("torch", "", "tensors"),
    ("numpy", "", "tokens on the host"),
    ("safetensors", "", "checkpoints"),
    ("psutil", "", "memory of processes"),
    ("tokenizers", "", "byte-pair encoding"),
    ("jsonargparse", "", "configuration"),
    ("PyYAML", "", "configuration"),
    ("rich", "", "progress"),
    ("deepspeed", "deepspeed", "ZeRO, offload, several devices"),
    ("bitsandbytes", "bnb", "8-bit optimizer states"),
    ("lion-pytorch", "lion", "Lion"),
    ("datasets", "hub", "data from the Hugging Face hub"),
    ("pyarrow", "hub", ".parquet files"),
    ("zstandard", "zstd", ".zst files"),
    ("nvidia-ml-py", "nvidia", "memory of NVIDIA devices"),
    ("tensorboard", "tensorboard", "metrics in TensorBoard"),
    ("wandb", "wandb", "metrics in Weights & Biases"),
    ("trackio", "trackio", "metrics in trackio"),
    ("triton", "triton", "low-bit optimizer states on CUDA"),
    ("transformers", "hf", "models in Hugging Face's format"),
    ("matplotlib", "report", "figures of lowmem profile"),
)
_SHOWN_FEATURES = {
    "avx2": "AVX2", "avx512_f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX", "amx_bf16": "AMX BF16", "neon": "NEON", "bf16": "BF16", "sve": "SVE", "sve_bf16": "SVE BF16",
}  # fmt: skip


def cpu_report() -> dict[str, Any]:
    """Processor, cores, and the instructions that matter for training."""
    features = cpu_features()
    return {
        "model": cpu_model(),
        "architecture": platform.machine(),
        "usable_cores": usable_cores(),
        "logical_cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "torch_threads": torch.get_num_threads(),
        "instructions": [shown for name, shown in _SHOWN_FEATURES.items() if features.get(name)],
        "native_bf16": cpu_has_native_bf16(),
    }


def cuda_report() -> dict[str, Any]:
    """CUDA devices, and why there is none that can be used."""
    count = torch.cuda.device_count() if torch.backends.cuda.is_built() else 0
    return {
        "problem": cuda_problem(),
        "torch_cuda": torch.version.cuda or torch.version.hip,
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
        "devices": [_cuda_device(index) for index in range(count)],
    }


def _cuda_device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    try:
        used = torch.cuda.device_memory_used(index)  # through NVML: asking CUDA itself would create a context
    except (RuntimeError, ImportError, AttributeError):
        used = None
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total_bytes": properties.total_memory,
        "used_bytes": used,
        "native_bf16": cuda_has_native_bf16(index),
        "native_fp8": cuda_has_native_fp8(index),
        "problem": cuda_problem(index),
    }


def memory_report() -> dict[str, Any]:
    """Host memory in bytes; `usable_bytes` is what a run can count on now."""
    ram, swap, limit = psutil.virtual_memory(), psutil.swap_memory(), cgroup_limit_bytes()
    return {
        "ram_total_bytes": ram.total,
        "ram_available_bytes": ram.available,
        "swap_total_bytes": swap.total,
        "swap_used_bytes": swap.used,
        "cgroup_limit_bytes": limit,
        "usable_bytes": min(ram.available, limit) if limit else ram.available,
    }


def disk_report() -> list[dict[str, Any]]:
    """Free bytes where runs and token shards go by default."""
    return [
        {"purpose": purpose, "path": str(path), "free_bytes": shutil.disk_usage(_existing(path)).free}
        for purpose, path in (("working directory", Path.cwd()), ("token shards", cache_root("")))
    ]


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def library_report() -> list[dict[str, Any]]:
    """Version of each library; null and the command that installs it where it is missing. Imports none of them."""
    rows = []
    for name, extra, purpose in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        target = f"'lowmem[{extra}]'" if extra else "lowmem"
        install = None if version else f"pip install {target}"
        rows.append({"name": name, "version": version, "extra": extra, "purpose": purpose, "install": install})
    return rows


def compiler_report() -> dict[str, Any]:
    """C++ compiler, which DeepSpeed's operators need."""
    return {"cxx": cxx_compiler()}


def kernels_report() -> dict[str, Any]:
    """lowmem's own optimizer kernels: the instruction set in use, and why they cannot be used (empty when they can)."""
    return {"instructions": cpu_kernels.ISAS[cpu_kernels.isa()], "problem": cpu_kernels.problem()}


def block_cache_report() -> dict[str, Any]:
    """The cache of freed memory blocks on the CPU: why it cannot be used, empty when it can. Compiles it where that was not done."""
    return {"problem": block_cache_library(compiled_root())[1]}


def deepspeed_report() -> dict[str, Any]:
    """Which DeepSpeed operators are compiled; compiles nothing."""
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return {"installed": False, "operators": {}}
    from lowmem.engine.deepspeed_build import deepspeed_op_status

    device_type = "cpu" if cuda_problem() else "cuda"
    return {"installed": True, "operators": deepspeed_op_status(device_type)}
