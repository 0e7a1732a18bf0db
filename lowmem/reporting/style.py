"""How figures look, and how they become SVG: one palette, text as text, the colour of the page around them, the same bytes every time."""

import importlib.util
import io
import re
from contextlib import AbstractContextManager
from html import escape
from typing import TYPE_CHECKING, Any

from lowmem.errors import ConfigError
from lowmem.reporting.rows import REST

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
