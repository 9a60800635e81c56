"""S3-FIFO: what is not used twice while it passes a small queue leaves; the rest has a second chance, and more.

Yang, Zhang, Qiu, Yue and Vigfusson, FIFO Queues are All You Need for Cache Eviction, SOSP 2023: a small queue of a
tenth of the cache, a main queue whose front goes to its back at the price of one use (of at most three), and ghosts of
the small queue, which come back into the main one.

Looking moves nothing, so a score says when the paper's evictions would come to a unit, and they are carried out when
it has left: what stood in front of it is promoted or sent to the back. One without a use that stood there had to stay,
as something follows it. It has been `passed`, and goes first from then on. Each that leaves passes at most one such,
so all of this costs O(1) for each use and each eviction.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .ghosts import Ghosts
from .per_cache import PerCache
from .queued import CLASS, QueuedRanking
from .segment import Segment
from .use import UnitId

if TYPE_CHECKING:
    from .policy import Worth

SMALL_SHARE: Final = 0.1
GHOST_SHARE: Final = 0.9
USES_MAX: Final = 3
USES_TO_MAIN: Final = 2
# In this order they leave. Main ones with n uses have the class MAIN + 2 n; promoted ones come behind those with none.
OVER, MAIN, PROMOTED, SMALL = 0, 1, 2, 2 * USES_MAX + 2


class S3Fifo(PerCache["S3FifoRanking"]):
    """Queues are each cache's own."""

    name: Final = "s3fifo"

    def ranking(self, capacity_bytes: int, worth: Worth) -> S3FifoRanking:
        """See Policy.ranking."""
        return self.follow(S3FifoRanking(capacity_bytes))


@dataclass(slots=True)
class _Unit:
    place: int
    uses: int = 0
    is_main: bool = False
    is_passed: bool = False


class S3FifoRanking(QueuedRanking):
    """The queues of one cache."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__()
        self._small_bytes = SMALL_SHARE * capacity_bytes
        self._small = Segment(self._small_bytes)  # but for those that were passed
        self._main: OrderedDict[UnitId, None] = OrderedDict()  # the same
        self._ghosts = Ghosts(GHOST_SHARE * capacity_bytes)
        self._units: dict[UnitId, _Unit] = {}
        self._outdone: set[UnitId] = set()  # new ones that the rest of their chain would push out

    def _enter(self, unit: UnitId, size_bytes: int) -> None:
        entry = self._units[unit] = _Unit(self._next_place(), is_main=self._ghosts.discard(unit))
        if entry.is_main:
            self._main[unit] = None
        else:
            self._small.push(unit, size_bytes)

    def _hit(self, unit: UnitId) -> None:
        entry = self._units[unit]
        entry.uses = min(USES_MAX, entry.uses + 1)
        if not entry.is_passed:
            return
        if entry.is_main:
            entry.uses -= 1  # which takes it to the back
            self._to_main(unit, entry)
        elif entry.uses >= USES_TO_MAIN:
            self._to_main(unit, entry)
            entry.uses = 0

    def _expect(self, missing: Sequence[UnitId]) -> None:
        coming = [unit for unit in missing if unit not in self._ghosts]
        mean_bytes = self._mean_bytes()
        share_bytes = max(self._small_bytes, mean_bytes)
        self._outdone = self._beyond(coming, share_bytes)
        # The paper asks before each insertion whether the small queue has reached its share, wherever that one goes.
        room_bytes = mean_bytes * max(len(coming), min(1, len(missing)))
        self._small.resize(share_bytes - room_bytes)

    def _renew(self, unit: UnitId) -> None:
        """A FIFO knows no age."""

    def _gone(self, unit: UnitId) -> None:
        entry = self._units[unit]
        size_bytes = self._sizes[unit]
        if entry.is_main:
            if not entry.is_passed:
                self._pass_main()
                self._main.pop(unit, None)
        else:
            if not entry.is_passed:
                self._small.take(unit)
                self._pass_small(entry.place)
            self._ghosts.put(unit, size_bytes)
        del self._units[unit]

    def _pass_small(self, place: int) -> None:
        """Up to this place promote, or past the first that cannot be."""
        while self._small.over:
            unit = next(iter(self._small.over))
            entry = self._units[unit]
            if entry.place > place:
                return
            self._small.take(unit)
            if entry.uses < USES_TO_MAIN:
                entry.is_passed = True
                return
            self._to_main(unit, entry)
            entry.uses = 0

    def _pass_main(self) -> None:
        """Send to the back, for a use each, until one is met without any: the one that leaves, or one that stays."""
        while True:
            unit = next(iter(self._main))
            entry = self._units[unit]
            if entry.uses:
                entry.uses -= 1
                self._to_main(unit, entry)
                continue
            del self._main[unit]
            entry.is_passed = True
            return

    def _to_main(self, unit: UnitId, entry: _Unit) -> None:
        """To its back."""
        entry.place, entry.is_main, entry.is_passed = self._next_place(), True, False
        self._main[unit] = None
        self._main.move_to_end(unit)

    def _score(self, unit: UnitId) -> int:
        entry = self._units.get(unit)
        if entry is None:
            order_class = MAIN if unit in self._ghosts else OVER if unit in self._outdone else SMALL
            return order_class * CLASS + self._place + 1
        if entry.is_main:
            return (MAIN + 2 * entry.uses) * CLASS + entry.place
        if not entry.is_passed and unit not in self._small.over:
            return SMALL * CLASS + entry.place
        return (PROMOTED if entry.uses >= USES_TO_MAIN else OVER) * CLASS + entry.place

    def _parts(self, unit: UnitId) -> dict[str, float]:
        entry = self._units.get(unit, _Unit(0))
        return {
            "uses": float(entry.uses),
            "in_main_queue": float(entry.is_main),
            "was_passed": float(entry.is_passed),
            "small_queue_bytes": float(self._small.size_bytes),
            "small_share_bytes": self._small_bytes,
        }
