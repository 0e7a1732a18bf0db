"""Where a report was made: hardware and versions, without names and paths that identify a machine."""

import json
import platform
import re
import subprocess
import sys
from datetime import date
from typing import Any

_PATH = re.compile(r"(?:(?<=^)|(?<=[\s=:'\"({\[,]))(?:/[^/\s,:;'\"(){}\[\]]+)+/(?=[^/\s]|$|\s)")


def describe() -> dict[str, Any]:
    """Date, processor, memory, devices and versions, asked of `lowmem doctor` in a process of its own: it has to load PyTorch."""
    command = [sys.executable, "-m", "lowmem.cli", "doctor", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(answer.stdout)
    except ValueError:  # the figures are worth having without it
        report = {}
    facts = {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(report.get("cpu", {})),
        "memory_bytes": report.get("memory", {}).get("ram_total_bytes"),
        "devices": [f"{device['name']}, {device['total_bytes'] / 2**30:.0f} GiB" for device in report.get("cuda", {}).get("devices", [])],
        "python": platform.python_version(),
        "versions": {row["name"]: row["version"] for row in report.get("libraries", []) if row.get("version")},
    }
    return {name: value for name, value in facts.items() if value}


def _processor(cpu: dict[str, Any]) -> str:
    if "model" not in cpu:
        return ""
    return f"{cpu['model']}, {cpu['usable_cores']} usable cores, {', '.join(cpu['instructions']) or 'no vector instructions known'}"


def without_folders(text: str) -> str:
    """Absolute paths in a text, shortened to their last part."""
    return _PATH.sub(".../", text)
