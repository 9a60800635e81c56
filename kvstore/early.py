"""Early: sealed extents of open ingests on their way to private NVMe slots, so that durability follows a commit sooner.

They keep their copies in DDR, and nobody waits for them: what has not begun when the document is published is written
through like any other, and what fails is given up until then. The catalog hears of the slots only when the document is
there, so a crash leaves them free.
"""

from __future__ import annotations

from collections import OrderedDict

from .extent import Extent, ExtentId
from .orders import Urgency
from .placing import place
from .residency import Placement, Tier
from .state import ExtentRecord
from .store import Store
from .writing import Item, Life


class EarlyWrites:
    """Who has which. Queue, bounds and the writing itself are those of Writes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.waiting: OrderedDict[tuple[int, ExtentId], Item] = OrderedDict()
        self._items: dict[int, dict[ExtentId, Item]] = {}  # by ingest

    def queue(self, ingest: int, extent: Extent, source: Placement) -> None:
        """Let it wait for its turn, held."""
        self.store.hold(source)
        record = ExtentRecord(extent=extent)
        item = Item(record=record, source=source, urgency=Urgency.WRITE_THROUGH, life=Life.QUEUED, ingest=ingest)
        self.waiting[ingest, extent.id] = item
        self._items.setdefault(ingest, {})[extent.id] = item

    def begin(self, item: Item, target: Placement) -> None:
        """It is being written there; the slot is the ingest's."""
        target.holds += 1
        self.store.records.private[self._key(item)[0]].append(target)
        item.target, item.life = target, Life.BEGUN

    def give_up(self, item: Item) -> None:
        """It will not be written early; a target is the caller's to free."""
        ingest, extent = self._key(item)
        del self._items[ingest][extent]
        self._take_out(ingest, item.target)

    def publish(self, item: Item, record: ExtentRecord) -> None:
        """Its target becomes the record's, which the ingest no longer holds."""
        ingest, extent = self._key(item)
        assert item.target is not None
        del self._items[ingest][extent]
        self._take_out(ingest, item.target)
        item.target.holds -= 1
        item.record = record
        place(self.store.records, record, Tier.NVME, item.target)

    def end(self, ingest: int) -> list[Item]:
        """Forget all that is left of an ingest, whose private copies go; returns what still waited for its turn."""
        left = list(self._items.pop(ingest, {}).values())
        waited = [item for item in left if item.life is Life.QUEUED]
        for item in waited:
            del self.waiting[self._key(item)]
        for item in left:
            item.life = Life.ENDED
        return waited

    def items(self, ingest: int) -> list[Item]:
        """Those of an ingest that wait, are under way, or have landed."""
        return list(self._items.get(ingest, {}).values())

    def queued_bytes(self, ingest: int) -> int:
        """What of an ingest is waiting or under way."""
        return sum(item.size_bytes for item in self.items(ingest) if item.life is not Life.LANDED)

    def _take_out(self, ingest: int, target: Placement | None) -> None:
        private = self.store.records.private[ingest]
        private[:] = [copy for copy in private if copy is not target]

    def _key(self, item: Item) -> tuple[int, ExtentId]:
        assert item.ingest is not None
        return item.ingest, item.extent.id
