"""The service against a naive model, under every order of events that hypothesis finds.

The model knows documents as tokens, and bytes as labels: what a slot or a shard's tokens hold is the whole prefix that
they were computed from. Reads, writes, loads and saves move labels; each must move the right one.
"""

from dataclasses import replace

import numpy as np
import pytest
from holdfast.kvstore.claims import PinKind
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import CorruptExtent, HoldfastError, StorageFailed, StorageFull
from holdfast.kvstore.extent import cut
from holdfast.kvstore.keys import block_keys
from holdfast.kvstore.orders import (
    CloseShard,
    LoadShard,
    OpenShard,
    ReadIn,
    RetireSlab,
    SaveShard,
    Seal,
    Verify,
    Write,
    WriteOut,
)
from holdfast.kvstore.residency import State, Tier
from holdfast.kvstore.sections import TenantConfig
from holdfast.kvstore.service import Service
from holdfast.kvstore.state import Left
from holdfast.kvstore.writes import RETRY_NS
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fakes import EXTENT_BYTES, ManualEffects, tiny_config, tiny_spec

STEP = 32  # tokens per extent
LAYERS = 2
WRITERS = (1, 2)
RANKS = (11, 12)
NAMES = ("a", "b", "c", "d")
UNNAMED = ""
MADE = (*NAMES, UNNAMED, UNNAMED)
ASKED = (*NAMES, "?0", "?1")  # the last ones are unnamed documents that are there
LENGTHS = (1, 31, 32, 33, 64, 90, 128, 250)
OLD = 1000  # added to the number of a client of an earlier daemon
SELDOM = st.sampled_from([False] * 5 + [True])
NOT_ANSWERED = (OpenShard, CloseShard, RetireSlab)


def stream(number, length):
    """Three streams that share their first 40 tokens."""
    return tuple(i if i < 40 else 100 * number + i % 50 for i in range(length))


def prefixes(tokens):
    """What each extent of a document holds, by its first token."""
    return {start: tokens[: start + STEP] for start in range(0, len(tokens), STEP)}


def small_config(ddr_extents, nvme_extents, window_extents):
    """So many extents fill each tier, and pass through DDR at once."""
    config = tiny_config()
    window_bytes = window_extents * EXTENT_BYTES
    ddr = replace(config.ddr, capacity_bytes=ddr_extents * EXTENT_BYTES, slab_bytes=32 << 10, window_bytes=window_bytes)
    nvme = replace(config.nvme, capacity_bytes=nvme_extents * EXTENT_BYTES, segment_bytes=64 << 10)
    nvme = replace(nvme, backlog_bytes=2 * EXTENT_BYTES)
    return replace(config, ddr=ddr, nvme=nvme)


class Machine(RuleBasedStateMachine):
    """Rules are commands, reports and accidents; what follows each rule must hold whatever came before."""

    config = small_config(8, 8, 8)
    rows_per_rank = 80

    @initialize(when_behind=st.sampled_from(["memory", "wait"]))
    def start(self, when_behind):
        self.config = replace(self.config, nvme=replace(self.config.nvme, when_behind=when_behind))
        self.clock = ManualClock()
        self.nvme = {}
        self.rows = {"extents": {}, "documents": {}, "pins": {}}
        self.index = {}  # warm: id of an extent, or of a document -> its record
        self.scribblers = {}  # clients of an earlier daemon -> slots that they may still write to
        self.adopted = set()  # slots that the last daemon filled
        self.boot()

    def boot(self):
        self.was_given = False
        self.certain = 0  # notes that a kill does not take away: slots were given to writers since
        self.effects = ManualEffects(self.submitted)
        self.ddr = {}
        self.hbm = {}
        self.shards = {}  # shard -> what its document's extents hold
        self.labels = {}  # extent id -> what it holds
        self.expected = {}  # order id -> label that it moves
        self.documents = {}
        self.absorbed = {}  # unnamed document -> the one that continues it
        self.were_pinned = set()  # unnamed documents
        self.policies = {}
        self.fronts = {}  # id of an ingest -> unnamed documents that it continues
        self.ingests = {}  # id -> (ingest, tokens, name, group)
        self.leases = {}  # id -> (attach, name, group, {slot: extent id})
        self.pins = {}
        self.floored = set()
        self.has_group = False
        self.service = Service(self.config, self.clock, self.effects, lambda _: bytes(32))
        self.fingerprint = self.service.register_spec(tiny_spec())

    # What orders do ----------------------------------------------------------------------------

    def label_at(self, slot, tier):
        found = [
            copy.extent
            for copy in self.service.state.all_placements()
            if copy.slot == slot and copy.tier is tier and copy.state is not State.LOST
        ]
        assert len(found) == 1, f"{tier} {slot} belongs to {found}"
        return self.labels[found[0]]

    def submitted(self):
        order = self.effects.orders[-1]
        state = self.service.state if hasattr(self, "service") else None
        match order:
            case ReadIn(source=source, target=target):
                # The record takes its copy before it asks for the bytes.
                self.expected[order.id] = self.label_at(target, Tier.DDR)
                assert self.nvme[source] == self.expected[order.id], "reads another extent's bytes"
            case WriteOut(source=source, target=target):
                self.expected[order.id] = self.ddr[source]
                assert all(slot != target for _, slot in self.rows["extents"].values()), "cataloged slot reused"
                self.nvme[target] = "torn"
            case OpenShard(shard=shard, resident_tokens=resident):
                if shard not in self.shards:
                    found = next(s for s in state.shards() if s.id == shard)
                    self.shards[shard] = {start: self.labels[e] for e, (start, _) in found.spans.items()}
                    assert resident == 0
                here = {start for number, start in self.hbm if number == shard}
                for start in here:
                    if start >= resident:
                        del self.hbm[shard, start]
                front = {start for start in self.shards[shard] if start < resident}
                assert all((shard, start) in self.hbm for start in front), "rows said to be resident are not"
            case CloseShard(shard=shard):
                if not any(s.id == shard for s in state.shards()):
                    self.hbm = {key: label for key, label in self.hbm.items() if key[0] != shard}
            case SaveShard():
                self.certain = len(self.effects.notes)
            case RetireSlab(slab=slab):
                assert state.ddr.owner(slab) is not None, "memory goes when another owner takes the slab"

    def carry_out(self, order):
        """What the order does to memory when it ends well."""
        match order:
            case ReadIn(source=source, target=target):
                assert self.nvme[source] == self.expected[order.id], "its source was overwritten"
                self.ddr[target] = self.nvme[source]
            case WriteOut(source=source, target=target):
                assert self.ddr[source] == self.expected[order.id], "its source was overwritten"
                self.nvme[target] = self.ddr[source]
            case Seal(slot=slot):
                assert self.ddr[slot] == self.label_at(slot, Tier.DDR)
            case LoadShard(shard=shard, parts=parts, layer_stop=stop):
                for part in parts:
                    if not self.is_open(shard) or self.is_lost(part.slot):
                        continue  # nobody will use it
                    assert self.ddr[part.slot] == self.shards[shard][part.start], "loads another extent's bytes"
                    if stop == LAYERS:
                        self.hbm[shard, part.start] = self.ddr[part.slot]
            case SaveShard(shard=shard, parts=parts):
                for part in parts:
                    self.ddr[part.slot] = self.hbm.get((shard, part.start), "torn")
            case Write(records=records):
                for record in records:
                    self.apply(record)

    def is_open(self, shard):
        return any(other.id == shard for other in self.service.state.shards())

    def is_lost(self, slot):
        return any(copy.slot == slot and copy.tier is Tier.DDR for copy in self.service.state.leaving)

    def apply(self, record):
        match record.kind:
            case "put-extent":
                taken = [i for i, (_, slot) in self.rows["extents"].items() if slot == record.slot]
                assert taken in ([], [record.extent.id]), "two rows for one slot"
                self.rows["extents"][record.extent.id] = (record.extent, record.slot)
            case "drop-extent":
                self.rows["extents"].pop(record.extent, None)
            case "put-document":
                self.rows["documents"][record.document.id] = record.document
            case "drop-document":
                self.rows["documents"].pop((record.tenant, record.name), None)
            case "put-pin":
                self.rows["pins"][record.pin.document] = record.pin
            case "drop-pin":
                self.rows["pins"].pop((record.tenant, record.name), None)

    def endable(self):
        """Orders that could end next: catalog writes and each group's commands keep their order, the rest does not."""
        found = []
        seen = set()
        for order in self.effects.orders:
            lane = "catalog" if isinstance(order, Write) else getattr(order, "group", None)
            if lane is None or lane not in seen:
                found.append(order)
            seen.add(lane)
        return found

    def end(self, order):
        if isinstance(order, Verify) and self.ddr.get(order.slot) != self.labels[order.extent]:
            self.effects.fail(self.service, order, CorruptExtent("planted"))
            return
        self.carry_out(order)
        self.effects.complete(self.service, order)

    def drain(self):
        while self.effects.orders:
            self.end(self.endable()[0])

    @rule(data=st.data())
    def order_ends(self, data):
        if self.endable():
            self.end(data.draw(st.sampled_from(self.endable()), label="order"))

    @rule()
    def all_orders_end(self):
        self.drain()

    @rule(data=st.data())
    def layer_arrives(self, data):
        reads = [order for order in self.effects.orders if isinstance(order, ReadIn)]
        if reads:
            order = data.draw(st.sampled_from(reads))
            self.ddr[order.target] = self.nvme[order.source]
            self.service.advanced(order.id, 1)

    @rule(data=st.data())
    def order_fails(self, data):
        orders = [o for o in self.endable() if not isinstance(o, NOT_ANSWERED) and not self.has_spec(o)]
        if not orders:
            return
        order = data.draw(st.sampled_from(orders), label="order")
        error = StorageFailed("planted")
        if isinstance(order, WriteOut) and data.draw(st.booleans(), label="full"):
            error = StorageFull("planted")
        if isinstance(order, ReadIn) and data.draw(st.booleans(), label="corrupt"):
            error = CorruptExtent("planted")
            self.floored = {(name, label) for name, label in self.floored if label != self.expected[order.id]}
        if isinstance(order, ReadIn):
            self.ddr[order.target] = "torn"
        if isinstance(order, SaveShard):
            for part in order.parts:
                self.ddr[part.slot] = "torn"
                self.floored = {(n, x) for n, x in self.floored if x != self.shards[order.shard][part.start]}
        self.effects.fail(self.service, order, error)

    def has_spec(self, order):
        return isinstance(order, Write) and any(record.kind == "put-spec" for record in order.records)

    def refused(self, error, expected, code):
        """A refusal that the model knew of, or one of this code."""
        assert expected or error.code == code

    # Commands ----------------------------------------------------------------------------------

    @rule(
        client=st.sampled_from(WRITERS),
        name=st.sampled_from(MADE),
        tokens=st.builds(stream, st.integers(1, 3), st.sampled_from(LENGTHS)),
        policy=st.sampled_from(WritePolicy),
        grouped=st.booleans(),
    )
    def begin(self, client, name, tokens, policy, grouped):
        self.begin_one(client, name, tokens, policy, grouped)

    @rule(
        name=st.sampled_from(MADE),
        tokens=st.builds(stream, st.integers(1, 3), st.sampled_from(LENGTHS)),
        policy=st.sampled_from(WritePolicy),
        grouped=st.booleans(),
    )
    def store(self, name, tokens, policy, grouped):
        """An ingest from begin to end, so that there is something to have accidents with."""
        known = set(self.ingests)
        self.begin_one(1, name, tokens, policy, grouped)
        self.drain()
        for ingest in set(self.ingests) - known:
            for _ in tokens[::STEP]:
                self.hand_over_one(ingest, 1)  # nothing is done where all have slots
                self.drain()
            self.commit_one(ingest)
        self.drain()

    def begin_one(self, client, name, tokens, policy, grouped):
        document = DocumentId("t", name)
        group = "g" if grouped else None
        array = np.array(tokens, dtype=np.uint32)
        deadline_ns = self.clock.monotonic_ns() + 50

        def granted(result):
            if not isinstance(result, HoldfastError):
                self.ingests[result.id] = (result, tokens, result.document.id.name, group)
                self.was_given = True

        cuts = cut(block_keys(array, tiny_spec(), bytes(32)), len(tokens), tiny_spec(), "t")
        for extent, label in zip(cuts, prefixes(tokens).values(), strict=True):
            assert self.labels.setdefault(extent.id, label) == label, "one id for two contents"
        before = self.service.state.used_bytes()
        unnamed = [document.name for document in self.service.state.documents.unnamed] if name == UNNAMED else []
        fronts = [other for other in unnamed if 16 <= len(self.documents[other]) < len(tokens)]
        fronts = [other for other in fronts if tokens[: len(self.documents[other])] == self.documents[other]]
        try:
            ingest = self.service.begin_ingest(
                client, document, self.fingerprint, array, policy, group, 48, deadline_ns, granted
            )
        except HoldfastError:
            assert self.service.state.used_bytes() == before
            return
        self.fronts[ingest.id] = fronts

    @precondition(lambda self: self.ingests)
    @rule(data=st.data())
    def commit(self, data):
        self.commit_one(data.draw(st.sampled_from(sorted(self.ingests))))

    def commit_one(self, number):
        ingest, tokens, name, _ = self.ingests[number]
        self.fill(ingest, tokens)
        fronts = self.fronts.get(number, ())

        def done(result):
            if not isinstance(result, HoldfastError):
                self.documents[name] = tokens
                self.absorbed.pop(name, None)
                self.absorbed |= {other: name for other in fronts if other in self.documents}

        seals = []
        if ingest.group is None and len(tokens) % 2:  # every other one, so that some are left to the daemon
            seals = [b"made-by-" * 4 if n % 2 else b"" for n, _ in enumerate(ingest.passage.unsealed)]
        try:
            self.service.commit_ingest(ingest.client, ingest.id, done, seals)
        except HoldfastError:
            assert ingest.stage != "filling" or ingest.passage.todo

    def fill(self, ingest, tokens):
        """Its writer, or its group, makes all KV that it has room for."""
        labels = prefixes(tokens)
        if ingest.stage == "filling" and ingest.shard is not None:
            for extent in ingest.missing:
                self.hbm[ingest.shard.id, extent.start] = labels[extent.start]
        elif ingest.stage == "filling":
            for extent in ingest.passage.unsealed:
                self.ddr[ingest.filled[extent.id].slot] = labels[extent.start]

    @precondition(lambda self: self.ingests)
    @rule(data=st.data(), count=st.integers(1, 2))
    def hand_over(self, data, count):
        self.hand_over_one(data.draw(st.sampled_from(sorted(self.ingests))), count)

    def hand_over_one(self, number, count):
        ingest, tokens, *_ = self.ingests[number]
        self.fill(ingest, tokens)
        filled = [(extent.start, extent.group) for extent in ingest.passage.unsealed[:count]]
        try:
            seals = [b"made-by-" * 4 for _ in filled] if len(tokens) % 2 else []
            self.service.next_slots(ingest.client, ingest.id, filled, seals, lambda _: None)
        except HoldfastError as error:
            is_expected = error is ingest.error or error.code in ("invalid-request", "in-use")
            self.refused(error, is_expected, "claim-not-found")

    @rule(
        name=st.sampled_from(MADE),
        tokens=st.builds(stream, st.integers(1, 3), st.sampled_from(LENGTHS)),
        count=st.integers(1, 4),
        steps=st.integers(0, 5),
        commits=st.booleans(),
    )
    def is_put(self, name, tokens, count, steps, commits):
        """A part of a document is on its way to NVMe when it is committed, or something else happens."""
        known = set(self.ingests)
        self.begin_one(1, name, tokens, WritePolicy.THROUGH, False)
        self.drain()
        for ingest in set(self.ingests) - known:
            self.hand_over_one(ingest, count)
        for _ in range(steps):
            if self.endable():
                self.end(self.endable()[0])
        for ingest in set(self.ingests) - known:
            if commits:
                self.commit_one(ingest)

    @rule(
        name=st.sampled_from(NAMES),
        number=st.integers(1, 3),
        lengths=st.lists(st.sampled_from(LENGTHS), min_size=2, max_size=3, unique=True).map(sorted),
        policies=st.tuples(st.sampled_from(WritePolicy), st.sampled_from(WritePolicy)),
        grouped=st.booleans(),
        asks=st.booleans(),
    )
    def converse(self, name, number, lengths, policies, grouped, asks):
        """A document grows while somebody reads it."""
        if grouped:
            self.group_comes()
        for length in lengths:
            self.store(name, stream(number, length), policies[length > 64], grouped)
            if asks:
                self.attach_one(2, name, grouped)

    @precondition(lambda self: self.ingests)
    @rule(data=st.data())
    def abort(self, data):
        ingest, *_ = self.ingests[data.draw(st.sampled_from(sorted(self.ingests)))]
        self.abort_one(ingest)

    def abort_one(self, ingest):
        try:
            self.service.abort_ingest(ingest.client, ingest.id)
        except HoldfastError:
            assert ingest.stage == "ended"

    @rule(client=st.sampled_from(WRITERS), name=st.sampled_from(ASKED), grouped=st.booleans())
    def attach(self, client, name, grouped):
        self.attach_one(client, self.real(name), grouped)

    @rule(
        client=st.sampled_from(WRITERS),
        tokens=st.builds(stream, st.integers(1, 4), st.sampled_from(LENGTHS)),
        extra=st.integers(0, 1),
    )
    def attach_prefix(self, client, tokens, extra):
        """What is leased begins as these tokens do, and nothing that could be attached begins longer so."""
        tokens += (999,) * extra
        keys = b"".join(block_keys(np.array(tokens, dtype=np.uint32), tiny_spec(), bytes(32)))
        deadline_ns = self.clock.monotonic_ns() + 50
        found = []

        def granted(result):
            if not isinstance(result, HoldfastError):
                slots = {record.ddr.slot: record.extent.id for record in result.loading.records}
                self.leases[result.lease.id] = (result, result.owner.id.name, None, slots)
                found.append(result)

        longest = max((self.shared(name, tokens) for name in self.documents), default=0)
        try:
            count = self.service.attach_prefix(client, "t", self.fingerprint, keys, deadline_ns, granted)
        except HoldfastError as error:
            self.refused(error, error.code == "prefix-not-found" and not longest, "no-capacity")
            return
        assert count == longest
        assert all(self.documents[result.owner.id.name][:count] == tokens[:count] for result in found)

    def shared(self, name, tokens):
        """Leading tokens that a document has of these, block by block, as far as it has copies."""
        document, count = self.documents[name], 0
        for extent in self.service.state.documents[DocumentId("t", name)].document.extents:
            if self.service.state.extents[extent].source() is None:
                return count
            label, before = self.labels[extent], count
            while count < len(label) and label[: min(len(label), count + 16)] == tokens[: count + 16]:
                count = min(len(label), count + 16)
            if count < before + STEP:
                return count
        assert count <= len(document)
        return count

    def real(self, name):
        """Its name, or that of some unnamed document."""
        there = sorted(self.service.state.documents.unnamed)
        return there[int(name[1:]) % len(there)].name if name.startswith("?") and there else name

    def forget(self):
        """Unnamed documents may have gone, those of which something is lost, or which another continues."""
        state = self.service.state
        there = {document.name for document in state.documents.unnamed}
        for name in [name for name in self.documents if "/" in name and name not in there]:
            tokens, absorber = self.documents.pop(name), self.absorbed.pop(name, None)
            copied = {self.labels[record.extent.id] for record in state.extents.values() if record.placements()}
            is_whole = set(prefixes(tokens).values()) <= copied
            assert not is_whole or absorber in self.documents, f"{name} has gone, and nothing was lost"
            assert not any(other == name for _, other, *_ in self.leases.values()), f"{name} has gone, and was leased"
            assert name not in self.pins, f"{name} has gone, and was pinned"

    @rule(name=st.sampled_from(ASKED), grouped=st.booleans())
    def sink_and_ask(self, name, grouped):
        """A document goes down to NVMe, and somebody wants it back."""
        name = self.real(name)
        self.drain()
        self.evict_one(name, Tier.DDR)
        self.drain()
        self.attach_one(2, name, grouped)

    def attach_one(self, client, name, grouped):
        group = "g" if grouped else None

        def granted(result):
            if isinstance(result, HoldfastError):
                return
            records = [] if grouped else result.loading.records
            self.leases[result.lease.id] = (result, name, group, {r.ddr.slot: r.extent.id for r in records})

        deadline_ns = self.clock.monotonic_ns() + 50
        try:
            self.service.attach(client, DocumentId("t", name), None, group, None, deadline_ns, granted)
        except HoldfastError as error:
            if error.code == "document-not-found":
                self.forget()
                assert name not in self.documents
            elif error.code == "document-incomplete":
                assert not self.all_there(name, group)

    def all_there(self, name, group):
        """Whether every extent has a copy outside HBM, or in the document's own shard."""
        state = self.service.state
        shards = state.groups[group].shards.values() if group in state.groups else ()
        own = next((s for s in shards if s.key == (DocumentId("t", name), len(self.documents[name]))), None)
        shard = own.id if own is not None else None
        have = {
            self.labels[copy.extent]
            for copy in state.all_placements()
            if copy.readable and copy not in state.leaving and (copy.tier is not Tier.HBM or copy.shard == shard)
        }
        return set(prefixes(self.documents[name]).values()) <= have

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def detach(self, data):
        self.detach_one(data.draw(st.sampled_from(sorted(self.leases))))

    def detach_one(self, lease):
        attach, *_ = self.leases.pop(lease)
        self.service.detach(attach.lease.owner, lease)

    @rule(
        name=st.sampled_from(ASKED),
        floor=st.sampled_from(Tier),
        seconds=st.sampled_from([None, 1e-6]),
        kind=st.sampled_from([PinKind.HARD, PinKind.HARD, PinKind.SOFT]),
    )
    def pin(self, name, floor, seconds, kind):
        """A soft pin only says who leaves first, so what is known of sinking is of hard ones."""
        name = self.real(name)
        try:
            self.service.pin(DocumentId("t", name), floor, seconds, "me", "test", kind)
        except HoldfastError as error:
            is_memory = floor is Tier.NVME and error.code == "invalid-request"  # which NVMe never has
            self.refused(error, name not in self.documents or is_memory, "pins-overcommitted")
            return
        self.floored = {(other, label) for other, label in self.floored if other != name}
        self.pins.pop(name, None)
        self.were_pinned.add(name)
        if kind is PinKind.HARD:
            self.pins[name] = floor

    @rule(name=st.sampled_from(ASKED))
    def unpin(self, name):
        name = self.real(name)
        try:
            self.service.unpin(DocumentId("t", name))
        except HoldfastError:
            assert name not in self.pins
            return
        self.pins.pop(name, None)

    @rule(
        client=st.sampled_from(WRITERS),
        name=st.sampled_from(ASKED),
        grouped=st.booleans(),
        seconds=st.sampled_from([None, 1e-6]),
        takes_back=SELDOM,
    )
    def hint(self, client, name, grouped, seconds, takes_back):
        name = self.real(name)
        document, group = DocumentId("t", name), "g" if grouped else None
        try:
            self.service.prefetching.hint(client, document, group, 1 + client, seconds, "")
        except HoldfastError as error:
            self.refused(error, name not in self.documents or (grouped and not self.has_group), "")
        if takes_back:
            self.service.prefetching.cancel(client, document, group, "")

    @rule(name=st.sampled_from(ASKED), tier=st.sampled_from(Tier))
    def evict(self, name, tier):
        self.evict_one(self.real(name), tier)

    def evict_one(self, name, tier):
        document = DocumentId("t", name)
        try:
            plan = self.service.upkeep.plan_eviction(document, tier, 0)
            assert self.service.evict(document, tier, 0, self.clock.monotonic_ns() + 50, lambda _: None) == plan
        except HoldfastError:
            self.forget()
            leased = any(other == name for _, other, *_ in self.leases.values())
            waiting = any(a.lease.document == document for a in self.service.attaches.open.values())
            assert name not in self.documents or leased or waiting or name in self.pins

    @rule(tier=st.sampled_from([Tier.DDR, Tier.NVME]), count=st.integers(1, 4))
    def evict_bytes(self, tier, count):
        try:
            plan = self.service.evict(None, tier, count << 14, self.clock.monotonic_ns() + 50, lambda _: None)
            assert len(plan) == count
        except HoldfastError as error:
            self.refused(error, False, "no-capacity")

    @rule(name=st.sampled_from(ASKED), accident=SELDOM)
    def delete(self, name, accident):
        if not accident:
            return
        name = self.real(name)
        try:
            self.service.delete(DocumentId("t", name))
        except HoldfastError:
            return
        self.documents.pop(name)

    @rule(nanoseconds=st.sampled_from([1, 60, 2000, RETRY_NS]))
    def tick(self, nanoseconds):
        self.clock.advance(nanoseconds)
        self.service.tick()
        self.pins = {name: floor for name, floor in self.pins.items() if self.service.state.pins.hard(("t", name))}

    # Accidents ---------------------------------------------------------------------------------

    @rule()
    def group_comes(self):
        if not self.has_group:
            for rank, client in enumerate(RANKS):
                self.service.register_rank(client, "g", rank, 2, 1, self.fingerprint, self.rows_per_rank)
            self.has_group = True

    @rule(client=st.sampled_from(WRITERS), accident=SELDOM)
    def writer_goes(self, client, accident):
        if not accident:
            return
        self.service.disconnect(client)
        self.leases = {i: item for i, item in self.leases.items() if item[0].lease.owner != client}

    @rule(client=st.sampled_from(RANKS), accident=SELDOM)
    def rank_goes(self, client, accident):
        if not self.has_group or not accident:
            return
        self.has_group = False
        self.service.disconnect(client)
        self.hbm.clear()
        failed = [i for i, (a, _, group, _) in self.leases.items() if group and a.loading.phase == "moving"]
        assert not failed, "an attach waits for a group that is gone"
        for order in [o for o in self.effects.orders if isinstance(o, LoadShard)]:
            self.effects.fail(self.service, order, StorageFailed("gone"))  # late, and heard by nobody

    @rule(accident=SELDOM)
    def restart(self, accident):
        if not accident:
            return
        self.scribblers, self.adopted, self.index = {}, set(), {}
        rows = self.rows["documents"]
        self.start_again(None)
        has_any = {d for d, row in rows.items() if not self.rows["extents"].keys().isdisjoint(row.extents)}
        assert set(self.service.state.documents) == {d for d in rows if d.namespace is None} | has_any

    def start_again(self, left):
        rows = self.rows
        needed = {extent for document in rows["documents"].values() for extent in document.extents}
        rows["extents"] = {i: row for i, row in rows["extents"].items() if i in needed}  # orphans go
        labels = self.labels
        self.boot()
        self.labels = labels
        self.service.restore(
            [tiny_spec()],
            list(rows["extents"].values()),
            list(rows["documents"].values()),
            list(rows["pins"].values()),
            left=left,
        )
        found = self.service.state.documents.values()
        self.documents = {r.document.id.name: labels[r.document.extents[-1]] for r in found}
        self.pins = {pin.document.name: pin.floor for pin in self.service.state.pins.all() if pin.kind == "hard"}
        self.were_pinned = {pin.document.name for pin in self.service.state.pins.all()}
        for extent, slot in rows["extents"].values():
            assert self.nvme[slot] == labels[extent.id], "a cataloged slot holds something else"

    @rule(accident=SELDOM)
    def everybody_goes(self, accident):
        """With no claims and no orders left, nothing is held, waits or lingers."""
        if not accident:
            return
        self.drain()
        for lease in list(self.leases):
            self.detach_one(lease)
        for client in (*WRITERS, *self.scribblers):
            self.service.disconnect(client)
        self.scribblers.clear()
        self.drain()
        self.service.tick()
        self.drain()
        service = self.service
        assert not service.room.waiting
        assert not service.writes.queued
        assert not service.writes.backlog_bytes
        assert not service.loader.reads.waiting
        assert not service.loader._active
        assert not service.store.orders_in_flight
        assert not service.state.leases
        assert not service.state.private
        assert not service.state.hints.live
        assert not service.state.awaited
        service.tick()
        self.forget()
        assert all(service.state.pins.hard(document) for document in service.state.outlasting)
        for copy in service.state.all_placements():
            assert copy.holds == 0, copy
            assert copy.state is State.RESIDENT, copy

    # What always holds -------------------------------------------------------------------------

    @invariant()
    def state_agrees_with_itself(self):
        if hasattr(self, "service"):
            self.service.state.check()

    @invariant()
    def what_writers_were_given_is_certain(self):
        if getattr(self, "was_given", False):
            self.certain = len(self.effects.notes)
            self.was_given = False

    @invariant()
    def fenced_slabs_hand_out_nothing(self):
        fenced = {slot.slab for slots in getattr(self, "scribblers", {}).values() for slot in slots}
        if fenced:
            copies = self.service.state.all_placements()
            assert {c.slot for c in copies if c.tier is Tier.DDR and c.slot.slab in fenced} <= self.adopted

    @invariant()
    def the_model_and_the_service_know_the_same_documents(self):
        if hasattr(self, "service"):
            self.forget()
            assert {document.name for document in self.service.state.documents} == set(self.documents)

    @invariant()
    def what_is_continued_goes(self):
        if not hasattr(self, "service"):
            return
        state = self.service.state
        assert not state.faded
        for name, absorber in self.absorbed.items():
            is_in_use = DocumentId("t", name) in state.outlasting or name in self.were_pinned
            assert is_in_use or absorber not in self.documents, f"{absorber} continues {name}, which is there"

    @invariant()
    def leased_bytes_stay(self):
        if not hasattr(self, "service"):
            return
        live = {c.slot: c for c in self.service.state.all_placements() if c.tier is Tier.DDR}
        for attach, _, group, slots in self.leases.values():
            ready = attach.loading.phase == "ready"
            for slot, extent in slots.items():
                assert slot in live, "a leased slot was freed"
                assert live[slot].extent == extent, "a leased slot was reused"
                assert not ready or self.ddr[slot] == self.labels[extent]
            if group and ready and self.has_group and attach.loading.shard.copies:
                shard = attach.loading.shard.id
                for start, label in prefixes(self.labels[attach.owner.extents[-1]]).items():  # it may have grown
                    assert self.hbm[shard, start] == label

    @invariant()
    def pinned_documents_do_not_sink(self):
        if not hasattr(self, "service"):
            return
        high = {}
        for copy in self.service.state.all_placements():
            if copy.readable and copy.tier is not Tier.HBM and copy not in self.service.state.leaving:
                label = self.labels[copy.extent]
                high[label] = min(high.get(label, Tier.NVME), copy.tier)
        for name, floor in self.pins.items():
            lowest = max(floor, Tier.DDR)
            for label in prefixes(self.documents[name]).values():
                if label in high and high[label] <= lowest:
                    self.floored.add((name, label))
                else:
                    assert (name, label) not in self.floored, f"{name} sank below {floor}"
        self.floored = {(name, label) for name, label in self.floored if name in self.pins}


class WarmMachine(Machine):
    """The same with memory that outlives the daemon, and clients that outlive it too."""

    @rule(
        data=st.data(),
        name=st.sampled_from(NAMES),
        tokens=st.builds(stream, st.integers(1, 3), st.sampled_from(LENGTHS)),
        policy=st.sampled_from(WritePolicy),
        steps=st.integers(0, 6),
    )
    def is_killed_in_the_middle(self, data, name, tokens, policy, steps):
        """One document is there, another is being written; then a client of the last life writes on."""
        self.store(name, tokens, policy, False)
        self.begin_one(2, data.draw(st.sampled_from(NAMES)), stream(4, 90), policy, False)
        for _ in range(steps):
            if self.endable():
                self.end(self.endable()[0])
        self.restart_warm(data)
        self.attach_one(1, name, False)
        self.drain()
        self.old_writers_write()
        self.store(data.draw(st.sampled_from(NAMES)), stream(5, 128), WritePolicy.MEMORY, False)
        self.attach_one(1, name, False)

    @rule(data=st.data())
    def restart_warm(self, data):
        """The daemon is killed; memory and the index outlive it, though not the index's last notes."""
        self.what_writers_were_given_is_certain()  # by now, also within a rule
        notes = self.effects.notes
        for record in notes[: data.draw(st.integers(self.certain, len(notes)), label="notes")]:
            self.take_note(record)
        self.remember_writers(data.draw(st.sets(st.sampled_from((*WRITERS, *RANKS))), label="clients that live on"))
        for order in self.effects.orders:
            if isinstance(order, ReadIn):
                self.ddr[order.target] = "torn"
        records = list(self.index.values())
        left = Left(
            specs=[tiny_spec()],
            extents=[(record.extent, record.slot) for record in records if record.kind == "put-extent"],
            documents=[record.document for record in records if record.kind == "put-document"],
            slabs=range(self.service.state.ddr.slab_count),
            fences={client: {slot.slab for slot in slots} for client, slots in self.scribblers.items()},
        )
        known = dict(self.rows["documents"])
        durable = set(known)
        ddr = self.ddr
        self.start_again(left)
        self.ddr = ddr
        self.adopted = {c.slot for c in self.service.state.all_placements() if c.tier is Tier.DDR}
        found = set(self.service.state.documents)
        assert found <= durable | {document.id for document in left.documents}
        there = {*self.rows["extents"], *(extent.id for extent, _ in left.extents)}
        for document in durable - found:
            assert document.namespace is not None
            assert there.isdisjoint(known[document].extents), f"{document} is not there again, and something of it is"

    def take_note(self, record):
        match record.kind:
            case "put-extent":
                self.index[record.extent.id] = record
            case "put-document":
                self.index[record.document.id] = record
            case "drop-extent":
                self.index.pop(record.extent, None)
            case "drop-document":
                self.index.pop((record.tenant, record.name), None)

    def remember_writers(self, living):
        """Who may still write to which slots, when the daemon that gave them is gone."""
        given = {client + OLD: set() for client in living}
        for ingest in self.service.ingests.open.values():
            if ingest.client in living and ingest.group is None and ingest.passage is not None:
                given[ingest.client + OLD] |= {copy.slot for copy in ingest.filled.values()}
        for order in self.effects.orders:
            for rank in RANKS:
                if isinstance(order, SaveShard) and rank in living:
                    given[rank + OLD] |= {part.slot for part in order.parts}
        for client, slots in given.items():
            if slots:
                self.scribblers[client] = slots

    @rule()
    def old_writers_write(self):
        for slots in self.scribblers.values():
            for slot in slots:
                self.ddr[slot] = "scribble"

    @rule(client=st.sampled_from([client + OLD for client in (*WRITERS, *RANKS)]))
    def old_writer_ends(self, client):
        self.scribblers.pop(client, None)
        self.service.disconnect(client)


class NarrowMachine(Machine):
    """The same with documents larger than DDR, which pass through it in windows."""

    config = small_config(4, 16, 2)
    rows_per_rank = 160

    @rule(
        name=st.sampled_from(NAMES),
        tokens=st.builds(stream, st.integers(1, 3), st.sampled_from([128, 250])),
        policy=st.sampled_from(WritePolicy),
        grouped=st.booleans(),
    )
    def comes_and_sinks(self, name, tokens, policy, grouped):
        """A document comes, sinks to NVMe, and a group wants it back."""
        self.group_comes()
        self.store(name, tokens, policy, grouped)
        self.sink_and_ask(name, True)

    @rule(
        name=st.sampled_from(NAMES),
        tokens=st.builds(stream, st.integers(1, 3), st.sampled_from([128, 250])),
        policy=st.sampled_from(WritePolicy),
        steps=st.integers(0, 30),
    )
    def is_coming(self, name, tokens, policy, steps):
        """A document is on its way out of a group when something else happens."""
        self.group_comes()
        known = set(self.ingests)
        self.begin_one(1, name, tokens, policy, True)
        self.drain()
        for ingest in set(self.ingests) - known:
            self.commit_one(ingest)
        for _ in range(steps):
            if self.endable():
                self.end(self.endable()[-1])


QUOTA = TenantConfig(ddr_maximum_bytes=4 * EXTENT_BYTES, nvme_maximum_bytes=12 * EXTENT_BYTES)


def bounded(config):
    """The tenant may have less than there is, and copies leave in the background at low marks."""
    ddr = replace(config.ddr, high_watermark=0.6, low_watermark=0.3)
    nvme = replace(config.nvme, high_watermark=0.6, low_watermark=0.3)
    return replace(config, ddr=ddr, nvme=nvme, tenants={"t": QUOTA})


class BoundedMachine(NarrowMachine):
    """The same with quotas and watermarks."""

    config = bounded(small_config(6, 16, 2))

    @invariant()
    def a_tenant_has_no_more_than_it_may(self):
        if hasattr(self, "service"):
            usage = self.service.state.usage
            assert usage.used(Tier.DDR, "t") <= QUOTA.ddr_maximum_bytes
            assert usage.used(Tier.NVME, "t") <= QUOTA.nvme_maximum_bytes


Machine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    report_multiple_bugs=False,
)
NarrowMachine.TestCase.settings = settings(Machine.TestCase.settings, max_examples=100)  # its rules do more each
WarmMachine.TestCase.settings = settings(Machine.TestCase.settings, max_examples=100)
BoundedMachine.TestCase.settings = settings(Machine.TestCase.settings, max_examples=30)
TestService = pytest.mark.timeout(400)(Machine.TestCase)  # it computes, and other work may hold the cores
TestNarrowService = pytest.mark.timeout(400)(NarrowMachine.TestCase)
TestWarmService = pytest.mark.timeout(400)(WarmMachine.TestCase)
TestBoundedService = pytest.mark.timeout(400)(BoundedMachine.TestCase)
