"""Plots as SVG that stands in a page: drawn by matplotlib, with text that stays text and colours that are CSS variables."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 560
"""width of a plot, in the units of its view box: CSS pixels where the column is that wide"""
MOST_POINTS = 300

INK, MUTED, RULE, PAPER = "#1b1f24", "#59636e", "#d9dee4", "#fffffe"
HUES = ("#0072b2", "#c2500a", "#007a5a", "#9c3f86", "#96680a", "#4a525b")
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {h: f"hue{i}" for i, h in enumerate(HUES)}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot: its mark at the end, its points, and the band around it if it has one."""

    mark: str
    x: list[float]
    y: list[float]
    colour: str
    dash: Any = "-"
    low: list[float] | None = None
    high: list[float] | None = None


class Canvas:
    """A figure whose axes are placed by margins in the units of the view box."""

    def __init__(self, figure: Figure, height: float, width: float) -> None:
        self.figure, self.height, self.width, self.svg = figure, height, width, ""

    def axes(self, *, left: float, right: float, bottom: float, top: float) -> Axes:
        """Add axes that leave these margins."""
        across, up = self.width - left - right, self.height - bottom - top
        return self.figure.add_axes((left / self.width, bottom / self.height, across / self.width, up / self.height))


_LOOK: dict[Any, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "fedsieve", "image.composite_image": False, "text.parse_math": False},
    **{
        "font.size": 13,
        "axes.labelsize": 13,
        "xtick.labelsize": 13,
        "ytick.labelsize": 13,
        "lines.linewidth": 2,
        "lines.markeredgewidth": 0,
        "lines.solid_joinstyle": "round",
    },
    **{"text.color": INK, "axes.labelcolor": MUTED, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED},
    **{"axes.edgecolor": MUTED, "axes.facecolor": "none", "axes.grid": True, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False},
    **{"grid.color": RULE, "grid.linewidth": 1, "xtick.color": MUTED, "ytick.major.size": 0, "xtick.major.size": 4},
    **{"axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 7), "axes.unicode_minus": True},
}


@contextlib.contextmanager
def canvas(height: float, width: float = WIDTH) -> Iterator[Canvas]:
    """Give a canvas to draw on; its `svg` is there once the block has ended. A user's matplotlibrc has no say."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's browser brings the fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        drawing = Canvas(Figure(figsize=(width / 72, height / 72), facecolor="none"), height, width)
        yield drawing
        text = io.StringIO()
        drawing.figure.savefig(text, format="svg", metadata={"Date": None})
    drawing.svg = _inline(text.getvalue())


def _inline(svg: str) -> str:
    """Return a drawing as it may stand in a page: no prolog, no metadata, no fixed size or font, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(r"<svg [^>]*>", f"<svg {box[0] if box else ''}>", svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([^;\"]*?)(\d[\d.]*px)[^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: coloured(found[0]), svg).strip()


def coloured(colour: str) -> str:
    """Return a colour as the page's variable for it, if there is one."""
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour


def with_ids(svg: str, prefix: str) -> str:
    """Return the drawing with ids of its own, as several stand in one page."""
    svg = re.sub(r'(<[^>]*? id=")', rf"\g<1>{prefix}", svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)


def plot(
    lines: Sequence[Line],
    xlabel: str,
    ylabel: str,
    *,
    percent: bool = False,
    whole: bool = False,
    logx: bool = False,
    logy: bool = False,
) -> str:
    """Return a line plot as SVG, each line with its mark at its end."""
    with canvas(320) as drawing:
        axes = drawing.axes(left=48, right=14 + 7 * max(len(line.mark) for line in lines), bottom=42, top=24)
        for line in lines:
            keep = _thinned(len(line.x))
            x, y = [line.x[i] for i in keep], [line.y[i] for i in keep]
            if line.low is not None and line.high is not None:
                band = [line.low[i] for i in keep], [line.high[i] for i in keep]
                axes.fill_between(x, *band, color=line.colour, alpha=0.16, linewidth=0)
            dotted = len(x) == 1 or (len(x) <= 25 and len(lines) <= 6)
            axes.plot(
                x, y, color=line.colour, linestyle=line.dash, marker="o" if dotted else "", markersize=9 if len(x) == 1 else 5
            )
        axes.set_xlabel(xlabel)
        axes.set_title(ylabel, loc="left", fontsize=13, color=MUTED, pad=8, x=-48 / (axes.get_position().width * WIDTH))
        scale(axes, logx=logx, logy=logy, whole=whole)
        if percent:
            bottom, top = axes.get_ylim()
            axes.set_ylim(max(bottom, 0), min(top, 100.5))
        elif not logy:
            axes.set_ylim(0, max(1.05 * axes.dataLim.y1, 1e-9))
        if all(line.mark for line in lines) and (len(lines) > 1 or lines[0].mark != "test"):
            _mark_ends(axes, lines, 72 / drawing.figure.dpi)
    return drawing.svg


def scale(axes: Axes, *, logx: bool = False, logy: bool = False, whole: bool = False) -> None:
    """Set the scales and plain numbers at few ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set(xscale="log" if logx else "linear", yscale="log" if logy else "linear")
    for axis, log in ((axes.xaxis, logx), (axes.yaxis, logy)):
        low, high = axis.get_view_interval()
        axis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)) if log else MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10])
        )
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.8g}"))
    if whole:
        whole_numbers(axes)


def whole_numbers(axes: Axes) -> None:
    """Have the horizontal axis count in whole numbers."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _thinned(count: int) -> list[int]:
    """Return the positions of at most MOST_POINTS of `count` points, evenly spaced, the first and the last among them."""
    if count <= MOST_POINTS:
        return list(range(count))
    return [i * (count - 1) // (MOST_POINTS - 1) for i in range(MOST_POINTS)]


def _mark_ends(axes: Axes, lines: Sequence[Line], points: float) -> None:
    """Write each line's mark behind its last point, moved up or down as far as the marks need to stand apart.

    A pixel of the drawing is so many `points`.
    """
    ends = [axes.transData.transform((line.x[-1], line.y[-1])) * points for line in lines]
    top = float(axes.bbox.y1) * points + 4
    heights = [float(y) for _, y in ends]

    def apart(i: int, others: Sequence[int], step: float) -> None:
        while any(
            abs(ends[i][0] - ends[j][0]) < 8 * len(lines[i].mark) + 3 and abs(heights[i] - heights[j]) < 14 for j in others
        ):
            heights[i] += step

    order = sorted(range(len(lines)), key=lambda i: heights[i])
    for place, i in enumerate(order):
        apart(i, order[:place], 1)
    if max(heights) > top:
        order.sort(key=lambda i: -heights[i])
        for place, i in enumerate(order):
            heights[i] = min(heights[i], top)
            apart(i, order[:place], -1)
    for line, end, height in zip(lines, ends, heights, strict=True):
        axes.annotate(
            line.mark,
            (line.x[-1], line.y[-1]),
            (7, height - float(end[1])),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            color=line.colour,
            annotation_clip=False,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0, "alpha": 0.7},
        )
