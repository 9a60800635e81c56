"""MQ: one LRU queue for each power of two of uses; what is not used for a life time sinks to the next queue.

Zhou, Philbin and Li, The Multi-Queue Replacement Algorithm for Second Level Buffer Caches, USENIX 2001: eight queues,
and ghosts (Qout) of four caches that keep their uses. Time counts uses of units. The paper's life time is the distance
at which most reuses are seen; here it is LIFE_TIME times the number of residents.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .ghosts import Ghosts
from .per_cache import PerCache
from .queued import CLASS, QueuedRanking
from .use import UnitId, Use

if TYPE_CHECKING:
    from .policy import Worth

QUEUES: Final = 8
LIFE_TIME: Final = 4
GHOST_SHARE: Final = 4


class Mq(PerCache["MqRanking"]):
    """Queues are each cache's own."""

    name: Final = "mq"

    def ranking(self, capacity_bytes: int, worth: Worth) -> MqRanking:
        """See Policy.ranking."""
        return self.follow(MqRanking(capacity_bytes))


@dataclass(slots=True)
class _Unit:
    uses: int
    queue: int = 0
    place: int = 0
    expires: int = 0


class MqRanking(QueuedRanking):
    """The queues of one cache."""

    def __init__(self, capacity_bytes: int, life_time: int | None = None) -> None:
        super().__init__()
        self._life_time = life_time  # in uses of units; None: it follows the number of residents
        self._time = 0
        self._used_units = 0  # by the last use
        self._queues: list[OrderedDict[UnitId, None]] = [OrderedDict() for _ in range(QUEUES)]
        self._units: dict[UnitId, _Unit] = {}
        self._ghosts = Ghosts(GHOST_SHARE * capacity_bytes)

    def used(self, use: Use) -> None:
        """See Policy.used. What the time of the last use has outlived sinks first."""
        self._take_in()
        self._time += self._used_units
        self._sink()
        self._used_units = len(use.chain)
        super().used(use)

    def _sink(self) -> None:
        """At most one of a queue for each unit used, as in the paper."""
        for number, queue in enumerate(self._queues[1:]):
            for _ in range(min(len(queue), self._used_units)):
                unit = next(iter(queue))
                entry = self._units[unit]
                if entry.expires >= self._time:
                    break
                self._to_back(unit, entry, number)

    def _to_back(self, unit: UnitId, entry: _Unit, queue: int) -> None:
        if queue != entry.queue:
            del self._queues[entry.queue][unit]
            self._queues[queue][unit] = None
            entry.queue = queue
        else:
            self._queues[queue].move_to_end(unit)
        self._renew_life(entry)

    def _renew_life(self, entry: _Unit) -> None:
        life_time = LIFE_TIME * len(self._sizes) if self._life_time is None else self._life_time
        entry.place, entry.expires = self._next_place(), self._time + life_time

    def _enter(self, unit: UnitId, size_bytes: int) -> None:
        uses = self._ghosts.uses(unit) + 1
        self._ghosts.discard(unit)
        entry = self._units[unit] = _Unit(uses, _queue(uses))
        self._queues[entry.queue][unit] = None
        self._renew_life(entry)

    def _hit(self, unit: UnitId) -> None:
        entry = self._units[unit]
        entry.uses += 1
        self._to_back(unit, entry, _queue(entry.uses))

    def _expect(self, missing: Sequence[UnitId]) -> None:
        """No queue has a share."""

    def _renew(self, unit: UnitId) -> None:
        entry = self._units[unit]
        self._to_back(unit, entry, entry.queue)

    def _gone(self, unit: UnitId) -> None:
        entry = self._units.pop(unit)
        del self._queues[entry.queue][unit]
        self._ghosts.put(unit, self._sizes[unit], entry.uses)

    def _score(self, unit: UnitId) -> int:
        entry = self._units.get(unit)
        if entry is None:
            return _queue(self._ghosts.uses(unit) + 1) * CLASS + self._place + 1
        return entry.queue * CLASS + entry.place

    def _parts(self, unit: UnitId) -> dict[str, float]:
        entry = self._units.get(unit, _Unit(self._ghosts.uses(unit) + 1))
        return {"uses": float(entry.uses), "unit_uses_to_live": float(max(0, entry.expires - self._time))}


def _queue(uses: int) -> int:
    return min(QUEUES, uses.bit_length()) - 1
