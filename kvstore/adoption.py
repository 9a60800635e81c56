"""Adoption: what a daemon that was killed, or stopped to be upgraded, left in DDR is found there by the next one.

The warm index says which sealed extents lie in which slots. It may be late, and the bytes may have been written to
since, so each copy is FILLING until its planes have been verified. Verification goes on behind everything else; a
loading that needs a copy has it verified at once, and waits for that as for a read.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from .document import Document, DocumentId, WritePolicy
from .errors import CorruptExtent, HoldfastError
from .extent import Extent, ExtentId, extent_count, named
from .geometry import extent_geometry
from .growth import may_continue, superseded
from .orders import DropDocument, DropExtent, Outcome, Urgency, Verify
from .residency import Placement, Tier
from .reuse import Decision
from .slots import Slot, SlotClass
from .state import DocumentRecord, ExtentRecord, Left
from .upkeep import Upkeep

VERIFYING_MAX: Final = 4  # behind everything else; those that somebody waits for come on top


@dataclass(frozen=True, slots=True)
class _Found:
    """A copy that waits to be verified."""

    record: ExtentRecord
    target: Placement


class Adoption:
    """Takes a predecessor's copies over, verifies them, and lets go of those that differ."""

    def __init__(self, upkeep: Upkeep) -> None:
        self.upkeep = upkeep
        self.reads = upkeep.loader.reads
        self.store = upkeep.store
        self.room = upkeep.room
        self.state = upkeep.state
        self.verified = self.room.writes.catch_up  # what follows when all is verified
        self._queue: dict[ExtentId, _Found] = {}
        self._verifying = 0
        self._before: dict[DocumentId, tuple[ExtentId, ...]] = {}  # of documents that were continued

    # Taking over -------------------------------------------------------------------------------

    def adopt(self, left: Left) -> None:
        """Take over what still has a use, and tell the index what has none. After the catalog's, before pins."""
        for spec in left.specs:
            self.state.specs.setdefault(spec.fingerprint(), spec)
        sound = {extent.id for extent, slot in left.extents if self._is_sound(extent, slot)}
        fresh = [document for document in left.documents if self._is_fresh(document, sound)]
        replaced = [extent for document in fresh for extent in self._replace(document)]
        needed = {extent for record in self.state.documents.values() for extent in record.document.extents}
        needed.update(extent for document in fresh for extent in document.extents)
        for extent, slot in left.extents:
            if extent.id in needed and self._is_sound(extent, slot):
                self._take(extent, slot)
            else:
                self.store.notes.add(DropExtent(extent.id))
        self.state.ddr.inherit(left.slabs)
        for client, slabs in left.fences.items():
            for slab in slabs:
                self.state.ddr.fence(slab, client)
        for document in fresh:
            self._publish(document)
        for document in left.documents:
            if document.id not in self.state.documents:
                self.store.notes.add(DropDocument(*document.id))
        for record in replaced:
            self.store.reap(record)
        self.state.ledger.counts["adopted"] += len(self._queue)
        self._verify_next()

    def _is_fresh(self, document: Document, sound: Container[ExtentId]) -> bool:
        """Whether the index knows better than the catalog, which has a document only when it is durable.

        A version that only continues a durable one must be whole, else the durable one is worth more.
        """
        spec = self.state.specs.get(document.fingerprint)
        if spec is None or len(document.extents) != extent_count(document.token_count, spec):
            return False
        known = self.state.documents.get(document.id)
        if known is None:
            return True
        if known.document.extents == document.extents or known.document.created_wall_ns >= document.created_wall_ns:
            return False
        if not may_continue(known.document, document, spec):
            return True
        records = {extent: self.state.extents.get(extent) for extent in document.extents}
        return all(e in sound or (r is not None and r.source() is not None) for e, r in records.items())

    def _replace(self, document: Document) -> list[ExtentRecord]:
        """Forget the document that had this name before: its deletion was acknowledged, but not yet in the catalog.

        Or it was continued: then what the catalog names of it stays until that has heard of the longer one.
        """
        if document.id not in self.state.documents:
            return []
        known = self.state.forget(document.id)
        if may_continue(known.document, document, self.state.specs[document.fingerprint]):
            self._before[document.id] = superseded(known, document)
            return []
        self.upkeep.tell(document.id, DropDocument(*document.id))
        records = [self.state.extents[extent] for extent in known.document.extents]
        for record in records:
            record.leave(document.id)
        return records

    def _is_sound(self, extent: Extent, slot: Slot) -> bool:
        """Whether the slot could hold the extent, and nothing else claims it."""
        spec = self.state.specs.get(extent.fingerprint)
        if spec is None or extent.group >= len(spec.groups):
            return False
        kind = SlotClass(extent.tenant, extent.slot_bytes)
        return extent_geometry(spec, extent.group).size_bytes == extent.slot_bytes and self.state.ddr.fits_in(
            kind, slot
        )

    def _take(self, extent: Extent, slot: Slot) -> None:
        record = self.state.extents.setdefault(extent.id, ExtentRecord(extent=extent))
        record.extent = extent  # the catalog may have left it without block keys
        self.state.fronts.add(extent)
        target = self.store.adopt_ddr(record, slot)
        target.holds += 1  # until it is verified
        self._queue[extent.id] = _Found(record, target)
        self.reads.waiting[extent.id] = []
        self.reads.unverified[extent.id] = lambda: self._verify(extent.id, Urgency.ATTACH)

    def _publish(self, document: Document) -> None:
        """Make a document visible that was acknowledged but not durable, unless nothing at all is left of it."""
        spec = self.state.specs[document.fingerprint]
        extents = named(document.extents, document.token_count, spec, document.id.tenant)
        here = [self.state.extents.get(extent.id) for extent in extents]
        if not any(record is not None and record.placements() for record in here):
            return
        owner = frozenset((document.id,))
        for extent in extents:
            self.state.extents.setdefault(extent.id, ExtentRecord(extent=extent)).join(owner)
        volatile = {extent.id for extent in extents if not self.state.extents[extent.id].cataloged}
        policy = document.write_policy
        if policy is WritePolicy.AUTO:
            policy = WritePolicy.THROUGH  # what was decided is forgotten; nothing is to be lost
        decision = Decision(policy, "found in memory after a restart")
        before = self._before.pop(document.id, ())
        record = DocumentRecord(document=document, told=True, volatile=volatile, before=before, decision=decision)
        self.state.publish(record)
        self.room.writes.make_durable(document.id)

    # Verifying ---------------------------------------------------------------------------------

    def _verify_next(self) -> None:
        while self._queue and self._verifying < VERIFYING_MAX:
            self._verify(next(iter(self._queue)), Urgency.PREFETCH)
        if not self._queue and not self._verifying:
            self.verified()

    def _verify(self, extent: ExtentId, urgency: Urgency) -> None:
        found = self._queue.pop(extent, None)
        if found is None:
            return  # under way
        if not found.record.documents:
            self._refuted(found, CorruptExtent("no document needs it any more"))
            return
        assert found.target.slot is not None
        spec = self.state.specs[found.record.extent.fingerprint]
        order = Verify(
            id=self.store.new_id(),
            extent=extent,
            slot=found.target.slot,
            geometry=extent_geometry(spec, found.record.extent.group),
            urgency=urgency,
        )
        self._verifying += 1
        self.store.submit(order, lambda outcome: self._verify_done(found, outcome))

    def _verify_done(self, found: _Found, outcome: Outcome) -> None:
        self._verifying -= 1
        if outcome.error is None:
            self._verified(found, outcome.checksums)
        else:
            self.state.ledger.counts["quarantined"] += 1
            self._refuted(found, outcome.error)
        self._verify_next()

    def _verified(self, found: _Found, seal: bytes) -> None:
        extent = found.record.extent.id
        del self.reads.unverified[extent]
        self.reads.land(found.record, found.target, seal, self.reads.waiting.pop(extent))
        self.state.ledger.counts["adopted_verified"] += 1

    def _refuted(self, found: _Found, error: HoldfastError) -> None:
        """Read it again, where NVMe has it, into the same slot; else it is lost, and those who wait hear of it."""
        record, target, extent = found.record, found.target, found.record.extent
        del self.reads.unverified[extent.id]
        source = record.nvme
        if source is not None and source.readable and record.documents:
            waiting = self.reads.waiting[extent.id]
            for loading in waiting:
                loading.swap.source_bytes[Tier.DDR.label] -= extent.slot_bytes
                loading.came_from(Tier.NVME, record)
            urgency = min((loading.urgency for loading in waiting), default=Urgency.PREFETCH)
            self.reads.into(record, source, target, urgency)
            target.holds -= 1
        else:
            self.reads.lose(record, target, self.reads.waiting.pop(extent.id), error)
