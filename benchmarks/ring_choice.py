"""`auto` beside the strategies it chooses from: the worst point of a grid, and time to first token by miss rate.

`auto` decides once a call, which here is one layer (the runner decides once for all layers), from a calibration that
the product's own code measured in the same processes a moment ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil
from statistics import median
from typing import Any, Final

from curves import Curve
from ring_case import CHOSEN, Case
from ring_group import Group, interleave, load
from ring_rows import Sizes
from rows import Row, row
from samples import Samples

GOAL: Final = 1.05
CHOICES: Final = ("pass_kv", "pass_q")
SERIES: Final = ("auto", *CHOICES, "all_gather")
DIFFERENT: Final = 1.05  # times as long, where a choice matters
SPEED_GUESS: Final = 1e11  # flop/s, only to fill a sample


@dataclass(frozen=True)
class Point:
    """Milliseconds by strategy and of `auto`, which took `chosen`."""

    case: Case
    ms: dict[str, float]
    chosen: str

    @property
    def best_ms(self) -> float:
        return min(self.ms[how] for how in CHOICES)

    @property
    def ratio(self) -> float:
        return self.ms["auto"] / self.best_ms

    @property
    def choice_ratio(self) -> float:
        """What the choice costs, without the noise of a third series of samples."""
        return self.ms[self.chosen] / self.best_ms

    @property
    def differs(self) -> bool:
        return max(self.ms[how] for how in CHOICES) > DIFFERENT * self.best_ms


class Choice:
    """`facts`: what was measured for deciding. `curves`: milliseconds over percent of tokens that are new."""

    def __init__(self, ranks: Group, sizes: Sizes) -> None:
        self.ranks, self.sizes = ranks, sizes
        self.facts: dict[str, Any] = {}
        self.rows: list[Row] = []
        self.curves: list[Curve] = []

    def run(self) -> None:
        answers = self.ranks.ask("calibrate", over=CHOSEN)
        assert all(answer == answers[0] for answer in answers), "all ranks decide alike"
        self.facts["calibration"] = answers[0]
        self.grid()
        self.miss_rates()

    def measured(self, case: Case, rounds: int, hows: Sequence[str]) -> Samples:
        load([self.ranks], [case])
        times = max(1, ceil(self.sizes.sample_seconds * SPEED_GUESS / (2048 * case.pairs)))
        samples = Samples()
        sides = {how: partial(self.ranks.sample, times, "run", name=case.name, how=how, over=CHOSEN) for how in hows}
        interleave(Samples(), 1, sides)  # a round that only touches the memory
        interleave(samples, rounds, sides)
        return samples

    def grid(self) -> None:
        """The worst ratio of medians, `auto` over the better strategy."""
        points: list[Point] = []
        deciding: list[float] = []
        rounds = self.sizes.few_rounds + 2
        for cached, new in product(self.sizes.grid_cached, self.sizes.grid_new):
            case = Case(f"t{new}_p{cached}", new, cached)
            samples = self.measured(case, rounds, SERIES)
            [decision, *_] = self.ranks.ask("decide", name=case.name)
            deciding.append(decision["seconds"])
            points.append(Point(case, {how: samples.ms(how) for how in SERIES}, decision["strategy"]))
            self.ranks.ask("forget")
        worst = max(points, key=lambda point: point.ratio)
        differing = [point for point in points if point.differs]
        raw = {f"{point.case.name}_{how}_ms": ms for point in points for how, ms in point.ms.items()} | {
            "worst_new": float(worst.case.new),
            "worst_cached": float(worst.case.cached),
            "ratio_min": min(point.ratio for point in points),
            "ratio_max": worst.ratio,
            "worst_choice": max(point.choice_ratio for point in points),
            "points": float(len(points)),
            "points_where_they_differ": float(len(differing)),
            "right_where_they_differ": float(sum(point.choice_ratio == 1 for point in differing)),
            "deciding_us": 1e6 * median(deciding),
            "rounds": float(rounds),
        }
        self.rows.append(row("auto_worst", worst.ratio, GOAL, "lower", raw))

    def miss_rates(self) -> None:
        total, hows = self.sizes.miss_tokens, (*CHOICES, "auto")
        points: dict[str, list[tuple[float, float]]] = {how: [] for how in hows}
        for percent in self.sizes.miss_percents:
            new = max(1, round(total * percent / 100))
            samples = self.measured(Case(f"miss{percent}", new, total - new), max(1, self.sizes.few_rounds - 2), hows)
            for how in hows:
                points[how].append((percent, samples.ms(how)))
            self.ranks.ask("forget")
        self.curves = [Curve(how.replace("_", "-"), tuple(points[how])) for how in hows]
