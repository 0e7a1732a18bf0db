"""Reports as a page, as Markdown, and as files."""

import json
from html import escape
from pathlib import Path
from typing import Any

from lowmem.reporting import figures
from lowmem.reporting.figures import slug, svg_file, timeline_svg
from lowmem.reporting.results import PeakRow, peak_rows
from lowmem.system.errors import StorageError
from lowmem.system.files import replace_file
from lowmem.system.units import format_bytes

HEADER = ("config", "memory", "budget", "predicted", "measured", "predicted is", "tokens/s")


def cells(row: PeakRow) -> list[str]:
    """One line of the table; a failed run says so instead of what was measured."""
    predicted = format_bytes(row.predicted_bytes) if row.predicted_bytes else "no prediction"
    start = [row.name, row.place, format_bytes(row.budget_bytes) if row.budget_bytes else "none", predicted]
    if row.failure:
        return [*start, f"failed, {row.failure.partition(':')[0]}", "", ""]
    difference = row.difference_percent
    return [
        *start,
        format_bytes(row.measured_bytes) if row.measured_bytes else "not measured",
        f"{difference:+.1f} %" if difference is not None else "",
        f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "",
    ]


def table(rows: list[PeakRow]) -> str:
    """The whole table, and below it why runs failed; ends with a newline."""
    lines = [[_escape(cell) for cell in line] for line in ([*HEADER], *(cells(row) for row in rows))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    rule = ["-" * (width - (column > 1)) + (":" if column > 1 else "") for column, width in enumerate(widths)]
    text = []
    for line in (lines[0], rule, *lines[1:]):
        cut = [cell.ljust(width) for cell, width in zip(line[:2], widths, strict=False)]
        cut += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append(f"| {' | '.join(cut)} |")
    reasons = {f"- {_escape(row.name)} failed, {_escape(row.failure)}": None for row in rows if row.failure}
    return "\n".join([*text, *([""] if reasons else []), *reasons]) + "\n"


def _escape(cell: str) -> str:
    """No cell may end the cell or the line it stands in."""
    return " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --line: #d0d7de; --soft: #f6f8fa; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #161b22; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.wide { overflow-x: auto; } .wide svg { width: 100%; min-width: 34rem; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
th { background: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
#peaks-table th:nth-child(2), #peaks-table td:nth-child(2) { text-align: left; }
td.message { text-align: left; white-space: normal; color: var(--bad); min-width: 16rem; }
table.text td { text-align: left; white-space: normal; }
p.note { font-size: .9rem; opacity: .85; max-width: 46rem; } footer { margin-top: 3rem; font-size: .85rem; opacity: .8; }
"""
_HOW = (
    "Measured: RAM is the most that the run's processes had resident at once, by the kernel's high-water mark; GPU memory is the most "
    "that PyTorch's allocator held, without the CUDA context. “Everything else” is the part of a measured peak that is not weights, "
    "gradients or optimizer states as the engine counts them; the base is taken from the prediction. “Predicted is” tells how far the "
    "prediction lies above (+) or below (-) the measurement."
)
_HOW_TIMELINE = (
    "Memory over time is sampled from outside, pages that processes share counted once. It can lie below the measured peak: a peak between "
    "two samples is missed when the process resets its high-water mark, as it does to measure itself exactly."
)


def page(title: str, sections: list[str], machine: dict[str, Any]) -> str:
    """The whole document.

    Args:
        title: plain text.
        sections: HTML, made by the functions below.
        machine: as `environment.describe` returns it.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + _machine_section(machine)
        + "\n</body>\n</html>\n"
    )


def peaks_section(rows: list[PeakRow], svg: str) -> str:
    """The table of peaks and its figure."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in HEADER)
    body = "".join(f"<tr>{_table_row(row)}</tr>\n" for row in rows)
    return (
        f'<h2>Peak memory</h2>\n<div class="wide"><table id="peaks-table"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
        f'<div class="wide">{svg}</div>\n<p class="note">{escape(_HOW)}</p>'
    )


def _table_row(row: PeakRow) -> str:
    texts = cells(row)
    if row.failure:
        return (
            "".join(f"<td>{escape(text)}</td>" for text in texts[:4])
            + f'<td class="message" colspan="3">failed, {escape(row.failure)}</td>'
        )
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def figure_section(title: str, svg: str) -> str:
    """A heading and a figure."""
    return f'<h2>{escape(title)}</h2>\n<div class="wide">{svg}</div>'


def timelines_section(figures: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Memory over time of each run.

    Args:
        figures: name, <svg>, and the peaks by phase of memory.json, which may be empty.
    """
    parts = [f"<h3>{escape(name)}</h3>\n<div class='wide'>{svg}</div>\n{_phase_table(phases)}" for name, svg, phases in figures]
    return f'<h2>Memory over time</h2>\n{"".join(parts)}<p class="note">{escape(_HOW_TIMELINE)}</p>'


def _phase_table(phases: dict[str, dict[str, int]]) -> str:
    if not phases:
        return ""
    cuda = any(peaks.get("cuda_reserved_peak_bytes") for peaks in phases.values())
    columns = [("host_peak_bytes", "peak RAM")]
    columns += [("cuda_allocated_peak_bytes", "GPU, tensors"), ("cuda_reserved_peak_bytes", "GPU, allocator")] if cuda else []
    head = "<th>phase</th>" + "".join(f"<th>{title}</th>" for _, title in columns)
    lines = ""
    for name, peaks in phases.items():
        sizes = "".join(f"<td>{format_bytes(peaks.get(key, 0))}</td>" for key, _ in columns)
        lines += f"<tr><td>{escape(name.replace('_', ' '))}</td>{sizes}</tr>"
    return f'<div class="wide"><table class="phases"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>\n'


def facts_section(title: str, facts: dict[str, str]) -> str:
    """A table of names and values."""
    lines = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in facts.items())
    return f'<h2>{escape(title)}</h2>\n<div class="wide"><table class="text"><tbody>{lines}</tbody></table></div>'


def _machine_section(machine: dict[str, Any]) -> str:
    facts = {name: str(value) for name, value in machine.items() if name not in ("versions", "devices", "memory_bytes")}
    if "memory_bytes" in machine:
        facts["memory"] = format_bytes(machine["memory_bytes"])
    if machine.get("devices"):
        facts["GPUs"] = "; ".join(machine["devices"])
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items()) or "unknown"
    return facts_section("Machine and versions", facts)


def write_configs(folder: Path, results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """The report on configurations: NAME.json, profile.md, profile.html, peaks.svg, speed.svg and NAME-timeline.svg.

    Args:
        results: as `lowmem.cli.profile` makes them.
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
    sections = [peaks_section(rows, peaks), figure_section("Speed", speed), timelines_section(timelines)]
    files["profile.html"] = page("Memory: predicted and measured", sections, machine)
    _write(folder, files)


def write_command(folder: Path, result: dict[str, Any], machine: dict[str, Any]) -> None:
    """The report on one command: command.json, command-timeline.svg and profile.html.

    Raises:
        StorageError: the folder cannot be written.
    """
    svg = timeline_svg(result)
    sections = [facts_section("Result", command_facts(result)), timelines_section([(result["name"], svg, {})])]
    files = {
        "command.json": _json({**result, "machine": machine}),
        "command-timeline.svg": svg_file(svg),
        "profile.html": page(f"Memory of {result['name']}", sections, machine),
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
