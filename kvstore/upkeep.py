"""Upkeep: what operators ask for (evict, delete; see keeping for pins) and what a restart brings back.

Evictions and prefetches carry on after the command returns; `settle` looks which have ended.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from .claims import Pin
from .document import Document, DocumentId
from .errors import DeadlineExceeded, HoldfastError, InUse, InvalidRequest, NoCapacity
from .extent import Extent, named
from .holders import largest
from .ingest import Ingests
from .loader import Loader
from .orders import DropDocument, DropExtent, DropPin, Outcome, PutDocument, PutPin, Record, Write
from .planner import Victim
from .residency import Placement, State, Tier
from .sizes import format_size
from .slots import Slot, SlotClass
from .spec import KVSpec
from .state import DocumentRecord, ExtentRecord

NS: Final = 1_000_000_000
PREFETCH_DEADLINE_NS: Final = 300 * NS  # nobody waits for it, but no wait is without end
NOBODY: Final = 0  # the client number of the daemon itself


@dataclass(eq=False, slots=True, kw_only=True)
class Eviction:
    """Somebody waits until none of these copies is left; those in the middle of a move leave when it has ended.

    `leaving` are on their way out, `pending` are not: a hit may have called them back.
    """

    pending: list[tuple[Victim, Placement]]
    leaving: deque[tuple[Victim, Placement]] = field(default_factory=deque)
    done: Callable[[HoldfastError | None], None]
    deadline_ns: int


class Upkeep:
    """Evictions, deletions, what the catalog is told of a document, restart."""

    def __init__(self, loader: Loader, ingests: Ingests) -> None:
        self.loader = loader
        self.ingests = ingests
        self.store = loader.store
        self.room = loader.room
        self.state = loader.store.records
        self._evictions: list[Eviction] = []
        self._unsaid: set[DocumentId] = set()  # of which the catalog may still tell something old
        self._telling: Counter[DocumentId] = Counter()  # and of which it is being told something new

    @property
    def telling(self) -> frozenset[DocumentId]:
        """Documents whose deletion or pin is on its way to the catalog."""
        return frozenset(self._telling)

    # Time --------------------------------------------------------------------------------------

    def expire(self) -> None:
        """End the patience of those who wait for evictions."""
        now_ns = self.store.clock.monotonic_ns()
        for eviction in [e for e in self._evictions if e.deadline_ns <= now_ns]:
            self._evictions.remove(eviction)
            eviction.done(DeadlineExceeded("the eviction goes on, but took longer than the caller waits"))

    def settle(self) -> None:
        """Let go what has become movable, and tell those whose evictions are complete.

        What is leaving is looked at from the front only, because there may be thousands.
        """
        for eviction in list(self._evictions):
            while eviction.leaving and eviction.leaving[0][1].state is not State.DRAINING:
                eviction.pending.append(eviction.leaving.popleft())
            ready = [item for item in eviction.pending if item[1].movable]
            if any(self._pinned(victim, copy) for victim, copy in ready):
                self._give_up(eviction)
                continue
            self.room.execute([victim for victim, _ in ready], "admin")
            eviction.leaving += [item for item in eviction.pending if item[1].state is State.DRAINING]
            eviction.pending = [i for i in eviction.pending if i[1].state not in (State.DRAINING, State.GONE)]
            if not eviction.pending and not eviction.leaving:
                self._evictions.remove(eviction)
                eviction.done(None)

    def give_up_pinned(self) -> None:
        """A pin has come: end the evictions that it forbids."""
        for eviction in list(self._evictions):
            if any(self._pinned(victim, copy) for victim, copy in (*eviction.pending, *eviction.leaving)):
                self._give_up(eviction)

    def _give_up(self, eviction: Eviction) -> None:
        self._evictions.remove(eviction)
        eviction.done(InUse("a pin came while the eviction was under way; the rest stays"))

    def _pinned(self, victim: Victim, copy: Placement) -> bool:
        """Whether pins forbid by now what an eviction still means to do."""
        if copy.state is State.GONE:
            return False
        if copy.shard is not None:
            shard = next((s for s in self.state.shards() if s.id == copy.shard), None)
            return shard is not None and not self.state.may_leave_hbm(shard)
        record = self.state.extents.get(victim.extent)
        return record is not None and copy in record.placements() and not self.state.may_leave(record, copy)

    # Evictions ---------------------------------------------------------------------------------

    def plan_eviction(self, document: DocumentId | None, tier: Tier, size_bytes: int) -> tuple[Victim, ...]:
        """What `evict` would do, as it stands now: this is the dry run. Raises as `evict` does."""
        if document is None:
            if tier is Tier.HBM or size_bytes < 1:
                raise InvalidRequest("without a document, name a tier (ddr or nvme) and at least one byte")
            victims = self.store.planner.free_bytes(tier, size_bytes)
            if victims is None:
                wanted = format_size(size_bytes)
                raise NoCapacity(f"{wanted} cannot leave {tier.label}: the rest is leased, pinned or not there")
            return victims
        owner = self.state.document(document).document
        self._refuse_claimed(owner, tier)
        target = Tier(tier + 1) if tier is not Tier.NVME else None
        return self.store.planner.evict_document(owner, target)

    def _refuse_claimed(self, owner: Document, tier: Tier) -> None:
        self._refuse_leased(owner.id)
        pin = self.state.pins.hard(owner.id)
        if pin is not None and tier >= pin.floor:
            raise self._is_pinned(pin)

    def _is_pinned(self, pin: Pin) -> InUse:
        why = f" ({pin.reason!r})" if pin.reason else ""
        return InUse(
            f"{pin.document} is pinned at {pin.floor.label} by {pin.owner!r}{why}; unpin first",
            [pin.holder(self.store.clock.wall_ns(), pin.floor)],
        )

    def _refuse_leased(self, document: DocumentId) -> None:
        leases, now_ns = self.state.leased(document), self.store.clock.monotonic_ns()
        if leases:
            holders = largest(lease.holder(now_ns, self.state.client_name(lease.owner)) for lease in leases)
            raise InUse(f"{document} is leased by {len(leases)} holder(s); detach first", holders)

    def evict(
        self,
        document: DocumentId | None,
        tier: Tier,
        size_bytes: int,
        deadline_ns: int,
        done: Callable[[HoldfastError | None], None],
    ) -> tuple[Victim, ...]:
        """Take a document out of `tier` and all nearer ones (or free bytes of a tier); `done` when it has happened.

        Out of NVMe means out of the cache: its KV is dropped, its name stays with nothing behind it until it is
        ingested again or deleted. Raises InUse for what is leased or pinned, NoCapacity when not enough may leave.
        """
        plan = self.plan_eviction(document, tier, size_bytes)
        pending = [(victim, copy) for victim in plan if (copy := self._copy(victim)) is not None]
        self._evictions.append(Eviction(pending=pending, done=done, deadline_ns=deadline_ns))
        return plan

    def _copy(self, victim: Victim) -> Placement | None:
        if victim.shard is not None:
            shard = next((s for s in self.state.shards() if s.id == victim.shard), None)
            return shard.copies.get(victim.extent) if shard is not None else None
        record = self.state.extents[victim.extent]
        return record.ddr if victim.tier is Tier.DDR else record.nvme

    # Deletion ----------------------------------------------------------------------------------

    def delete(
        self, document: DocumentId, done: Callable[[HoldfastError | None], None] = lambda _: None, reason: str = ""
    ) -> None:
        """Forget a document; KV that no other document needs goes too, and a soft pin of it ends.

        Raises InUse while it is leased, or pinned hard.

        It is invisible at once; `done` hears when the catalog has forgotten it too, so that no restart brings it back.
        Where nobody has asked for it, the reason is written down for every copy.
        """
        owner = self.state.document(document)
        self._refuse_needed(document)
        if reason:
            for victim in self.store.planner.evict_document(owner.document, None):
                self.store.verdict(victim, reason)
        for shard in self.state.shards():
            if shard.document == document:
                self.store.close_shard(shard)
        self.state.forget(document)
        self.state.departures.ended(owner.document, reason or "deleted", self.store.clock.wall_ns())
        is_told = document.namespace is None or owner.told or document in self._unsaid or document in self._telling
        forget: list[Record] = [DropDocument(*document)] if is_told else []
        if self.state.pins.get(document) is not None:
            self.state.pins.remove(document)
            forget.append(DropPin(*document))
        if forget:
            self.tell(document, *forget, done=done)
        else:
            done(None)
        self.store.notes.add(DropDocument(document.tenant, document.name))
        for extent in (*owner.document.extents, *owner.before):
            record = self.state.extents[extent]
            record.leave(document)
            self.store.reap(record)

    def _refuse_needed(self, document: DocumentId) -> None:
        self._refuse_leased(document)
        pin = self.state.pins.hard(document)
        if pin is not None:
            raise self._is_pinned(pin)
        for ingest in self.ingests.open.values():
            if ingest.document.id == document:
                raise InUse(f"{document} is being ingested")
        for shard in self.state.shards():
            if shard.document == document and any(copy.holds for copy in shard.copies.values()):
                raise InUse(f"{document} is being moved; try again")

    def tell(
        self, document: DocumentId, *records: Record, done: Callable[[HoldfastError | None], None] = lambda _: None
    ) -> None:
        """Write what has changed of a document; what is refused is tried again. `done` hears of the first try."""
        self._tell([document], records, done)

    def tell_all(self, changed: Mapping[DocumentId, Record], done: Callable[[HoldfastError | None], None]) -> None:
        """The same of several documents, together."""
        self._tell(list(changed), tuple(changed.values()), done)

    def _tell(
        self,
        documents: Sequence[DocumentId],
        records: tuple[Record, ...],
        done: Callable[[HoldfastError | None], None],
    ) -> None:
        def committed(outcome: Outcome) -> None:
            self._telling.subtract(documents)
            self._telling = +self._telling
            if outcome.error is not None:
                self.state.ledger.counts["catalog_failures"] += 1
                self._unsaid.update(documents)
            done(outcome.error)

        self._telling.update(documents)
        self.store.submit(Write(id=self.store.new_id(), records=records), committed)

    def retry_writes(self) -> None:
        """Once more tell the catalog what it refused to hear, as it stands now."""
        unsaid, self._unsaid = self._unsaid, set()
        for document in sorted(unsaid):
            pin = self.state.pins.get(document)
            records: list[Record] = [PutPin(pin) if pin is not None else DropPin(*document)]
            owner = self.state.documents.get(document)
            if owner is None:
                records.append(DropDocument(*document))
            elif owner.durable:
                records.append(PutDocument(owner.document))
            else:  # its row will be written when all of it is on NVMe; that of one before it may be there
                owner.told = True
            self.tell(document, *records)

    def _write(self, *records: Record) -> None:
        self.store.submit(Write(id=self.store.new_id(), records=records))

    # Restart -----------------------------------------------------------------------------------

    def restore(
        self,
        specs: Iterable[KVSpec],
        extents: Iterable[tuple[Extent, Slot]],
        documents: Iterable[Document],
    ) -> None:
        """Take over what the catalog holds: NVMe copies where they lie, and documents. Before anything else."""
        for spec in specs:
            self.state.specs[spec.fingerprint()] = spec
        for extent, slot in extents:
            record = self.state.extents.setdefault(extent.id, ExtentRecord(extent=extent))
            self.state.fronts.add(extent)
            if not self.state.nvme.fits_in(SlotClass("", extent.slot_bytes), slot):
                # The budget shrank, or segments have another size now: what does not fit is given up, visibly.
                self.state.ledger.counts["not_restored"] += 1
                self._write(DropExtent(extent.id))
                continue
            self.store.adopt_nvme(record, slot)
        for document in documents:
            self._restore_document(document)

    def _restore_document(self, document: Document) -> None:
        if not self.state.extents.keys() >= set(document.extents):
            # Extents that were dropped by verdict have no row: the document still names what it lost.
            spec = self.state.specs[document.fingerprint]
            for extent in named(document.extents, document.token_count, spec, document.id.tenant):
                self.state.extents.setdefault(extent.id, ExtentRecord(extent=extent))
        owner = frozenset((document.id,))
        for name in document.extents:
            self.state.extents[name].join(owner)
            self.state.extents[name].stored = True
        self.state.publish(DocumentRecord(document=document, durable=True, told=True))
