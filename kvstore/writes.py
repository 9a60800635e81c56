"""Writes: what goes from DDR to NVMe, when, and what becomes of it when the device cannot.

Demotions go before write-through, and that before early writes. What is in flight is bounded in bytes, and so is the
backlog of write-through: a document that would exceed it stays in memory for now, or its commit waits (`when_behind`).
A segment for which the device has no room is withdrawn for a while: that is an eviction.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .costs import NS_PER_SECOND
from .document import Document, DocumentId, WritePolicy
from .early import EarlyWrites
from .errors import DeadlineExceeded, HoldfastError, StorageFull
from .extent import Extent, ExtentId
from .growth import cataloged
from .ledger import Hop
from .making import make_place
from .orders import Outcome, PutDocument, PutExtent, PutSpec, PutWear, Record, Urgency, Write, WriteOut
from .placing import place, stay
from .residency import Event, Placement, State, Tier
from .reuse import Decision, Stake, decide, write_price_ns
from .slots import SlotClass
from .state import DocumentRecord, ExtentRecord
from .store import Store
from .wear import count_wear
from .writing import Item, Life, Turn

QUEUED: Final = (Urgency.DEMOTE, Urgency.WRITE_THROUGH, Urgency.RELIEF)
IN_FLIGHT_BYTES: Final = 512 << 20  # several syncs deep, so that none holds up the next; demotions go first
RETRY_NS: Final = 60 * NS_PER_SECOND  # how long a device that is full or broken is left alone


class Writes:
    """Queues writes and carries them through the catalog. `limit_bytes` bounds the backlog of write-through."""

    def __init__(self, store: Store, limit_bytes: int, when_behind: str) -> None:
        self.store = store
        self.state = store.records
        self.comebacks = store.planner.comebacks
        self.limit_bytes = limit_bytes
        self.when_behind = when_behind
        self.backlog_bytes = 0  # of write-through, queued and in flight
        self._queues: dict[Urgency, OrderedDict[ExtentId, Item]] = {urgency: OrderedDict() for urgency in QUEUED}
        self.early = EarlyWrites(store)
        self._in_flight: set[Item] = set()
        self._in_flight_bytes = 0
        self._turns: list[tuple[Turn, Decision]] = []  # the oldest first
        self._behind: dict[DocumentId, None] = {}  # what is to be written through and waits for room, oldest first
        self._unsaid: set[DocumentId] = set()  # whose rows the catalog refused
        self._retry_ns = 0  # until then nothing that is behind is tried
        self._offer_ns: int | None = None  # when withdrawn segments are tried again

    @property
    def queued(self) -> int:
        """Extents that wait for, or are on, their way to NVMe."""
        return sum(map(len, self._in_order())) + len(self._in_flight)

    # Documents ---------------------------------------------------------------------------------

    def decide(self, document: Document, extents: Iterable[Extent]) -> Decision:
        """The policy that its owner named; for AUTO what pays, by what the daemon has learned."""
        if document.write_policy is not WritePolicy.AUTO:
            return Decision(document.write_policy, "named by its owner")
        rate = self.comebacks.rate(document.id.family, self.store.clock.monotonic_ns())
        return decide([self._stake(extent) for extent in extents if not self._stored(extent)], rate)

    def _stored(self, extent: Extent) -> bool:
        record = self.state.extents.get(extent.id)
        return record is not None and record.nvme is not None

    def _stake(self, extent: Extent) -> Stake:
        planner, record = self.store.planner, ExtentRecord(extent=extent)
        link = planner.links[Hop(Tier.DDR, Tier.NVME)]
        return Stake(
            known=extent.id in self.state.extents or extent.id in self.state.ghosts,
            saved_ns=planner.recompute_ns(record) - planner.reload_ns(record, Tier.NVME, Tier.DDR),
            price_ns=write_price_ns(extent.slot_bytes, link),
        )

    def committed(self, owner: DocumentRecord, decision: Decision) -> None:
        """A document is visible: write it through if that was decided, now or when the disk has caught up."""
        owner.decision = decision
        if self.state.extents[owner.document.extents[0]].extent.previous is None:  # else it is a part of another
            self.comebacks.committed(owner.document.id, self.store.clock.monotonic_ns())
        if decision.policy is WritePolicy.THROUGH:
            self._through(owner)
        self.make_durable(owner.document.id)

    def came_back(self, owner: DocumentRecord, how: str) -> None:
        """A document is used again: if that was not expected, it is from now on."""
        self.comebacks.returned(owner.document.id, self.store.clock.monotonic_ns())
        if owner.document.write_policy is WritePolicy.AUTO and owner.decision is not None and not owner.writes_through:
            self.keep(owner, how)

    def keep(self, owner: DocumentRecord, how: str) -> None:
        """Write it through, whatever was decided."""
        owner.decision = Decision(WritePolicy.THROUGH, how)
        self._through(owner)

    def write_back(self) -> None:
        """Queue everything that should outlive the daemon and is not on NVMe yet, however much it is."""
        for owner in self.state.documents.values():
            if owner.document.write_policy is not WritePolicy.MEMORY:
                for record in self._unwritten(owner):
                    self._queue_through(record)

    def catch_up(self) -> None:
        """Queue, as the backlog takes it, what should be on NVMe and is not: a restart has found it in memory."""
        self._behind |= {d: None for d, o in self.state.documents.items() if o.writes_through and not o.durable}

    def write_again(self, record: ExtentRecord) -> None:
        """Queue an extent whose NVMe copy turned out to be none, if DDR has it."""
        if self._is_unwritten(record):
            self._queue_through(record)

    def make_durable(self, document: DocumentId) -> None:
        """Put the document into the catalog once all of its extents are there."""
        owner = self.state.documents.get(document)
        if owner is None or owner.volatile or owner.durable:
            return
        owner.told = True
        spec = self.state.specs[owner.document.fingerprint]  # with it, lest an earlier commit of it failed
        write = Write(id=self.store.new_id(), records=(PutSpec(spec), PutDocument(owner.document)))

        def committed(outcome: Outcome) -> None:
            owner.durable = outcome.error is None
            if owner.durable:
                cataloged(self.store, owner)
            else:
                self.state.ledger.counts["catalog_failures"] += 1
                self._unsaid.add(document)

        self.store.submit(write, committed)

    # The backlog -------------------------------------------------------------------------------

    def admit(self, turn: Turn, document: Document, extents: Iterable[Extent]) -> None:
        """Grant a commit's turn: at once, unless the disk is behind and commits are to wait for it."""
        decision = self.decide(document, extents)
        if decision.policy is WritePolicy.THROUGH:
            turn.size_bytes = sum(extent.slot_bytes for extent in extents if not self._stored(extent))
        if self.when_behind == "wait" and turn.size_bytes and (self._turns or not self._has_room_for(turn)):
            self._turns.append((turn, decision))
        else:
            turn.granted(decision)

    def cancel(self, turn: Turn) -> None:
        """Forget a turn that may still wait."""
        self._turns = [waiting for waiting in self._turns if waiting[0] is not turn]

    def _has_room(self, size_bytes: int) -> bool:
        """Whether so much more may be queued; anything may be when nothing is."""
        return not self.backlog_bytes or self.backlog_bytes + size_bytes <= self.limit_bytes

    def _has_room_for(self, turn: Turn) -> bool:
        """The same for a commit: what of it is queued already is no reason to wait for it."""
        others_bytes = self.backlog_bytes - self.early.queued_bytes(turn.ingest)
        return not others_bytes or others_bytes + turn.size_bytes <= self.limit_bytes

    def _unwritten(self, owner: DocumentRecord) -> list[ExtentRecord]:
        """The document's extents that could be queued for NVMe and are not."""
        records = [self.state.extents[extent] for extent in owner.document.extents]
        return [record for record in records if self._is_unwritten(record)]

    def _is_unwritten(self, record: ExtentRecord) -> bool:
        is_here = record.nvme is None and record.ddr is not None and record.ddr.readable
        return is_here and not self._is_queued(record.extent.id)

    def _is_queued(self, extent: ExtentId) -> bool:
        return any(extent in queue for queue in self._queues.values())

    def _through(self, owner: DocumentRecord) -> None:
        """Write a document through, or leave it in memory for now if the disk is behind."""
        unwritten = self._unwritten(owner)
        if len(unwritten) < len(owner.volatile) or self._has_room(sum(r.extent.slot_bytes for r in unwritten)):
            self._feed(owner)
        else:
            self.state.ledger.counts["write_through_skipped"] += 1
            self._behind[owner.document.id] = None

    def _feed(self, owner: DocumentRecord) -> None:
        """Queue as much of a document as the backlog takes: one larger than the limit goes piece by piece."""
        for record in self._unwritten(owner):
            if not self._has_room(record.extent.slot_bytes):
                self._behind[owner.document.id] = None
                return
            self._queue_through(record)
        self._behind.pop(owner.document.id, None)

    def _refill(self) -> None:
        """When half of the backlog has drained: queue what is behind, the oldest documents first."""
        is_time = self.store.clock.monotonic_ns() >= self._retry_ns
        if not self._behind or not is_time or self.backlog_bytes > self.limit_bytes // 2:
            return
        while self._behind:
            document = next(iter(self._behind))
            owner = self.state.documents.get(document)
            if owner is not None and owner.writes_through:
                self._feed(owner)
                if document in self._behind:
                    return
            self._behind.pop(document, None)

    def tick(self) -> None:
        """Let time pass: turns that waited too long end, and a device or a catalog that refused is asked again."""
        now_ns = self.store.clock.monotonic_ns()
        for turn in [t for t, _ in self._turns if t.deadline_ns is not None and t.deadline_ns <= now_ns]:
            self.cancel(turn)
            turn.refused(DeadlineExceeded("the disk did not catch up before the deadline (nvme.when_behind = wait)"))
        unsaid, self._unsaid = self._unsaid, set()
        for document in sorted(unsaid):
            self.make_durable(document)
        if self._offer_ns is not None and self._offer_ns <= now_ns:
            self._offer_ns = None
            self.state.nvme.offer()

    # The queue ---------------------------------------------------------------------------------

    def demote(self, record: ExtentRecord, urgency: Urgency) -> None:
        """Write out a DDR copy that drains, for somebody who waits for its room (DEMOTE) or for nobody (RELIEF)."""
        self._queues[urgency][record.extent.id] = self._item(record, urgency)

    @property
    def relief(self) -> int:
        """Extents that wait for, or are on, their way to NVMe although nobody waits for their room."""
        return len(self._queues[Urgency.RELIEF]) + sum(item.urgency is Urgency.RELIEF for item in self._in_flight)

    def hasten(self) -> None:
        """Somebody waits for room by now: what drains for nobody is written at once."""
        for item in self._queues[Urgency.RELIEF].values():
            item.urgency = Urgency.DEMOTE
        self._queues[Urgency.DEMOTE] |= self._queues[Urgency.RELIEF]
        self._queues[Urgency.RELIEF].clear()

    def _queue_through(self, record: ExtentRecord) -> None:
        self.backlog_bytes += record.extent.slot_bytes
        self._queues[Urgency.WRITE_THROUGH][record.extent.id] = self._item(record, Urgency.WRITE_THROUGH)

    def _item(self, record: ExtentRecord, urgency: Urgency) -> Item:
        assert record.ddr is not None
        record.ddr.holds += 1  # not `hold`: a write does not cancel the drain that asks for it
        return Item(record=record, source=record.ddr, urgency=urgency, life=Life.PUBLISHED)

    # Before their document is there --------------------------------------------------------------

    def begin_early(self, ingest: int, extent: Extent, source: Placement) -> None:
        """Queue a sealed extent of an open ingest, if the backlog has room that nobody waits for."""
        if not self._turns and self._has_room(extent.slot_bytes):
            self.backlog_bytes += extent.slot_bytes
            self.early.queue(ingest, extent, source)

    def publish_early(self, ingest: int) -> None:
        """Its document is there: what was written early, or is being, becomes what is written through."""
        landed = []
        for item in self.early.items(ingest):
            record = self.state.extents[item.extent.id]
            is_queued = self._is_queued(record.extent.id)
            if item.target is None or record.ddr is not item.source or record.nvme is not None or is_queued:
                continue  # not begun, or another was first; see `end_early`
            self.early.publish(item, record)
            if item.life is Life.LANDED:
                self.backlog_bytes += item.size_bytes
                self.store.hold(item.source)
                self._take_off(item, item.target)
                record.stored = True
                landed.append((item, item.target))
            item.life = Life.PUBLISHED
        if landed:
            self._catalog(landed)

    def end_early(self, ingest: int) -> None:
        """The ingest has ended: what is left of it is not written, or not kept."""
        for item in self.early.end(ingest):
            self._let_go(item)

    def _landed_early(self, item: Item, target: Placement, error: HoldfastError | None) -> None:
        """One more is on NVMe, or will not be before its document is; or nobody wants it any more."""
        self._landed(item, target)
        if item.life is Life.ENDED:
            self.store.settle(target)
        elif error is None:
            item.life = Life.LANDED
        else:
            self.early.give_up(item)
            target.holds -= 1
            if isinstance(error, StorageFull):
                self.withdraw(target)
            else:
                self.state.ledger.counts["write_failures"] += 1
                self.store.fail(target)
        self._let_go(item)

    def pump(self) -> None:
        """Start the writes that may be in flight, and let in who waits for the backlog."""
        while self._turns and self._has_room_for(self._turns[0][0]):
            turn, decision = self._turns.pop(0)
            turn.granted(decision)
        self._refill()
        full: set[tuple[str, SlotClass]] = set()
        while self._in_flight_bytes < IN_FLIGHT_BYTES and (queue := next(filter(None, self._in_order()), None)):
            item = next(iter(queue.values()))
            record = item.record
            target = None
            is_wanted = item.life is Life.QUEUED or (record.nvme is None and bool(record.documents))
            if is_wanted and (item.extent.tenant, item.kind) not in full:
                target = self.store.take(record.extent, Tier.NVME)
                if target is None and make_place(self.store, item, self._in_order(), IN_FLIGHT_BYTES):
                    return  # slots are free when the catalog says so
            queue.popitem(last=False)
            if target is not None:
                self._write(item, target)
            elif is_wanted:
                full.add((item.extent.tenant, item.kind))
                self.state.ledger.counts["nvme_full"] += 1
                if item.life is Life.QUEUED:
                    self.early.give_up(item)
                    self._let_go(item)
                else:
                    self._failed(item, "NVMe, or its tenant's part of it, is full of what cannot leave")
            else:
                self._ended(item)

    def _in_order(self) -> tuple[OrderedDict[Any, Item], ...]:
        """What waits for a slot, the most urgent first."""
        return (*(self._queues[u] for u in QUEUED[:2]), self.early.waiting, self._queues[Urgency.RELIEF])

    def _take_off(self, item: Item, target: Placement) -> None:
        self._in_flight.add(item)
        self._in_flight_bytes += item.size_bytes
        target.holds += 1

    def _write(self, item: Item, target: Placement) -> None:
        assert item.source.slot is not None
        assert target.slot is not None
        self._take_off(item, target)
        if item.life is Life.QUEUED:
            self.early.begin(item, target)
        else:
            place(self.state, item.record, Tier.NVME, target)
        started_ns = self.store.clock.monotonic_ns()
        order = WriteOut(
            id=self.store.new_id(),
            source=item.source.slot,
            target=target.slot,
            size_bytes=target.size_bytes,
            urgency=item.urgency,
        )

        def written(outcome: Outcome) -> None:
            if outcome.error is None:
                hop, now_ns = Hop(Tier.DDR, Tier.NVME), self.store.clock.monotonic_ns()
                self.state.ledger.moved(hop, item.size_bytes, outcome.busy_ns, started_ns, now_ns)
                self.store.planner.learn(hop, item.size_bytes, outcome.busy_ns)
                count_wear(self.state, item.extent, item.urgency)
            if item.life is not Life.PUBLISHED:
                self._landed_early(item, target, outcome.error)
            elif outcome.error is None:
                self._catalog([(item, target)])
            elif isinstance(outcome.error, StorageFull):
                self._try_again(item, target)
            else:
                self._landed(item, target)
                self.store.fail(target)
                self._broken(item, outcome.error)

        self.store.submit(order, written)

    def _catalog(self, copies: Sequence[tuple[Item, Placement]]) -> None:
        """These copies are on NVMe: give them rows."""
        puts: list[Record] = []
        for item, target in copies:
            assert target.slot is not None
            puts.append(PutExtent(item.extent, item.source.checksums, target.slot))

        def committed(outcome: Outcome) -> None:
            for item, target in copies:
                self._cataloged(item, target, outcome.error)

        puts.append(PutWear(self.state.ledger.wear))
        self.store.submit(Write(id=self.store.new_id(), records=tuple(puts)), committed)

    def _cataloged(self, item: Item, target: Placement, error: HoldfastError | None) -> None:
        record = item.record
        self._landed(item, target)
        if error is not None:
            self.store.fail_nvme(record, target)  # the row may be there all the same
            self._broken(item, error)
            return
        record.cataloged = True
        target.apply(Event.COMPLETE)
        self.state.changes.note(record.extent.id)
        for owner in self.state.owners_of(record):
            owner.volatile.discard(record.extent.id)
            self.make_durable(owner.document.id)
        self._ended(item)
        self.store.settle(target)

    # Ends --------------------------------------------------------------------------------------

    def _landed(self, item: Item, target: Placement) -> None:
        self._in_flight.remove(item)
        self._in_flight_bytes -= item.size_bytes
        target.holds -= 1

    def _ended(self, item: Item) -> None:
        self._let_go(item)
        self.store.reap(item.record)

    def _let_go(self, item: Item) -> None:
        if item.urgency is Urgency.WRITE_THROUGH:
            self.backlog_bytes -= item.size_bytes
        self.store.unhold(item.source)

    def _try_again(self, item: Item, target: Placement) -> None:
        self._landed(item, target)
        self.withdraw(target)
        queue = self._queues[item.urgency]
        queue[item.record.extent.id] = item
        queue.move_to_end(item.record.extent.id, last=False)

    def withdraw(self, target: Placement) -> None:
        """The device has no room for the segment of this copy, which is lost: leave it alone for a while."""
        assert target.slot is not None
        self.state.nvme.withdraw(target.slot.slab)
        self.store.fail(target)
        self.state.ledger.counts["segments_withdrawn"] += 1
        self._offer_ns = self.store.clock.monotonic_ns() + RETRY_NS

    def _broken(self, item: Item, error: HoldfastError) -> None:
        self.state.ledger.counts["write_failures"] += 1
        self._failed(item, str(error))

    def _failed(self, item: Item, reason: str) -> None:
        """The extent stays memory-only for a while; one that had to leave DDR leaves all the same, as a verdict."""
        record, source = item.record, item.source
        is_wanted = item.urgency is Urgency.RELIEF or not self.state.may_leave(record, source)
        if source.state is State.DRAINING and is_wanted:
            stay(self.state, source)  # pinned meanwhile, or nobody waits for its room
        elif source.state is State.DRAINING and record.documents:
            victim = self.store.planner.last_copy(record, source)
            self.store.verdict(victim, f"not written out: {reason}")
        for owner in self.state.owners_of(record):
            if owner.writes_through:
                self._behind[owner.document.id] = None
        self._retry_ns = self.store.clock.monotonic_ns() + RETRY_NS
        self._ended(item)
