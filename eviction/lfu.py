"""LFU: what was used least often while it was here leaves first; of those, what was used longest ago.

The in-cache ("practical") LFU of Breslau et al., Web Caching and Zipf-like Distributions, INFOCOM 1999: counts end with
residence. It never forgets what stays, so a session that was busy once and is dead holds its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .candidate import Candidate
from .per_cache import PerCache
from .use import UnitId, Use

if TYPE_CHECKING:
    from .policy import Worth

RECENCY_BITS: Final = 34  # of the number of the last use; above it the uses. Exact up to 2^19 uses, as 53 bits are
RECENCY_MASK: Final = (1 << RECENCY_BITS) - 1


class Lfu(PerCache["LfuRanking"]):
    """Counts are each cache's own."""

    name: Final = "lfu"

    def ranking(self, capacity_bytes: int, worth: Worth) -> LfuRanking:
        """See Policy.ranking."""
        return self.follow(LfuRanking())


class LfuRanking:
    """Knows what is resident, and nothing else."""

    def __init__(self) -> None:
        self._now = 0  # the number of the last use
        self._marks: dict[UnitId, int] = {}  # uses and recency in one number, which is the score

    def used(self, use: Use) -> None:
        """One use more for each that is here."""
        self._now += 1
        marks, now = self._marks, self._now
        for unit in use.chain:
            if unit in marks:
                marks[unit] = ((marks[unit] >> RECENCY_BITS) + 1) << RECENCY_BITS | now

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """No use more, but as recent as one."""
        self._now += 1
        for unit in chain:
            if unit in self._marks:
                self._marks[unit] = self._marks[unit] & ~RECENCY_MASK | self._now

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """Used once, just now."""
        assert unit not in self._marks, f"{unit} came twice"
        self._marks[unit] = self._new()

    def left(self, unit: UnitId) -> None:
        """Its count is forgotten."""
        del self._marks[unit]

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """Uses first, then the number of the last one. What is not here counts as just come."""
        marks, new = self._marks, self._new()
        return [float(marks.get(candidate.unit, new)) for candidate in candidates]

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """`uses_since` is how many uses of other chains came after its last one."""
        mark = self._marks.get(candidate.unit, self._new())
        return {
            "uses": float(mark >> RECENCY_BITS),
            "uses_since": float(self._now - (mark & RECENCY_MASK)),
            "score": float(mark),
        }

    def _new(self) -> int:
        return 1 << RECENCY_BITS | self._now
