"""Results of `lowmem profile` as files: JSON, a Markdown table, SVG figures and one page."""

import json
from pathlib import Path
from typing import Any

from lowmem.data.storage import replace_file
from lowmem.errors import StorageError
from lowmem.reporting import figures, page
from lowmem.reporting.markdown import table
from lowmem.reporting.rows import peak_rows
from lowmem.reporting.style import slug, svg_file
from lowmem.reporting.timeline import timeline_svg
from lowmem.units import format_bytes


def write_configs(folder: Path, results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """The report on configurations: NAME.json, profile.md, profile.html, peaks.svg, speed.svg and NAME-timeline.svg.

    Args:
        results: as `lowmem.profile` makes them.
        machine: as `environment.describe` returns it.
    Raises:
        StorageError: the folder cannot be written.
    """
    rows = peak_rows(results)
    peaks, speed = figures.peaks_svg(rows), figures.speed_svg(results)
    files = {"peaks.svg": svg_file(peaks), "speed.svg": svg_file(speed), "profile.md": table(rows)}
    timelines = []
    for result in results:
        predicted, budget = result.get("predicted") or {}, result.get("budget") or {}
        svg = timeline_svg(result, budget_bytes=budget.get("ram_bytes"), predicted_bytes=predicted.get("host_peak_bytes"))
        timelines.append((result["name"], svg, result.get("phases") or {}))
        files[f"{slug(result['name'])}-timeline.svg"] = svg_file(svg)
        files[f"{slug(result['name'])}.json"] = _json({**result, "machine": machine})
    sections = [page.peaks_section(rows, peaks), page.figure_section("Speed", speed), page.timelines_section(timelines)]
    files["profile.html"] = page.page("Memory: predicted and measured", sections, machine)
    _write(folder, files)


def write_command(folder: Path, result: dict[str, Any], machine: dict[str, Any]) -> None:
    """The report on one command: command.json, command-timeline.svg and profile.html.

    Raises:
        StorageError: the folder cannot be written.
    """
    svg = timeline_svg(result)
    sections = [page.facts_section("Result", command_facts(result)), page.timelines_section([(result["name"], svg, {})])]
    files = {
        "command.json": _json({**result, "machine": machine}),
        "command-timeline.svg": svg_file(svg),
        "profile.html": page.page(f"Memory of {result['name']}", sections, machine),
    }
    _write(folder, files)


def command_facts(result: dict[str, Any]) -> dict[str, str]:
    """What is said about a command, in words."""
    return {
        "command": result["command"],
        "peak host memory": format_bytes(result["host_peak_bytes"]),
        "duration": f"{result['duration_s']:.2f} s",
        "samples": str(result["samples"]),
        "exit code": str(result["exit_code"]),
    }


def _json(value: dict[str, Any]) -> str:
    """One key a line, except the many short objects of a timeline, one of which fills a line."""
    timeline = value.get("timeline", [])
    text = json.dumps({**value, "timeline": "@"} if timeline else value, indent=1)
    lines = ",\n  ".join(json.dumps(sample) for sample in timeline)
    return text.replace('"timeline": "@"', f'"timeline": [\n  {lines}\n ]', 1) + "\n"


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_file(folder / name, text)
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror or error}; choose another --out") from error
