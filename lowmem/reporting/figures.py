"""The figures of a report: peaks by component against the budget, and tokens per second. Each function returns an <svg> element."""

from typing import TYPE_CHECKING, Any

from lowmem.reporting import style
from lowmem.reporting.rows import PARTS, REST, PeakRow
from lowmem.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROUP_IN, _LEFT_IN, _RIGHT_IN = 0.92, 0.82, 0.12
_ROOM = 1.22  # of the longest bar: the rest is for its number
_LETTER = 0.0125  # of the width of the plot: a letter, generously
_FAR = 1.8  # a budget beyond this many longest bars is named at the edge instead of stretching the axis


def peaks_svg(rows: list[PeakRow]) -> str:
    """Per row two stacked bars, predicted above measured, and the budget as a line through both."""
    with style.settings():
        parts = [part for part in (*PARTS, REST) if any(part in row.predicted_parts or part in row.measured_parts for row in rows)]
        parts += sorted({part for row in rows for part in row.predicted_parts} - set(parts))
        legend_in = 0.24 * (1 + (len(parts) - 1) // 5) if parts else 0
        height = _GROUP_IN * len(rows) + legend_in + 0.75
        figure = style.new_figure(height)
        axes = style.plot_area(figure, left_in=_LEFT_IN, right_in=_RIGHT_IN, top_in=legend_in + 0.2, bottom_in=0.5)
        longest = max((size for row in rows for size in (row.predicted_bytes, row.measured_bytes) if size), default=0) or 2**20
        budgets = [row.budget_bytes for row in rows if row.budget_bytes and row.budget_bytes <= _FAR * longest]
        unit, word = _unit(longest)
        edge = max([longest * _ROOM, *(1.03 * budget for budget in budgets)]) / unit
        axes.set_xlim(0, edge)
        axes.set_ylim(len(rows), 0)
        axes.set_xlabel(f"peak memory ({word})", color=style.INK)
        axes.xaxis.grid(True, color=style.INK, alpha=0.12, linewidth=0.6)
        axes.set_yticks([])
        for index, row in enumerate(rows):
            _draw_row(axes, index, row, unit, edge)
        _legend(axes, parts, height)
        return style.to_svg(figure, "peaks", "Peak memory by component, predicted and measured, against the budget: " + _in_words(rows))


def _draw_row(axes: "Axes", index: int, row: PeakRow, unit: int, edge: float) -> None:
    axes.text(0, index + 0.17, f"{row.name}, {row.place}", color=style.INK, fontweight="bold", va="center")
    bars = (("predicted", 0.42, row.predicted_bytes, row.predicted_parts), ("measured", 0.74, row.measured_bytes, row.measured_parts))
    for kind, at, total, parts in bars:
        axes.annotate(
            kind, (0, index + at), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", color=style.INK,
            annotation_clip=False,
        )  # fmt: skip
        if total:
            gid = f"bar-{style.slug(row.name)}-{row.place[:3]}-{kind}"
            _draw_bar(axes, index + at, parts or {REST: total}, unit, edge, gid)
            axes.text(_beside(total, row.budget_bytes, unit, edge), index + at, format_bytes(total), color=style.INK, va="center")
        else:
            axes.text(0.008 * edge, index + at, _absent(kind, row), color=style.INK, alpha=0.75, va="center", fontstyle="italic")
    if row.budget_bytes:
        _draw_budget(axes, index, row, row.budget_bytes, unit, edge)


def _beside(total: int, budget: int | None, unit: int, edge: float) -> float:
    """Where the number of a bar begins: behind its end, or behind the budget's line where that would cross it."""
    gap, at = 0.008 * edge, total / unit
    end = at + gap + _LETTER * edge * len(format_bytes(total))
    crossed = budget is not None and at <= budget / unit <= end
    return (budget or 0) / unit + gap if crossed else at + gap


def _absent(kind: str, row: PeakRow) -> str:
    """Why there is no bar, short enough for its place; the table has the whole message."""
    if kind == "predicted":
        return "no prediction"
    return f"failed ({row.failure.partition(':')[0]})" if row.failure else "not measured"


def _draw_bar(axes: "Axes", y: float, parts: dict[str, int], unit: int, edge: float, gid: str) -> None:
    left = 0.0
    for part, size in parts.items():
        width = size / unit
        (bar,) = axes.barh(
            y, width, 0.27, left=left, color=style.COLOURS.get(part, style.COLOURS[REST]), edgecolor="#ffffff", linewidth=0.5,
            hatch="////" if part == REST else None,
        )  # fmt: skip
        bar.set_gid(f"{gid}-{style.slug(part)}")
        text = _short(size)
        if part != REST and width > edge * _LETTER * (len(text) + 1):
            ink = "#ffffff" if part in style.DARK else "#000000"
            axes.text(left + width / 2, y, text, color=ink, ha="center", va="center", fontsize=7.5)
        left += width


def _draw_budget(axes: "Axes", index: int, row: PeakRow, budget: int, unit: int, edge: float) -> None:
    label = f"budget {format_bytes(budget)}"
    if budget / unit > edge:
        axes.text(edge, index + 0.17, f"{label} ▸", color=style.BUDGET, ha="right", va="center")
        return
    at = budget / unit
    (line,) = axes.plot([at, at], [index + 0.26, index + 0.92], color=style.BUDGET, linewidth=1.6, solid_capstyle="butt")
    line.set_gid(f"budget-{index}")
    title_end = 1.2 * _LETTER * edge * (len(row.name) + len(row.place) + 3)
    if at - _LETTER * edge * len(label) > title_end:
        axes.text(at, index + 0.17, label, color=style.BUDGET, ha="right", va="center")
    else:
        axes.text(max(at, title_end), index + 0.17, label if at > title_end else f"◂ {label}", color=style.BUDGET, va="center")


def _legend(axes: "Axes", parts: list[str], height_in: float) -> None:
    from matplotlib.patches import Patch

    if not parts:
        return
    handles = [
        Patch(
            facecolor=style.COLOURS.get(part, style.COLOURS[REST]), hatch="////" if part == REST else None, edgecolor="#ffffff",
            linewidth=0.5, label=part.replace("_", " "),
        )
        for part in parts
    ]  # fmt: skip
    axes.figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1 - 0.04 / height_in), ncols=5, frameon=False, labelcolor=style.INK,
        handlelength=1.2, handleheight=0.9, columnspacing=1.4, handletextpad=0.5, borderaxespad=0.2,
    )  # fmt: skip


def speed_svg(results: list[dict[str, Any]]) -> str:
    """Tokens per second of every run that ended well."""
    done = [result for result in results if result.get("tokens_per_s")]
    with style.settings():
        figure = style.new_figure(0.42 * max(1, len(done)) + 0.65)
        axes = style.plot_area(figure, left_in=1.6, right_in=_RIGHT_IN, top_in=0.08, bottom_in=0.5)
        fastest = max((result["tokens_per_s"] for result in done), default=1)
        axes.set_xlim(0, fastest * _ROOM)
        axes.set_ylim(max(1, len(done)) - 0.5, -0.5)
        axes.set_xlabel("tokens per second (median of the steps after the first)", color=style.INK)
        axes.xaxis.grid(True, color=style.INK, alpha=0.12, linewidth=0.6)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_yticks(range(len(done)), [_cut(result["name"], 22) for result in done])
        for index, result in enumerate(done):
            (bar,) = axes.barh(index, result["tokens_per_s"], 0.6, color=style.MEASURED)
            bar.set_gid(f"speed-{style.slug(result['name'])}")
            axes.text(result["tokens_per_s"] + 0.008 * fastest, index, f"{result['tokens_per_s']:,.0f}", color=style.INK, va="center")
        words = "; ".join(f"{result['name']} {result['tokens_per_s']:,.0f}" for result in done)
        return style.to_svg(figure, "speed", f"Tokens per second: {words or 'no run ended well'}")


def _unit(largest: int) -> tuple[int, str]:
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


def _short(size: int) -> str:
    """A size inside a bar, in the words of `format_bytes`, without blank."""
    return format_bytes(size).replace(" ", "\u00a0")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _in_words(rows: list[PeakRow]) -> str:
    """The figure for those who do not see it."""
    return "; ".join(
        f"{row.name}, {row.place}: predicted {format_bytes(row.predicted_bytes) if row.predicted_bytes else 'not'}, "
        f"measured {format_bytes(row.measured_bytes) if row.measured_bytes else 'not'}"
        for row in rows
    )
