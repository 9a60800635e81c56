"""Writes, scene by scene: write policies, a disk that cannot follow, a device that is full, wear.

DDR takes 64 extents, NVMe 256 in segments of 16; the backlog of write-through is 8 extents.
"""

import numpy as np
import pytest
from holdfast.kvstore import writes as writes_module
from holdfast.kvstore.costs import LinkSpeed
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import DeadlineExceeded, HoldfastError, StorageFailed, StorageFull
from holdfast.kvstore.ledger import Hop, Wear
from holdfast.kvstore.metrics import Metrics
from holdfast.kvstore.orders import PutWear, Seal, Write, WriteOut
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import NS, Service
from holdfast.kvstore.slots import SlotClass
from holdfast.kvstore.spec import KVSpec, LayerGroup
from holdfast.kvstore.views import document_view, tier_views

from fakes import CLIENT, EXTENT_BYTES, EXTENT_TOKENS, FAR_NS, ManualEffects, tiny_config, tiny_service, tiny_spec

KV_BYTES = 2 * 16 * 4  # of a token: 2 layers, key and value of 8 float32
RETRY_SECONDS = writes_module.RETRY_NS // NS


class Scene:
    """A service, and documents of so many extents whose tokens nobody else has."""

    def __init__(self, **overrides):
        self.service, self.effects, self.clock = tiny_service(tiny_config(**overrides))
        self.state = self.service.state
        self.seed = 0

    def begin(self, name, extents, policy=WritePolicy.THROUGH, tokens=None, spec=None):
        """An open ingest, filled."""
        self.seed += 1
        count = extents * EXTENT_TOKENS
        made = tokens if tokens is not None else np.random.default_rng(self.seed).integers(0, 1000, count)
        fingerprint = (spec or tiny_spec()).fingerprint()
        heard = []
        ingest = self.service.begin_ingest(
            CLIENT, DocumentId("t", name), fingerprint, made, policy, None, 64, FAR_NS, heard.append
        )
        self.state.check()
        return ingest, heard

    def commit(self, ingest, deadline_ns=None):
        """What is heard of a commit whose seals are done; nothing else has ended."""
        heard = []
        self.service.commit_ingest(CLIENT, ingest.id, heard.append, (), deadline_ns)
        for order in self.pending(Seal):
            self.end(order)
        return heard

    def publish(self, name, extents, policy=WritePolicy.THROUGH, tokens=None):
        """An acknowledged document; its writes are under way."""
        ingest, _ = self.begin(name, extents, policy, tokens)
        assert self.commit(ingest) == [ingest.document]
        return ingest.document.id

    def store(self, name, extents, policy=WritePolicy.THROUGH, tokens=None):
        """The same, and everything settled."""
        document = self.publish(name, extents, policy, tokens)
        self.settle()
        return document

    def end(self, order, error=None):
        if error is None:
            self.effects.complete(self.service, order)
        else:
            self.effects.fail(self.service, order, error)
        self.state.check()

    def settle(self):
        while self.effects.orders:
            self.end(self.effects.orders[0])

    def pending(self, kind):
        return [order for order in self.effects.orders if isinstance(order, kind)]

    def wait(self, seconds):
        self.clock.advance(int(seconds * NS))
        self.service.tick()
        self.state.check()

    def durable(self, document):
        return self.state.documents[document].durable

    def tiers(self, document):
        extents = self.state.documents[document].document.extents
        return [{copy.tier for copy in self.state.extents[e].placements() if copy.readable} for e in extents]

    def policy(self, document):
        view = document_view(self.state, self.service.planner, self.state.documents[document])
        return view.write_policy, view.write_reason

    def extents_of(self, orders):
        """The documents whose extents these writes read from."""
        owners = {r.ddr.slot: min(r.documents).name for r in self.state.extents.values() if r.ddr is not None}
        return [owners[order.source] for order in orders]

    def slow_disk(self):
        """Writing an extent costs 0.8 ms, wear included; recomputing it saves 1.2 ms."""
        self.service.planner.links[Hop(Tier.DDR, Tier.NVME)] = LinkSpeed(bytes_per_second=3e7, latency_ns=0)

    def nobody_comes_back(self):
        """Many documents have gone by that nobody asked for again."""
        self.slow_disk()
        for number in range(20):
            self.store(f"gone-{number}", 1, WritePolicy.MEMORY)
            self.service.delete(DocumentId("t", f"gone-{number}"))
        self.settle()
        self.wait(901)


# Policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["evicted", "pressed out"])
def test_a_clean_copy_leaves_ddr_without_a_write(how):
    """Not one order, and not one byte of wear."""
    scene = Scene()
    document = scene.store("a", 4)
    before = scene.state.ledger.wear
    if how == "evicted":
        scene.service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
    else:
        scene.clock.advance(NS)
        scene.begin("b", 64)
    assert not scene.pending(WriteOut)
    assert scene.tiers(document) == [{Tier.NVME}] * 4
    scene.settle()
    assert scene.state.ledger.wear == before


def test_an_unknown_tenants_documents_are_written_through():
    """By the prior: nothing is known of who asks for the first time."""
    scene = Scene()
    document = scene.publish("a", 2, WritePolicy.AUTO)
    assert len(scene.pending(WriteOut)) == 2
    policy, reason = scene.policy(document)
    assert policy == "auto: write-through"
    assert "100% comebacks" in reason


@pytest.mark.parametrize("how", ["attach", "pin", "ingest", "evict"])
def test_what_nobody_comes_back_for_is_written_when_it_turns_out_otherwise(how):
    """At its commit no byte is written; it is when it is used again, or when DDR evicts it."""
    scene = Scene()
    scene.nobody_comes_back()
    tokens = np.arange(2 * EXTENT_TOKENS)
    document = scene.publish("a", 2, WritePolicy.AUTO, tokens)
    assert not scene.pending(WriteOut)
    assert scene.policy(document)[0] == "auto: write-back"
    expected = "auto: write-through"
    match how:
        case "attach":
            scene.service.attach(CLIENT, document, None, None, None, FAR_NS, [].append)
            assert scene.policy(document)[1] == "attached again"
        case "pin":
            scene.service.pin(document, Tier.DDR, None, "me", "")
            assert scene.policy(document)[1] == "pinned"
        case "ingest":
            scene.publish("a", 2, WritePolicy.AUTO, tokens)
        case "evict":
            scene.service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
            expected = "auto: write-back"
    assert scene.policy(document)[0] == expected
    assert len(scene.pending(WriteOut)) == 2
    scene.settle()
    assert scene.durable(document)


def test_a_document_that_was_here_before_is_written_through():
    """The ghosts remember it, although it was deleted and its tenant's documents rarely come back."""
    scene = Scene()
    scene.slow_disk()
    tokens = np.arange(2 * EXTENT_TOKENS)
    scene.service.delete(scene.store("a", 2, WritePolicy.MEMORY, tokens))
    scene.nobody_comes_back()
    again = scene.publish("b", 2, WritePolicy.AUTO, tokens)
    assert scene.policy(again)[0] == "auto: write-through"


def test_auto_does_not_overrule_what_was_named_before():
    scene = Scene()
    tokens = np.arange(EXTENT_TOKENS)
    document = scene.store("a", 1, WritePolicy.MEMORY, tokens)
    scene.store("a", 1, WritePolicy.AUTO, tokens)
    assert scene.policy(document)[0] == "memory-only"
    assert not scene.durable(document)


# A disk that cannot follow ---------------------------------------------------------------------------


def test_documents_beyond_the_backlog_stay_in_memory_until_it_has_drained():
    """They are acknowledged at once; the oldest is written first; nobody has to ask."""
    scene = Scene()
    first = scene.publish("a", 8)
    behind = [scene.publish(name, 4) for name in ("b", "c", "d")]
    assert set(scene.extents_of(scene.pending(WriteOut))) == {"a"}
    assert scene.state.ledger.counts["write_through_skipped"] == 3
    assert scene.service.writes.backlog_bytes == 8 * EXTENT_BYTES
    seen = []
    while scene.effects.orders:
        assert scene.service.writes.backlog_bytes <= scene.service.writes.limit_bytes
        seen += scene.extents_of(o for o in scene.pending(WriteOut)[:1])
        scene.end(scene.effects.orders[0])
    assert list(dict.fromkeys(seen)) == ["a", "b", "c", "d"]
    assert all(map(scene.durable, [first, *behind]))
    assert scene.service.writes.backlog_bytes == 0


def test_a_document_larger_than_the_backlog_is_written_piece_by_piece():
    scene = Scene()
    document = scene.publish("a", 30)
    most = 0
    while scene.effects.orders:
        most = max(most, len(scene.pending(WriteOut)))
        scene.end(scene.effects.orders[0])
    assert most == 8
    assert scene.durable(document)
    assert scene.state.ledger.counts["write_through_skipped"] == 0


def test_what_is_behind_is_written_when_ddr_evicts_it():
    """A demotion does not wait for the backlog."""
    scene = Scene()
    scene.publish("a", 8)
    behind = scene.publish("b", 2)
    scene.service.evict(behind, Tier.DDR, 0, FAR_NS, [].append)
    assert scene.extents_of(scene.pending(WriteOut)).count("b") == 2
    scene.settle()
    assert scene.tiers(behind) == [{Tier.NVME}] * 2
    assert scene.state.ledger.wear.demotion_bytes == 2 * EXTENT_BYTES


def test_a_deleted_document_is_not_caught_up_with():
    scene = Scene()
    scene.publish("a", 8)
    scene.service.delete(scene.publish("b", 4))
    scene.settle()
    assert scene.state.ledger.wear.write_through_bytes == 8 * EXTENT_BYTES


def test_when_behind_wait_a_commit_is_acknowledged_when_the_backlog_has_room():
    """In the order of the commits, and the document is not visible before."""
    scene = Scene(nvme__when_behind="wait")
    scene.publish("a", 8)
    second, _ = scene.begin("b", 6)
    third, _ = scene.begin("c", 1)
    heard = [scene.commit(second), scene.commit(third)]
    memory, _ = scene.begin("m", 8, WritePolicy.MEMORY)
    assert scene.commit(memory) == [memory.document], "it has no use for the disk"
    assert heard == [[], []]
    assert second.document.id not in scene.state.documents
    while not heard[0]:
        assert scene.service.writes.backlog_bytes > 2 * EXTENT_BYTES
        assert not heard[1]
        scene.end(scene.effects.orders[0])
    scene.settle()
    assert heard == [[second.document], [third.document]]
    assert scene.durable(third.document.id)
    assert scene.state.ledger.counts["write_through_skipped"] == 0


@pytest.mark.parametrize("how", ["abort", "disconnect", "deadline"])
def test_a_putter_that_goes_away_while_it_waits_for_the_disk_leaves_nothing(how):
    scene = Scene(nvme__when_behind="wait")
    scene.publish("a", 8)
    ingest, _ = scene.begin("b", 4)
    heard = scene.commit(ingest, scene.clock.monotonic_ns() + 5 * NS)
    match how:
        case "abort":
            scene.service.abort_ingest(CLIENT, ingest.id)
        case "disconnect":
            scene.service.disconnect(CLIENT)
        case "deadline":
            scene.wait(4)
            assert not heard
            scene.wait(1)
            assert isinstance(heard[0], DeadlineExceeded)
    assert isinstance(heard[0], HoldfastError)
    scene.settle()
    assert ingest.document.id not in scene.state.documents
    assert scene.state.used_bytes()["ddr"] == 8 * EXTENT_BYTES
    assert not scene.state.private


def test_what_is_in_flight_is_bounded_in_bytes_and_a_demotion_goes_next(monkeypatch):
    monkeypatch.setattr(writes_module, "IN_FLIGHT_BYTES", 4 * EXTENT_BYTES)
    scene = Scene()
    back = scene.store("b", 2, WritePolicy.BACK)
    scene.publish("a", 8)
    assert len(scene.pending(WriteOut)) == 4
    scene.service.evict(back, Tier.DDR, 0, FAR_NS, [].append)
    assert len(scene.pending(WriteOut)) == 4
    scene.end(scene.pending(WriteOut)[0])
    scene.end(scene.pending(Write)[0])
    assert scene.extents_of(scene.pending(WriteOut)) == ["a", "a", "a", "b"]
    scene.settle()


def test_a_broken_disk_is_left_alone_for_a_while_and_then_caught_up_with():
    scene = Scene()
    document = scene.publish("a", 2)
    for order in scene.pending(WriteOut):
        scene.end(order, StorageFailed("EIO"))
    scene.settle()
    scene.wait(RETRY_SECONDS - 1)
    assert not scene.effects.orders
    scene.wait(1)
    assert len(scene.pending(WriteOut)) == 2
    scene.settle()
    assert scene.durable(document)


# A full device ---------------------------------------------------------------------------------------


def all_full(scene):
    """Every write to a segment that has no extents yet finds the device full, all others end well."""
    made = {r.nvme.slot.slab for r in scene.state.extents.values() if r.nvme is not None and r.nvme.readable}
    refused = 0
    while scene.effects.orders:
        order = scene.effects.orders[0]
        full = isinstance(order, WriteOut) and order.target.slab not in made
        refused += full
        scene.end(order, StorageFull("ENOSPC") if full else None)
        assert refused < 100, "it spins"
    return refused


def test_a_device_without_room_for_any_segment_leaves_documents_in_memory():
    """The capacity says so, nothing spins, and a minute later it is tried again."""
    scene = Scene()
    document = scene.publish("a", 4)
    assert all_full(scene) == 4, "those in flight, and no more"
    assert scene.tiers(document) == [{Tier.DDR}] * 4
    assert scene.state.ledger.counts["nvme_full"] == 4
    assert scene.state.nvme.capacity_bytes == 0
    assert scene.state.nvme.withdrawn_bytes == 4 << 20
    assert next(v for v in tier_views(scene.state) if v.tier == "nvme").withdrawn_bytes == 4 << 20
    assert b"holdfast_nvme_withdrawn_bytes 4.194304e+06" in Metrics(scene.service, "1").text()
    scene.wait(RETRY_SECONDS - 1)
    assert not scene.effects.orders
    scene.wait(1)
    assert scene.state.nvme.capacity_bytes == 4 << 20
    scene.settle()
    assert scene.durable(document)
    assert scene.state.nvme.withdrawn_bytes == 0


def test_a_full_device_evicts_for_what_is_newer():
    """Sixteen extents fill the one segment that could be made; the next document takes the place of the oldest."""
    scene = Scene()
    old = scene.store("old", 8)
    for name in ("older", "b"):
        scene.clock.advance(NS)
        new = scene.store(name, 4)
    scene.service.evict(old, Tier.DDR, 0, FAR_NS, [].append)
    scene.settle()
    scene.clock.advance(NS)
    new = scene.publish("new", 4)
    assert all_full(scene) == 4
    assert scene.durable(new)
    assert scene.tiers(new) == [{Tier.DDR, Tier.NVME}] * 4
    assert scene.tiers(old)[-4:] == [set()] * 4, "its tail left"
    assert scene.state.nvme.capacity_bytes == 256 << 10
    assert scene.state.nvme.used_bytes == scene.state.nvme.capacity_bytes


def test_a_demotion_on_a_device_that_is_full_for_good_is_a_verdict():
    """Who needs DDR gets it all the same."""
    scene = Scene()
    old = scene.store("old", 60, WritePolicy.BACK)
    scene.clock.advance(NS)
    _, heard = scene.begin("new", 10)
    assert all_full(scene)
    assert heard
    assert not isinstance(heard[0], HoldfastError)
    assert scene.tiers(old).count(set()) == 6
    assert "full" in scene.state.ledger.verdicts[-1].reason


def test_a_segment_that_still_holds_something_takes_nothing_new_when_it_was_refused():
    """Copy on write: even a segment that exists may find the device full."""
    scene = Scene()
    kept = scene.store("kept", 8)
    scene.publish("new", 4)
    first = scene.pending(WriteOut)[0]
    scene.end(first, StorageFull("ENOSPC"))
    retried = scene.pending(WriteOut)
    assert first.target.slab == 0
    scene.settle()
    assert scene.tiers(kept) == [{Tier.DDR, Tier.NVME}] * 8
    assert retried[-1].target.slab != 0 or scene.state.ledger.counts["nvme_full"]


# Wear ------------------------------------------------------------------------------------------------


def test_wear_is_counted_by_cause_and_amplification_is_exact():
    """A part-filled extent writes its padding; what was stored before is no new KV."""
    scene = Scene()
    through = scene.store("a", 0, tokens=np.arange(40))
    scene.service.evict(scene.store("b", 2, WritePolicy.BACK), Tier.DDR, 0, FAR_NS, [].append)
    scene.settle()
    kv = (40 + 2 * EXTENT_TOKENS) * KV_BYTES
    wear = Wear(write_through_bytes=2 * EXTENT_BYTES, demotion_bytes=2 * EXTENT_BYTES, kv_bytes=kv)
    assert scene.state.ledger.wear == wear
    view = next(v for v in tier_views(scene.state) if v.tier == "nvme")
    assert view.written_bytes == {"write-through": 2 * EXTENT_BYTES, "demotion": 2 * EXTENT_BYTES}
    assert view.write_amplification == 4 * EXTENT_BYTES / kv
    scene.service.evict(through, Tier.NVME, 0, FAR_NS, [].append)
    scene.settle()
    scene.store("a", 0, tokens=np.arange(40))
    again = scene.state.ledger.wear
    assert again == wear._replace(write_through_bytes=4 * EXTENT_BYTES)


def test_wear_goes_to_the_catalog_with_the_commits_that_happen_anyway():
    scene = Scene()
    scene.publish("a", 2)
    for order in scene.pending(WriteOut):
        scene.end(order)
    writes = scene.pending(Write)
    assert [[record.kind for record in write.records] for write in writes] == [["put-extent", "put-wear"]] * 2
    assert writes[-1].records[-1] == PutWear(scene.state.ledger.wear)


@pytest.mark.parametrize("segments", [16, 5, 4])
def test_the_budget_is_exact_over_a_restart(segments):
    """Extents of three sizes; what fits the budget of the new daemon is taken over slot by slot, the rest is not."""
    specs = [
        KVSpec(
            groups=(LayerGroup(layers=tuple(range(layers)), kv_heads=1, key_dim=8, value_dim=8),),
            dtype="float32",
            model=f"m{layers}",
            vocabulary_size=1000,
            block_tokens=16,
            extent_blocks=2,
        )
        for layers in (2, 3, 5)
    ]
    scene = Scene()
    for number in range(30):
        spec = specs[number % 3]
        scene.service.register_spec(spec)
        ingest, _ = scene.begin(f"d{number}", 1 + number % 4, spec=spec)
        scene.settle()
        scene.commit(ingest)
        scene.settle()
    old = scene.state
    slots = [record.nvme.slot for record in old.extents.values() if record.nvme is not None]
    assert sum(slot.size_bytes for slot in slots) == old.nvme.used_bytes <= old.nvme.capacity_bytes
    service = Service(
        tiny_config(nvme__capacity_bytes=str(segments << 18)), scene.clock, ManualEffects(), lambda _: bytes(32)
    )
    extents = [(record.extent, record.nvme.slot) for record in old.extents.values() if record.nvme is not None]
    documents = [record.document for record in old.documents.values()]
    service.upkeep.restore(specs, extents, documents)
    service.state.check()
    kept = [slot for slot in slots if slot.slab < segments]
    assert service.state.nvme.used_bytes == sum(slot.size_bytes for slot in kept) <= segments << 18
    assert service.state.ledger.counts["not_restored"] == len(slots) - len(kept)
    for kind in {SlotClass("", slot.size_bytes) for slot in slots}:
        while service.state.nvme.fits({kind: 1}):
            assert service.state.nvme.allocate(kind).slab < segments
    assert service.state.nvme.used_bytes <= service.state.nvme.capacity_bytes
