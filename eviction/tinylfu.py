"""W-TinyLFU: newcomers wait in a small window, and enter the main queues if they are used more than who would leave.

Einziger, Friedman and Manes, TinyLFU: A Highly Efficient Cache Admission Policy, ACM ToS 13(4), 2017: an LRU window of
a hundredth of the cache, a segmented LRU (probation, and four fifths protected) as the main cache, and a count-min
sketch of uses. The oldest of the window meets the oldest on probation. The less used one leaves, the window's at equal
use; a winner from the window goes on probation, and the next of the window meets the next on probation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final

from .per_cache import PerCache
from .queued import CLASS, QueuedRanking
from .segment import Segment
from .sketch import Sketch
from .use import UnitId, Use

if TYPE_CHECKING:
    from .policy import Worth

WINDOW_SHARE: Final = 0.01
PROTECTED_SHARE: Final = 0.8  # of the rest
LOST, PROBATION, PROTECTED, WINDOW = range(4)  # in this order they leave


class TinyLfu(PerCache["TinyLfuRanking"]):
    """Queues and sketch are each cache's own: a sketch is as wide as its cache has units."""

    name: Final = "tinylfu"

    def ranking(self, capacity_bytes: int, worth: Worth) -> TinyLfuRanking:
        """See Policy.ranking."""
        return self.follow(TinyLfuRanking(capacity_bytes))


class TinyLfuRanking(QueuedRanking):
    """The queues of one cache."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__()
        self._window_bytes = WINDOW_SHARE * capacity_bytes
        self._window = Segment(self._window_bytes)
        self._probation: OrderedDict[UnitId, None] = OrderedDict()
        self._protected = Segment(PROTECTED_SHARE * (capacity_bytes - self._window_bytes))
        self._places: dict[UnitId, int] = {}
        self._sketch = Sketch()
        self._challengers: list[UnitId] = []  # new ones that the rest of their chain would push out of the window
        self._lost: dict[UnitId, int] | None = None  # who leaves next, and its turn; None until asked for

    def used(self, use: Use) -> None:
        """See Policy.used. The sketch counts all uses, of what is here and of what is not."""
        for unit in use.chain:
            self._sketch.add(unit)
        super().used(use)

    def _enter(self, unit: UnitId, size_bytes: int) -> None:
        self._sketch.widen(len(self._sizes))
        self._places[unit] = self._next_place()
        self._window.push(unit, size_bytes)
        self._lost = None

    def _hit(self, unit: UnitId) -> None:
        if unit in self._protected:
            self._protected.renew(unit)
        elif unit in self._window:
            self._window.renew(unit)
        else:
            del self._probation[unit]
            self._protected.push(unit, self._sizes[unit])
            self._demote(self._protected)
        self._places[unit] = self._next_place()
        self._lost = None

    def _expect(self, missing: Sequence[UnitId]) -> None:
        mean_bytes = self._mean_bytes()
        share_bytes = max(self._window_bytes, mean_bytes)
        self._window.resize(share_bytes)
        self._demote(self._window)  # what came since, and was not turned away
        self._window.resize(share_bytes - mean_bytes * len(missing))
        outdone = self._beyond(missing, share_bytes)
        self._challengers = [unit for unit in reversed(missing) if unit in outdone]
        self._lost = None

    def _demote(self, segment: Segment) -> None:
        """What is over its share goes on probation."""
        while segment.over:
            unit = next(iter(segment.over))
            segment.take(unit)
            self._probation[unit] = None
            self._places[unit] = self._next_place()

    def _renew(self, unit: UnitId) -> None:
        for segment in (self._window, self._protected):
            if unit in segment:
                segment.renew(unit)
        if unit in self._probation:
            self._probation.move_to_end(unit)
        self._places[unit] = self._next_place()
        self._lost = None

    def _gone(self, unit: UnitId) -> None:
        if unit in self._probation:
            del self._probation[unit]
        else:
            (self._window if unit in self._window else self._protected).take(unit)
        del self._places[unit]
        self._lost = None

    def _losers(self) -> dict[UnitId, int]:
        """The window's and the chain's challengers against the oldest on probation, each pair in its turn."""
        if self._lost is None:
            self._lost = {}
            defenders = iter(self._probation)
            defender = next(defenders, None)
            for unit in chain(self._window.over, self._challengers):
                wins = defender is not None and self._sketch.count(unit) > self._sketch.count(defender)
                loser = defender if wins and defender is not None else unit
                self._lost[loser] = len(self._lost)
                if wins:
                    defender = next(defenders, None)
        return self._lost

    def _score(self, unit: UnitId) -> int:
        turn = self._losers().get(unit)
        if turn is not None:
            return LOST * CLASS + turn
        if unit not in self._places:
            return (PROBATION if unit in self._challengers else WINDOW) * CLASS + self._place + 1
        if unit in self._protected:
            return PROTECTED * CLASS + self._places[unit]
        # The window's winners go on probation, behind all that are.
        is_window = unit in self._window and unit not in self._window.over
        return (WINDOW if is_window else PROBATION) * CLASS + self._places[unit]

    def _parts(self, unit: UnitId) -> dict[str, float]:
        return {
            "uses": float(self._sketch.count(unit)),
            "in_window": float(unit in self._window),
            "is_protected": float(unit in self._protected),
            "lost_its_trial": float(unit in self._losers()),
        }
