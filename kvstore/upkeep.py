"""Upkeep: what operators ask for (pin, evict, delete) and what a restart brings back.

Evictions and prefetches carry on after the command returns; `settle` looks which have ended.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from .claims import Pin
from .document import NAME_LIMIT, Document, DocumentId
from .errors import DeadlineExceeded, HoldfastError, InUse, InvalidRequest, NoCapacity
from .extent import Extent, named
from .ingest import Ingests
from .ledger import SwapRecord
from .loader import Loader
from .loading import Loading
from .orders import DropDocument, DropExtent, DropPin, Outcome, PutDocument, PutPin, Record, Urgency, Write
from .planner import Victim
from .residency import Placement, State, Tier
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
    """Pins, evictions, deletions, prefetches, restart."""

    def __init__(self, loader: Loader, ingests: Ingests) -> None:
        self.loader = loader
        self.ingests = ingests
        self.store = loader.store
        self.room = loader.room
        self.state = loader.store.records
        ingests.grew = self._grew
        self._evictions: list[Eviction] = []
        self._unsaid: set[DocumentId] = set()  # of which the catalog may still tell something old
        self._telling: Counter[DocumentId] = Counter()  # and of which it is being told something new

    @property
    def telling(self) -> frozenset[DocumentId]:
        """Documents whose deletion or pin is on its way to the catalog."""
        return frozenset(self._telling)

    # Time --------------------------------------------------------------------------------------

    def expire(self) -> None:
        """End the pins whose time is up, and the patience of those who wait for evictions."""
        for pin in self.state.pins.expired(self.store.clock.wall_ns()):
            self.unpin(pin.document)
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

    # Pins --------------------------------------------------------------------------------------

    def pin(self, document: DocumentId, floor: Tier, ttl_seconds: float | None, owner: str, reason: str) -> Pin:
        """Keep a document at or above a tier, and bring it there. Raises PinsOvercommitted, changing nothing."""
        record = self.state.document(document)
        now_ns = self.store.clock.wall_ns()
        if ttl_seconds is not None and not 0 < ttl_seconds < 10**9:
            raise InvalidRequest(f"ttl_seconds must be positive, not {ttl_seconds}")
        if max(len(owner), len(reason)) > NAME_LIMIT:
            raise InvalidRequest(f"a pin's owner and reason have at most {NAME_LIMIT} characters")
        pin = Pin(
            document=document,
            floor=floor,
            size_bytes=sum(self.state.extents[e].extent.slot_bytes for e in record.document.extents),
            owner=owner,
            reason=reason,
            created_wall_ns=now_ns,
            expires_wall_ns=None if ttl_seconds is None else now_ns + int(ttl_seconds * NS),
        )
        self.state.pins.add(pin)
        self.tell(document, PutPin(pin))
        if floor is not Tier.NVME:
            self._keep(record.document)
            self._prefetch(record.document)
        for eviction in list(self._evictions):
            if any(self._pinned(victim, copy) for victim, copy in (*eviction.pending, *eviction.leaving)):
                self._give_up(eviction)
        return pin

    def _grew(self, document: Document) -> None:
        """A pin holds the longer version too."""
        size_bytes = sum(self.state.extents[extent].extent.slot_bytes for extent in document.extents)
        pin = self.state.pins.resize(document.id, size_bytes)
        if pin is not None:
            self.tell(document.id, PutPin(pin))

    def unpin(self, document: DocumentId) -> Pin:
        """Let it sink again. Raises ClaimNotFound."""
        pin = self.state.pins.remove(document)
        self.tell(document, DropPin(document.tenant, document.name))
        return pin

    def _keep(self, document: Document) -> None:
        """What is on its way out of DDR stays, also of a document that is too large to be brought there."""
        for extent in document.extents:
            copy = self.state.extents[extent].ddr
            if copy is not None and copy.state is State.DRAINING:
                self.store.unhold(self.store.hold(copy))

    def _prefetch(self, document: Document) -> None:
        """Bring a document to DDR; best effort, because nobody waits for it."""
        records = [self.state.extents[extent] for extent in document.extents]
        loading = Loading(
            document=document.id,
            records=records,
            spans={},
            group=None,
            layout=None,
            urgency=Urgency.PREFETCH,
            swap=SwapRecord(
                id=self.store.new_id(),
                document=str(document.id),
                group=None,
                client=NOBODY,
                started_wall_ns=self.store.clock.wall_ns(),
                token_count=document.token_count,
            ),
            started_ns=self.store.clock.monotonic_ns(),
            granted=lambda: None,
            layer_ready=lambda _: None,
            ended=lambda _: None,
            released=True,
        )
        try:
            self.loader.start(loading, self.store.clock.monotonic_ns() + PREFETCH_DEADLINE_NS)
        except HoldfastError:
            self.state.ledger.counts["prefetches_refused"] += 1

    # Evictions ---------------------------------------------------------------------------------

    def plan_eviction(self, document: DocumentId | None, tier: Tier, size_bytes: int) -> tuple[Victim, ...]:
        """What `evict` would do, as it stands now: this is the dry run. Raises as `evict` does."""
        if document is None:
            if tier is Tier.HBM or size_bytes < 1:
                raise InvalidRequest("without a document, name a tier (ddr or nvme) and at least one byte")
            victims = self.store.planner.free_bytes(tier, size_bytes)
            if victims is None:
                raise NoCapacity(f"{size_bytes} B cannot leave {tier.label}: the rest is leased, pinned or not there")
            return victims
        owner = self.state.document(document).document
        self._refuse_claimed(owner, tier)
        target = Tier(tier + 1) if tier is not Tier.NVME else None
        return self.store.planner.evict_document(owner, target)

    def _refuse_claimed(self, owner: Document, tier: Tier) -> None:
        leases = self.state.leased(owner.id)
        if leases:
            raise InUse(f"{owner.id} is leased by {len(leases)} holder(s); detach first")
        pin = self.state.pins.get(owner.id)
        if pin is not None and tier >= pin.floor:
            raise InUse(f"{owner.id} is pinned at {pin.floor.label} by {pin.owner!r} ({pin.reason!r}); unpin first")

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
        """Forget a document; KV that no other document needs goes too. Raises InUse while it is leased or pinned.

        It is invisible at once; `done` hears when the catalog has forgotten it too, so that no restart brings it back.
        Where nobody has asked for it, the reason is written down for every copy.
        """
        owner = self.state.document(document)
        leases = self.state.leased(document)
        if leases:
            raise InUse(f"{document} is leased by {len(leases)} holder(s); detach first")
        if self.state.pins.get(document) is not None:
            raise InUse(f"{document} is pinned; unpin first")
        for ingest in self.ingests.open.values():
            if ingest.document.id == document:
                raise InUse(f"{document} is being ingested")
        for shard in self.state.shards():
            if shard.document == document and any(copy.holds for copy in shard.copies.values()):
                raise InUse(f"{document} is being moved; try again")
        if reason:
            for victim in self.store.planner.evict_document(owner.document, None):
                self.store.verdict(victim, reason)
        for shard in self.state.shards():
            if shard.document == document:
                self.store.close_shard(shard)
        del self.state.documents[document]
        self.tell(document, DropDocument(document.tenant, document.name), done=done)
        self.store.notes.add(DropDocument(document.tenant, document.name))
        for extent in (*owner.document.extents, *owner.before):
            record = self.state.extents[extent]
            record.documents -= {document}
            self.store.reap(record)

    def tell(
        self, document: DocumentId, *records: Record, done: Callable[[HoldfastError | None], None] = lambda _: None
    ) -> None:
        """Write what has changed of a document; what is refused is tried again. `done` hears of the first try."""

        def committed(outcome: Outcome) -> None:
            self._telling[document] -= 1
            if not self._telling[document]:
                del self._telling[document]
            if outcome.error is not None:
                self.state.ledger.counts["catalog_failures"] += 1
                self._unsaid.add(document)
            done(outcome.error)

        self._telling[document] += 1
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
            elif owner.durable:  # else its row will be written when all of it is on NVMe
                records.append(PutDocument(owner.document))
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

    def restore_pins(self, pins: Iterable[Pin]) -> None:
        """Take over the pins of documents that are there, and bring those documents near."""
        for pin in pins:
            try:
                self.state.document(pin.document)
                self.state.pins.add(pin)
            except HoldfastError:  # the document was never durable, or the budget shrank
                self.state.ledger.counts["pins_not_restored"] += 1
                self.tell(pin.document, DropPin(*pin.document))
        for document in [record.document for record in self.state.documents.values()]:
            pin_of = self.state.pins.get(document.id)
            if pin_of is not None and pin_of.floor is not Tier.NVME:
                self._prefetch(document)

    def _restore_document(self, document: Document) -> None:
        self.state.documents[document.id] = DocumentRecord(document=document, durable=True)
        if not self.state.extents.keys() >= set(document.extents):
            # Extents that were dropped by verdict have no row: the document still names what it lost.
            spec = self.state.specs[document.fingerprint]
            for extent in named(document.extents, document.token_count, spec, document.id.tenant):
                self.state.extents.setdefault(extent.id, ExtentRecord(extent=extent))
        owner = frozenset((document.id,))
        for name in document.extents:
            self.state.extents[name].join(owner)
            self.state.extents[name].stored = True
