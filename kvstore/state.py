"""State: everything the daemon knows, in plain containers. Read by all rules, changed only by the store.

`check` compares the containers with each other; tests call it after every command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from ..eviction.policy import Ranking
from .bypass import Bypass
from .changes import Changes
from .claims import Lease, Pins
from .departures import Departures
from .document import Document, DocumentId, WritePolicy
from .documents import Documents
from .errors import DocumentNotFound, GroupNotFound
from .extent import Extent, ExtentId
from .forests import Forests
from .fronts import Fronts
from .hints import Hints
from .layout import Layout
from .ledger import Ledger
from .owners import Owners, common, in_order, joined, left
from .prompts import Prompts
from .quality import Quality
from .quotas import Quotas, Usage
from .residency import Placement, Tier
from .residency import State as Phase
from .reuse import Decision, Ghosts
from .slots import RowPool, SlabPool, Slot
from .spec import KVSpec

DDR = "ddr"
NVME = "nvme"


def hbm_device(group: str) -> str:
    """The device name of a group's HBM."""
    return f"hbm:{group}"


@dataclass(slots=True, kw_only=True)
class ExtentRecord:
    """An extent, its copies in DDR and on NVMe, and the committed documents that need it.

    Copies in HBM belong to shards.
    """

    extent: Extent
    ddr: Placement | None = None
    nvme: Placement | None = None
    documents: Owners = frozenset()
    cataloged: bool = False  # the catalog has, or is about to have, a row for the NVMe copy
    stored: bool = False  # NVMe has it, or had it once

    def join(self, owner: frozenset[DocumentId]) -> None:
        """One more document needs it: see owners."""
        self.documents = joined(self.documents, owner)

    def leave(self, document: DocumentId) -> None:
        """A document needs it no more."""
        self.documents = left(self.documents, document)

    def placements(self) -> list[Placement]:
        """The copies outside HBM, nearest first."""
        return [copy for copy in (self.ddr, self.nvme) if copy is not None]

    def source(self) -> Placement | None:
        """The copy an attach reads from, outside HBM: DDR if it is there or on its way, else NVMe."""
        for copy in (self.ddr, self.nvme):
            if copy is not None and (copy.readable or (copy is self.ddr and copy.state is Phase.FILLING)):
                return copy
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What an earlier daemon says it left in DDR: sealed extents and their slots, and the documents it knew of.

    `slabs` are all that were kept; `fences` are those that its clients may still look at, by client.
    """

    specs: Sequence[KVSpec] = ()
    extents: Sequence[tuple[Extent, Slot]] = ()
    documents: Sequence[Document] = ()
    slabs: Collection[int] = ()
    fences: Mapping[int, Collection[int]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class DocumentRecord:
    """A committed document; `durable` when the catalog has it and all of its extents.

    `volatile` are the extents that were not yet in the catalog when the document was committed. `decision` says what
    was decided for it at its commit; None after a restart.
    `told`: the catalog may have a row of it.
    `before`: extents of a shorter version that the catalog still names. `chains` are made when needed (see uses).
    `admitted`: something of it was written when DDR evicted it, so the rest is too (see admission).
    `use_count` and `last_use_ns` tell of uses since the daemon started.
    """

    document: Document
    durable: bool = False
    told: bool = False
    volatile: set[ExtentId] = field(default_factory=set)
    before: tuple[ExtentId, ...] = ()
    decision: Decision | None = None
    chains: tuple[tuple[ExtentId, ...], ...] = ()
    admitted: bool = False
    use_count: int = 0
    last_use_ns: int | None = None

    @property
    def writes_through(self) -> bool:
        """Whether it should be on NVMe without waiting for an eviction."""
        return self.decision is not None and self.decision.policy is WritePolicy.THROUGH


class ShardKey(NamedTuple):
    """A version of a document: versions differ in length."""

    document: DocumentId
    token_count: int


@dataclass(slots=True, kw_only=True)
class Shard:
    """The rows that a document takes in a group's arenas: `rows[rank]` is (first row, count).

    `spans` gives every extent's tokens [start, stop), in document order; `copies` are those that have rows: a front
    of the document. `layout` covers all spans.
    """

    id: int
    group: str
    document: DocumentId
    layout: Layout
    spans: dict[ExtentId, tuple[int, int]]
    rows: list[tuple[int, int]]
    copies: dict[ExtentId, Placement] = field(default_factory=dict)
    generation: int = 0  # the opening that the ranks know; 0 when they have to be told anew

    @property
    def key(self) -> ShardKey:
        """Whose rows they are."""
        return ShardKey(self.document, self.layout.token_count)

    def lengths(self, stop: int) -> list[int]:
        """Rows per rank that the first `stop` tokens take."""
        kept = self.layout.truncated(stop)
        return [kept.length(rank // self.layout.tp) for rank in range(self.layout.ranks)]

    @property
    def complete(self) -> bool:
        """Every extent of the document is here and readable."""
        return len(self.copies) == len(self.spans) and all(c.readable for c in self.copies.values())


class Backend(NamedTuple):
    """What a rank computes with, by name, chosen at its start; empty where it did not say."""

    kernel: str = ""
    communicator: str = ""
    device: str = ""


UNSAID: Final = Backend()


@dataclass(slots=True, kw_only=True)
class Group:
    """Ranks that decode together. `seats[rank]` is the client at that rank; it works when all are taken."""

    name: str
    fingerprint: bytes  # of its model in canonical form
    cp: int
    tp: int
    row_bytes: int  # bytes of one row on one rank
    pools: dict[int, RowPool] = field(default_factory=dict)
    seats: dict[int, int] = field(default_factory=dict)
    backends: dict[int, Backend] = field(default_factory=dict)
    shards: dict[ShardKey, Shard] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """How many there are when it is complete."""
        return self.cp * self.tp

    @property
    def complete(self) -> bool:
        """All ranks are registered."""
        return len(self.seats) == self.ranks

    @property
    def capacity_bytes(self) -> int:
        """Bytes over all ranks' arenas."""
        return sum(pool.rows for pool in self.pools.values()) * self.row_bytes


class State:
    """The containers. Keys are ids; no container holds what another can derive."""

    def __init__(
        self, ddr: SlabPool, nvme: SlabPool, pins: Pins, ledger: Ledger, ghosts: Ghosts, quotas: Quotas
    ) -> None:
        self.ddr = ddr
        self.nvme = nvme
        self.pins = pins
        self.ledger = ledger
        self.usage = Usage()
        self.hints = Hints()
        self.awaited: Counter[DocumentId] = Counter()  # documents of loads that wait for room
        self.quotas = quotas
        self.specs: dict[bytes, KVSpec] = {}
        self.documents: Documents[DocumentRecord] = Documents()
        self.prompts = Prompts()  # of these documents
        self.faded: dict[DocumentId, DocumentId | None] = {}  # unnamed ones that may have to go: see transients
        self.outlasting: dict[DocumentId, DocumentId | None] = {}  # that had to go when last looked at, and are in use
        self.extents: dict[ExtentId, ExtentRecord] = {}
        self.ghosts = ghosts
        self.departures = Departures()
        self.quality = Quality(ghosts.limit)
        self.forests = Forests()
        self.rankings: dict[str, Ranking] = {}  # by device
        self.fronts = Fronts()  # of these extents
        self.changes = Changes()
        self.bypass: Bypass | None = None
        self.groups: dict[str, Group] = {}
        self.leases: dict[int, Lease] = {}
        self.pids: dict[int, int] = {}  # of clients whose process is known
        self.private: dict[int, list[Placement]] = {}  # ingest id -> copies nobody else sees yet
        self.spares: dict[ExtentId, Placement] = {}  # good DDR copies, should the one that is being filled fail
        self.draining: dict[ExtentId, Placement] = {}  # DDR copies told to leave; a hit may have called one back
        self.retired: list[Shard] = []  # of versions before the present one, which somebody still reads
        self.leaving: list[Placement] = []  # copies that no record names any more, whose slots are not free yet

    def document(self, document: DocumentId) -> DocumentRecord:
        """The record. Raises DocumentNotFound."""
        record = self.documents.get(document)
        if record is None:
            raise DocumentNotFound(f"no document {document.name!r} in tenant {document.tenant!r}")
        return record

    def can_read(self, reader: bytes, stored: bytes) -> bool:
        """Whether KV of the one spec can be used as that of the other: pages decode to their model's canonical KV."""
        ours, theirs = self.specs.get(reader), self.specs[stored]
        if ours is None or ours == theirs:
            return reader == stored
        return bool(theirs.page_format and not ours.page_format) and ours.canonical() == theirs.canonical()

    def publish(self, record: DocumentRecord) -> DocumentRecord:
        """A document is there, and so are the records of its extents."""
        document = record.document
        self.documents[document.id] = record
        self.prompts.add(document, self.extents[document.extents[-1]].extent, self.specs[document.fingerprint])
        return record

    def forget(self, document: DocumentId) -> DocumentRecord:
        """A document is no more; the records of its extents are there still."""
        record = self.documents.pop(document)
        made = record.document
        self.prompts.discard(made, self.extents[made.extents[-1]].extent, self.specs[made.fingerprint])
        self.faded.pop(document, None)
        self.outlasting.pop(document, None)
        return record

    def owners_of(self, record: ExtentRecord) -> list[DocumentRecord]:
        """The documents that need an extent."""
        return [self.documents[document] for document in in_order(record.documents)]

    def has_copies(self, document: Document) -> bool:
        """Whether any copy of it is left."""
        records = (self.extents[extent] for extent in document.extents)
        return any(record.ddr or record.nvme for record in records) or any(s.copies for s in self.shards_of(document))

    def group(self, name: str) -> Group:
        """A group with all ranks registered. Raises GroupNotFound."""
        group = self.groups.get(name)
        if group is None:
            raise GroupNotFound(f"no group {name!r}; registered: {', '.join(self.groups) or 'none'}")
        if not group.complete:
            raise GroupNotFound(f"group {name!r} has {len(group.seats)} of {group.cp * group.tp} ranks registered")
        return group

    def leased(self, document: DocumentId) -> list[Lease]:
        """The document's leases."""
        return [lease for lease in self.leases.values() if lease.document == document]

    def client_name(self, client: int) -> str:
        """A client as people are told of it, with its process where that can be seen."""
        pid = self.pids.get(client)
        return f"client {client}" if pid is None else f"client {client} (pid {pid})"

    def floor(self, record: ExtentRecord) -> Tier | None:
        """The nearest floor among the hard pins of the documents that need this extent."""
        if not self.pins:
            return None
        pins = map(self.pins.hard, common(record.documents, self.pins.documents))
        floors = [pin.floor for pin in pins if pin is not None]
        return min(floors, default=None)

    def may_leave(self, record: ExtentRecord, placement: Placement) -> bool:
        """Whether pins allow this copy to leave DDR or NVMe: another good copy stays at or above the floor.

        HBM copies go with their process, so they never stand in for a copy in DDR or on NVMe; and a pinned
        document's NVMe copy stays, whatever the floor, because a pin is to survive a restart. For the same reason a
        document pinned in HBM stays in DDR.
        """
        floor = self.floor(record)
        if floor is None:
            return True
        if placement.tier is Tier.NVME:
            return False
        others = [copy for copy in record.placements() if copy is not placement]
        return any(copy.tier <= floor and copy.readable for copy in others)

    def may_leave_hbm(self, shard: Shard) -> bool:
        """Whether pins allow the shard's copies to go."""
        pin = self.pins.hard(shard.document)
        return pin is None or pin.floor is not Tier.HBM

    def capacity_bytes(self, tier: Tier, device: str) -> int:
        """What a device can hold; 0 for a group that is gone."""
        if tier is Tier.HBM:
            group = self.groups.get(device.partition(":")[2])
            return group.capacity_bytes if group is not None else 0
        return (self.ddr if tier is Tier.DDR else self.nvme).capacity_bytes

    def is_expected(self, documents: Owners, tier: Tier, device: str) -> bool:
        """Whether queries on any of these documents wait, or are announced, which shields its copies on a device."""
        if any(common(documents, self.awaited)):
            return True
        if not self.hints.live:
            return False
        return any(common(documents, self.hints.shielded(tier, device, self.capacity_bytes(tier, device))))

    def shards(self) -> list[Shard]:
        """Every shard of every group."""
        return [shard for group in self.groups.values() for shard in group.shards.values()]

    def shards_of(self, document: Document) -> list[Shard]:
        """Those of this very version, one a group at most."""
        key = ShardKey(document.id, document.token_count)
        return [shard for group in self.groups.values() if (shard := group.shards.get(key)) is not None]

    def copies(self, extent: ExtentId, shards: Sequence[Shard] = ()) -> dict[Tier, Placement]:
        """An extent's copies by tier, those in these shards included."""
        record = self.extents.get(extent)
        found = {} if record is None else {copy.tier: copy for copy in record.placements()}
        for shard in shards:
            if extent in shard.copies:
                found[Tier.HBM] = shard.copies[extent]
        return found

    def all_placements(self) -> list[Placement]:
        """Every copy of every extent, those of open ingests included."""
        found = [copy for record in self.extents.values() for copy in record.placements()]
        found += [copy for copies in self.private.values() for copy in copies]
        found += [*self.spares.values(), *self.leaving]
        return found + [copy for shard in self.shards() for copy in shard.copies.values()]

    def held(self) -> Iterator[Placement]:
        """The copies that somebody uses."""
        for record in self.extents.values():
            if record.ddr is not None and record.ddr.holds:
                yield record.ddr
            if record.nvme is not None and record.nvme.holds:
                yield record.nvme
        for copies in (*self.private.values(), self.leaving, *(shard.copies.values() for shard in self.shards())):
            yield from (copy for copy in copies if copy.holds)

    def used_bytes(self) -> Counter[str]:
        """Bytes of placements per device."""
        used: Counter[str] = Counter()
        for placement in self.all_placements():
            used[placement.device] += placement.size_bytes
        return used

    def check(self) -> None:
        """Assert the invariants of DESIGN section 6 between the containers."""
        used = self.used_bytes()
        placements = self.all_placements()
        for device, pool in ((DDR, self.ddr), (NVME, self.nvme)):
            assert used[device] == pool.used_bytes, (device, used[device], pool.used_bytes)
            assert used[device] <= pool.capacity_bytes, device
            slots = [copy.slot for copy in placements if copy.device == device]
            assert None not in slots
            assert len(set(slots)) == len(slots), f"two copies share a slot on {device}"
        for device in {*used, DDR, NVME, *self.ledger.bytes_in}:
            assert used[device] == self.ledger.occupancy(device), f"ledger differs on {device}"
        self._check_usage(placements)
        for placement in placements:
            assert placement.state != "gone", f"a gone copy is still listed: {placement}"
            assert placement.holds >= 0, placement
        drains = {id(copy) for copy in self.draining.values() if copy.state is Phase.DRAINING}
        here = [record.ddr for record in self.extents.values() if record.ddr is not None]
        assert drains == {id(copy) for copy in here if copy.state is Phase.DRAINING}, "what drains is not all listed"
        named = {id(copy) for record in self.extents.values() for copy in record.placements()}
        for copies in self.private.values():
            for copy in copies:
                assert copy.state is Phase.FILLING, f"a private copy could be read: {copy}"
                assert copy.holds, f"nobody holds a private copy: {copy}"
                assert id(copy) not in named, f"a private copy has a record: {copy}"
        for extent, spare in self.spares.items():
            ddr = self.extents[extent].ddr
            assert ddr is not None, f"a spare for nothing: {spare}"
            assert ddr.state is Phase.FILLING, f"a spare for what is complete: {ddr}"
            assert spare.state is Phase.RESIDENT, spare
        self.forests.check((record.extent, record.ddr, record.nvme) for record in self.extents.values())
        for group in self.groups.values():
            self._check_group(group)
        for record in self.extents.values():
            for document in record.documents:
                owner = self.documents[document]
                assert record.extent.id in (*owner.document.extents, *owner.before)
        for document, owner in self.documents.unnamed.items():
            is_seen = document in self.faded or document in self.outlasting
            assert is_seen or self.has_copies(owner.document), f"{document} is but a name"
        for shard in self.shards():
            known = self.documents.get(shard.document)
            is_old = known is not None and shard.layout.token_count < known.document.token_count
            assert is_old == (shard in self.retired), f"an earlier version's shard {shard.id} is forgotten"

    def _check_usage(self, placements: Iterable[Placement]) -> None:
        """What each tenant has of each tier, counted anew."""
        counted = {tier: Counter[str]() for tier in Tier}
        for placement in placements:
            counted[placement.tier][placement.tenant] += placement.size_bytes
        for tier, tenants in counted.items():
            assert tenants == self.usage.of(tier), f"usage of {tier.label} differs"

    def _check_group(self, group: Group) -> None:
        for rank, pool in group.pools.items():
            taken = sorted(shard.rows[rank] for shard in group.shards.values())
            assert sum(count for _, count in taken) == pool.used_rows, (group.name, rank)
            busy = [item for item in taken if item[1]]
            for (start, count), (following, _) in pairwise(busy):
                assert start + count <= following, f"shards overlap on {group.name}/{rank}"
        for shard in group.shards.values():
            rows = sum(count for _, count in shard.rows)
            size = sum(copy.size_bytes for copy in shard.copies.values())
            assert rows * group.row_bytes == size, f"rows of shard {shard.id}"
            assert list(shard.copies) == list(shard.spans)[: len(shard.copies)], "a shard holds a front"
