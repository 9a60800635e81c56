"""Curves as SVG without a library: on logarithmic or linear axes, a legend beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from plot import FONT, GRID, LINE, WIDTH, text

PLOT: Final = (90, 60, 620, 330)  # left, top, width, height of the axes
COLOURS: Final = (
    *("#b5482f", "#2f5fb5", "#2a7f62", "#8a5fb5", "#b58a2f", "#555555"),
    *("#d46a9f", "#4fb0c6", "#7fae3f", "#8c564b", "#1b1b6b", "#e08e45"),
)
MARK: Final = 3.5


@dataclass(frozen=True)
class Curve:
    """Points by ascending x. `dashed` sets what is derived apart from what is measured."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """Over all values; marked at `ticks`, or at the powers of `base`, beyond the values where need be.

    Logarithmic, unless it is `linear`: then it needs `ticks`.
    """

    name: str
    base: float = 10
    ticks: tuple[float, ...] = ()
    linear: bool = False

    def marks(self, values: Sequence[float]) -> list[float]:
        if self.ticks:
            return list(self.ticks)
        low, high = (math.log(bound(values), self.base) for bound in (min, max))
        return [self.base**power for power in range(math.floor(low + 1e-9), math.ceil(high - 1e-9) + 1)]

    def share(self, value: float, values: Sequence[float]) -> float:
        """Where a value lies between the ends of the axis: 0 to 1."""
        ends = [*values, *self.marks(values)]
        low, high, here = (each if self.linear else math.log(each) for each in (min(ends), max(ends), value))
        return (here - low) / ((high - low) or 1.0)


def relative(lines: Sequence[Curve]) -> list[Curve]:
    """Each curve over the lowest at every x; all have the same x."""
    lowest = [min(y for _, y in points) for points in zip(*(line.points for line in lines), strict=True)]
    return [
        replace(line, points=tuple((x, y / best) for (x, y), best in zip(line.points, lowest, strict=True)))
        for line in lines
    ]


def curves(lines: Sequence[Curve], title: str, across: Axis, up: Axis) -> str:
    """Curves on their axes, with a legend."""
    left, top, width, height = PLOT
    all_x = [x for line in lines for x, _ in line.points]
    all_y = [y for line in lines for _, y in line.points]

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * across.share(x, all_x), top + height * (1 - up.share(y, all_y))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top + height + 60}" {FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        text(12, LINE - 2, title, weight="bold"),
        text(left, top - 12, up.name),
        text(left + width / 2, top + height + 44, across.name, anchor="middle"),
    ]
    bottom = top + height
    for x in across.marks(all_x):
        place, _ = at(x, all_y[0])
        parts += [_line(place, top, place, bottom), text(place, bottom + 18, f"{x:,.10g}", anchor="middle")]
    for y in up.marks(all_y):
        _, place = at(all_x[0], y)
        parts += [_line(left, place, left + width, place), text(left - 8, place + 4, f"{y:,.10g}", anchor="end")]
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for x, y in line.points:  # the numbers stay readable: a title shows under the mouse
            centre_x, centre_y = at(x, y)
            label = f"<title>{x:,.10g}: {y:.5g}</title>"
            parts.append(f'<circle cx="{centre_x:.1f}" cy="{centre_y:.1f}" r="{MARK}" fill="{colour}">{label}</circle>')
        beside = top + 10 + LINE * number
        sample = f'x1="{left + width + 20}" x2="{left + width + 50}" y1="{beside}" y2="{beside}"'
        parts.append(f'<line {sample} stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(text(left + width + 58, beside + 4, line.name))
    return "\n".join([*parts, "</svg>\n"])


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{GRID}"/>'
