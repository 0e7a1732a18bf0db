"""The `doctor` command: what this machine can do, and what will be slow on it and why."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from lowmem.cli.options import OptionParser
from lowmem.memory.allocator import block_cache_library
from lowmem.memory.procfs import cgroup_limit_bytes
from lowmem.optim.kernels import cpu as cpu_kernels
from lowmem.system.devices import (
    cpu_features,
    cpu_has_native_bf16,
    cpu_model,
    cuda_has_native_bf16,
    cuda_has_native_fp8,
    cuda_problem,
    cxx_compiler,
    usable_cores,
)
from lowmem.system.files import cache_root, compiled_root, existing_folder
from lowmem.system.units import format_bytes

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
        {"purpose": purpose, "path": str(path), "free_bytes": shutil.disk_usage(existing_folder(path)).free}
        for purpose, path in (("working directory", Path.cwd()), ("token shards", cache_root("")))
    ]


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
    from lowmem.engine.deepspeed.operators import deepspeed_op_status

    device_type = "cpu" if cuda_problem() else "cuda"
    return {"installed": True, "operators": deepspeed_op_status(device_type)}


def print_table(report: dict[str, Any]) -> None:
    """Print what `lowmem.cli.doctor.examine` found on standard output, for people."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, lines in _rows(report):
        for index, line in enumerate(lines):
            table.add_row("" if index else name, line)
    console = Console(file=sys.stdout, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(table)
    console.print()
    notes = report["notes"] or ["nothing found"]
    console.print("What will be slow here, and why:", style="bold")
    for note in notes:
        console.print(f"- {note}")


def _rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Heading and lines of every section."""
    describe: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
        "cpu": ("CPU", _cpu_lines),
        "cuda": ("GPU", _gpu_lines),
        "memory": ("memory", _memory_lines),
        "disk": (
            "disk",
            lambda disks: [f"{format_bytes(disk['free_bytes'])} free for the {disk['purpose']}, {disk['path']}" for disk in disks],
        ),
        "libraries": ("libraries", _library_lines),
        "compiler": ("compiler", lambda compiler: [compiler["cxx"] or "none found"]),
        "kernels": ("optimizer kernels", lambda kernels: [(kernels["problem"] and "not compiled") or f"C++, {kernels['instructions']}"]),
        "block_cache": ("memory blocks", lambda cache: ["given back when freed" if cache["problem"] else "kept for reuse"]),
        "deepspeed": ("DeepSpeed", _deepspeed_lines),
    }
    rows = [("system", [f"Python {report['python']}, {report['platform']}"])]
    for key, (heading, lines) in describe.items():
        part = report[key]
        failed = isinstance(part, dict) and "error" in part
        rows.append((heading, [f"could not be determined ({part['error']})"] if failed else lines(part)))
    return rows


def _cpu_lines(cpu: dict[str, Any]) -> list[str]:
    bf16 = "native" if cpu["native_bf16"] else "emulated (slow)"
    return [
        f"{cpu['model']} ({cpu['architecture']}), {cpu['usable_cores']} usable cores of {cpu['logical_cores']}",
        f"{', '.join(cpu['instructions']) or 'no vector instructions known'}; bf16: {bf16}",
    ]


def _gpu_lines(cuda: dict[str, Any]) -> list[str]:
    lines = []
    for device in cuda["devices"]:
        used = "" if device["used_bytes"] is None else f", {format_bytes(device['used_bytes'])} in use"
        kinds = [f"{kind}: {'native' if device[f'native_{kind}'] else 'no'}" for kind in ("bf16", "fp8")]
        lines.append(
            f"{device['index']}: {device['name']}, {format_bytes(device['total_bytes'])}{used}, "
            f"compute capability {device['capability']}, {', '.join(kinds)}"
        )
    return lines or ["none"]


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    limit = memory["cgroup_limit_bytes"]
    return [
        f"RAM {format_bytes(memory['ram_total_bytes'])}, {format_bytes(memory['ram_available_bytes'])} available",
        f"swap {format_bytes(memory['swap_total_bytes'])}, {format_bytes(memory['swap_used_bytes'])} used",
        f"container limit {format_bytes(limit) if limit else 'none'}",
    ]


def _disk_lines(disks: list[dict[str, Any]]) -> list[str]:
    return [f"{format_bytes(disk['free_bytes'])} free for the {disk['purpose']}, {disk['path']}" for disk in disks]


def _library_lines(libraries: list[dict[str, Any]]) -> list[str]:
    installed = ", ".join(f"{row['name']} {row['version']}" for row in libraries if row["version"])
    return [installed, *(f"{row['name']} is not installed ({row['purpose']}): {row['install']}" for row in libraries if not row["version"])]


def _deepspeed_lines(deepspeed: dict[str, Any]) -> list[str]:
    if not deepspeed["installed"]:
        return ["not installed"]
    return [", ".join(f"{name}: {status}" for name, status in deepspeed["operators"].items())]


_BUILD_COMMAND = "python -m lowmem.engine.deepspeed.operators"
_FEW_CORES = 4
_LITTLE_RAM_BYTES = 4 * 2**30
_LITTLE_DISK_BYTES = 5 * 2**30


def doctor_main(argv: Sequence[str]) -> int:
    """Run `lowmem doctor`.

    Args:
        argv: without the program's name.
    Returns:
        0, whatever is missing.
    Raises:
        ConfigError: unknown options.
    """
    parser = OptionParser("lowmem doctor", "Show what this machine can do, and what will be slow on it.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(list(argv))
    report = examine()
    if flags.json:
        print(json.dumps(report, indent=1))
    else:
        print_table(report)
    return 0


def examine() -> dict[str, Any]:
    """Everything `lowmem doctor --json` prints; a probe that fails is {"error": why} and stops no other."""
    report: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    probes: dict[str, Callable[[], Any]] = {
        "cpu": cpu_report,
        "cuda": cuda_report,
        "memory": memory_report,
        "disk": disk_report,
        "libraries": library_report,
        "compiler": compiler_report,
        "kernels": kernels_report,
        "block_cache": block_cache_report,
        "deepspeed": deepspeed_report,
    }
    for name, probe in probes.items():
        try:
            report[name] = probe()
        except Exception as error:  # whatever a probe meets on a strange machine, the others are still worth showing
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    report["notes"] = [note for find in (_cpu_notes, _gpu_notes, _memory_notes, _build_notes) for note in _notes_or_none(find, report)]
    return report


def _notes_or_none(find: Callable[[dict[str, Any]], list[str]], report: dict[str, Any]) -> list[str]:
    try:
        return find(report)
    except (KeyError, TypeError):  # the probe behind it failed
        return []


def _cpu_notes(report: dict[str, Any]) -> list[str]:
    cpu, cuda = report["cpu"], report["cuda"]
    notes = []
    if cuda["problem"] and not cpu["native_bf16"]:
        notes.append(
            "this CPU has no native bf16: train.precision=auto computes in fp32; bf16 would be emulated, which saves memory and costs speed"
        )
    if cpu["architecture"] in ("x86_64", "AMD64") and "AVX2" not in cpu["instructions"]:
        notes.append("this CPU has no AVX2: matrix products run several times slower than on any CPU since about 2015")
    if cuda["problem"] and cpu["usable_cores"] < _FEW_CORES:
        notes.append(f"{cpu['usable_cores']} usable cores: matrix products scale with cores; keep models small and other programs closed")
    if cpu["usable_cores"] < (cpu["logical_cores"] or 0):
        notes.append(f"this process may use {cpu['usable_cores']} of {cpu['logical_cores']} cores (its CPU affinity is limited)")
    return notes


def _gpu_notes(report: dict[str, Any]) -> list[str]:
    cuda = report["cuda"]
    notes = []
    if cuda["problem"]:
        notes.append(f"no GPU is used: {cuda['problem']}; runs with device=auto train on the CPU")
        if cuda["nvidia_driver"] and not cuda["torch_cuda"]:
            notes.append("there is an NVIDIA driver, but this PyTorch is a CPU build: install a CUDA build of torch")
    for device in cuda["devices"]:
        if device["problem"]:
            notes.append(f"GPU {device['index']} cannot be used: {device['problem']}")
        elif not device["native_bf16"]:
            notes.append(
                f"GPU {device['index']} ({device['name']}) has no native bf16: train.precision=auto computes in fp16 with loss scaling"
            )
    return notes


def _memory_notes(report: dict[str, Any]) -> list[str]:
    memory = report["memory"]
    notes = []
    limit = memory["cgroup_limit_bytes"]
    if limit and limit < memory["ram_total_bytes"]:
        notes.append(
            f"this container may use {format_bytes(limit)} of {format_bytes(memory['ram_total_bytes'])}: "
            "past it the kernel kills the process; set budget.ram below it"
        )
    usable, available, swapped = (format_bytes(memory[key]) for key in ("usable_bytes", "ram_available_bytes", "swap_used_bytes"))
    if memory["usable_bytes"] < _LITTLE_RAM_BYTES:
        notes.append(f"{usable} of RAM are free: set budget.ram, so that a run fails before the machine swaps")
    if memory["swap_used_bytes"] > memory["ram_available_bytes"]:
        notes.append(
            f"{swapped} are in swap and only {available} of RAM are free: a run that touches swap is slower by orders of magnitude; "
            "close other programs"
        )
    for disk in report["disk"]:
        if disk["free_bytes"] < _LITTLE_DISK_BYTES:
            notes.append(f"{format_bytes(disk['free_bytes'])} are free for the {disk['purpose']} ({disk['path']}): checkpoints may not fit")
    return notes


def _build_notes(report: dict[str, Any]) -> list[str]:
    missing = [row["name"] for row in report["libraries"] if not row["version"] and not row["extra"]]
    notes = [f"{', '.join(missing)} missing, which lowmem always needs: pip install lowmem"] if missing else []
    notes += [report["kernels"]["problem"]] if report["kernels"]["problem"] else []
    notes += [report["block_cache"]["problem"]] if report["block_cache"]["problem"] else []
    operators = report["deepspeed"].get("operators", {})
    if [name for name, status in operators.items() if status != "built"]:
        if report["compiler"]["cxx"] is None:
            notes.append("no C++ compiler: DeepSpeed's operators cannot be built, so engine.offload=cpu will not work; install g++")
        else:
            notes.append(
                "DeepSpeed's CPU operators are not built: the first run with offload compiles them, about two minutes; "
                f"beforehand: {_BUILD_COMMAND}"
            )
    return notes
