"""Opaque objects against a dict, under every order of events that hypothesis finds.

What a key stands for changes only when it is deleted, so content is a label: namespace, key, and how often it was
deleted. Reads, writes and seals carry labels as the mover carries bytes and checksums; crashes keep what the catalog
and the warm index were told. Whatever happens, a get gives the label or nothing.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from holdfast.kvstore.claims import PinKind, Refresh
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import CorruptExtent, HoldfastError, StorageFailed, StorageFull
from holdfast.kvstore.opaque import object_id, object_key
from holdfast.kvstore.orders import Outcome, ReadIn, Seal, Verify, Write, WriteOut
from holdfast.kvstore.putting import Incoming
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.sections import TenantConfig
from holdfast.kvstore.service import Service
from holdfast.kvstore.state import Left
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fakes import FAR_NS, ManualEffects, tiny_config, tiny_spec

CLIENTS = (1, 2)
SPACES = ("x", "y")
KEYS = (b"a", b"b", b"c", b"d", b"ab")
SIZES = (3000, 9000, 15_000)
BATCH = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)
SELDOM = st.sampled_from([False] * 5 + [True])
TENANT = "t"


def seal_of(label, size_bytes=8):
    """The checksums of what a label stands for."""
    return hashlib.blake2b(label.encode(), digest_size=size_bytes).digest()


def small_config(when_behind="memory", quota=None):
    """Four to twenty objects fill DDR."""
    config = tiny_config()
    ddr = replace(config.ddr, capacity_bytes=128 << 10, slab_bytes=16 << 10)
    nvme = replace(config.nvme, capacity_bytes=256 << 10, segment_bytes=64 << 10, backlog_bytes=32 << 10)
    tenants = {} if quota is None else {TENANT: quota}
    return replace(config, ddr=ddr, nvme=replace(nvme, when_behind=when_behind), tenants=tenants)


def refused(error, *codes):
    """One of these refusals."""
    assert error.code in codes, error


class Machine(RuleBasedStateMachine):
    """Rules are commands, reports and accidents."""

    quota = None

    @initialize(when_behind=st.sampled_from(["memory", "wait"]))
    def start(self, when_behind):
        self.config = small_config(when_behind, self.quota)
        self.clock = ManualClock()
        self.nvme = {}
        self.rows = {"extents": {}, "documents": {}, "pins": {}, "specs": {}}
        self.index = {}  # extents, as the warm index knew them at the start
        self.kept_notes = {"extents": {}, "documents": {}, "pins": {}, "specs": {}}
        self.deleted = {}  # document -> how often
        self.unsure = {}  # document -> labels that a crash may bring back: their deletion was not answered
        self.boot()

    def boot(self):
        self.effects = ManualEffects()
        self.certain = 0
        self.ddr = {}
        self.puts = {}  # id -> (put, [documents])
        self.coming = set()  # documents that are being published
        self.truth = {}  # document -> label
        self.gets = {}  # id -> {slot: label}
        self.pins = set()
        self.service = Service(self.config, self.clock, self.effects, lambda _: bytes(32))
        self.fingerprint = self.service.register_spec(tiny_spec())

    @property
    def objects(self):
        return self.service.objects

    def label(self, document):
        """What a key stands for now."""
        return f"{document}#{self.deleted.get(document, 0)}"

    # What orders do ----------------------------------------------------------------------------

    def end(self, order):
        error, seal = None, b""
        match order:
            case ReadIn(source=source, target=target, extent=extent):
                seal = self.rows["extents"][extent].checksums
                self.ddr[target] = self.nvme[source]
                error = None if seal_of(self.nvme[source], len(seal)) == seal else CorruptExtent("differs")
            case WriteOut(source=source, target=target):
                assert all(row.slot != target for row in self.rows["extents"].values()), "cataloged slot reused"
                self.nvme[target] = self.ddr[source]
            case Verify(slot=slot, extent=extent):
                seal = self.index[extent].checksums
                error = None if seal_of(self.ddr[slot], len(seal)) == seal else CorruptExtent("differs")
            case Seal(slot=slot):
                self.ddr.setdefault(slot, "")
                seal = seal_of(self.ddr[slot], 8 * order.geometry.plane_count)
            case Write(records=records):
                for record in records:
                    self.keep(self.rows, record)
        self.effects.orders.remove(order)
        if error is not None:
            self.pins.clear()  # what is damaged may be theirs
        if hasattr(order, "id"):
            self.service.finished(order.id, Outcome(error=error, checksums=seal, busy_ns=10, elapsed_ns=10))

    @staticmethod
    def keep(rows, record):
        """What a record does to the catalog, or to the index."""
        match record.kind:
            case "put-extent":
                rows["extents"][record.extent.id] = record
            case "drop-extent":
                rows["extents"].pop(record.extent, None)
            case "put-document":
                rows["documents"][record.document.id] = record.document
            case "drop-document":
                rows["documents"].pop((record.tenant, record.name), None)
            case "put-pin":
                rows["pins"][record.pin.document] = record.pin
            case "drop-pin":
                rows["pins"].pop((record.tenant, record.name), None)
            case "put-spec":
                rows["specs"][record.spec.fingerprint()] = record.spec

    def endable(self):
        """Catalog writes keep their order."""
        writes = [order for order in self.effects.orders if isinstance(order, Write)]
        return [order for order in self.effects.orders if order not in writes[1:]]

    def drain(self):
        while self.effects.orders:
            self.end(self.endable()[0])

    @rule(data=st.data(), count=st.integers(1, 4))
    def orders_end(self, data, count):
        for _ in range(count):
            if self.endable():
                self.end(data.draw(st.sampled_from(self.endable()), label="order"))

    @rule()
    def all_orders_end(self):
        self.drain()

    @rule(data=st.data())
    def order_fails(self, data):
        found = [o for o in self.endable() if isinstance(o, ReadIn | WriteOut | Verify)]
        if not found:
            return
        order = data.draw(st.sampled_from(found), label="order")
        error = StorageFull("planted") if isinstance(order, WriteOut) and order.id % 2 else StorageFailed("planted")
        if isinstance(order, ReadIn):
            self.ddr[order.target] = "torn"
        self.pins.clear()  # what is damaged may be theirs
        self.effects.orders.remove(order)
        self.service.finished(order.id, Outcome(error=error))

    @rule(data=st.data())
    def rots(self, data):
        """Bytes on NVMe change."""
        if self.nvme:
            self.nvme[data.draw(st.sampled_from(sorted(self.nvme)), label="slot")] = "rotten"
            self.pins.clear()

    # Commands ----------------------------------------------------------------------------------

    @rule(
        client=st.sampled_from(CLIENTS),
        space=st.sampled_from(SPACES),
        keys=BATCH,
        odd=SELDOM,
        policy=st.sampled_from(WritePolicy),
        tokens_each=st.sampled_from([0, 256]),
        patience_ns=st.sampled_from([50, FAR_NS]),
    )
    def begin(self, client, space, keys, odd, policy, tokens_each, patience_ns):
        self.begin_one(client, space, keys, odd, policy, tokens_each, patience_ns)

    def begin_one(self, client, space, keys, odd, policy, tokens_each=0, patience_ns=FAR_NS):
        documents = [object_id(TENANT, space, key) for key in keys]
        known = {*self.truth, *self.coming}
        sizes = [SIZES[sum(key) % 3] + odd + self.deleted.get(d, 0) for key, d in zip(keys, documents, strict=True)]

        def answered(put):
            if put.ingests:
                self.puts[put.id] = put, documents
            there = {n for n in range(len(keys)) if n not in put.ingests and n not in put.refused}
            for number in there:
                assert documents[number] in known, "said to be there"

        deadline_ns = min(FAR_NS, self.clock.monotonic_ns() + patience_ns)
        incoming = Incoming(TENANT, space, policy, tokens_each)
        self.objects.begin_put(client, incoming, list(zip(keys, sizes, strict=True)), deadline_ns, answered)
        self.certain = len(self.effects.notes)

    @precondition(lambda self: self.puts)
    @rule(data=st.data(), left_out=st.sets(st.integers(0, 3), max_size=2))
    def commit(self, data, left_out):
        self.commit_one(data.draw(st.sampled_from(sorted(self.puts))), left_out)

    def commit_one(self, number, left_out=()):
        put, documents = self.puts.pop(number)
        seals, filled = [], {}
        for place, ingest in sorted(put.ingests.items()):
            label = self.label(documents[place])
            copy = ingest.filled.get(ingest.document.extents[0])
            if place in left_out or copy is None:
                seals.append(b"")
                continue
            self.ddr[copy.slot] = label
            seals.append(seal_of(label))
            filled[place] = label

        def answered(put):
            for place, label in filled.items():
                self.coming.discard(documents[place])
                if place not in put.refused:
                    self.truth.setdefault(documents[place], label)

        self.coming |= {documents[place] for place in filled}
        try:
            self.objects.commit_put(put.client, put.id, seals, FAR_NS, answered)
        except HoldfastError as error:
            refused(error, "claim-not-found")
            self.coming -= {documents[place] for place in filled}

    @rule(space=st.sampled_from(SPACES), keys=BATCH, policy=st.sampled_from(WritePolicy))
    def store(self, space, keys, policy):
        """From begin to end, so that there is something to have accidents with."""
        known = set(self.puts)
        self.begin_one(1, space, keys, False, policy)
        self.drain()
        for number in set(self.puts) - known:
            self.commit_one(number)
        self.drain()

    @precondition(lambda self: self.puts)
    @rule(data=st.data())
    def abort(self, data):
        put, _ = self.puts.pop(data.draw(st.sampled_from(sorted(self.puts))))
        self.objects.abort_put(put.client, put.id)

    @rule(
        client=st.sampled_from(CLIENTS),
        space=st.sampled_from(SPACES),
        keys=BATCH,
        patience_ns=st.sampled_from([50, FAR_NS]),
    )
    def get(self, client, space, keys, patience_ns):
        documents = [object_id(TENANT, space, key) for key in keys]

        def answered(get):
            slots = {}
            for number, attach in get.found.items():
                document, slot = documents[number], attach.loading.records[0].ddr.slot
                assert document in {*self.truth, *self.coming}, f"{document} was deleted"
                assert self.ddr[slot] == self.label(document), "somebody else's bytes, or older ones"
                slots[slot] = self.ddr[slot]
            self.gets[get.id] = client, slots

        deadline_ns = min(FAR_NS, self.clock.monotonic_ns() + patience_ns)
        self.objects.get(client, TENANT, space, keys, deadline_ns, answered)

    @precondition(lambda self: self.gets)
    @rule(data=st.data())
    def release(self, data):
        number = data.draw(st.sampled_from(sorted(self.gets)))
        client, _ = self.gets.pop(number)
        self.objects.release(client, number)

    @rule(space=st.sampled_from(SPACES), keys=BATCH)
    def find_and_touch(self, space, keys):
        before = self.service.state.used_bytes()
        found = self.objects.find(TENANT, space, keys)
        assert self.service.state.used_bytes() == before
        for key, tier in zip(keys, found, strict=True):
            assert tier is None or object_id(TENANT, space, key) in {*self.truth, *self.coming}
        self.objects.touch(TENANT, space, keys)

    @rule(space=st.sampled_from(SPACES), keys=BATCH)
    def delete(self, space, keys):
        documents = [object_id(TENANT, space, key) for key in keys]
        there = [document in self.service.state.documents for document in documents]
        labels = {document: self.label(document) for document in documents}
        gone = set()

        def answered(result):
            if isinstance(result, HoldfastError):
                return
            assert not any(one and not was for one, was in zip(result, there, strict=True))
            self.certain = len(self.effects.notes)
            for document in gone:
                self.unsure.get(document, set()).discard(labels[document])

        self.objects.delete(TENANT, space, keys, answered)
        for document, was in zip(documents, there, strict=True):
            if was and document not in self.service.state.documents:
                gone.add(document)
                self.truth.pop(document, None)
                self.coming.discard(document)
                self.pins.discard(document)
        for document in gone:
            self.unsure.setdefault(document, set()).add(labels[document])
            self.deleted[document] = self.deleted.get(document, 0) + 1
        for number in [n for n, (_, documents) in self.puts.items() if gone.intersection(documents)]:
            put, _ = self.puts.pop(number)  # what they were about to write is not what the key stands for any more
            self.objects.abort_put(put.client, put.id)

    @rule(
        space=st.sampled_from(SPACES),
        keys=st.none() | BATCH,
        kind=st.sampled_from(PinKind),
        floor=st.sampled_from(Tier),
    )
    def pin(self, space, keys, kind, floor):
        prefix = b"a" if keys is None else None
        documents = self.objects.chosen(TENANT, space, keys, prefix)
        assert keys is not None or all(object_key(document).startswith(b"a") for document in documents)
        before = self.service.state.pins.all()
        try:
            pins = self.objects.pin(documents, floor, None, "me", "why", kind, Refresh.NEVER, lambda _: None)
        except HoldfastError as error:
            refused(error, "pins-overcommitted", "invalid-request")
            assert self.service.state.pins.all() == before
            return
        self.pins -= {pin.document for pin in pins}
        if kind is PinKind.HARD:
            self.pins |= {
                d for d in documents if self.service.state.has_copies(self.service.state.documents[d].document)
            }

    @rule(space=st.sampled_from(SPACES))
    def unpin(self, space):
        documents = self.objects.chosen(TENANT, space, None, None)
        self.objects.unpin(documents, lambda _: None)
        self.pins -= set(documents)

    @rule(space=st.sampled_from(SPACES), keys=BATCH, sizes=st.tuples(st.integers(1, 8), st.integers(0, 2)))
    def sink_and_get(self, space, keys, sizes):
        """Others push objects down; somebody wants some back."""
        self.drain()
        for tier, count in zip((Tier.DDR, Tier.NVME), sizes, strict=True):
            try:
                self.service.evict(None, tier, count * 12_000 + 1, FAR_NS, lambda _: None)
            except HoldfastError as error:
                refused(error, "no-capacity")
        self.drain()
        self.get(2, space, keys, FAR_NS)

    @rule(length=st.sampled_from([32, 100, 200]), policy=st.sampled_from(WritePolicy))
    def a_document_comes(self, length, policy):
        """Others want room too."""
        tokens = np.arange(length, dtype=np.uint32)
        opened = []
        try:
            self.service.begin_ingest(
                9, DocumentId(TENANT, f"doc{length}"), self.fingerprint, tokens, policy, None, 64, FAR_NS, opened.append
            )
            self.drain()
            for ingest in opened:
                if not isinstance(ingest, HoldfastError):
                    for extent in ingest.passage.unsealed:
                        self.ddr[ingest.filled[extent.id].slot] = extent.id
                    self.service.commit_ingest(9, ingest.id, lambda _: None)
        except HoldfastError:
            pass
        self.drain()
        self.service.disconnect(9)

    @rule(nanoseconds=st.sampled_from([1, 60, 2000]))
    def tick(self, nanoseconds):
        self.clock.advance(nanoseconds)
        self.service.tick()

    # Accidents ---------------------------------------------------------------------------------

    @rule(client=st.sampled_from(CLIENTS), accident=SELDOM)
    def client_goes(self, client, accident):
        if accident:
            self.service.disconnect(client)
            self.puts = {i: item for i, item in self.puts.items() if item[0].client != client}
            self.gets = {i: item for i, item in self.gets.items() if item[0] != client}

    @rule(data=st.data(), is_warm=st.booleans(), accident=SELDOM)
    def restart(self, data, is_warm, accident):
        if not accident:
            return
        index = {"extents": {}, "documents": {}, "pins": {}, "specs": {}}
        if is_warm:
            notes = self.effects.notes
            for record in notes[: data.draw(st.integers(self.certain, len(notes)), label="notes")]:
                self.keep(self.kept_notes, record)
            index = self.kept_notes
            for order in self.effects.orders:
                if isinstance(order, ReadIn):
                    self.ddr[order.target] = "torn"
        else:
            self.kept_notes = index
        self.start_again(index)

    def start_again(self, index):
        rows, ddr = self.rows, self.ddr
        needed = {extent for document in rows["documents"].values() for extent in document.extents}
        rows["extents"] = {i: row for i, row in rows["extents"].items() if i in needed}  # orphans go
        before = {**self.truth, **{document: self.label(document) for document in self.coming}}
        specs = list(rows["specs"].values())
        self.boot()
        self.ddr, self.index = ddr, index["extents"]
        self.service.restore(
            specs,
            [(row.extent, row.slot) for row in rows["extents"].values()],
            list(rows["documents"].values()),
            list(rows["pins"].values()),
            left=Left(
                specs=list(index["specs"].values()),
                extents=[(row.extent, row.slot) for row in index["extents"].values()],
                documents=list(index["documents"].values()),
                slabs=range(self.service.state.ddr.slab_count),
            ),
        )
        for document, owner in self.service.state.documents.unnamed.items():
            (copies,) = (self.service.state.extents[extent].placements() for extent in owner.document.extents)
            found = {Tier.NVME: rows["extents"], Tier.DDR: index["extents"]}  # a pinned one may be on its way up
            kept = {found[c.tier][c.extent].checksums for c in copies if c.extent in found[c.tier]}
            allowed = {before.get(document), *self.unsure.get(document, ())} - {None}
            label = self.label(document)
            if kept:  # else it is pinned, and lost
                (label,) = (label for label in allowed if {seal_of(label)} == kept)  # else it came back, or as two
            self.deleted[document] = int(label.rpartition("#")[2])
            self.truth[document] = label
        self.unsure.clear()

    @rule(accident=SELDOM)
    def everybody_goes(self, accident):
        """With no claims and no orders left, nothing is held, waits or lingers."""
        if not accident:
            return
        for client in (*CLIENTS, 9):
            self.service.disconnect(client)
        self.puts, self.gets = {}, {}
        self.drain()
        self.service.tick()
        self.drain()
        service = self.service
        assert not self.objects.puts.open
        assert not self.objects.gets.open
        assert not service.room.waiting
        assert not service.writes.backlog_bytes
        assert not service.store.orders_in_flight
        assert not service.state.leases
        assert not service.state.private
        assert all(copy.holds == 0 for copy in service.state.all_placements())

    # What always holds -------------------------------------------------------------------------

    @invariant()
    def state_agrees_with_itself(self):
        if hasattr(self, "service"):
            self.service.state.check()
            self.service.state.documents.check()

    @invariant()
    def leased_bytes_stay(self):
        if hasattr(self, "service"):
            for _, slots in self.gets.values():
                assert all(self.ddr[slot] == label for slot, label in slots.items())

    @invariant()
    def pinned_objects_stay(self):
        if hasattr(self, "service"):
            documents = self.service.state.documents
            for document in self.pins:
                assert document in documents, f"{document} is pinned, and has gone"
                assert self.service.state.has_copies(documents[document].document), f"{document} is pinned, and lost"


class QuotaMachine(Machine):
    """The same of a tenant that may have less than there is."""

    quota = TenantConfig(ddr_maximum_bytes=64 << 10, nvme_maximum_bytes=128 << 10, ddr_lease_bytes=32 << 10)


Machine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    report_multiple_bugs=False,
)
QuotaMachine.TestCase.settings = settings(Machine.TestCase.settings, max_examples=20)
TestObjects = pytest.mark.timeout(400)(Machine.TestCase)
TestObjectsOfATenant = pytest.mark.timeout(400)(QuotaMachine.TestCase)
