"""Samples of a benchmark: seconds by name, and the rows that pairs of them make."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

from bare import timed
from rows import Row, ratio_row

T = TypeVar("T")


class Samples:
    """Seconds by name, in the order of the rounds."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        self.times.setdefault(name, []).append(seconds)

    def timed(self, name: str, work: Callable[[], T]) -> T:
        seconds, result = timed(work)
        self.add(name, seconds)
        return result

    def timed_cpu(self, name: str, work: Callable[[], object]) -> None:
        """CPU time too, of all threads of this process."""
        cpu = time.process_time()
        self.timed(name, work)
        self.add(f"{name}_cpu", time.process_time() - cpu)

    def forget(self) -> None:
        """A round that only touched the memory does not count."""
        self.times.clear()

    def ms(self, name: str) -> float:
        return 1e3 * statistics.median(self.times[name])

    def ratio(self, name: str, goal: float, ours: str, bare: str, *beside: str) -> Row:
        """See rows.ratio_row."""
        made = ratio_row(name, goal, self.times, ours, bare, *beside)
        made.raw["rounds"] = made.raw.pop("samples")
        return made

    def relation(self, above: str, below: str) -> float:
        """Median over rounds of one time over another."""
        pairs = zip(self.times[above], self.times[below], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def spread(self, name: str) -> float:
        """(slowest - fastest) / median: a quiet machine shows a few percent."""
        samples = self.times[name]
        return (max(samples) - min(samples)) / statistics.median(samples)
