"""Figures of measured memory: bars, timelines, and their style."""

import importlib.util
import io
import re
from contextlib import AbstractContextManager
from html import escape
from typing import TYPE_CHECKING, Any

from lowmem.reporting.results import PARTS, REST, PeakRow
from lowmem.system.errors import ConfigError
from lowmem.system.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH_IN = 7.2
INK = "#010203"  # stands for the colour of the text around a figure
# Okabe and Ito's palette, distinguishable with every kind of colour blindness; neighbours in a bar also differ in brightness.
COLOURS = {
    "base": "#8c8c8c", "weights": "#0072b2", "gradients": "#e69f00", "optimizer_states": "#009e73", "activations": "#d55e00",
    "logits": "#cc79a7", "workspace": "#f0e442", "data": "#56b4e9", REST: "#c8c8c8",
}  # fmt: skip
DARK = {"base", "weights", "optimizer_states", "activations"}  # parts on which numbers are white
BUDGET = "#e5484d"
PREDICTED, MEASURED = "#56b4e9", "#0072b2"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "hatch.linewidth": 0.6,
    "axes.unicode_minus": False,
}
_FILE_STYLE = "<style>svg{color:#1f2328}@media (prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"


def require_matplotlib() -> None:
    """Say early that the library is missing.

    Raises:
        ConfigError: with the command that installs it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("reports with figures need matplotlib, which is not installed; pip install 'lowmem[report]'")


def settings(salt: str = "lowmem") -> AbstractContextManager[None]:
    """matplotlib's settings while a figure is made or written; a user's own matplotlibrc does not reach it."""
    import matplotlib

    values: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    values |= _SETTINGS | {"svg.hashsalt": salt}
    return matplotlib.rc_context(values)


def new_figure(height_in: float) -> "Figure":
    """An empty figure of the page's width."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_IN, height_in))


def plot_area(figure: "Figure", *, left_in: float, right_in: float, top_in: float, bottom_in: float) -> "Axes":
    """Axes with margins in inches, with a quiet frame."""
    width, height = figure.get_size_inches()
    box = (left_in / width, bottom_in / height, (width - left_in - right_in) / width, (height - top_in - bottom_in) / height)
    axes = figure.add_axes(box)
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK, length=0)
    axes.set_axisbelow(True)
    return axes


def to_svg(figure: "Figure", name: str, title: str) -> str:
    """The figure as an <svg> element for a page.

    Args:
        name: a word that makes its ids unique on the page.
        title: what a reader who does not see it is told.
    """
    buffer = io.StringIO()
    with settings(name):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match.group()}{name}-", text)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", _FONT)
    head = f' role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
    return text.replace(">", head, 1).strip() + "\n"


def svg_file(svg: str) -> str:
    """The same as a file of its own, which follows the reader's dark or light setting."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace("</title>", f"</title>{_FILE_STYLE}", 1)


def slug(name: str) -> str:
    """A name as a word for ids and file names."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "config"


_GROUP_IN, _LEFT_IN, _RIGHT_IN = 0.92, 0.82, 0.12
_ROOM = 1.22  # of the longest bar: the rest is for its number
_LETTER = 0.0125  # of the width of the plot: a letter, generously
_FAR = 1.8  # a budget beyond this many longest bars is named at the edge instead of stretching the axis


def peaks_svg(rows: list[PeakRow]) -> str:
    """Per row two stacked bars, predicted above measured, and the budget as a line through both."""
    with settings():
        parts = [part for part in (*PARTS, REST) if any(part in row.predicted_parts or part in row.measured_parts for row in rows)]
        parts += sorted({part for row in rows for part in row.predicted_parts} - set(parts))
        legend_in = 0.24 * (1 + (len(parts) - 1) // 5) if parts else 0
        height = _GROUP_IN * len(rows) + legend_in + 0.75
        figure = new_figure(height)
        axes = plot_area(figure, left_in=_LEFT_IN, right_in=_RIGHT_IN, top_in=legend_in + 0.2, bottom_in=0.5)
        longest = max((size for row in rows for size in (row.predicted_bytes, row.measured_bytes) if size), default=0) or 2**20
        budgets = [row.budget_bytes for row in rows if row.budget_bytes and row.budget_bytes <= _FAR * longest]
        unit, word = _unit(longest)
        edge = max([longest * _ROOM, *(1.03 * budget for budget in budgets)]) / unit
        axes.set_xlim(0, edge)
        axes.set_ylim(len(rows), 0)
        axes.set_xlabel(f"peak memory ({word})", color=INK)
        axes.xaxis.grid(True, color=INK, alpha=0.12, linewidth=0.6)
        axes.set_yticks([])
        for index, row in enumerate(rows):
            _draw_row(axes, index, row, unit, edge)
        _legend(axes, parts, height)
        return to_svg(figure, "peaks", "Peak memory by component, predicted and measured, against the budget: " + _in_words(rows))


def _draw_row(axes: "Axes", index: int, row: PeakRow, unit: int, edge: float) -> None:
    axes.text(0, index + 0.17, f"{row.name}, {row.place}", color=INK, fontweight="bold", va="center")
    bars = (("predicted", 0.42, row.predicted_bytes, row.predicted_parts), ("measured", 0.74, row.measured_bytes, row.measured_parts))
    for kind, at, total, parts in bars:
        axes.annotate(
            kind, (0, index + at), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", color=INK,
            annotation_clip=False,
        )  # fmt: skip
        if total:
            gid = f"bar-{slug(row.name)}-{row.place[:3]}-{kind}"
            _draw_bar(axes, index + at, parts or {REST: total}, unit, edge, gid)
            axes.text(_beside(total, row.budget_bytes, unit, edge), index + at, format_bytes(total), color=INK, va="center")
        else:
            axes.text(0.008 * edge, index + at, _absent(kind, row), color=INK, alpha=0.75, va="center", fontstyle="italic")
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
            y, width, 0.27, left=left, color=COLOURS.get(part, COLOURS[REST]), edgecolor="#ffffff", linewidth=0.5,
            hatch="////" if part == REST else None,
        )  # fmt: skip
        bar.set_gid(f"{gid}-{slug(part)}")
        text = _short(size)
        if part != REST and width > edge * _LETTER * (len(text) + 1):
            ink = "#ffffff" if part in DARK else "#000000"
            axes.text(left + width / 2, y, text, color=ink, ha="center", va="center", fontsize=7.5)
        left += width


def _draw_budget(axes: "Axes", index: int, row: PeakRow, budget: int, unit: int, edge: float) -> None:
    label = f"budget {format_bytes(budget)}"
    if budget / unit > edge:
        axes.text(edge, index + 0.17, f"{label} ▸", color=BUDGET, ha="right", va="center")
        return
    at = budget / unit
    (line,) = axes.plot([at, at], [index + 0.26, index + 0.92], color=BUDGET, linewidth=1.6, solid_capstyle="butt")
    line.set_gid(f"budget-{index}")
    title_end = 1.2 * _LETTER * edge * (len(row.name) + len(row.place) + 3)
    if at - _LETTER * edge * len(label) > title_end:
        axes.text(at, index + 0.17, label, color=BUDGET, ha="right", va="center")
    else:
        axes.text(max(at, title_end), index + 0.17, label if at > title_end else f"◂ {label}", color=BUDGET, va="center")


def _legend(axes: "Axes", parts: list[str], height_in: float) -> None:
    from matplotlib.patches import Patch

    if not parts:
        return
    handles = [
        Patch(
            facecolor=COLOURS.get(part, COLOURS[REST]), hatch="////" if part == REST else None, edgecolor="#ffffff",
            linewidth=0.5, label=part.replace("_", " "),
        )
        for part in parts
    ]  # fmt: skip
    axes.figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1 - 0.04 / height_in), ncols=5, frameon=False, labelcolor=INK,
        handlelength=1.2, handleheight=0.9, columnspacing=1.4, handletextpad=0.5, borderaxespad=0.2,
    )  # fmt: skip


def speed_svg(results: list[dict[str, Any]]) -> str:
    """Tokens per second of every run that ended well."""
    done = [result for result in results if result.get("tokens_per_s")]
    with settings():
        figure = new_figure(0.42 * max(1, len(done)) + 0.65)
        axes = plot_area(figure, left_in=1.6, right_in=_RIGHT_IN, top_in=0.08, bottom_in=0.5)
        fastest = max((result["tokens_per_s"] for result in done), default=1)
        axes.set_xlim(0, fastest * _ROOM)
        axes.set_ylim(max(1, len(done)) - 0.5, -0.5)
        axes.set_xlabel("tokens per second (median of the steps after the first)", color=INK)
        axes.xaxis.grid(True, color=INK, alpha=0.12, linewidth=0.6)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_yticks(range(len(done)), [_cut(result["name"], 22) for result in done])
        for index, result in enumerate(done):
            (bar,) = axes.barh(index, result["tokens_per_s"], 0.6, color=MEASURED)
            bar.set_gid(f"speed-{slug(result['name'])}")
            axes.text(result["tokens_per_s"] + 0.008 * fastest, index, f"{result['tokens_per_s']:,.0f}", color=INK, va="center")
        words = "; ".join(f"{result['name']} {result['tokens_per_s']:,.0f}" for result in done)
        return to_svg(figure, "speed", f"Tokens per second: {words or 'no run ended well'}")


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


_SHADES = {"load": 0.05, "first_step": 0.16, "steady_steps": 0.09, "evaluation": 0.16, "save": 0.05}
_MOST_TICKS = 100
_MOST_POINTS = 2000


def timeline_svg(result: dict[str, Any], *, budget_bytes: int | None = None, predicted_bytes: int | None = None) -> str:
    """Memory of the process tree over time.

    Args:
        result: name, timeline, and where known spans and steps_at_s, as `lowmem profile` writes them.
        budget_bytes, predicted_bytes: lines across, of host memory.
    """
    samples = thinned(result.get("timeline") or [{"t_s": 0.0, "host_bytes": 0, "host_peak_bytes": 0}])
    times = [sample["t_s"] for sample in samples]
    now, peaks = [sample["host_bytes"] for sample in samples], [sample["host_peak_bytes"] for sample in samples]
    top = max([*peaks, 2**20])
    unit, word = (2**30, "GiB") if top >= 2**30 else (2**20, "MiB")
    end = max([*times, *(span["to_s"] for span in result.get("spans", [])), 0.1])
    with settings():
        figure = new_figure(3.1)
        axes = plot_area(figure, left_in=0.62, right_in=0.12, top_in=0.5, bottom_in=0.48)
        lines = [size for size in (budget_bytes, predicted_bytes) if size and size <= 1.8 * top]
        axes.set_xlim(0, end)
        axes.set_ylim(0, max([top * 1.12, *(1.08 * size for size in lines)]) / unit)
        steps = result.get("steps_at_s", [])
        ticks = "; small marks: the end of a step" if 0 < len(steps) <= _MOST_TICKS else ""
        axes.set_xlabel(f"seconds since the start{ticks}", color=INK)
        axes.set_ylabel(f"host memory ({word})", color=INK)
        axes.yaxis.grid(True, color=INK, alpha=0.12, linewidth=0.6)
        _draw_phases(axes, result.get("spans", []), end)
        axes.fill_between(times, [size / unit for size in now], color=MEASURED, alpha=0.25, linewidth=0)
        if peaks != now:
            axes.plot(times, [size / unit for size in peaks], color="#e69f00", linewidth=1.2, label="peak between samples")
        (line,) = axes.plot(times, [size / unit for size in now], color=MEASURED, linewidth=1.4, label="resident")
        line.set_gid(f"timeline-{slug(result['name'])}")
        _draw_level(axes, budget_bytes, "budget", BUDGET, "-", unit, end)
        _draw_level(axes, predicted_bytes, "predicted peak", "#009e73", (0, (4, 2)), unit, end)
        if ticks:
            axes.vlines(steps, 0, axes.get_ylim()[1] * 0.03, color=INK, linewidth=0.8)
        axes.figure.legend(
            loc="upper left", bbox_to_anchor=(0.07, 1.0), ncols=4, frameon=False, labelcolor=INK, fontsize=8, borderaxespad=0.2,
            handlelength=1.6,
        )  # fmt: skip
        name = f"timeline-{slug(result['name'])}"
        return to_svg(figure, name, f"Host memory of {result['name']} over {end:.1f} s, at most {format_bytes(top)}")


def thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 2,000 points; each stands for the largest values among the samples it replaces."""
    group = -(-len(samples) // _MOST_POINTS)
    chunks = (samples[start : start + group] for start in range(0, len(samples), group or 1))
    return [
        {**chunk[0], **{key: max(sample[key] for sample in chunk) for key in ("host_bytes", "host_peak_bytes")}} for chunk in chunks
    ]  # fmt: skip


def _draw_phases(axes: "Axes", spans: list[dict[str, Any]], end: float) -> None:
    """Shades behind the line; a name above each phase that is wide enough for it."""
    taken = -1.0
    for span in spans:
        begin, width = span["from_s"], span["to_s"] - span["from_s"]
        axes.axvspan(begin, begin + width, color=INK, alpha=_SHADES.get(span["phase"], 0.05), linewidth=0)
        words = span["phase"].replace("_", " ")
        need = end * 0.0125 * len(words)  # a letter is a little more than 1 % of the width
        if width >= need and begin >= taken:
            axes.annotate(
                words, (begin + width / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", ha="center",
                va="bottom", fontsize=8, color=INK, annotation_clip=False,
            )  # fmt: skip
            taken = begin + width


def _draw_level(axes: "Axes", size: int | None, words: str, colour: str, dashes: Any, unit: int, end: float) -> None:
    if not size:
        return
    label = f"{words} {format_bytes(size)}"
    if size / unit > axes.get_ylim()[1]:
        axes.plot([], [], color=colour, linestyle=dashes, linewidth=1.4, label=f"{label} (above)")
    else:
        axes.plot([0, end], [size / unit] * 2, color=colour, linestyle=dashes, linewidth=1.4, label=label)
