"""Line charts as inline SVG: colours and fonts are CSS classes of the page, so one chart serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 10, 36
_MAX_POINTS = 300  # a longer line is drawn as the means of so many parts


class Point(NamedTuple):
    """A value at x, with the ends of its interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points by ascending x, joined by a line; `style` is the CSS class that colours them."""

    name: str
    points: Sequence[Point]
    style: str
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """What :func:`svg` draws; `level` is a horizontal line, such as what real images score, with its name."""

    title: str
    x_label: str
    series: Sequence[Series]
    level: tuple[str, float] | None = None
    log2_x: bool = False


def svg(chart: Chart) -> str:
    """Return the chart as an <svg> element whose label tells its values; each point's tooltip does so too.

    Raises ValueError for a chart without points.
    """
    frame = _Frame.around(chart)
    parts = [*_grid(frame, chart), *_level(frame, chart), *(_draw(frame, chart, s) for s in chart.series)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_summary(chart))}">{"".join(parts)}</svg>'
    )


def figures(charts: Sequence[Chart]) -> str:
    """Return the charts as captioned figures side by side, as many as the page's width allows."""
    captioned = "\n".join(
        f"<figure><figcaption><strong>{escape(chart.title)}</strong></figcaption>{svg(chart)}</figure>"
        for chart in charts
    )
    return f'<div class="charts">\n{captioned}\n</div>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def thinned(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """Return `points`, or the means of `limit` equal parts of them where they are more."""
    if len(points) <= limit:
        return list(points)
    bounds = [round(i * len(points) / limit) for i in range(limit + 1)]
    parts = [points[a:b] for a, b in pairwise(bounds)]
    return [Point(sum(p.x for p in part) / len(part), sum(p.y for p in part) / len(part)) for part in parts]


@dataclass(frozen=True)
class _Frame:
    """The plotting area: its ticks, and where a value lies in the picture."""

    x_ticks: list[float]
    y_ticks: list[float]
    log2_x: bool

    @classmethod
    def around(cls, chart: Chart) -> _Frame:
        points = [p for series in chart.series for p in series.points]
        if not points:
            raise ValueError(f"chart {chart.title!r}: expected at least one point, got none")
        heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
        heights += [chart.level[1]] if chart.level else []
        xs = [p.x for p in points]
        x_ticks = ticks(min(xs), max(xs), 5)
        if chart.log2_x:
            x_ticks = [2.0**e for e in range(math.floor(math.log2(min(xs))), math.ceil(math.log2(max(xs))) + 1)]
        return cls(x_ticks, ticks(min(heights), max(heights)), chart.log2_x)

    def x(self, value: float) -> float:
        low, high, value = (math.log2(v) if self.log2_x else v for v in (self.x_ticks[0], self.x_ticks[-1], value))
        share = (value - low) / (high - low) if high > low else 0.5
        inset = 14 if self.log2_x else 0  # so that the first and last markers clear the edges
        return round(_LEFT + inset + share * (WIDTH - _LEFT - _RIGHT - 2 * inset), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _BOTTOM - _TOP), 1)


def _grid(frame: _Frame, chart: Chart) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    lines = []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        lines.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/><text x="{_LEFT - 6}" y="{y + 4}" class="y">')
        lines.append(f"{tick:g}</text>")
    for tick in frame.x_ticks:
        lines.append(f'<text x="{frame.x(tick)}" y="{bottom + 15}" class="x">{tick:g}</text>')
    return [*lines, f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 5}" class="x">{escape(chart.x_label)}</text>']


def _level(frame: _Frame, chart: Chart) -> list[str]:
    if chart.level is None:
        return []
    name, value = chart.level
    return [
        f'<path class="level" d="M{_LEFT} {frame.y(value)}H{WIDTH - _RIGHT}">'
        f"<title>{escape(name)}: {value:.4g}</title></path>"
    ]


def _draw(frame: _Frame, chart: Chart, series: Series) -> str:
    points = thinned(series.points)
    line = "L".join(f"{frame.x(p.x)} {frame.y(p.y)}" for p in points)
    parts = [f'<path class="line" d="M{line}"/>'] if len(points) > 1 else []
    if series.markers or len(points) == 1:
        parts += [_marker(frame, chart, series, p) for p in points]
    return f'<g class="{series.style}">{"".join(parts)}</g>'


def _marker(frame: _Frame, chart: Chart, series: Series, point: Point) -> str:
    x, y = frame.x(point.x), frame.y(point.y)
    interval = ""
    if point.low is not None and point.high is not None:
        interval = f'<path class="interval" d="M{x} {frame.y(point.low)}V{frame.y(point.high)}"/>'
    tooltip = f"{series.name}, {chart.x_label} {point.x:g}: {point.y:.4g}{_interval(point)}"
    diamond, circle = f"M{x} {y - 6}l6 6l-6 6l-6 -6z", f"M{x - 4} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0"
    shape = diamond if series.style == "student" else circle  # tells them apart where colours do not
    return f'<g>{interval}<path class="marker" d="{shape}"/><title>{escape(tooltip)}</title></g>'


def _interval(point: Point) -> str:
    return "" if point.low is None or point.high is None else f" ({point.low:.4g} to {point.high:.4g})"


def _summary(chart: Chart) -> str:
    """The chart in words: all points of a short series, the ends of a long one."""
    texts = []
    for series in chart.series:
        shown = series.points if len(series.points) <= 8 else (series.points[0], series.points[-1])
        joint = ", " if len(series.points) <= 8 else " to "
        texts.append(f"{series.name} {joint.join(f'{p.y:.4g} at {p.x:g}' for p in shown)}")
    texts += [f"{chart.level[0]} {chart.level[1]:.4g}"] if chart.level else []
    return f"{chart.title} against {chart.x_label}: {'; '.join(texts)}"
