"""ARC: a list of what was used once and one of what was used again share a cache, and hits on ghosts move the border.

Megiddo and Modha, ARC: A Self-Tuning, Low Overhead Replacement Cache, FAST 2003; their T1 (`once`), T2 (`again`), the
ghosts B1 and B2, and the target p of T1, in bytes. The oldest of T1 beyond p leave first, then T2, then the rest of T1.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .ghosts import Ghosts
from .per_cache import PerCache
from .queued import CLASS, QueuedRanking
from .segment import Segment
from .use import UnitId

if TYPE_CHECKING:
    from .policy import Worth

OVER, AGAIN, ONCE = range(3)  # in this order they leave


class Arc(PerCache["ArcRanking"]):
    """Lists and target are each cache's own."""

    name: Final = "arc"

    def ranking(self, capacity_bytes: int, worth: Worth) -> ArcRanking:
        """See Policy.ranking."""
        return self.follow(ArcRanking(capacity_bytes))


class ArcRanking(QueuedRanking):
    """The lists of one cache."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__()
        self._capacity_bytes = capacity_bytes
        self._target_bytes = 0.0
        self._once = Segment(0.0)
        self._again: OrderedDict[UnitId, None] = OrderedDict()
        self._once_ghosts = Ghosts(capacity_bytes)
        self._again_ghosts = Ghosts(2 * capacity_bytes)
        self._places: dict[UnitId, int] = {}
        self._outdone: set[UnitId] = set()  # new ones that the rest of their chain would push out

    def _enter(self, unit: UnitId, size_bytes: int) -> None:
        self._places[unit] = self._next_place()
        if self._once_ghosts.discard(unit) or self._again_ghosts.discard(unit):
            self._again[unit] = None
        else:
            self._once.push(unit, size_bytes)
        self._once_ghosts.trim(max(0, self._capacity_bytes - self._once.size_bytes))
        known_bytes = self._bytes + self._once_ghosts.size_bytes
        self._again_ghosts.trim(max(0, 2 * self._capacity_bytes - known_bytes))

    def _hit(self, unit: UnitId) -> None:
        if unit in self._again:
            self._again.move_to_end(unit)
        else:
            self._once.take(unit)
            self._again[unit] = None
        self._places[unit] = self._next_place()

    def _expect(self, missing: Sequence[UnitId]) -> None:
        coming: list[UnitId] = []
        has_again_ghost = False
        for unit in missing:
            if unit in self._once_ghosts:
                self._adapt(unit, self._once_ghosts, self._again_ghosts, 1)
            elif unit in self._again_ghosts:
                self._adapt(unit, self._again_ghosts, self._once_ghosts, -1)
                has_again_ghost = True
            else:
                coming.append(unit)
        # The paper asks before each insertion whether T1 is over p, and after a hit in B2 whether it has reached p.
        share_bytes = math.nextafter(self._target_bytes, -1.0) if has_again_ghost else self._target_bytes
        mean_bytes = self._mean_bytes()
        self._outdone = self._beyond(coming, self._target_bytes + mean_bytes)
        self._once.resize(share_bytes - mean_bytes * max(0, len(coming) - 1))

    def _adapt(self, unit: UnitId, found: Ghosts, other: Ghosts, sign: int) -> None:
        """The list whose ghost is wanted again should have been longer."""
        ghost_bytes = found.bytes_of(unit)
        step = sign * ghost_bytes * max(1.0, other.size_bytes / max(1, found.size_bytes))
        self._target_bytes = min(max(0.0, self._target_bytes + step), float(self._capacity_bytes))

    def _renew(self, unit: UnitId) -> None:
        if unit in self._again:
            self._again.move_to_end(unit)
        else:
            self._once.renew(unit)
        self._places[unit] = self._next_place()

    def _gone(self, unit: UnitId) -> None:
        size_bytes = self._sizes[unit]
        del self._places[unit]
        if unit in self._again:
            del self._again[unit]
            self._again_ghosts.put(unit, size_bytes)
        else:
            self._once.take(unit)
            self._once_ghosts.put(unit, size_bytes)

    def _order_class(self, unit: UnitId) -> int:
        if unit in self._places:
            return AGAIN if unit in self._again else OVER if unit in self._once.over else ONCE
        if unit in self._once_ghosts or unit in self._again_ghosts:
            return AGAIN
        return OVER if unit in self._outdone else ONCE

    def _score(self, unit: UnitId) -> int:
        return self._order_class(unit) * CLASS + self._places.get(unit, self._place + 1)

    def _parts(self, unit: UnitId) -> dict[str, float]:
        return {
            "used_again": float(self._order_class(unit) == AGAIN),
            "once_bytes": float(self._once.size_bytes),
            "target_bytes": self._target_bytes,
        }
