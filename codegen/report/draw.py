"""Plots without a script: scales, ticks and marks, in percent of a plot's sides.

Texts keep their size at any width because nothing but positions is scaled: lines are drawn in an `svg` that
stretches, marks and texts are placed at percentages beside it (templates/report_macros.jinja).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Shape = Literal["circle", "square", "diamond", "star"]

PATHS: dict[Shape, str] = {
    "circle": "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0",
    "square": "M-.9,-.9h1.8v1.8h-1.8z",
    "diamond": "M0,-1.2L1.2,0L0,1.2L-1.2,0z",
    "star": "M0,-1.5L.42,-.5L1.5,-.46L.65,.22L.93,1.25L0,.66L-.93,1.25L-.65,.22L-1.5,-.46L-.42,-.5z",
}
#: a plot's size in CSS pixels that texts are kept apart for; below it they are not shown
_WIDTH, _HEIGHT, _CHAR, _LINE = 620.0, 320.0, 6.6, 15.0


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` on 0 .. 100 %."""

    low: float
    high: float
    log: bool = False

    @staticmethod
    def over(values: Iterable[float], *, log: bool = False, zero: bool = False, room: float = 0.06) -> Scale:
        """A scale that holds the values with some room at its ends. zero: it starts at 0."""
        found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(found), max(found)) if found else (1.0, 10.0)
        if log:
            span = max(math.log10(high / low), 0.15)
            middle = math.log10(high * low) / 2
            half = span * (0.5 + room)
            return Scale(10 ** (middle - half), 10 ** (middle + half), True)
        span = (high - (0.0 if zero else low)) or abs(high) or 1.0
        return Scale(0.0 if zero else low - room * span, high + room * span)

    def at(self, value: float) -> float:
        """Percent, cut to the plot."""
        if self.log:
            value = max(value, 1e-300)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(100.0 * min(max(share, 0.0), 1.0), 3)

    def ticks(self, count: int = 5) -> list[Tick]:
        values = self._decades(count) if self.log else self._steps(count)
        return [Tick(self.at(value), short(value)) for value in values]

    def _steps(self, count: int) -> list[float]:
        raw = (self.high - self.low) / count
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _decades(self, count: int) -> list[float]:
        bottom, top = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for marks in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [m * 10.0**e for e in range(bottom, top + 1) for m in marks]
            found = [v for v in found if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
            if len(found) >= min(3, count):
                thin = math.ceil(len(found) / (count + 2))
                return found[::thin]
        return self._steps(count)


@dataclass(frozen=True, slots=True)
class Mark:
    """A value of a plot. `size` is its radius in pixels; `label` is written beside it where there is room."""

    x: float
    y: float
    title: str
    colour: str
    shape: Shape = "circle"
    size: float = 5.0
    label: str = ""
    strong: bool = False

    @property
    def path(self) -> str:
        return PATHS[self.shape]


@dataclass(frozen=True, slots=True)
class Line:
    """A polyline through (x, y) in percent, y upwards."""

    points: tuple[tuple[float, float], ...]
    colour: str
    dashed: bool = False
    title: str = ""

    @property
    def path(self) -> str:
        return " ".join(f"{x:g},{100 - y:g}" for x, y in self.points)


@dataclass(frozen=True, slots=True)
class Label:
    """A text at (x, y) percent, moved by (dx, dy) pixels; anchor start, middle or end."""

    x: float
    y: float
    text: str
    dx: float = 0.0
    dy: float = 0.0
    anchor: str = "start"
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing ready for its template. `about` tells those who do not see it what it shows."""

    about: str
    x_title: str
    y_title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    labels: Sequence[Label] = ()


def placed(
    marks: Sequence[Mark], taken: Sequence[Label] = (), only: Sequence[Mark] | None = None
) -> list[Label]:
    """Labels of marks (or of `only` some of them), those that come first first, each where it covers neither
    another label nor a mark; a label that fits nowhere is left out (it is still in the mark's title)."""
    boxes = [_box(label) for label in taken]
    obstacles = [_around(mark) for mark in marks]
    found = []
    for number, mark in enumerate(marks):
        if not mark.label or (only is not None and mark not in only):
            continue
        gap = mark.size + 5
        for dx, dy, anchor in (
            (gap, 4, "start"),
            (-gap, 4, "end"),
            (0, -gap - 1, "middle"),
            (0, gap + 11, "middle"),
        ):
            label = Label(mark.x, mark.y, mark.label, dx, dy, anchor)
            box = _box(label)
            others = [o for i, o in enumerate(obstacles) if i != number]
            inside = box[0] >= 0 and box[1] >= 0 and box[2] <= _WIDTH and box[3] <= _HEIGHT
            if inside and not any(_meet(box, other) for other in (*boxes, *others)):
                boxes.append(box)
                found.append(label)
                break
    return found


_Box = tuple[float, float, float, float]


def _box(label: Label) -> _Box:
    x, y = label.x / 100 * _WIDTH + label.dx, (1 - label.y / 100) * _HEIGHT + label.dy
    width = len(label.text) * _CHAR
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
    return left, y - _LINE + 3, left + width, y + 4


def _around(mark: Mark) -> _Box:
    x, y, r = mark.x / 100 * _WIDTH, (1 - mark.y / 100) * _HEIGHT, mark.size
    return x - r, y - r, x + r, y + r


def _meet(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# -- numbers -------------------------------------------------------------------------------


def number(value: float) -> str:
    """Four significant digits, thousands separated."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:,.4g}"


def short(value: float) -> str:
    """For ticks: 1,500 -> 1.5k."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
