"""Peaks as a Markdown table, aligned so that it reads as plain text too."""

from lowmem.reporting.rows import PeakRow
from lowmem.units import format_bytes

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
