"""LRU: what was used longest ago leaves first. The order everybody knows, and the baseline."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from .candidate import Candidate
from .use import UnitId, Use

AWAITED_MAX: Final = 65_536  # used and not resident: they may be about to come


class _Last(NamedTuple):
    """When something was used last: the number of that use, and its time where it is known.

    Uses are numbered, because the times of two may be equal. All units of one use share one of these.
    """

    number: int
    now_ns: int | None


class Lru:
    """Knows the order of last uses of what is resident somewhere, or was used lately."""

    name: Final = "lru"

    def __init__(self) -> None:
        self._newest = 0
        self._oldest = 0
        self._resident: dict[UnitId, _Last] = {}
        self._caches: dict[UnitId, int] = {}  # how many hold it, where that is more than one
        self._awaited: OrderedDict[UnitId, _Last] = OrderedDict()  # the one used longest ago first

    def used(self, use: Use) -> None:
        """The whole chain was used at once, so its units leave by their place in it alone."""
        self._date(use.chain, use.now_ns)

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """As a use: age counts from here."""
        self._date(chain, now_ns)

    def _date(self, chain: Sequence[UnitId], now_ns: int) -> None:
        self._newest += 1
        last = _Last(self._newest, now_ns)
        for unit in chain:
            if unit in self._resident:
                self._resident[unit] = last
            else:
                self._awaited[unit] = last
                self._awaited.move_to_end(unit)
        while len(self._awaited) > AWAITED_MAX:
            self._awaited.popitem(last=False)

    def ranking(self, capacity_bytes: int, worth: Callable[[int], float]) -> LruRanking:
        """All caches share one memory."""
        return LruRanking(self)

    def came(self, unit: UnitId) -> None:
        """It is in one more cache. What no use has named counts as used before everything else."""
        if unit in self._resident:
            self._caches[unit] = self._caches.get(unit, 1) + 1
            return
        last = self._awaited.pop(unit, None)
        if last is None:
            self._oldest -= 1
            last = _Last(self._oldest, None)
        self._resident[unit] = last

    def left(self, unit: UnitId) -> None:
        """It is in one cache less."""
        caches = self._caches.pop(unit, 1)
        if caches == 1:
            del self._resident[unit]
        elif caches > 2:
            self._caches[unit] = caches - 1

    def last(self, unit: UnitId) -> tuple[int, int | None]:
        """Number and time of its last use; older than everything where nothing is known."""
        return self._resident.get(unit) or self._awaited.get(unit) or _Last(self._oldest - 1, None)


class LruRanking:
    """One cache's view of that order."""

    def __init__(self, policy: Lru) -> None:
        self._policy = policy

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """See Lru.came."""
        self._policy.came(unit)

    def left(self, unit: UnitId) -> None:
        """See Lru.left."""
        self._policy.left(unit)

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """The number of the last use."""
        return [float(self._policy.last(candidate.unit)[0]) for candidate in candidates]

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """The score, and the age in seconds where it is known."""
        number, last_ns = self._policy.last(candidate.unit)
        age = {} if last_ns is None else {"age_seconds": max(0, now_ns - last_ns) / 1e9}
        return {**age, "score": float(number)}
