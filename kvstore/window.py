"""Window: the part of DDR that one document passes through on its way, when all of it at once would be too much."""

from __future__ import annotations

from collections.abc import Sequence

from .demand import Demand
from .errors import DocumentTooLarge
from .extent import Extent
from .loading import Loading
from .residency import Tier
from .room import Room
from .slots import slots_of
from .state import ExtentRecord
from .store import Store


class Window:
    """Says how many extents are under way at once, and lets those that have passed make place for others."""

    def __init__(self, store: Store, room: Room, size_bytes: int) -> None:
        self.store = store
        self.room = room
        self.size_bytes = size_bytes

    def most_bytes(self, tenant: str) -> int:
        """How much of DDR one document of that tenant passes through."""
        return min(self.size_bytes, self.store.planner.tenancy.most_bytes(Tier.DDR, tenant))

    def extents(self, extent: Extent) -> int:
        """How many extents of this one's size are inside at once: at least one."""
        return max(1, self.most_bytes(extent.tenant) // extent.slot_bytes)

    def refuse_too_large(self, loading: Loading) -> None:
        """Raises DocumentTooLarge for what is to be in DDR all at once and never could."""
        extents = [record.extent for record in loading.records]
        if not self.store.records.ddr.could_hold(slots_of(extents)):
            size_bytes = sum(extent.slot_bytes for extent in extents)
            raise DocumentTooLarge(
                f"{loading.document}: {size_bytes} B do not fit into DDR of "
                f"{self.store.records.ddr.capacity_bytes} B at once; attach ranges of its tokens (Store.windows), "
                "or attach it to a group"
            )

    def outside(self, loading: Loading, lacking: Sequence[ExtentRecord]) -> int:
        """How many of these extents, from the front, wait until others have passed. Without a group none does.

        A group holds one layer group, so its extents are of one size.
        """
        if loading.group is None or not lacking:
            return 0
        return max(0, len(lacking) - self.extents(lacking[0].extent))

    def slide(self, loading: Loading, record: ExtentRecord) -> bool:
        """Whether there is a slot for it: a free one that nobody waits for, or that of an extent which has passed."""
        demand = Demand(slots=slots_of([record.extent]))
        planner = self.store.planner
        if not self.room.waiting and planner.fits(demand):
            return True
        while loading.passed:
            if self.give_way(loading.passed.popleft()) and planner.fits(demand):
                return True
        return False

    def give_way(self, record: ExtentRecord) -> bool:
        """Drop a DDR copy that nobody uses and NVMe has too; False where that is not so."""
        copy = record.ddr
        below = record.nvme is not None and record.nvme.readable
        if copy is None or not copy.movable or not below or not self.store.records.may_leave(record, copy):
            return False
        self.store.drop(copy)
        return True
