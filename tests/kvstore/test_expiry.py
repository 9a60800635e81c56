"""Expiry: documents whose time is up go, as soon as nobody needs them, and not before."""

import pytest
from holdfast.kvstore.claims import PinKind
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import DocumentNotFound, InvalidRequest
from holdfast.kvstore.expiry import EXTENTS_GONE, LOOKED_AT
from holdfast.kvstore.orders import PutDocument, Write
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import Service

from daemon_process import DaemonProcess, put, tokens_of, until, write
from fakes import CLIENT, tiny_spec
from scene import Scene, rows, tokens

NS = 10**9


@pytest.fixture
def scene():
    return Scene()


def pass_time(scene, seconds):
    """Time goes on, and the service looks around twice: a round of looking begins with a tick."""
    scene.clock.advance(int(seconds * NS))
    for _ in range(2):
        scene.service.tick()
        scene.state.check()


def expiry_of(scene, document):
    return scene.state.documents[document].document.expires_wall_ns


def test_a_document_goes_when_its_time_is_up_and_says_why(scene):
    document = scene.store("short", tokens(1, 3), ttl_seconds=10)
    other = scene.store("long", tokens(2, 1))
    pass_time(scene, 9.9)
    assert document in scene.state.documents
    pass_time(scene, 0.2)
    scene.settle()
    assert set(scene.state.documents) == {other}
    assert {(v.reason, v.action, v.documents) for v in scene.state.ledger.verdicts} == {
        ("expired", "drop", ("t/short",))
    }
    assert len(scene.state.ledger.verdicts) == 6, "three extents in two tiers"
    assert scene.state.ledger.counts["documents_expired"] == 1
    assert scene.state.usage.used(Tier.DDR, "t") == scene.state.usage.used(Tier.NVME, "t") == 16384


def test_what_another_document_shares_stays(scene):
    scene.store("short", tokens(1, 3), ttl_seconds=10)
    longer = scene.store("longer", tokens(1, 4))
    pass_time(scene, 11)
    assert set(scene.state.documents) == {longer}
    assert all(tiers == {Tier.DDR, Tier.NVME} for tiers in scene.tiers(longer))
    assert not scene.state.ledger.verdicts


def test_the_time_runs_from_publication(scene):
    ingest, _ = scene.begin("slow", tokens(1, 1), ttl_seconds=10)
    pass_time(scene, 60)
    scene.commit(ingest)
    scene.settle()
    assert expiry_of(scene, DocumentId("t", "slow")) == scene.clock.wall_ns() + 10 * NS


def test_a_lease_is_waited_for_but_no_new_one_is_given(scene):
    document = scene.store("read", tokens(1, 2), ttl_seconds=10)
    (attach,) = scene.attach(document)
    pass_time(scene, 11)
    assert document in scene.state.documents
    with pytest.raises(DocumentNotFound, match="has expired"):
        scene.attach(document)
    scene.detach(attach)
    pass_time(scene, 0)
    assert document not in scene.state.documents


def test_a_pin_outlives_the_time_of_its_document(scene):
    document = scene.store("kept", tokens(1, 2), ttl_seconds=10)
    scene.service.pin(document, Tier.DDR, None, "me", "test")
    pass_time(scene, 11)
    (attach,) = scene.attach(document)
    scene.detach(attach)
    scene.service.unpin(document)
    pass_time(scene, 0)
    assert document not in scene.state.documents


def test_a_soft_pin_goes_with_its_document(scene):
    document = scene.store("liked", tokens(1, 2), ttl_seconds=10)
    scene.service.keeping.pin(document, Tier.DDR, None, "me", "test", kind=PinKind.SOFT)
    scene.settle()
    scene.clock.advance(11 * NS)
    with pytest.raises(DocumentNotFound, match="has expired"):
        scene.attach(document)
    pass_time(scene, 0)
    assert document not in scene.state.documents
    assert not scene.state.pins.all()


def test_an_ingest_of_the_same_document_is_waited_for_and_gives_it_new_time(scene):
    document = scene.store("again", tokens(1, 2), ttl_seconds=10)
    ingest, _ = scene.begin("again", tokens(1, 2))
    pass_time(scene, 11)
    assert document in scene.state.documents
    scene.commit(ingest)
    scene.settle()
    assert expiry_of(scene, document) is None, "its time was over, so it is as if it were new"
    assert scene.state.documents[document].durable


def test_a_longer_version_inherits_the_time_that_is_left(scene):
    document = scene.store("talk", tokens(1, 1), ttl_seconds=10)
    until = expiry_of(scene, document)
    scene.store("talk", tokens(1, 2))
    assert expiry_of(scene, document) == until
    scene.store("talk", tokens(1, 3), ttl_seconds=100)
    assert expiry_of(scene, document) == scene.clock.wall_ns() + 100 * NS


@pytest.mark.parametrize("policy", [WritePolicy.THROUGH, WritePolicy.MEMORY])
def test_it_is_set_and_lifted_later_and_survives_a_restart(scene, policy):
    document = scene.store("later", tokens(1, 2), policy)
    heard = []
    scene.service.expiry.set(document, 10, heard.append)
    if policy is WritePolicy.THROUGH:
        assert not heard, "answered when the catalog knows"
        (write,) = scene.pending(Write)
        assert isinstance(write.records[0], PutDocument)
    scene.settle()
    assert heard == [None]
    noted = [note.document for note in scene.effects.notes if isinstance(note, PutDocument)]
    assert noted[-1].expires_wall_ns == scene.clock.wall_ns() + 10 * NS
    if policy is WritePolicy.THROUGH:
        again = Service(scene.config, scene.clock, scene.effects, lambda _: bytes(32))
        again.restore(*rows(scene))
        scene.clock.advance(11 * NS)
        again.tick()
        again.tick()
        assert not again.state.documents
    scene.service.expiry.set(document, None)
    scene.settle()
    pass_time(scene, 20)
    assert document in scene.state.documents


@pytest.mark.parametrize("ttl_seconds", [0, -1, float("nan"), float("inf"), 1e10])
def test_what_is_no_time_to_live(scene, ttl_seconds):
    document = scene.store("one", tokens(1, 1))
    with pytest.raises(InvalidRequest, match="ttl_seconds"):
        scene.service.expiry.set(document, ttl_seconds)
    with pytest.raises(InvalidRequest, match="ttl_seconds"):
        scene.begin("two", tokens(2, 1), ttl_seconds=ttl_seconds)
    assert not scene.service.ingests.open
    with pytest.raises(DocumentNotFound):
        scene.service.expiry.set(DocumentId("t", "three"), 1)


def test_a_tick_looks_at_a_bounded_number_of_documents_and_all_have_their_turn(scene, monkeypatch):
    monkeypatch.setattr("holdfast.kvstore.expiry.LOOKED_AT", 2)
    monkeypatch.setattr("holdfast.kvstore.expiry.EXTENTS_GONE", 2)
    assert LOOKED_AT > 2
    assert EXTENTS_GONE > 2
    for number in range(5):
        scene.store(f"d{number}", tokens(number, 1), ttl_seconds=10)
    scene.clock.advance(11 * NS)
    left = []
    for _ in range(6):
        before = len(scene.state.documents)
        scene.service.tick()
        left.append(before - len(scene.state.documents))
    assert max(left) <= 2
    assert not scene.state.documents


def test_a_disconnected_reader_no_longer_keeps_it(scene):
    document = scene.store("read", tokens(1, 2), ttl_seconds=10)
    scene.attach(document)
    pass_time(scene, 11)
    scene.service.disconnect(CLIENT)
    pass_time(scene, 0)
    assert document not in scene.state.documents


def test_a_real_daemon_keeps_the_time_over_a_restart_and_then_deletes():
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        opened = client.begin_ingest("a", tiny_spec().fingerprint(), tokens_of("a", 64), ttl_seconds=3600)
        write(client, "a", opened.parts)
        set_at_ingest = client.commit_ingest(opened.ingest).expires_wall_ns
        put(client, "b", 64)
        until(lambda: all(document.durable for document in client.documents()), "both are on NVMe")
        daemon.rest().patch("/v1/documents/default/b", {"ttl_seconds": 1800})
        known = {document.name: document.expires_wall_ns for document in client.documents()}
        assert known["a"] == set_at_ingest
        client = daemon.restart_cold().client()
        assert {document.name: document.expires_wall_ns for document in client.documents()} == known
        daemon.rest().patch("/v1/documents/default/b", {"ttl_seconds": 0.001})
        until(lambda: [document.name for document in client.documents()] == ["a"], "it has expired")
        until(lambda: daemon.used("nvme") == 2 * 16384, "and its KV is gone")
        assert {v["reason"] for v in daemon.rest().get("/v1/evictions")["evictions"]} == {"expired"}
