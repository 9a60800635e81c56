"""Pins as commands: what stays and in which order it leaves, what refreshes them, what the catalog is told and when."""

from dataclasses import replace

import pytest
from holdfast.kvstore.claims import NS, PinKind, PinSelection, Refresh
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import InUse, InvalidRequest, LeasesOvercommitted, PinsOvercommitted, StorageFailed
from holdfast.kvstore.orders import DropDocument, DropPin, PutPin, Write
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.sections import TenantConfig
from holdfast.kvstore.service import Service

from fakes import CLIENT, EXTENT_BYTES, FAR_NS
from scene import SPEC, Scene, rows, tokens


def pin(scene, document, floor=Tier.DDR, seconds=None, kind=PinKind.HARD, refresh=Refresh.NEVER, done=lambda _: None):
    """Pin, without letting anything end."""
    made = scene.service.pin(document, floor, seconds, "ops", "demo", kind, refresh, done)
    scene.state.check()
    return made


def soft(scene, document, seconds=None, floor=Tier.DDR):
    """A soft pin, and what it brings."""
    pin(scene, document, floor, seconds, PinKind.SOFT)
    scene.settle()


def push(scene, extents, seed=50):
    """Somebody needs that much of DDR; then it is free again."""
    name = DocumentId("t", f"push{seed}")
    scene.service.delete(scene.store(name.name, tokens(seed, extents), WritePolicy.MEMORY))
    scene.settle()


def near(scene, *documents):
    """Which of them are all in DDR."""
    return [document.name for document in documents if all(Tier.DDR in tiers for tiers in scene.tiers(document))]


def told(scene):
    """Records about pins on their way to the catalog."""
    return [r for order in scene.pending(Write) for r in order.records if isinstance(r, PutPin | DropPin)]


# Soft ------------------------------------------------------------------------------------------


def test_what_is_softly_pinned_leaves_after_everything_unpinned_and_the_weaker_first():
    """Although it is used less than the others; of two that are pinned the one nearer its end goes first."""
    scene = Scene(ddr=6)
    a, b, c = (scene.store(name, tokens(n, 2)) for n, name in enumerate("abc"))
    soft(scene, a, 100.0)
    soft(scene, b)
    for _ in range(5):
        scene.detach(scene.attach(c)[0])
    push(scene, 2)
    assert near(scene, a, b, c) == ["a", "b"]
    scene.clock.advance(60 * NS)  # a has half of its life left
    push(scene, 4, 51)
    assert near(scene, a, b, c) == ["b"]
    push(scene, 6, 52)
    assert near(scene, a, b, c) == []


def test_a_soft_pin_forbids_nothing():
    """Evictions and deletions go on, and a deletion ends it, in one commit."""
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 2))
    soft(scene, document)
    scene.evict(document, Tier.DDR)
    assert scene.tiers(document) == [{Tier.NVME}] * 2
    scene.service.delete(document)
    assert not scene.state.pins.all()
    assert {DropPin(*document), DropDocument(*document)} <= set(scene.pending(Write)[0].records)


def test_a_soft_pin_brings_its_document_near_at_the_cost_of_nobody_who_is_pinned():
    """What no pin names makes room for it; another soft pin's document does not."""
    scene = Scene(ddr=2)
    a, b = (scene.store(name, tokens(n, 2)) for n, name in enumerate("ab"))
    assert near(scene, a, b) == ["b"]
    soft(scene, a)
    assert near(scene, a, b) == ["a"]
    soft(scene, b)
    assert near(scene, a, b) == ["a"]
    assert scene.state.ledger.counts["prefetches_refused"] == 1
    assert not scene.service.room.waiting


# Hard ------------------------------------------------------------------------------------------


def test_a_hard_pin_that_does_not_fit_beside_the_others_names_the_fewest_that_have_to_go():
    """The largest first; a soft one in the way is no reason."""
    scene = Scene(ddr=8, nvme=32)
    sizes = {"one": 1, "two": 2, "four": 4}
    documents = {name: scene.store(name, tokens(n, size)) for n, (name, size) in enumerate(sizes.items())}
    softly, wanted = scene.store("soft", tokens(7, 1)), scene.store("wanted", tokens(8, 3))
    for document in documents.values():
        pin(scene, document)
    soft(scene, softly)
    with pytest.raises(PinsOvercommitted, match="t/four") as refused:
        pin(scene, wanted)
    assert [(holder.document, holder.tier) for holder in refused.value.holders] == [("four", "ddr")]
    assert scene.state.pins.get(wanted) is None
    scene.service.unpin(documents["four"])
    pin(scene, wanted)


def test_a_pin_in_hbm_has_to_fit_some_group():
    """By the groups there are; where none is yet, one may come."""
    scene = Scene(ddr=16, nvme=32)
    a, b, c = (scene.store(name, tokens(n, 2)) for n, name in enumerate("abc"))
    pin(scene, a, Tier.HBM)
    scene.group(rows=64)
    pin(scene, b, Tier.HBM)
    with pytest.raises(PinsOvercommitted, match="hbm") as refused:
        pin(scene, c, Tier.HBM)
    assert [holder.document for holder in refused.value.holders] == ["b"]
    with pytest.raises(PinsOvercommitted, match="more than the arenas"):
        pin(scene, scene.store("long", tokens(9, 5)), Tier.HBM)


def test_a_document_does_not_grow_beyond_what_its_pin_may_keep():
    """It is refused before anything is computed; softly pinned it may."""
    scene = Scene(ddr=4, nvme=32)
    document = scene.store("a", tokens(1, 2))
    pin(scene, document)
    scene.settle()
    with pytest.raises(PinsOvercommitted):
        scene.begin("a", tokens(1, 5))
    soft(scene, document)
    ingest, _ = scene.begin("a", tokens(1, 5))
    assert ingest.grows


def test_a_hard_pin_makes_its_document_durable_and_refuses_what_nvme_never_has():
    """It is to survive a restart, and so is what it names."""
    scene = Scene()
    back = scene.store("back", tokens(1, 2), WritePolicy.BACK)
    memory = scene.store("memory", tokens(2, 1), WritePolicy.MEMORY)
    pin(scene, back, Tier.NVME)
    scene.settle()
    assert scene.state.document(back).durable
    with pytest.raises(InvalidRequest, match="memory-only"):
        pin(scene, memory, Tier.NVME)
    pin(scene, memory, Tier.DDR)


def test_what_a_hard_pinned_document_grew_by_is_durable_too():
    """Pinned on NVMe it would stay in DDR for ever where NVMe has no copy."""
    scene = Scene(nvme=32)
    document = scene.store("a", tokens(1, 2), WritePolicy.BACK)
    pin(scene, document, Tier.NVME)
    scene.settle()
    scene.store("a", tokens(1, 4), WritePolicy.BACK)
    assert scene.state.document(document).durable
    scene.store("b", tokens(2, 8), WritePolicy.MEMORY)
    assert scene.tiers(document) == [{Tier.NVME}] * 4
    with pytest.raises(InvalidRequest, match="memory-only"):
        scene.begin("a", tokens(1, 5), WritePolicy.MEMORY)


def test_a_soft_pin_gives_way_to_those_who_wait_for_room():
    scene = Scene(ddr=4, nvme=32)
    document = scene.store("a", tokens(1, 2))
    scene.evict(document, Tier.DDR)
    full = scene.store("b", tokens(2, 4), WritePolicy.BACK)
    _, heard = scene.begin("c", tokens(3, 4))
    assert scene.service.room.waiting
    soft(scene, document)
    assert scene.state.ledger.counts["prefetches_refused"] == 1
    scene.settle()
    assert not isinstance(heard[0], Exception)
    assert scene.tiers(full) == [{Tier.NVME}] * 4


# Life ------------------------------------------------------------------------------------------


def test_a_hit_starts_the_life_again_and_the_catalog_hears_of_it_now_and_then():
    """An attach, or a publication; recency does not wait for commits, so one in an eighth of the life is enough."""
    scene = Scene(ddr=8, nvme=32)
    document = scene.store("a", tokens(1, 1))
    pin(scene, document, seconds=80.0, refresh=Refresh.HIT)
    other = scene.store("b", tokens(2, 1))
    pin(scene, other, seconds=80.0)
    scene.settle()
    for _ in range(9):
        scene.clock.advance(1 * NS)
        scene.detach(scene.attach(document)[0])
    assert not told(scene)
    scene.clock.advance(1 * NS)
    scene.detach(scene.attach(document)[0])
    scene.detach(scene.attach(other)[0])
    assert told(scene) == [PutPin(scene.state.pins.get(document))]
    assert scene.state.pins.get(document).remaining_seconds(scene.clock.wall_ns()) == 80
    scene.clock.advance(70 * NS)
    scene.service.tick()
    assert scene.state.pins.get(document)
    assert not scene.state.pins.get(other)
    scene.store("a", tokens(1, 2))
    assert scene.state.pins.get(document).remaining_seconds(scene.clock.wall_ns()) == 80
    scene.clock.advance(80 * NS)
    scene.service.tick()
    assert not scene.state.pins.all()


def test_a_refresh_needs_a_life():
    scene = Scene()
    with pytest.raises(InvalidRequest, match="ttl_seconds"):
        pin(scene, scene.store("a", tokens(1, 1)), refresh=Refresh.HIT)


def test_pins_survive_a_restart_with_what_is_left_of_them():
    """Kind, life and refresh; what ended meanwhile is gone, and is brought near by nobody."""
    scene = Scene(ddr=4, nvme=16)
    a, b, c = (scene.store(name, tokens(n, 1)) for n, name in enumerate("abc"))
    pin(scene, a, seconds=100.0, refresh=Refresh.HIT)
    soft(scene, b, 100.0)
    pin(scene, c, seconds=10.0)
    again = Scene(ddr=4, nvme=16)
    again.clock.advance(50 * NS)
    again.service.restore(*rows(scene))
    again.settle()
    assert near(again, a, b, c) == ["a", "b"]
    assert again.state.pins.get(b).quarters(again.clock.wall_ns()) == 2
    assert again.state.pins.get(a).remaining_seconds(again.clock.wall_ns()) == 50
    assert again.state.ledger.counts["pins_not_restored"] == 0
    again.detach(again.attach(a)[0])
    assert told(again) == [PutPin(again.state.pins.get(a))]
    again.clock.advance(60 * NS)
    again.service.tick()
    assert [found.document for found in again.state.pins.all()] == [a]


# The catalog -----------------------------------------------------------------------------------


def test_pins_are_answered_when_the_catalog_has_them():
    """They hold at once; and so they end."""
    scene = Scene()
    document = scene.store("a", tokens(1, 1))
    heard = []
    made = pin(scene, document, Tier.NVME, done=heard.append)
    assert scene.state.pins.get(document) == made
    assert not heard
    scene.settle()
    assert heard == [None]
    scene.service.unpin(document, heard.append)
    assert heard == [None]
    scene.settle()
    assert heard == [None, None]


def test_a_pin_that_the_catalog_refuses_is_an_error_holds_and_is_told_again():
    """Only a restart before that would lose it."""
    scene = Scene()
    document = scene.store("a", tokens(1, 1))
    heard = []
    made = pin(scene, document, Tier.NVME, done=heard.append)
    (order,) = scene.pending(Write)
    scene.end(order, StorageFailed("full"))
    assert [type(answer) for answer in heard] == [StorageFailed]
    assert scene.state.pins.get(document) == made
    scene.service.tick()
    assert told(scene) == [PutPin(made)]


def test_many_pins_end_in_one_commit():
    """And what the catalog refused to forget is said again, of each."""
    scene = Scene(nvme=32)
    documents = [scene.store(name, tokens(n, 1)) for n, name in enumerate("abc")]
    for document in documents:
        pin(scene, document, Tier.NVME)
    scene.settle()
    heard = []
    ended = scene.service.unpin_all(PinSelection(owner="ops", documents=documents[:2]), heard.append)
    assert [found.document for found in ended] == documents[:2]
    (order,) = scene.pending(Write)
    assert set(order.records) == {DropPin(*document) for document in documents[:2]}
    assert not heard
    scene.end(order, StorageFailed("full"))
    assert [type(answer) for answer in heard] == [StorageFailed]
    scene.service.tick()
    assert set(told(scene)) == {DropPin(*document) for document in documents[:2]}
    assert scene.service.unpin_all(PinSelection(owner="nobody"), heard.append) == []
    assert heard[-1] is None


# Leases ----------------------------------------------------------------------------------------


def capped(**limits):
    """A scene whose tenant has limits."""
    scene = Scene()
    scene.config = replace(scene.config, tenants={"*": TenantConfig(**limits)})
    scene.service = Service(scene.config, scene.clock, scene.effects, lambda _: bytes(32))
    scene.service.register_spec(SPEC)
    scene.settle()
    return scene


def test_a_tenants_leases_and_pins_are_capped_by_its_table():
    scene = capped(ddr_lease_bytes=3 * EXTENT_BYTES, ddr_pin_bytes=2 * EXTENT_BYTES)
    a, b = scene.store("a", tokens(1, 2)), scene.store("b", tokens(2, 2))
    (first,) = scene.attach(a)
    scene.attach(a)
    with pytest.raises(LeasesOvercommitted) as refused:
        scene.attach(b)
    assert [holder.document for holder in refused.value.holders] == ["a"]
    assert len(scene.state.leases) == 2
    assert scene.attach(b, tokens=(0, 32))
    assert first.lease.size_bytes == 2 * EXTENT_BYTES
    pin(scene, a)
    with pytest.raises(PinsOvercommitted, match=r"tenants\.t\.ddr_pin_bytes"):
        pin(scene, b)
    pin(scene, b, Tier.NVME)


def test_whatever_names_a_lease_renews_it():
    """Waiting, reporting, or just saying so; what another lease's holder says does not."""
    scene = Scene(lease_seconds=10)
    scene.group()
    document = scene.store("a", tokens(1, 1))
    (attach,) = scene.attach(document)
    (other,) = scene.attach(document, "g")
    scene.settle()
    assert (other.lease.tier, other.lease.size_bytes) == (Tier.HBM, 32 * scene.state.groups["g"].row_bytes)
    for says in (
        lambda: scene.service.wait_layers(CLIENT, attach.lease.id, 1, lambda _: None),
        lambda: scene.service.renew(CLIENT, attach.lease.id),
    ):
        scene.clock.advance(9 * NS)
        says()
    now_ns = scene.clock.monotonic_ns()
    assert not attach.lease.overdue(now_ns)
    assert other.lease.overdue(now_ns)
    with pytest.raises(InUse, match="leased"):
        scene.service.evict(document, Tier.DDR, 0, FAR_NS, lambda _: None)
