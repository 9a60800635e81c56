"""What documents have lost: by document, merged into ranges, bounded."""

from __future__ import annotations

from dataclasses import replace

from holdfast.kvstore.departures import DOCUMENTS, EACH, PAUSE_NS, Departures
from holdfast.kvstore.document import DocumentId
from holdfast.kvstore.errors import CorruptExtent
from holdfast.kvstore.ledger import Verdict
from holdfast.kvstore.orders import ReadIn
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import NS

from scene import Scene, named, tokens

ONE = Verdict(
    wall_ns=0,
    extent="e",
    documents=("t/a",),
    start=0,
    stop=32,
    tier="ddr",
    action="demote",
    reason="pressure",
    size_bytes=10,
    last_copy=False,
    restore_ns=5,
    policy="lru",
    scores={"score": 1.0},
    wanted_by="t/b",
)


def at(number, **differs):
    return replace(ONE, start=32 * number, stop=32 * number + 32, **differs)


def ranges(departures, name="a"):
    return [(d.tier, d.start, d.stop, d.copies) for d in departures.of(DocumentId("t", name)).departures]


def test_a_run_that_leaves_from_its_tail_is_one_departure():
    departures = Departures()
    for number in reversed(range(250)):
        departures.add(at(number, wall_ns=250 - number))
    (one,) = departures.of(DocumentId("t", "a")).departures
    assert (one.start, one.stop, one.copies, one.size_bytes, one.restore_ns) == (0, 8000, 250, 2500, 1250)
    assert (one.first_wall_ns, one.wall_ns) == (1, 250)


def test_the_parts_of_the_score_are_kept_though_the_rest_of_a_run_has_none():
    departures = Departures()
    departures.add(at(1, scores={"score": 1.0, "age": 2.0}))
    departures.add(at(0, scores={"score": 1.5}))
    assert departures.of(DocumentId("t", "a")).departures[0].scores == {"score": 1.0, "age": 2.0}


def test_another_reason_tier_or_time_is_another_departure():
    departures = Departures()
    departures.add(at(9))
    departures.add(at(8, tier="nvme"))
    departures.add(at(8))
    departures.add(at(7, reason="watermark"))
    departures.add(at(7, wanted_by="t/c"))
    departures.add(at(5))
    departures.add(at(4, wall_ns=2 * PAUSE_NS))
    assert ranges(departures) == [
        ("ddr", 256, 320, 2),
        ("nvme", 256, 288, 1),
        ("ddr", 224, 256, 1),
        ("ddr", 224, 256, 1),
        ("ddr", 160, 192, 1),
        ("ddr", 128, 160, 1),
    ]


def test_a_front_that_several_need_is_told_to_each():
    departures = Departures()
    departures.add(at(0, documents=("t/a", "t/b")))
    assert ranges(departures, "a") == ranges(departures, "b") == [("ddr", 0, 32, 1)]


def test_memory_is_bounded_in_both_directions():
    departures = Departures()
    for number in range(0, 10 * EACH, 2):  # never neighbours
        departures.add(at(number))
    assert len(departures.of(DocumentId("t", "a")).departures) == EACH
    assert ranges(departures)[-1] == ("ddr", 32 * (10 * EACH - 2), 32 * (10 * EACH - 1), 1)
    for number in range(DOCUMENTS):
        departures.add(at(0, documents=(f"t/{number}",)))
    assert len(departures) == DOCUMENTS
    assert departures.of(DocumentId("t", "a")) is None, "the one that lost something longest ago"


def test_who_needed_the_room_is_told():
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 4))
    scene.clock.advance(NS)
    scene.store("b", tokens(2, 3))
    (one,) = scene.state.departures.of(document).departures
    assert (one.tier, one.reason, one.action, one.wanted_by) == ("ddr", "pressure", "demote", "t/b")
    assert one.copies >= 3
    assert one.policy == "popularity"
    assert "score" in one.scores


def test_a_document_that_was_deleted_or_has_expired_is_remembered():
    scene = Scene()
    document, other = scene.store("a", tokens(1, 4)), scene.store("b", tokens(2, 2), ttl_seconds=10)
    scene.service.delete(document)
    scene.clock.advance(20 * NS)
    scene.service.tick()
    scene.service.tick()
    scene.settle()
    past = scene.state.departures.of(document)
    assert (past.ended, past.document.token_count, list(past.departures)) == ("deleted", 128, [])
    past = scene.state.departures.of(other)
    assert past.ended == "expired"
    assert {d.tier for d in past.departures} == {"ddr", "nvme"}


def test_what_is_found_corrupt_is_told():
    scene = Scene()
    document = scene.store("a", tokens(1, 1))
    scene.evict(document, Tier.DDR)
    scene.attach(document)
    (order,) = scene.pending(ReadIn)
    scene.end(order, CorruptExtent("plane 3 differs from its seal"))
    scene.settle()
    last = scene.state.departures.of(named("a")).departures[-1]
    assert (last.tier, last.action, last.reason) == ("nvme", "drop", "corrupt, plane 3 differs from its seal")
