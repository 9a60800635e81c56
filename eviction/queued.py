"""QueuedRanking: what rankings by queues have in common.

Their papers insert one block at a time, evict before each, and know no chains. Here a chain's missing units come
together, after room was made for all of them, and only leaves leave. So:

* The tail of a chain stands nearer to the exit than its front: units are taken in from the last to the first that came
  since the last event. They wait for the next one, so their order does not depend on who looks in between.
* Where a queue has a share, room for what is about to come is counted as taken. What of it goes beyond the share itself
  would be pushed out by the rest of its own chain: it may be chosen instead of a resident, and is then never brought.

With chains of one unit of one size, the order is that of the paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from .candidate import Candidate
from .use import UnitId, Use

CLASS: int = 1 << 48  # a score is a class of units times this, plus a place in the order within it


class QueuedRanking(ABC):
    """Brings events into order. Subclasses keep the queues, and say where a unit stands."""

    def __init__(self) -> None:
        self._arrived: dict[UnitId, int] = {}  # sizes of what came since the last event, in that order
        self._sizes: dict[UnitId, int] = {}  # of what is in the queues
        self._bytes = 0
        self._place = 0  # the last one that was given

    def used(self, use: Use) -> None:
        """See Policy.used: the front of the chain becomes the newest."""
        self._take_in()
        missing: list[UnitId] = []
        for unit in reversed(use.chain):
            if unit in self._sizes:
                self._hit(unit)
            else:
                missing.append(unit)
        missing.reverse()
        self._expect(missing)

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """See Policy.released."""
        self._take_in()
        for unit in reversed(chain):
            if unit in self._sizes:
                self._renew(unit)

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """See Ranking.came."""
        assert unit not in self._sizes, f"{unit} came twice"
        assert unit not in self._arrived, f"{unit} came twice"
        self._arrived[unit] = size_bytes

    def left(self, unit: UnitId) -> None:
        """See Ranking.left."""
        self._take_in()
        self._gone(unit)
        self._bytes -= self._sizes.pop(unit)

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """By class, and by place in it. What is not here counts as just come."""
        score = self._score
        return [float(score(candidate.unit)) for candidate in candidates]

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """`order_class` leaves before the next one; within it the lowest `place` does."""
        score = self._score(candidate.unit)
        order = {"order_class": float(score // CLASS), "place": float(score % CLASS)}
        return {**self._parts(candidate.unit), **order, "score": float(score)}

    def _next_place(self) -> int:
        self._place += 1
        return self._place

    def _take_in(self) -> None:
        if not self._arrived:
            return
        for unit, size_bytes in reversed(self._arrived.items()):
            self._sizes[unit] = size_bytes
            self._bytes += size_bytes
            self._enter(unit, size_bytes)
        self._arrived.clear()
        self._expect(())

    def _mean_bytes(self) -> float:
        """Of a resident: what one that is about to come is expected to take."""
        return self._bytes / len(self._sizes) if self._sizes else 0.0

    def _beyond(self, coming: Sequence[UnitId], share_bytes: float) -> set[UnitId]:
        """Those of a chain's missing units, front first, that do not fit a share beside the ones in front of them."""
        mean_bytes = self._mean_bytes()
        return set(coming[max(1, int(share_bytes // mean_bytes)) :]) if mean_bytes else set()

    @abstractmethod
    def _enter(self, unit: UnitId, size_bytes: int) -> None:
        """It is resident."""

    @abstractmethod
    def _hit(self, unit: UnitId) -> None:
        """It is resident and was used."""

    @abstractmethod
    def _expect(self, missing: Sequence[UnitId]) -> None:
        """The chain's other units, front first, may be about to come."""

    @abstractmethod
    def _renew(self, unit: UnitId) -> None:
        """It is resident and its user is done."""

    @abstractmethod
    def _gone(self, unit: UnitId) -> None:
        """It is not resident any more."""

    @abstractmethod
    def _score(self, unit: UnitId) -> int:
        """Class times CLASS plus place."""

    @abstractmethod
    def _parts(self, unit: UnitId) -> dict[str, float]:
        """What decided its class and place."""
