"""Line charts as inline SVG: sizes in viewBox units, colours by CSS class, so that light, dark and print work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from undiffuse.report.scales import Scale, fit_scale
from undiffuse.report.text import escape, power_of_ten, tick

# The viewBox is about as wide as a phone, so that its 12-unit text stays readable there.
WIDTH, HEIGHT = 440.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 30.0, 40.0
# Below this, tick labels would be mostly zeros.
TINY = 0.01


@dataclass(frozen=True)
class Line:
    """A line (or dots) through points; NaN breaks it. `style` is a CSS class."""

    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """The area between two lines."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Hint:
    """A place that answers the mouse: a rule at x, dots at (x, y) for each y, and a text."""

    x: float
    y: Sequence[float]
    text: str


@dataclass(frozen=True)
class Chart:
    """Axes, bands, lines and hints; the y axis is logarithmic where the values ask for it.

    Args:
        summary: what a reader who cannot see the picture should know.
        x_label, y_label: name and unit of each axis.
        marks: x of upright lines that warn (a value that is not finite).
        log: False keeps the y axis linear.
    """

    summary: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    hints: Sequence[Hint] = ()
    marks: Sequence[float] = field(default_factory=tuple)
    log: bool = True

    @cached_property
    def x_scale(self) -> Scale:
        values = [v for part in (*self.lines, *self.bands) for v in part.x]
        return fit_scale([*values, *self.marks], LEFT, WIDTH - RIGHT, exact=True)

    @cached_property
    def y_scale(self) -> Scale:
        lines = [v for line in self.lines for v in line.y]
        return fit_scale(lines + [v for b in self.bands for v in (*b.low, *b.high)], HEIGHT - BOTTOM, TOP, log=self.log)

    def svg(self) -> str:
        """The chart as one `<svg>` element."""
        body = [
            *self._axes(),
            *(f'<line class="mark" x1="{x}" x2="{x}" {self._tall()}/>' for x in map(self._x, self.marks)),
            *(self._band(band) for band in self.bands),
            *(self._line(line) for line in self.lines),
            *self._hints(),
        ]
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
            f'aria-label="{escape(self.summary)}">{"".join(body)}</svg>'
        )

    def y_power(self) -> int:
        """The power of ten taken out of the tick labels of a linear axis whose values are all tiny, else 0."""
        size = max(abs(self.y_scale.low), abs(self.y_scale.high))
        return 0 if self.y_scale.is_log or size >= TINY else math.floor(math.log10(size) + 1e-9)

    def _x(self, value: float) -> str:
        return f"{self.x_scale.place(value):.2f}"

    def _y(self, value: float) -> str:
        return f"{self.y_scale.place(value):.2f}"

    def _tall(self) -> str:
        return f'y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}"'

    def _axes(self) -> Iterable[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        power = self.y_power()
        for value in self.y_scale.ticks():
            y = self.y_scale.place(value)
            yield f'<line class="grid" x1="{LEFT:g}" x2="{right:g}" y1="{y:.2f}" y2="{y:.2f}"/>'
            label = tick(value / 10.0**power)
            yield f'<text class="tick" x="{LEFT - 7:g}" y="{y + 4:.2f}" text-anchor="end">{label}</text>'
        yield f'<line class="axis" x1="{LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>'
        for value in self.x_scale.ticks(6):
            x = self._x(value)
            yield f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom:g}" y2="{bottom + 4:g}"/>'
            yield f'<text class="tick" x="{x}" y="{bottom + 17:g}" text-anchor="middle">{tick(value)}</text>'
        scale = ", log scale" if self.y_scale.is_log else f", in units of {power_of_ten(power)}" if power else ""
        yield f'<text class="name" x="0" y="14">{escape(self.y_label)}{scale}</text>'
        yield f'<text class="name" x="{right:g}" y="{HEIGHT - 5:g}" text-anchor="end">{escape(self.x_label)}</text>'

    def _line(self, line: Line) -> str:
        """Each stretch begins with a step of length zero, which a round cap shows where a point stands alone."""
        finite = [(x, y) for x, y in zip(line.x, line.y) if math.isfinite(x + y)]
        dots = "".join(f'<circle cx="{self._x(x)}" cy="{self._y(y)}" r="2.2"/>' for x, y in finite)
        steps, drawing = [], False
        for x, y in zip(line.x, line.y):
            if math.isfinite(x + y):
                place = f"{self._x(x)} {self._y(y)}"
                steps.append(f"L{place}" if drawing else f"M{place}h0")
            drawing = math.isfinite(x + y)
        return f'<g class="{line.style}"><path d="{"".join(steps)}"/>{dots if line.dots else ""}</g>'

    def _band(self, band: Band) -> str:
        """One closed area for each unbroken stretch."""
        areas, stretch = [], []
        for x, low, high in [*zip(band.x, band.low, band.high), (math.nan,) * 3]:
            if math.isfinite(x + low + high):
                stretch.append((x, low, high))
                continue
            if stretch:
                above = [f"{self._x(x)} {self._y(high)}" for x, _, high in stretch]
                below = [f"{self._x(x)} {self._y(low)}" for x, low, _ in reversed(stretch)]
                areas.append(f"M{'L'.join(above + below)}Z")
            stretch = []
        return f'<path class="band" d="{"".join(areas)}"/>'

    def _hints(self) -> Iterable[str]:
        """Invisible upright strips, each reaching half-way to its neighbours; the mouse makes its content visible."""
        hints = sorted(self.hints, key=lambda hint: hint.x)
        places = [self.x_scale.place(hint.x) for hint in hints]
        edges = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(places)), WIDTH - RIGHT]
        for hint, place, left, right in zip(hints, places, edges, edges[1:]):
            dots = "".join(f'<circle cx="{place:.2f}" cy="{self._y(y)}" r="3.5"/>' for y in hint.y if math.isfinite(y))
            yield (
                f'<g class="hint"><rect x="{left:.2f}" width="{max(0.0, right - left):.2f}" y="{TOP:g}" '
                f'height="{HEIGHT - BOTTOM - TOP:g}"/><line x1="{place:.2f}" x2="{place:.2f}" {self._tall()}/>'
                f"{dots}<title>{escape(hint.text)}</title></g>"
            )
