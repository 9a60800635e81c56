"""Shared ranking: of a cache that may hold one unit several times, as the HBM of a group does.

Documents with one front have a shard each, and a copy of the front in each.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..eviction.candidate import Candidate
from ..eviction.policy import Ranking
from ..eviction.use import UnitId


class SharedRanking:
    """Tells the ranking of the first copy that comes and of the last one that leaves."""

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        self._copies: dict[UnitId, int] = {}

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """One more copy is there."""
        if unit not in self._copies:
            self._ranking.came(unit, size_bytes)
        self._copies[unit] = self._copies.get(unit, 0) + 1

    def left(self, unit: UnitId) -> None:
        """A copy is gone."""
        self._copies[unit] -= 1
        if not self._copies[unit]:
            del self._copies[unit]
            self._ranking.left(unit)

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """See Ranking."""
        return self._ranking.scores(candidates, now_ns)

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """See Ranking."""
        return self._ranking.explain(candidate, now_ns)
