"""GDSF: what is used often, dear to get back and small stays; the rest sinks as others leave.

    score = floor + uses x restore_ns / size_bytes

Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HPL-98-69R1, 1998. The
floor is what the cache's floor was when the unit was last used; the cache's floor is the highest score that has left.
Uses count while it is here. Cost multiplies uses instead of a probability of reuse: on traces of agents that loses
to LRU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .candidate import Candidate
from .ghosts import Bounded
from .per_cache import PerCache
from .use import UnitId, Use

if TYPE_CHECKING:
    from .policy import Worth

AWAITED_MAX: Final = 65_536  # used and not here: they may be about to come


@dataclass(slots=True)
class _Unit:
    size_bytes: int
    restore_ns: float | None  # None where no use has said where in a chain it is
    uses: int
    floor: float


class Gdsf(PerCache["GdsfRanking"]):
    """Floors and counts are each cache's own."""

    name: Final = "gdsf"

    def ranking(self, capacity_bytes: int, worth: Worth) -> GdsfRanking:
        """See Policy.ranking."""
        return self.follow(GdsfRanking(worth))


class GdsfRanking:
    """A unit's `restore_ns` is what `worth` gains by it: scores need one that does not change while it is here."""

    def __init__(self, worth: Worth) -> None:
        self._worth = worth
        self._floor = 0.0
        self._units: dict[UnitId, _Unit] = {}
        self._awaited: Bounded[float] = Bounded(AWAITED_MAX)  # what they will save

    def used(self, use: Use) -> None:
        """One use more for each that is here, from today's floor."""
        for index, unit in enumerate(use.chain):
            entry = self._units.get(unit)
            if entry is None:
                self._awaited.put(unit, self._restore_ns(use, index))
                continue
            entry.uses += 1
            entry.floor = self._floor
            if entry.restore_ns is None:
                entry.restore_ns = self._restore_ns(use, index)

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """No use more, but from today's floor."""
        for entry in self._known(chain):
            entry.floor = self._floor

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """Used once, just now."""
        assert unit not in self._units, f"{unit} came twice"
        self._units[unit] = _Unit(size_bytes, self._awaited.pop(unit), 1, self._floor)

    def left(self, unit: UnitId) -> None:
        """The floor rises to its score, whoever sent it away."""
        entry = self._units.pop(unit)
        if entry.restore_ns is not None:
            self._floor = max(self._floor, _score(entry, entry.restore_ns))

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """Nanoseconds per byte, above a floor. What is not here counts as just come."""
        return [_score(*self._found(candidate)) for candidate in candidates]

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """The parts of the formula."""
        entry, restore_ns = self._found(candidate)
        return {
            "floor": entry.floor,
            "uses": float(entry.uses),
            "restore_ns": restore_ns,
            "size_bytes": float(entry.size_bytes),
            "score": _score(entry, restore_ns),
        }

    def _found(self, candidate: Candidate) -> tuple[_Unit, float]:
        entry = self._units.get(candidate.unit)
        if entry is None:
            entry = _Unit(candidate.size_bytes, self._awaited.get(candidate.unit), 1, self._floor)
        return entry, float(candidate.restore_ns) if entry.restore_ns is None else entry.restore_ns

    def _known(self, chain: Sequence[UnitId]) -> Iterator[_Unit]:
        return (self._units[unit] for unit in chain if unit in self._units)

    def _restore_ns(self, use: Use, index: int) -> float:
        """What having this unit, behind what precedes it, saves."""
        start = index * use.unit_tokens
        return self._worth(min(start + use.unit_tokens, use.token_count)) - self._worth(start)


def _score(entry: _Unit, restore_ns: float) -> float:
    return entry.floor + entry.uses * restore_ns / max(1, entry.size_bytes)
