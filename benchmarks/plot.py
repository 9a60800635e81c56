"""A picture of a report, as SVG without a library: how far each row is from its goal, and what its rounds spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final

from rows import Row

WIDTH: Final = 960
LINE: Final = 24
LEFT: Final = 320  # names stand left of the bars
RIGHT: Final = 200  # values right of them
MOST: Final = 8.0  # times the goal, either way
FONT: Final = 'font-family="sans-serif" font-size="13"'
MET, MISSED, INK, GRID = "#2a7f62", "#b5482f", "#222222", "#cccccc"


def picture(rows: Sequence[Row], title: str, most: float = MOST) -> str:
    """Bars of better-than-goal on a logarithmic axis; the line at 1 is the goal, what lies beyond `most` is cut off."""
    height = LINE * (len(rows) + 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" {FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        text(12, LINE - 6, title, weight="bold"),
    ]
    for power in (-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1):
        factor = round(most**power, 3)
        x, colour = _across(factor, most), INK if factor == 1 else GRID
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{LINE * 1.5}" y2="{height - LINE}" stroke="{colour}"/>')
        label = "goal" if factor == 1 else f"{factor:.3g}x" if factor > 1 else f"1/{1 / factor:.3g}"
        parts.append(text(x, height - 6, label, anchor="middle"))
    for number, one in enumerate(rows):
        parts += _bar(one, LINE * (number + 2), most)
    return "\n".join([*parts, "</svg>\n"])


def _bar(one: Row, y: float, most: float) -> list[str]:
    def place(value: float) -> float:
        return _across(value / one.goal if one.better == "higher" else one.goal / value, most)

    low, high = sorted((place(one.goal), place(one.value)))
    sign = ">=" if one.better == "higher" else "<="
    colour = MET if one.met else MISSED
    parts = [
        text(LEFT - 12, y + 13, one.name, anchor="end"),
        f'<rect x="{low:.1f}" y="{y}" width="{max(high - low, 2):.1f}" height="{LINE - 8}" fill="{colour}"/>',
        text(WIDTH - RIGHT + 12, y + 13, f"{one.value:.3g} ({sign} {one.goal:.3g})"),
    ]
    if "ratio_min" in one.raw:
        ends = [place(one.raw[key]) for key in ("ratio_min", "ratio_max")]
        middle = y + (LINE - 8) / 2
        parts.append(f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{middle}" y2="{middle}" stroke="{INK}"/>')
    return parts


def _across(factor: float, most: float) -> float:
    place = math.log(min(max(factor, 1 / most), most)) / math.log(most)
    return LEFT + (WIDTH - LEFT - RIGHT) * (place + 1) / 2


def text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
