"""Plots as inline SVG: axes with round ticks, lines, dots, stacked bars. Colours are the page's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
SERIES_COLOURS = 6
BAR_HEIGHT, FIGURE_WIDTH = 26, 34

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: Sequence[Point]
    dots: bool = False
    """Drawn as dots, not as a line."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The range of one axis in its unit; logarithmic where latencies span decades."""

    label: str
    low: float
    high: float
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return (at - low) / (high - low)

    def ticks(self) -> list[float]:
        return _decades(self.low, self.high) if self.log else _round_steps(self.low, self.high)

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:g}"


def _round_steps(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every power of ten, or only 1 where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [float(f"{part}e{power}") for power in powers for part in parts]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def axis(label: str, values: Iterable[float], *, log: bool = False) -> Axis:
    """Wide enough for every value."""
    known = list(values)
    if log:
        positive = [value for value in known if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        return Axis(label, low / 1.1, max(high * 1.1, low * 2), log=True)
    return Axis(label, 0.0, max(known, default=1.0) * 1.05 or 1.0)


def share_axis(label: str) -> Axis:
    return Axis(label, 0.0, 1.0, percent=True)


def chart(
    title: str, x: Axis, y: Axis, series: Sequence[Series], marks: Sequence[tuple[str, float]] = ()
) -> str:
    """A figure with its legend; `marks` are dashed verticals with a name."""
    at = _placer(x, y)
    drawn = [_draw(one, number, at) for number, one in enumerate(series)]
    body = [*_grid(x, y, at), *_marks(marks, x, at), *drawn]
    return _figure(title, _svg(title, body), [one.name for one in series])


def _placer(x: Axis, y: Axis) -> Callable[[float, float], Point]:
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return lambda a, b: (
        round(LEFT + across * x.place(a), 1),
        round(HEIGHT - BOTTOM - up * y.place(b), 1),
    )


def _grid(x: Axis, y: Axis, at: Callable[[float, float], Point]) -> list[str]:
    parts = []
    for tick in x.ticks():
        px, bottom = at(tick, y.low)
        parts.append(f'<line class="grid" x1="{px}" y1="{TOP}" x2="{px}" y2="{bottom}"/>')
        parts.append(f'<text x="{px}" y="{bottom + 14}" text-anchor="middle">{x.text(tick)}</text>')
    for tick in y.ticks():
        left, py = at(x.low, tick)
        parts.append(f'<line class="grid" x1="{left}" y1="{py}" x2="{WIDTH - RIGHT}" y2="{py}"/>')
        parts.append(f'<text x="{left - 6}" y="{py + 4}" text-anchor="end">{y.text(tick)}</text>')
    middle, foot = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6
    parts.append(f'<text x="{middle}" y="{foot}" text-anchor="middle">{escape(x.label)}</text>')
    half = (TOP + HEIGHT - BOTTOM) / 2
    turn = f'transform="rotate(-90 12 {half})"'
    parts.append(f'<text x="12" y="{half}" text-anchor="middle" {turn}>{escape(y.label)}</text>')
    return parts


def _marks(
    marks: Sequence[tuple[str, float]], x: Axis, at: Callable[[float, float], Point]
) -> list[str]:
    parts = []
    for name, value in marks:
        if not x.low <= value <= x.high:
            continue
        px, _ = at(value, 0.0)
        parts.append(
            f'<line class="mark" x1="{px}" y1="{TOP}" x2="{px}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="name" x="{px + 4}" y="{HEIGHT - BOTTOM - 5}">{escape(name)}</text>'
        )
    return parts


def _draw(one: Series, number: int, at: Callable[[float, float], Point]) -> str:
    colour = number % SERIES_COLOURS
    places = [at(*point) for point in one.points]
    if one.dots:
        return "".join(f'<circle class="s{colour}" cx="{x}" cy="{y}" r="2"/>' for x, y in places)
    path = " ".join(f"{x},{y}" for x, y in places)
    ends = "".join(f'<circle class="s{colour}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places)
    return f'<polyline class="s{colour}" points="{path}"/>' + (ends if len(places) <= 24 else "")


def bars(title: str, unit: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """One stacked horizontal bar a row, its parts in the order given."""
    longest = max((sum(value for _, value in parts) for _, parts in rows), default=0.0)
    x = axis(unit, [longest])
    height = BAR_HEIGHT + 28
    body = [
        _bar(x, name, parts, TOP + number * height) for number, (name, parts) in enumerate(rows)
    ]
    names = [name for name, _ in rows[0][1]] if rows else []
    total = TOP + height * len(rows) + 24
    for tick in x.ticks():
        px = LEFT / 4 + (WIDTH - LEFT / 4 - RIGHT) * x.place(tick)
        body.append(f'<text x="{px:.1f}" y="{total - 8}" text-anchor="middle">{tick:g}</text>')
    return _figure(f"{title} ({unit})", _svg(title, body, total), names)


def _bar(x: Axis, name: str, parts: Sequence[tuple[str, float]], top: int) -> str:
    """With the whole beside its name, and figures where a part has room for one."""
    left, across = LEFT / 4, WIDTH - LEFT / 4 - RIGHT
    whole = sum(value for _, value in parts)
    drawn = [f'<text x="{left}" y="{top + 8}">{escape(name)}: {whole:.3g}</text>']
    done = 0.0
    for number, (part, value) in enumerate(parts):
        start, width = left + across * x.place(done), across * x.place(value)
        colour = number % SERIES_COLOURS
        drawn.append(
            f'<rect class="s{colour}" x="{start:.1f}" y="{top + 13}" width="{width:.1f}" '
            f'height="{BAR_HEIGHT}"><title>{escape(part)}: {value:.4g}</title></rect>'
        )
        if width > FIGURE_WIDTH:
            drawn.append(
                f'<text class="on" x="{start + width / 2:.1f}" y="{top + 13 + BAR_HEIGHT / 2 + 4}" '
                f'text-anchor="middle">{value:.3g}</text>'
            )
        done += value
    return "".join(drawn)


def _svg(title: str, body: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg>"
    )


def _figure(title: str, svg: str, names: Sequence[str]) -> str:
    legend = "".join(
        f'<span><i class="s{number % SERIES_COLOURS}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}"
        f'<div class="legend">{legend}</div></figure>'
    )
