"""Evictions asked for by operators: what they may take, and what pins and other documents keep."""

import numpy as np
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import InUse, StorageFailed
from holdfast.kvstore.orders import DropDocument, DropPin, PutDocument, PutPin, Write
from holdfast.kvstore.residency import Tier

from fakes import CLIENT, FAR_NS, tiny_service, tiny_spec
from scene import Scene
from scene import tokens as tokens_of


def stored(service, effects, name, tokens, write_policy=WritePolicy.THROUGH):
    """A committed document of these tokens, everything settled."""
    document = DocumentId("default", name)
    array = np.asarray(tokens, dtype=np.uint32)
    fingerprint = tiny_spec().fingerprint()
    answers = []
    opened = service.begin_ingest(CLIENT, document, fingerprint, array, write_policy, None, 64, FAR_NS, answers.append)
    service.commit_ingest(CLIENT, opened.id, answers.append)
    effects.complete_all(service)
    service.state.check()
    return document


def tiers(service, document):
    """The tiers of each extent's copies."""
    manifest = service.state.documents[document].document.extents
    return [[copy.tier for copy in service.state.extents[name].placements()] for name in manifest]


def test_out_of_nvme_is_recorded_as_the_last_copy():
    """A document that leaves the cache leaves a verdict that says so."""
    service, effects, _ = tiny_service()
    document = stored(service, effects, "a", range(32))
    service.evict(document, Tier.NVME, 0, FAR_NS, lambda _: None)
    effects.complete_all(service)
    assert not any(tiers(service, document))
    assert any(verdict.last_copy for verdict in service.state.ledger.verdicts)


def test_a_write_back_document_leaves_without_being_written_first():
    """Out of the cache means out, also for KV that was never on NVMe."""
    service, effects, _ = tiny_service()
    document = stored(service, effects, "a", range(32), WritePolicy.BACK)
    done = []
    service.evict(document, Tier.NVME, 0, FAR_NS, done.append)
    effects.complete_all(service)
    assert done == [None]
    assert not any(tiers(service, document))


def test_a_shared_front_stays_where_another_documents_pin_wants_it():
    """Evicting one document does not push another below its floor."""
    service, effects, _ = tiny_service()
    longer = stored(service, effects, "a", range(64))
    pinned = stored(service, effects, "b", range(32))
    service.pin(pinned, Tier.DDR, None, "me", "")
    effects.complete_all(service)
    service.evict(longer, Tier.DDR, 0, FAR_NS, lambda _: None)
    effects.complete_all(service)
    assert Tier.DDR in tiers(service, pinned)[0]


def test_a_shared_front_is_not_dropped_with_one_of_its_documents():
    """What another document needs does not leave the cache."""
    service, effects, _ = tiny_service()
    longer = stored(service, effects, "a", range(64))
    other = stored(service, effects, "b", range(32))
    service.evict(longer, Tier.NVME, 0, FAR_NS, lambda _: None)
    effects.complete_all(service)
    assert all(tiers(service, other))
    assert not tiers(service, longer)[-1]


def test_a_pin_during_the_write_out_keeps_the_document():
    """A pin that comes while an eviction drains wins, and the eviction says so."""
    service, effects, _ = tiny_service()
    document = stored(service, effects, "a", range(32), WritePolicy.BACK)
    done = []
    service.evict(document, Tier.DDR, 0, FAR_NS, done.append)
    service.pin(document, Tier.DDR, None, "me", "")
    effects.complete_all(service)
    service.tick()
    assert Tier.DDR in tiers(service, document)[0]
    assert [type(answer) for answer in done] == [InUse]


def test_a_document_that_the_catalog_refused_is_durable_later():
    """Its extents have their rows already: nothing else would bring it up again, and a restart would not know it."""
    scene = Scene()
    ingest, _ = scene.begin("a", tokens_of(1, 2))
    scene.commit(ingest)
    while scene.effects.orders:
        order = scene.effects.orders[0]
        is_row = isinstance(order, Write) and PutDocument(ingest.document) in order.records
        scene.end(order, StorageFailed("busy") if is_row else None)
    record = scene.state.document(ingest.document.id)
    assert not record.durable
    scene.service.tick()
    scene.settle()
    assert record.durable


def test_an_eviction_looks_at_its_copies_a_few_times_each(monkeypatch):
    """However many there are: not at all of them whenever one has been written."""
    scene = Scene(ddr=64, nvme=64)
    document = scene.store("a", tokens_of(1, 60), WritePolicy.BACK)
    looks = []
    may_leave = type(scene.state).may_leave
    monkeypatch.setattr(type(scene.state), "may_leave", lambda *args: looks.append(args) or may_leave(*args))
    scene.evict(document, Tier.DDR)
    assert scene.tiers(document) == [{Tier.NVME}] * 60
    assert len(looks) <= 5 * 60


def test_what_a_hit_calls_back_leaves_after_all():
    """It was on its way out when somebody attached it; when that has ended it goes, and the eviction ends."""
    scene = Scene()
    document = scene.store("a", tokens_of(1, 3), WritePolicy.BACK)
    done = []
    scene.service.evict(document, Tier.DDR, 0, FAR_NS, done.append)
    (attach,) = scene.attach(document)
    scene.settle()
    assert not done
    assert all(Tier.DDR in tiers for tiers in scene.tiers(document))
    scene.detach(attach)
    scene.settle()
    assert done == [None]
    assert scene.tiers(document) == [{Tier.NVME}] * 3


def test_a_pin_while_an_eviction_waits_for_a_lease_wins():
    """An eviction looks at pins again before it goes on."""
    service, effects, _ = tiny_service()
    evicted = stored(service, effects, "a", range(32))
    twin = stored(service, effects, "b", range(32))
    attach = service.attach(CLIENT, twin, None, None, None, FAR_NS, lambda _: None)
    done = []
    service.evict(evicted, Tier.DDR, 0, FAR_NS, done.append)
    assert done == []
    service.pin(evicted, Tier.DDR, None, "me", "")
    service.detach(CLIENT, attach.lease.id)
    effects.complete_all(service)
    assert Tier.DDR in tiers(service, evicted)[0]
    assert [type(answer) for answer in done] == [InUse]


def test_what_the_catalog_refused_is_said_again_as_it_stands_then():
    """A full disk may not bring a deleted document or an ended pin back at the next start, nor lose a pin."""
    service, effects, _ = tiny_service()
    gone, pinned, unpinned = [stored(service, effects, name, range(i, 32 + i)) for i, name in enumerate("abc")]
    service.pin(unpinned, Tier.NVME, None, "me", "")
    effects.complete_all(service)
    service.delete(gone)
    pin = service.pin(pinned, Tier.NVME, None, "me", "")
    service.unpin(unpinned)
    while effects.orders:
        effects.fail(service, effects.orders[0], StorageFailed("full"))
    service.tick()
    said = {record for order in effects.orders if isinstance(order, Write) for record in order.records}
    assert said >= {DropDocument(*gone), PutPin(pin), DropPin(*unpinned)}
    effects.complete_all(service)
    service.tick()
    assert not effects.orders
