"""Store: the one writer of state. Takes and frees slots, holds and releases copies, submits orders.

Every change of a placement goes through here, so that pools, ledger and records cannot disagree. It decides nothing:
who leaves and what is loaded is asked of it by room, loader, ingest and attach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .clock import Clock
from .errors import CorruptExtent, HoldfastError, StorageFailed
from .extent import Extent, ExtentId
from .notes import Notes
from .orders import (
    CloseShard,
    DropExtent,
    Effects,
    LoadShard,
    Order,
    Outcome,
    RetireSlab,
    SaveShard,
    Write,
)
from .parting import part
from .placing import place, stay
from .planner import Planner, Victim
from .residency import Event, Placement, State, Tier
from .slots import Slot, SlotClass
from .state import DDR, NVME, ExtentRecord, Shard, hbm_device
from .state import State as Records

Then = Callable[[Outcome], None]


class Store:
    """Mutators over the records. `changed` is called after anything that may have freed room."""

    def __init__(self, records: Records, planner: Planner, effects: Effects, clock: Clock) -> None:
        self.records = records
        self.planner = planner
        self.clock = clock
        self._effects = effects
        self.notes = Notes(effects)
        self._next_id = clock.wall_ns() // 1000  # nobody may take a number of an earlier daemon for one of ours
        self._then: dict[int, Then] = {}
        self._progress: dict[int, Callable[[int], None]] = {}
        self._loads: dict[str, set[int]] = {}  # orders that read into a group's HBM
        self._undropped: list[Placement] = []
        self._refused: set[ExtentId] = set()  # whose NVMe copy the device did not read at the last attempt

    # Orders ------------------------------------------------------------------------------------

    def new_id(self) -> int:
        """A number greater than any before, those of earlier daemons on this machine included."""
        self._next_id += 1
        return self._next_id

    def submit(self, order: Order, then: Then | None = None) -> None:
        """Hand an order to the effects; `then` hears how it ended, exactly once."""
        if isinstance(order, SaveShard):
            self.notes.flush()  # the index forgets what lay in its slots before a rank writes there
        if then is not None:
            order_id = getattr(order, "id", None)
            assert order_id is not None, "this order is never answered"
            self._then[order_id] = then
            if isinstance(order, LoadShard):
                self._loads.setdefault(order.group, set()).add(order_id)
        self._effects.submit(order)

    def watch(self, order_id: int, progress: Callable[[int], None]) -> None:
        """Hear of the layers that an order has brought so far."""
        self._progress[order_id] = progress

    def finished(self, order_id: int, outcome: Outcome) -> None:
        """An order ended. Late answers to cancelled orders are ignored."""
        self._progress.pop(order_id, None)
        then = self._then.pop(order_id, None)
        for ids in self._loads.values():
            ids.discard(order_id)
        if then is not None:
            then(outcome)

    def advanced(self, order_id: int, layers: int) -> None:
        """A read has brought its first `layers` layers."""
        progress = self._progress.get(order_id)
        if progress is not None:
            progress(layers)

    @property
    def orders_in_flight(self) -> int:
        """Orders whose end is awaited."""
        return len(self._then)

    # Placements --------------------------------------------------------------------------------

    def take(self, extent: Extent, tier: Tier) -> Placement | None:
        """A slot in DDR or on NVMe, FILLING, accounted; None when no slot is free, or its tenant may have no more."""
        pool = self.records.ddr if tier is Tier.DDR else self.records.nvme
        kind = SlotClass(extent.tenant if tier is Tier.DDR else "", extent.slot_bytes)
        slot = pool.allocate(kind) if self.planner.tenancy.may_take(extent, tier) else None
        if slot is None:
            return None
        if pool.must_retire(slot):
            self.submit(RetireSlab(slab=slot.slab))
        return self._placed(extent, tier, slot)

    def adopt_nvme(self, record: ExtentRecord, slot: Slot) -> None:
        """Restart: the catalog says that the extent lies in this slot."""
        self.records.nvme.claim(SlotClass("", record.extent.slot_bytes), slot)
        placement = self._placed(record.extent, Tier.NVME, slot)
        place(self.records, record, Tier.NVME, placement)
        placement.apply(Event.COMPLETE)
        record.cataloged = record.stored = True

    def adopt_ddr(self, record: ExtentRecord, slot: Slot) -> Placement:
        """Restart: an earlier daemon says that the extent lies in this slot. FILLING, until that is verified."""
        self.records.ddr.claim(SlotClass(record.extent.tenant, record.extent.slot_bytes), slot)
        placement = self._placed(record.extent, Tier.DDR, slot)
        place(self.records, record, Tier.DDR, placement)
        return placement

    def _placed(self, extent: Extent, tier: Tier, slot: Slot) -> Placement:
        device, size_bytes = DDR if tier is Tier.DDR else NVME, extent.slot_bytes
        return self._opened(
            Placement(
                extent=extent.id, tenant=extent.tenant, tier=tier, device=device, size_bytes=size_bytes, slot=slot
            )
        )

    def _opened(self, placement: Placement) -> Placement:
        self.records.ledger.came(placement.device, placement.size_bytes)
        self.records.usage.came(placement.tier, placement.tenant, placement.size_bytes)
        placement.came_ns = self.clock.monotonic_ns()
        placement.apply(Event.FILL)
        return placement

    def _released(self, placement: Placement) -> None:
        placement.apply(Event.RELEASE)
        self.records.ledger.left(placement.device, placement.size_bytes)
        self.records.usage.left(placement.tier, placement.tenant, placement.size_bytes)

    def filled(self, record: ExtentRecord, placement: Placement, seal: bytes) -> None:
        """The record's DDR copy is complete, with that seal."""
        placement.checksums = seal
        placement.apply(Event.COMPLETE)
        self.records.changes.note(placement.extent)
        self.notes.add_ddr(record)

    def hold(self, placement: Placement) -> Placement:
        """Use the bytes: they stay until `unhold`. A hit on a draining copy cancels the drain."""
        assert placement.state not in (State.LOST, State.GONE), placement
        if placement.state is State.DRAINING:
            stay(self.records, placement)
            self.records.ledger.counts["drains_cancelled"] += 1
        placement.holds += 1
        return placement

    def unhold(self, placement: Placement) -> None:
        """Stop using the bytes; a copy that was only waiting for that leaves now."""
        assert placement.holds > 0, placement
        placement.holds -= 1
        self.settle(placement)

    def unhold_all(self, placements: Iterable[Placement]) -> None:
        """Stop using these copies; those that are gone all the same are passed over."""
        extents = self.records.extents
        for placement in placements:
            if placement.state is State.GONE:
                continue
            assert placement.holds > 0, placement
            placement.holds -= 1
            if placement.state is State.RESIDENT:  # the rule, and quick: a document may have thousands
                record = extents.get(placement.extent)
                if record is not None and record.documents:
                    continue
            self.settle(placement)

    def settle(self, placement: Placement) -> None:
        """Free the slot of a copy that is lost, or unwanted and idle, once nobody holds it."""
        spare = self.records.spares.get(placement.extent)
        if spare is not None and placement.readable and self.records.extents[placement.extent].ddr is placement:
            del self.records.spares[placement.extent]
            self._drop_spare(spare)
        if placement.holds:
            return
        if placement.state is State.LOST or (placement.state is State.DRAINING and placement.tier is not Tier.HBM):
            self._gone(placement)
            return
        record = self.records.extents.get(placement.extent)
        if record is not None and not record.documents and placement.state is State.RESIDENT:
            if placement is record.nvme:
                self.drop_nvme(record)
            elif placement in record.placements():
                self.drop(placement)

    def offer(self, record: ExtentRecord, placement: Placement) -> bool:
        """Take a complete DDR copy over from an ingest, which held it; False where there is a good one already.

        Beside one that is still being filled, and may fail, it is kept as a spare.
        """
        taken = record.ddr is not None
        if record.ddr is not None and (record.ddr.readable or placement.extent in self.records.spares):
            return False
        placement.apply(Event.COMPLETE)
        placement.holds -= 1
        if taken:
            self.records.spares[placement.extent] = placement
        else:
            place(self.records, record, Tier.DDR, placement)
            self.notes.add_ddr(record)
        return True

    def drop(self, placement: Placement) -> None:
        """A complete DDR copy leaves at once; nobody may hold it. NVMe copies leave by `drop_nvme`."""
        assert placement.tier is Tier.DDR
        if placement.state is State.RESIDENT:
            placement.apply(Event.DRAIN)
        self._gone(placement)

    def _drop_spare(self, spare: Placement) -> None:
        """It leaves, when an early write out of it has ended."""
        spare.apply(Event.DRAIN)
        self.records.leaving.append(spare)
        self.settle(spare)

    def fail(self, placement: Placement) -> None:
        """The bytes cannot be trusted, or their device is gone; the slot is freed when nobody holds it."""
        placement.apply(Event.FAIL)
        self._detach(placement)
        self.settle(placement)

    def drop_nvme(self, record: ExtentRecord) -> None:
        """The NVMe copy leaves; nobody may hold it. Its slot is reusable only after the catalog has forgotten it."""
        placement = record.nvme
        assert placement is not None
        placement.apply(Event.DRAIN)
        self._uncatalog(record, placement)

    def fail_nvme(self, record: ExtentRecord, placement: Placement) -> None:
        """The NVMe bytes, or their catalog row, cannot be trusted: never read again. What lies behind is kept."""
        if placement is record.nvme:
            placement.apply(Event.FAIL)
            self._uncatalog(record, placement)

    def distrust(self, record: ExtentRecord, placement: Placement, error: HoldfastError) -> None:
        """A read of the NVMe copy failed. A mismatch is quarantined at once; what the device refuses, at the 2nd time.

        A refusal may be of the moment, and giving up all that was asked for during an outage would lose good KV. But a
        copy that stays unreadable must make place for one that is computed again.
        """
        if isinstance(error, StorageFailed):
            self.records.ledger.counts["read_failures"] += 1
        if isinstance(error, CorruptExtent) or (isinstance(error, StorageFailed) and placement.extent in self._refused):
            self.records.ledger.counts["quarantined"] += 1
            self.verdict(self.planner.last_copy(record, placement), f"corrupt, {error.message}")
            self._refused.discard(placement.extent)
            self.fail_nvme(record, placement)
        elif isinstance(error, StorageFailed):
            self._refused.add(placement.extent)

    def trust(self, record: ExtentRecord) -> None:
        """A read of the NVMe copy went well."""
        self._refused.discard(record.extent.id)

    def _uncatalog(self, record: ExtentRecord, placement: Placement) -> None:
        placement.holds += 1  # until the commit
        record.cataloged = False
        self._detach(placement)
        self._drop_row(placement)

    def _drop_row(self, placement: Placement) -> None:
        write = Write(id=self.new_id(), records=(DropExtent(placement.extent),))

        def committed(outcome: Outcome) -> None:
            if outcome.error is None:
                self.unhold(placement)
                return
            # The row may still be there, so the slot is not reused before it is known to be gone.
            self.records.ledger.counts["catalog_failures"] += 1
            self._undropped.append(placement)

        self.submit(write, committed)

    def retry_drops(self) -> None:
        """Once more take copies out of the catalog where that failed; a newer copy's row has replaced theirs."""
        undropped, self._undropped = self._undropped, []
        for placement in undropped:
            record = self.records.extents.get(placement.extent)
            if record is None or record.nvme is None:
                self._drop_row(placement)
            elif record.cataloged:
                self.unhold(placement)
            else:
                self._undropped.append(placement)

    def _detach(self, placement: Placement) -> None:
        """No record names the copy any more, so that another may take its place while its slot is still in use."""
        record = self.records.extents.get(placement.extent)
        if record is None or not any(copy is placement for copy in record.placements()):
            return
        if placement is record.ddr:
            place(self.records, record, Tier.DDR, self.records.spares.pop(placement.extent, None))
            self.notes.add_ddr(record)
        else:
            place(self.records, record, Tier.NVME, None)
        self.records.leaving.append(placement)
        self.reap(record)

    def _gone(self, placement: Placement) -> None:
        self._released(placement)
        if placement.slot is not None:
            pool = self.records.ddr if placement.tier is Tier.DDR else self.records.nvme
            pool.free(placement.slot)
        if self.records.draining.get(placement.extent) is placement:
            del self.records.draining[placement.extent]
        for copies in (*self.records.private.values(), self.records.leaving):
            if copies:
                copies[:] = [copy for copy in copies if copy is not placement]
        record = self.records.extents.get(placement.extent)
        if record is not None and record.ddr is placement:
            place(self.records, record, Tier.DDR, None)
            self.notes.add_ddr(record)
            self.reap(record)

    def reap(self, record: ExtentRecord) -> None:
        """Drop what no document needs any more; forget the record when its last copy is gone."""
        if record.documents:
            return
        spare = self.records.spares.pop(record.extent.id, None)
        if spare is not None:
            self._drop_spare(spare)
        for placement in record.placements():
            self.settle(placement)
        if not record.placements():
            if self.records.extents.pop(record.extent.id, None) is not None:
                self.records.ghosts.add(record.extent.id)
            self._refused.discard(record.extent.id)
            self.records.fronts.discard(record.extent)

    # Shards ------------------------------------------------------------------------------------

    def open_shard(self, shard: Shard, rows: list[tuple[int, int]]) -> None:
        """Give a shard its planned rows, and a FILLING copy to each extent that has none."""
        group = self.records.groups[shard.group]
        for rank, (start, count) in enumerate(rows):
            old_start, old_count = shard.rows[rank]
            pool = group.pools[rank]
            if old_count and old_start == start:
                taken = pool.claim(start + old_count, count - old_count)
            else:
                assert not old_count, "a shard that moves is closed first"
                taken = pool.claim(start, count)
            assert taken, "rows were planned on this very state"
        shard.rows = rows
        group.shards[shard.key] = shard
        known = self.records.documents.get(shard.document)
        is_old = known is not None and shard.layout.token_count < known.document.token_count
        if is_old and shard not in self.records.retired:
            self.records.retired.append(shard)  # the document grew while an attach waited for these rows
        for extent, (start, stop) in shard.spans.items():
            if extent in shard.copies:
                continue
            before, upto = sum(shard.lengths(start)), sum(shard.lengths(stop))
            shard.copies[extent] = self._opened(
                Placement(
                    extent=extent,
                    tenant=shard.document.tenant,
                    tier=Tier.HBM,
                    device=hbm_device(group.name),
                    size_bytes=(upto - before) * group.row_bytes,
                    shard=shard.id,
                )
            )
            self.records.rankings[hbm_device(group.name)].came(extent, shard.copies[extent].size_bytes)

    def shrink_shard(self, shard: Shard, extent: str) -> None:
        """The shard's last copy leaves; nobody may hold it."""
        assert next(reversed(shard.copies)) == extent, "shards shrink from the tail"
        placement = shard.copies.pop(extent)
        self._left_shard(shard, placement)
        group = self.records.groups[shard.group]
        stop = shard.spans[extent][0]
        for rank, length in enumerate(shard.lengths(stop)):
            start, count = shard.rows[rank]
            group.pools[rank].free(start + length, count - length)
            shard.rows[rank] = (start, length)
        if not shard.copies:
            del group.shards[shard.key]
            self.submit(CloseShard(group=group.name, shard=shard.id))

    def close_shard(self, shard: Shard, reason: str = "") -> None:
        """All of the shard's copies leave; nobody may hold any."""
        group = self.records.groups[shard.group]
        for placement in shard.copies.values():
            self._left_shard(shard, placement)
        shard.copies.clear()
        for rank, (start, count) in enumerate(shard.rows):
            group.pools[rank].free(start, count)
            shard.rows[rank] = (0, 0)
        group.shards.pop(shard.key, None)
        self.submit(CloseShard(group=group.name, shard=shard.id, reason=reason))

    def _left_shard(self, shard: Shard, placement: Placement) -> None:
        assert placement.holds == 0, f"shard {shard.id} is in use"
        self.records.changes.note(placement.extent)
        self._faded(shard)
        if placement.state is State.RESIDENT:
            placement.apply(Event.DRAIN)
        elif placement.state is State.FILLING:
            placement.apply(Event.FAIL)
        self._released(placement)
        self.records.rankings[placement.device].left(placement.extent)

    def fail_group(self, name: str, error: HoldfastError) -> None:
        """A rank died: the group's HBM is gone, and loads into it end. Saves out of it end when the effects say so.

        Until then the other ranks may still write to the slots.
        """
        group = self.records.groups[name]
        for order_id in sorted(self._loads.pop(name, set())):
            self.finished(order_id, Outcome(error=error))
        for shard in group.shards.values():
            for placement in shard.copies.values():
                placement.holds = 0  # the process that used the bytes is gone with them
                if placement.state is not State.LOST:
                    placement.apply(Event.FAIL)
                self._released(placement)
                self.records.changes.note(placement.extent)
                self.records.rankings[placement.device].left(placement.extent)  # one memory serves all rankings
            shard.copies.clear()
            self._faded(shard)
        group.shards.clear()
        del self.records.groups[name]
        self.records.rankings.pop(hbm_device(name), None)

    def _faded(self, shard: Shard) -> None:
        if shard.document.namespace is not None and shard.document in self.records.documents:
            self.records.faded.setdefault(shard.document, None)

    # Verdicts ----------------------------------------------------------------------------------

    def verdict(self, victim: Victim, reason: str, wanted_by: str = "") -> None:
        """Write down why a copy leaves, and for which document."""
        part(self.records, victim, reason, self.planner.policy.name, self.clock, wanted_by)
