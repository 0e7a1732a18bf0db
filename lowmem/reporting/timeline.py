"""Memory over time as a figure, with the phases of the run behind it."""

from typing import TYPE_CHECKING, Any

from lowmem.reporting import style
from lowmem.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    with style.settings():
        figure = style.new_figure(3.1)
        axes = style.plot_area(figure, left_in=0.62, right_in=0.12, top_in=0.5, bottom_in=0.48)
        lines = [size for size in (budget_bytes, predicted_bytes) if size and size <= 1.8 * top]
        axes.set_xlim(0, end)
        axes.set_ylim(0, max([top * 1.12, *(1.08 * size for size in lines)]) / unit)
        steps = result.get("steps_at_s", [])
        ticks = "; small marks: the end of a step" if 0 < len(steps) <= _MOST_TICKS else ""
        axes.set_xlabel(f"seconds since the start{ticks}", color=style.INK)
        axes.set_ylabel(f"host memory ({word})", color=style.INK)
        axes.yaxis.grid(True, color=style.INK, alpha=0.12, linewidth=0.6)
        _draw_phases(axes, result.get("spans", []), end)
        axes.fill_between(times, [size / unit for size in now], color=style.MEASURED, alpha=0.25, linewidth=0)
        if peaks != now:
            axes.plot(times, [size / unit for size in peaks], color="#e69f00", linewidth=1.2, label="peak between samples")
        (line,) = axes.plot(times, [size / unit for size in now], color=style.MEASURED, linewidth=1.4, label="resident")
        line.set_gid(f"timeline-{style.slug(result['name'])}")
        _draw_level(axes, budget_bytes, "budget", style.BUDGET, "-", unit, end)
        _draw_level(axes, predicted_bytes, "predicted peak", "#009e73", (0, (4, 2)), unit, end)
        if ticks:
            axes.vlines(steps, 0, axes.get_ylim()[1] * 0.03, color=style.INK, linewidth=0.8)
        axes.figure.legend(
            loc="upper left", bbox_to_anchor=(0.07, 1.0), ncols=4, frameon=False, labelcolor=style.INK, fontsize=8, borderaxespad=0.2,
            handlelength=1.6,
        )  # fmt: skip
        name = f"timeline-{style.slug(result['name'])}"
        return style.to_svg(figure, name, f"Host memory of {result['name']} over {end:.1f} s, at most {format_bytes(top)}")


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
        axes.axvspan(begin, begin + width, color=style.INK, alpha=_SHADES.get(span["phase"], 0.05), linewidth=0)
        words = span["phase"].replace("_", " ")
        need = end * 0.0125 * len(words)  # a letter is a little more than 1 % of the width
        if width >= need and begin >= taken:
            axes.annotate(
                words, (begin + width / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", ha="center",
                va="bottom", fontsize=8, color=style.INK, annotation_clip=False,
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
