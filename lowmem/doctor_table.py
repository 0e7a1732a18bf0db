"""What `lowmem doctor` found, as a table."""

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from lowmem.units import format_bytes


def print_table(report: dict[str, Any]) -> None:
    """Print what `lowmem.doctor.examine` found on standard output, for people."""
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
