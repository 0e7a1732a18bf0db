"""The `doctor` command: what this machine can do, and what will be slow on it and why."""

import json
import platform
from collections.abc import Callable, Sequence
from typing import Any

from lowmem.arguments import OptionParser
from lowmem.units import format_bytes

_BUILD_COMMAND = "python -m lowmem.engine.deepspeed_build"
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
        from lowmem.doctor_table import print_table  # rich takes a while to import

        print_table(report)
    return 0


def examine() -> dict[str, Any]:
    """Everything `lowmem doctor --json` prints; a probe that fails is {"error": why} and stops no other."""
    from lowmem import machine

    report: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    probes: dict[str, Callable[[], Any]] = {
        "cpu": machine.cpu_report,
        "cuda": machine.cuda_report,
        "memory": machine.memory_report,
        "disk": machine.disk_report,
        "libraries": machine.library_report,
        "compiler": machine.compiler_report,
        "kernels": machine.kernels_report,
        "block_cache": machine.block_cache_report,
        "deepspeed": machine.deepspeed_report,
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
