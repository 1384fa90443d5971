"""Draws small plots over the layers as inline SVG: the engine's numbers beside their references.

One plot for each kind of value, since kinds differ by orders of magnitude: x is the layer, the same in all of them; y
is logarithmic, in each plot's own decades. Colours are the page's (``html.STYLE``), so that plots have a dark mode too.
Coordinates have one decimal: the same numbers give the same bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 320.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 312.0, 8.0, 128.0
"""The frame that values lie in; left of it and under it are the labels."""
MAX_DECADES = 12
"""Values more decades below the largest lie on the lower edge: an exact layer would flatten all others."""
_MAX_LABELS = 4
_MAX_LAYER_LABELS = 7
_LAYER_STEPS = (1, 2, 5, 10, 20, 50, 100)
_SIZE = 4.0


@dataclass(frozen=True)
class Point:
    """A value of one layer. title: shown while a pointer rests on it. is_bad: beyond its limit."""

    layer_idx: int
    value: float
    title: str
    is_bad: bool = False


@dataclass(frozen=True)
class Line:
    """Values of some layers that are drawn as a line. style: the page's class for it."""

    style: str
    values: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Decades:
    """A range of y from 10^first to 10^last."""

    first: int
    last: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Decades":
        """Covers all values that have a logarithm, as far as ``MAX_DECADES`` allow; one decade at least."""
        logs = [math.log10(value) for value in values if 0 < value < math.inf]
        if not logs:
            return cls(-1, 0)
        last = math.ceil(max(logs))
        return cls(max(min(math.floor(min(logs)), last - 1), last - MAX_DECADES), last)

    def y(self, value: float) -> float:
        """Maps a value to y, downwards. Zero and small values lie on the lower edge, NaN and infinity on the upper."""
        if math.isnan(value) or value == math.inf:
            return TOP
        log = math.log10(value) if value > 0 else -math.inf
        share = (min(max(log, self.first), self.last) - self.first) / (self.last - self.first)
        return BOTTOM - share * (BOTTOM - TOP)

    @property
    def labelled(self) -> range:
        """The exponents that are written beside the frame."""
        return range(self.first, self.last + 1, max(1, math.ceil((self.last - self.first) / _MAX_LABELS)))


@dataclass(frozen=True)
class Axis:
    """The layers from left to right. is_numbered: whether their numbers are written; values outside all layers have
    none."""

    first: int
    last: int
    is_numbered: bool = True

    def x(self, layer_idx: int) -> float:
        """Maps a layer to x; a single layer lies in the middle."""
        share = 0.5 if self.first == self.last else (layer_idx - self.first) / (self.last - self.first)
        return LEFT + share * (RIGHT - LEFT)

    @property
    def labelled(self) -> list[int]:
        """Returns the layers whose numbers are written: every one, or every second, fifth, tenth, as there is room."""
        if not self.is_numbered:
            return []
        span = self.last - self.first
        step = next((step for step in _LAYER_STEPS if span <= _MAX_LAYER_LABELS * step), span)
        return [layer_idx for layer_idx in range(self.first, self.last + 1) if layer_idx % step == 0]


def small_plot(name: str, axis: Axis, points: Sequence[Point], lines: Sequence[Line]) -> str:
    """Draws one plot. name: what it shows, for screen readers."""
    drawn = [value for line in lines for _, value in line.values]
    decades = Decades.of([*drawn, *(point.value for point in points)])
    parts = [*_frame(decades, axis), *(_line(line, decades, axis) for line in lines)]
    good = [_dot(point, decades, axis) for point in points if not point.is_bad]
    bad = [_mark(point, decades, axis) for point in points if point.is_bad]
    parts += [f'<g class="ok">{"".join(good)}</g>', f'<g class="bad">{"".join(bad)}</g>']
    head = f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(name)}">'
    return f"{head}{''.join(parts)}</svg>"


def _frame(decades: Decades, axis: Axis) -> list[str]:
    parts = []
    for exponent in decades.labelled:
        y = decades.y(10.0**exponent)
        parts.append(f'<path class="grid" d="M{LEFT:g} {y:.1f}H{RIGHT:g}"/>')
        parts.append(f'<text x="{LEFT - 5:g}" y="{y + 3.5:.1f}" class="y">1e{exponent}</text>')
    for layer_idx in axis.labelled:
        x = axis.x(layer_idx)
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 14:g}" class="x">{layer_idx}</text>')
    return [*parts, f'<path class="axis" d="M{LEFT:g} {TOP:g}V{BOTTOM:g}H{RIGHT:g}"/>']


def _line(line: Line, decades: Decades, axis: Axis) -> str:
    places = [(axis.x(layer_idx), decades.y(value)) for layer_idx, value in line.values]
    if len(places) == 1:  # a line of one value would be invisible
        (x, y), places = places[0], []
        places = [(x - _SIZE, y), (x + _SIZE, y)]
    return f'<polyline class="{line.style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _dot(point: Point, decades: Decades, axis: Axis) -> str:
    x, y = axis.x(point.layer_idx), decades.y(point.value)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"><title>{escape(point.title)}</title></circle>'


def _mark(point: Point, decades: Decades, axis: Axis) -> str:
    """Draws a bad value in another shape too: not everybody tells the colours apart."""
    x, y = axis.x(point.layer_idx), decades.y(point.value)
    outline = f"M{x:.1f} {y - _SIZE:.1f}l{_SIZE:g} {_SIZE:g}l-{_SIZE:g} {_SIZE:g}l-{_SIZE:g} -{_SIZE:g}z"
    return f'<path d="{outline}"><title>{escape(point.title)}</title></path>'
