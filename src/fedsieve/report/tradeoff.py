"""What accuracy costs in bytes: a mark for each setting, the names of the methods beside their marks, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedsieve.report.plots import MUTED, PAPER, RULE, canvas, coloured, scale

WIDE = 960
"""width of the plot, in the units of its view box"""
DENSE = 0.9995
"""from this density on a setting is dense"""
_LEAST_SPAN = 6.0
"""percent that the axis of accuracy spans at least, so that small differences look small"""
_SMALLEST, _LARGEST = 5.0, 12.0

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""left, bottom, right, top"""


@dataclass(frozen=True, slots=True)
class Setting:
    """Runs that differ in their seed only, as one mark."""

    name: str
    """equal for settings that differ in density only"""
    colour: str
    """the same for one name"""
    density: float
    """in (0, 1]"""
    megabytes: float
    """mean over the seeds, > 0"""
    accuracy: float
    """percent, mean over the seeds"""
    low: float
    """least of the seeds"""
    high: float


def front(settings: Sequence[Setting]) -> list[int]:
    """Return the positions of the settings to which no other is preferable, from the fewest megabytes to the most.

    One is preferable if it has at least the accuracy for at most the megabytes, and is better in one of the two.
    """
    points = [(setting.megabytes, -setting.accuracy) for setting in settings]
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not kept or points[i][1] < points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def sizes(settings: Sequence[Setting]) -> dict[float, float]:
    """Return the diameter of the mark of each density below dense: the denser, the larger."""
    found = sorted({setting.density for setting in settings if setting.density < DENSE})
    step = (_LARGEST - _SMALLEST) / max(len(found) - 1, 1)
    return {density: _LARGEST - step * rank for rank, density in enumerate(reversed(found))}


def swatch(density: float, diameter: float) -> str:
    """Return a mark as SVG that stands in a line of text."""
    if density >= DENSE:
        return f'<path d="M8 1.5L14.5 8L8 14.5L1.5 8Z" style="fill: {coloured(MUTED)}"/>'
    return f'<circle cx="8" cy="8" r="{diameter / 2:.2f}" style="fill: {coloured(MUTED)}"/>'


def draw(settings: Sequence[Setting], *, log: bool) -> str:
    """Return the plot as SVG."""
    families: dict[str, list[Setting]] = {}
    for each in sorted(settings, key=lambda setting: -setting.density):
        families.setdefault(each.name, []).append(each)
    best, diameters = [settings[i] for i in front(settings)], sizes(settings)
    with canvas(min(320 + 16 * len(families), 680), WIDE) as drawing:
        axes = drawing.axes(left=48, right=14, bottom=44, top=26)
        low, high = min(setting.low for setting in settings), max(setting.high for setting in settings)
        room = max(0.07 * (high - low), 0.5 * (_LEAST_SPAN - (high - low)))
        axes.set_ylim(max(low - room, -2), high + room)
        left, right = (f(setting.megabytes for setting in settings) for f in (min, max))
        around = math.log(right / left) * 0.07 if log else (right - left) * 0.07 or 0.1 * right
        axes.set_xlim(*((left / math.exp(around), right * math.exp(around)) if log else (left - around, right + around)))
        axes.set_xlabel("megabytes carried, up and down" + ", log scale" * log)
        axes.set_title("accuracy (%)", loc="left", fontsize=13, color=MUTED, pad=8, x=-48 / (WIDE - 62))
        scale(axes, logx=log)
        edge = axes.get_xlim()[1]
        steps = [*((each.megabytes, each.accuracy) for each in best), (edge, best[-1].accuracy)]
        axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=RULE, linewidth=7, solid_capstyle="butt", zorder=1.5)
        for family in families.values():
            x, y = [each.megabytes for each in family], [each.accuracy for each in family]
            axes.plot(x, y, color=family[0].colour, linewidth=1.1, alpha=0.45, zorder=2)
            for each in family:
                if each.high > each.low:
                    axes.plot([each.megabytes] * 2, [each.low, each.high], color=each.colour, linewidth=1.2, zorder=2.5)
                shape, size = ("D", 8.5) if each.density >= DENSE else ("o", diameters[each.density])
                look: dict[str, Any] = {"color": each.colour, "markersize": size, "zorder": 3 + 1 / size}
                axes.plot(each.megabytes, each.accuracy, shape, markeredgecolor=PAPER, markeredgewidth=0.8, **look)
        across = 72 / drawing.figure.dpi

        def place(setting: Setting, value: float | None = None) -> Point:
            x, y = axes.transData.transform((setting.megabytes, setting.accuracy if value is None else value))
            return float(x) * across, float(y) * across

        marks = [[Mark(place(each), diameters.get(each.density, 10.5) / 2) for each in family] for family in families.values()]
        lines = [pair for family in marks for pair in pairwise(mark.at for mark in family)]
        lines += [(place(each, each.low), place(each, each.high)) for each in settings if each.high > each.low]
        corners = [steps[0], *(corner for (_, y), (x, up) in pairwise(steps) for corner in ((x, y), (x, up)))]
        walk = [(float(x) * across, float(y) * across) for x, y in axes.transData.transform(corners)]
        lines += [((x, y + side), (to, up + side)) for (x, y), (to, up) in pairwise(walk) for side in (-3.5, 3.5)]
        names_on_front = {each.name for each in best}
        texts = [Text(name, 7.6 if name in names_on_front else 6.9) for name in families]
        frame = (50.0, 46.0, WIDE - 4.0, drawing.height - 22.0)
        back = axes.transData.inverted()
        for text, spot, family in zip(texts, arrange(texts, marks, lines, frame), families.values(), strict=True):
            if spot.leader:
                ends = back.transform([(x / across, y / across) for x, y in spot.leader])
                axes.plot(*ends.T, color=family[0].colour, linewidth=0.8, zorder=2.8)
            x, y = back.transform((spot.text[0] / across, spot.text[1] / across))
            bold = text.words in names_on_front
            axes.text(
                x, y, text.words, ha=spot.side, va="center_baseline", fontsize=12.5, color=family[0].colour,
                fontweight="bold" if bold else "normal", zorder=5,
            )  # fmt: skip
    return drawing.svg


# ------------------------------------------------------------------------------------------------ where names stand


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark that a name may not cover."""

    at: Point
    radius: float


@dataclass(frozen=True, slots=True)
class Text:
    """A name to be placed; the width of a letter is a guess that leaves room, as the reader's browser brings the font."""

    words: str
    letter: float

    @property
    def width(self) -> float:
        """In units of the plot."""
        return self.letter * len(self.words)


@dataclass(frozen=True, slots=True)
class Spot:
    """A place for a name: its box, where its text begins, ends or has its middle, and a line to its mark if it is far off."""

    cost: float
    box: Box
    text: Point
    side: str
    near: Point
    mark: Mark
    leader: tuple[Point, Point] | None = None


_HEIGHT = 15.0
_GAPS = (3.0, 12.0, 22.0, 34.0, 48.0, 64.0, 82.0, 104.0, 130.0, 160.0)


def arrange(
    texts: Sequence[Text], marks: Sequence[Sequence[Mark]], lines: Sequence[tuple[Point, Point]], frame: Box
) -> list[Spot]:
    """Return a place for each name beside one of its own marks: over no mark, over no other name, and as near as may be.

    Names in a crowd choose first; then each chooses again, knowing where the others are, until none moves.
    """
    every = [mark for family in marks for mark in family]
    anywhere = (-math.inf, -math.inf, math.inf, math.inf)  # for a name that is too long for the frame
    options = [
        _options(text, family, frame) or _options(text, family, anywhere) for text, family in zip(texts, marks, strict=True)
    ]
    rated: dict[int, float] = {}

    def cost(spot: Spot, others: Sequence[Spot]) -> float:
        if id(spot) not in rated:
            rated[id(spot)] = spot.cost + _covered(spot, every, lines)
        return rated[id(spot)] + sum(_conflict(spot, other) for other in others)

    crowd = [min(sum(math.exp(-math.dist(mark.at, other.at) / 40) for other in every) for mark in family) for family in marks]
    order = sorted(range(len(texts)), key=lambda i: -crowd[i])
    chosen: dict[int, Spot] = {}
    for _ in range(8):
        before = dict(chosen)
        for i in order:
            chosen.pop(i, None)
            chosen[i] = _best(options[i], cost, list(chosen.values()))
        if before == chosen:
            break
    return [chosen[i] for i in range(len(texts))]


def _options(text: Text, family: Sequence[Mark], frame: Box) -> list[Spot]:
    """Return the places for a name, the nearest to its marks first."""
    return sorted((spot for rank, mark in enumerate(family) for spot in _spots(text, mark, 5.0 * rank, frame)), key=_cost)


def _spots(text: Text, mark: Mark, cost: float, frame: Box) -> Iterator[Spot]:
    """Yield places around a mark that lie in the frame."""
    for gap in _GAPS:
        for turn in range(24):
            cos, sin = math.cos(turn * math.pi / 12), math.sin(turn * math.pi / 12)
            side = "left" if cos > 0.25 else "right" if cos < -0.25 else "center"
            reach = mark.radius + gap
            x, y = mark.at[0] + reach * cos, mark.at[1] + reach * sin + sin * _HEIGHT / 2
            left = x - {"left": 0.0, "right": 1.0, "center": 0.5}[side] * text.width
            box = (left, y - _HEIGHT / 2, left + text.width, y + _HEIGHT / 2)
            if box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]:
                continue
            near = min(max(mark.at[0], box[0]), box[2]), min(max(mark.at[1], box[1] + 2), box[3] - 2)
            away = math.dist(near, mark.at)
            leader = None
            if away > mark.radius + 8:
                towards = mark.radius / away
                start = tuple(m + towards * (n - m) for m, n in zip(mark.at, near, strict=True))
                leader = ((start[0], start[1]), near)
            slant = 0.0 if cos > 0.9 else 1.5 if cos < -0.9 else 2.0
            yield Spot(cost + gap + slant, box, (x, y), side, near, mark, leader)


def _cost(spot: Spot) -> float:
    return spot.cost


def _covered(spot: Spot, marks: Sequence[Mark], lines: Sequence[tuple[Point, Point]]) -> float:
    """Return what it costs that marks and lines are covered there."""
    cost = 0.0
    for mark in marks:
        near = min(max(mark.at[0], spot.box[0]), spot.box[2]), min(max(mark.at[1], spot.box[1]), spot.box[3])
        if math.dist(near, mark.at) < mark.radius + 1:
            cost += 1000
        if spot.leader and mark is not spot.mark and _distance(mark.at, *spot.leader) < mark.radius + 1.5:
            cost += 70
    for line in lines:
        if _crosses_box(line, spot.box):
            cost += 24
        if spot.leader and _cross(*line, *spot.leader):
            cost += 5
    return cost


def _best(options: Sequence[Spot], cost: Callable[[Spot, Sequence[Spot]], float], others: Sequence[Spot]) -> Spot:
    """Return the place of the least cost; the options come by what they cost at least."""
    best, least = options[0], math.inf
    for spot in options:
        if spot.cost >= least:
            break
        if (found := cost(spot, others)) < least:
            best, least = spot, found
    return best


def _conflict(one: Spot, other: Spot) -> float:
    cost = 0.0
    if (
        one.box[0] < other.box[2] + 5
        and other.box[0] < one.box[2] + 5
        and one.box[1] < other.box[3]
        and other.box[1] < one.box[3]
    ):
        cost += 2000
    for line, box in ((one.leader, other.box), (other.leader, one.box)):
        if line and _crosses_box(line, box):
            cost += 500
    if one.leader and other.leader and _cross(*one.leader, *other.leader):
        cost += 120
    return cost


def _distance(point: Point, start: Point, end: Point) -> float:
    """Return how far a point is from a line between two others."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = dx * dx + dy * dy
    along = ((point[0] - start[0]) * dx + (point[1] - start[1]) * dy) / length if length else 0.0
    along = min(max(along, 0.0), 1.0)
    return math.dist(point, (start[0] + along * dx, start[1] + along * dy))


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    def turn(p: Point, q: Point, r: Point) -> bool:
        return (q[0] - p[0]) * (r[1] - p[1]) > (q[1] - p[1]) * (r[0] - p[0])

    return turn(a, b, c) != turn(a, b, d) and turn(c, d, a) != turn(c, d, b)


def _crosses_box(line: tuple[Point, Point], box: Box) -> bool:
    left, bottom, right, top = box
    (x, y), (to, up) = line
    if max(x, to) < left or min(x, to) > right or max(y, up) < bottom or min(y, up) > top:
        return False
    if (left <= x <= right and bottom <= y <= top) or (left <= to <= right and bottom <= up <= top):
        return True
    return _cross(*line, (left, bottom), (right, top)) or _cross(*line, (left, top), (right, bottom))
