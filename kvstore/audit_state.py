"""Audit of a running daemon: its memory against the catalog's rows, its accounts and its claims, pure.

The service goes on while rows are read, so it is looked at before and after: only what was settled at both looks, the
same copy in the same slot, must be in the rows between. Who calls confirms what is found by a second audit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from .audit import StoredExtent, about
from .document import Document, DocumentId
from .extent import Extent, ExtentId
from .findings import Code, Commit, EndClaims, Finding, Forget
from .orders import DropDocument, DropPin, PutDocument, PutExtent
from .residency import Placement
from .residency import State as Phase
from .slots import Slot
from .state import DDR, NVME, ExtentRecord, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An extent at the time of a look. `copy` is the NVMe one; it is settled when its row is there and stays."""

    extent: Extent
    copy: Placement | None
    is_settled: bool
    is_present: bool

    @classmethod
    def of(cls, record: ExtentRecord) -> Held:
        """Look at a record."""
        copy = record.nvme
        return cls(
            extent=record.extent,
            copy=copy,
            is_settled=copy is not None and record.cataloged and copy.readable and copy.slot is not None,
            is_present=record.source() is not None,
        )

    @property
    def slot(self) -> Slot:
        """Where the settled copy lies."""
        assert self.copy is not None
        assert self.copy.slot is not None
        return self.copy.slot


@dataclass(slots=True, kw_only=True)
class Look:
    """The service's memory, gathered in slices. `is_steady`: no copy came or went meanwhile, so accounts must agree."""

    extents: dict[ExtentId, Held] = field(default_factory=dict)
    documents: dict[DocumentId, tuple[Document, bool]] = field(default_factory=dict)  # with whether it is durable
    pins: frozenset[DocumentId] = frozenset()
    telling: frozenset[DocumentId] = frozenset()  # of which the catalog is being told something
    unlisted: frozenset[ExtentId] = frozenset()  # that have a copy which no record names: leaving, or private
    copies: dict[int, Placement] = field(default_factory=dict)  # by identity
    books: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # device -> bytes used by pool, and by ledger
    is_steady: bool = False

    def add(self, copies: Collection[Placement]) -> None:
        """Count these copies, each once."""
        self.copies.update((id(copy), copy) for copy in copies if copy.state is not Phase.GONE)

    @property
    def present(self) -> frozenset[ExtentId]:
        """The extents that can be had without recomputing them."""
        return frozenset(extent for extent, held in self.extents.items() if held.is_present)

    @property
    def settled(self) -> list[Held]:
        """What must be on NVMe."""
        return [held for held in self.extents.values() if held.is_settled]


def marks(state: State) -> tuple[tuple[tuple[str, int], ...], ...]:
    """What changes whenever a copy comes or goes."""
    return tuple(state.ledger.bytes_in.items()), tuple(state.ledger.bytes_out.items())


def books(state: State) -> dict[str, tuple[int, int]]:
    """The bytes used of each device, as its pool (HBM has none: the ledger) and as the ledger has them."""
    pools = {DDR: state.ddr.used_bytes, NVME: state.nvme.used_bytes}
    devices = {*pools, *state.ledger.bytes_in}
    return {d: (pools.get(d, state.ledger.occupancy(d)), state.ledger.occupancy(d)) for d in sorted(devices)}


def against_rows(
    before: Look,
    extents: Mapping[ExtentId, StoredExtent],
    documents: Mapping[DocumentId, Document],
    pins: Collection[DocumentId],
    after: Look,
) -> Iterator[Finding]:
    """What the rows, read between the looks, lack, have too much, or say otherwise."""
    for key, held in before.extents.items():
        later = after.extents.get(key)
        if later is None or not (held.is_settled and later.is_settled and held.copy is later.copy):
            continue
        row, slot = extents.get(key), held.slot
        subject = about(held.extent, ())
        if row is None:  # and with it the seal: what nobody can verify is not served
            detail = f"no row for segment {slot.slab}, offset {slot.offset}"
            yield Finding(code=Code.EXTENT_WITHOUT_ROW, subject=subject, detail=detail, repair=Forget(key))
        elif row.slot != slot:
            repair = Commit(PutExtent(held.extent, row.seal, slot))
            detail = f"the row says {row.slot} instead of {slot}"
            yield Finding(code=Code.EXTENT_ROW_DIFFERS, subject=subject, detail=detail, repair=repair)
    for key, row in extents.items():
        looks = (before, after)
        copies = [look.extents[key].copy for look in looks if key in look.extents]
        if not any(copies) and not any(key in look.unlisted for look in looks):
            detail = "the daemon has no such copy"
            subject = about(row.extent, ())
            yield Finding(code=Code.EXTENT_ROW_STALE, subject=subject, detail=detail, repair=Forget(key))
    yield from _documents(before, documents, pins, after)


def _documents(
    before: Look, rows: Mapping[DocumentId, Document], pins: Collection[DocumentId], after: Look
) -> Iterator[Finding]:
    for document, (ours, is_durable) in before.documents.items():
        stays = is_durable and after.documents.get(document) == (ours, True)
        if stays and (document not in rows or rows[document].extents != ours.extents):
            detail = "it is durable, as far as the daemon knows"
            repair = Commit(PutDocument(ours))
            yield Finding(code=Code.DOCUMENT_WITHOUT_ROW, subject=str(document), detail=detail, repair=repair)
    telling = before.telling | after.telling
    for document in rows:
        if document not in before.documents and document not in after.documents and document not in telling:
            repair = Commit(DropDocument(*document))
            detail = "the daemon has no such document"
            yield Finding(code=Code.DOCUMENT_ROW_STALE, subject=str(document), detail=detail, repair=repair)
    for document in pins:
        if document not in before.pins | after.pins | telling and document not in after.documents:
            repair = Commit(DropPin(*document))
            detail = "the daemon has neither the pin nor the document"
            yield Finding(code=Code.PIN_WITHOUT_DOCUMENT, subject=str(document), detail=detail, repair=repair)


def accounts(look: Look) -> Iterator[Finding]:
    """Copies, pools and ledger against each other."""
    if not look.is_steady:
        return
    used: Counter[str] = Counter()
    slots: Counter[tuple[str, Slot]] = Counter()
    for copy in look.copies.values():
        used[copy.device] += copy.size_bytes
        if copy.slot is not None:
            slots[copy.device, copy.slot] += 1
    for device in sorted({*used, *look.books}):
        pooled, booked = look.books.get(device, (0, 0))
        if not used[device] == pooled == booked:
            detail = f"copies {used[device]} B, pool {pooled} B, ledger {booked} B"
            yield Finding(code=Code.ACCOUNTS_DIFFER, subject=device, detail=detail)
    for (device, slot), count in slots.items():
        if count > 1:
            yield Finding(code=Code.ACCOUNTS_DIFFER, subject=f"{device} {slot}", detail=f"{count} copies in one slot")


def claims(state: State, writers: Mapping[int, str], clients: Collection[int]) -> Iterator[Finding]:
    """Leases, seats and ingests (`writers`: client -> what it writes) of clients that are no longer there."""
    held = {lease.owner: f"a lease of {lease.document}" for lease in state.leases.values()}
    held |= {
        client: f"a seat in group {group.name!r}" for group in state.groups.values() for client in group.seats.values()
    }
    held |= writers
    for client, what in sorted(held.items()):
        if client not in clients:
            subject = f"client {client}"
            yield Finding(code=Code.CLAIM_OF_NOBODY, subject=subject, detail=what, repair=EndClaims(client))
