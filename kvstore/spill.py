"""Spill: writes private DDR copies of open ingests to private slots on NVMe, so that their DDR slots are free again.

The catalog hears of these slots only when the ingest is complete, so a crash leaves them free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .errors import DeadlineExceeded, HoldfastError, NoCapacity, StorageFull
from .extent import Extent
from .ledger import Hop
from .orders import Outcome, Urgency, WriteOut
from .residency import Placement, Tier
from .room import Room
from .slots import SlotClass
from .store import Store
from .wear import count_wear


@dataclass(eq=False, slots=True, kw_only=True)
class Spilling:
    """One sealed copy that goes to NVMe. `done` hears of the new copy, which is held, or of what went wrong."""

    ingest: int
    extent: Extent
    source: Placement
    deadline_ns: int
    done: Callable[[Placement | HoldfastError], None]


class Spill:
    """Takes copies in order; each waits until NVMe has a slot that the catalog says is free."""

    def __init__(self, store: Store, room: Room) -> None:
        self.store = store
        self.room = room
        self._waiting: deque[Spilling] = deque()

    def request(self, spilling: Spilling) -> None:
        """Queue up; `pump` starts what can start."""
        self._waiting.append(spilling)

    def cancel(self, ingest: int) -> int:
        """Forget what an ingest still has in the queue, unheard; returns how many that were."""
        mine = [spilling for spilling in self._waiting if spilling.ingest == ingest]
        for spilling in mine:
            self._waiting.remove(spilling)
        return len(mine)

    def expire(self, now_ns: int) -> None:
        """Refuse who has waited past the deadline."""
        while (late := next((s for s in self._waiting if s.deadline_ns <= now_ns), None)) is not None:
            self._waiting.remove(late)
            late.done(DeadlineExceeded("no room on NVMe was freed before the deadline"))

    def pump(self) -> None:
        """Start what has a slot; make room for the first that has none."""
        while self._waiting:
            spilling = self._waiting[0]
            target = self.store.take(spilling.extent, Tier.NVME)
            if target is not None:
                self._waiting.popleft()
                self._write(spilling, target)
                continue
            victims = self.store.planner.make_nvme_room([spilling.extent])
            if victims is None:
                wanted = {SlotClass("", spilling.extent.slot_bytes): 1}
                if self.store.orders_in_flight and not self.room.judge.is_hopeless_on_nvme(wanted):
                    return  # what is being moved may leave when its move has ended
                self._waiting.popleft()
                holders = self.room.judge.holders(Tier.NVME)
                full = NoCapacity(f"NVMe is full of what has to stay: {', '.join(map(str, holders))}", holders)
                extent = spilling.extent
                over = self.store.planner.tenancy.refusal(Tier.NVME, extent.tenant, extent.slot_bytes)
                spilling.done(over or full)
                continue
            self.room.execute(victims, "pressure")
            return  # slots are free when the catalog says so

    def _write(self, spilling: Spilling, target: Placement) -> None:
        source = spilling.source
        assert source.slot is not None
        assert target.slot is not None
        target.holds += 1
        self.store.records.private[spilling.ingest].append(target)
        started_ns = self.store.clock.monotonic_ns()
        order = WriteOut(
            id=self.store.new_id(),
            source=source.slot,
            target=target.slot,
            size_bytes=target.size_bytes,
            urgency=Urgency.DEMOTE,
        )

        def written(outcome: Outcome) -> None:
            if isinstance(outcome.error, StorageFull):
                target.holds -= 1
                self.room.writes.withdraw(target)
                self._waiting.appendleft(spilling)  # once more, in the segments that exist
                return
            if outcome.error is not None:
                target.holds -= 1
                self.store.fail(target)
                self.store.records.ledger.counts["write_failures"] += 1
                spilling.done(outcome.error)
                return
            hop, now_ns = Hop(Tier.DDR, Tier.NVME), self.store.clock.monotonic_ns()
            self.store.records.ledger.moved(hop, target.size_bytes, outcome.busy_ns, started_ns, now_ns)
            self.store.planner.learn(hop, target.size_bytes, outcome.busy_ns)
            count_wear(self.store.records, spilling.extent, Urgency.WRITE_THROUGH)
            target.checksums = source.checksums
            spilling.done(target)

        self.store.submit(order, written)
