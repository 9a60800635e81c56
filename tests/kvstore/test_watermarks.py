"""Watermarks: room is made in the background, so that who comes after a burst waits for no eviction; and no more."""

import pytest
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import HoldfastError, StorageFailed
from holdfast.kvstore.orders import Urgency, WriteOut
from holdfast.kvstore.residency import State, Tier
from holdfast.kvstore.sections import TenantConfig
from holdfast.kvstore.watermarks import REASON, REST_NS

from fakes import EXTENT_BYTES
from scene import Scene, tokens

MARKS = (0.8, 0.5)  # of 16 extents: from 13 down to 8


def scene_of(**more):
    return Scene(**{"ddr": 16, "nvme": 64, "ddr_marks": MARKS} | more)


def burst(scene, count=7, policy=WritePolicy.BACK):
    """So many documents of two extents, which only DDR has when they are written back."""
    return [scene.store(f"b{number}", tokens(number, 2), policy) for number in range(count)]


def used(scene, tier=Tier.DDR):
    return scene.state.usage.used(tier, "t") // EXTENT_BYTES


def reasons(scene):
    return [verdict.reason for verdict in scene.state.ledger.verdicts]


def calm(scene):
    """Time passes until nothing is under way any more."""
    for _ in range(20):
        scene.service.tick()
        scene.settle()


def wait_share(marks):
    """Of documents that come back after bursts, how many waited for an eviction: their room was not there at once."""
    scene = scene_of(ddr_marks=marks)
    waited = asked = 0
    old = [scene.store(f"old{number}", tokens(100 + number, 2)) for number in range(4)]
    for document in old:
        scene.evict(document, Tier.DDR)
    for turn in range(8):
        burst_of = [scene.store(f"n{turn}.{i}", tokens(200 + 10 * turn + i, 2), WritePolicy.BACK) for i in range(3)]
        calm(scene)
        heard = scene.attach(old[turn % 4])
        asked += 1
        waited += not heard
        scene.settle()
        assert not isinstance(heard[0], HoldfastError)
        scene.detach(heard[0])
        scene.evict(old[turn % 4], Tier.DDR)
        assert burst_of
    return waited / asked


def test_who_comes_after_a_burst_waits_for_no_eviction():
    assert wait_share((1, 1)) > 0.5
    assert wait_share(MARKS) == 0


def test_above_the_high_mark_it_goes_down_to_the_low_one_and_no_further():
    scene = scene_of()
    burst(scene, 6)
    calm(scene)
    assert used(scene) == 12, "below the high mark nothing leaves"
    assert not reasons(scene)
    scene.store("b6", tokens(6, 2), WritePolicy.BACK)
    calm(scene)
    assert used(scene) == 8
    assert reasons(scene) == [REASON] * 6
    assert scene.state.ledger.counts["watermark_ddr"] == 6
    assert scene.state.ledger.counts["watermark_ddr_bytes"] == 6 * EXTENT_BYTES
    assert used(scene, Tier.NVME) == 6
    scene.store("b7", tokens(7, 4), WritePolicy.BACK)
    calm(scene)
    assert used(scene) == 12, "between the marks it rests"


def test_it_is_written_behind_everything_else():
    scene = scene_of()
    burst(scene)
    scene.service.tick()
    assert {order.urgency for order in scene.pending(WriteOut)} == {Urgency.RELIEF}
    assert scene.service.watermarks.relieving == [Tier.DDR]
    before = len(scene.effects.orders)
    for _ in range(5):
        scene.service.tick()
    assert len(scene.effects.orders) == before, "one step after the other"
    calm(scene)
    assert scene.service.watermarks.relieving == []


def test_what_both_tiers_have_leaves_at_once():
    scene = scene_of()
    burst(scene, policy=WritePolicy.THROUGH)
    scene.service.tick()
    assert not scene.effects.orders
    assert used(scene) == 8


def test_what_only_memory_has_stays():
    scene = scene_of()
    burst(scene, policy=WritePolicy.MEMORY)
    calm(scene)
    assert used(scene) == 14
    assert not reasons(scene)


def test_while_somebody_reads_nothing_is_written_but_what_is_clean_leaves():
    scene = scene_of(ddr_marks=(0.5, 0.1))
    old = scene.store("old", tokens(50, 2))
    scene.evict(old, Tier.DDR)
    scene.store("clean", tokens(51, 2))
    burst(scene, 4)
    (attach,) = scene.attach(old)
    assert scene.service.loader.reads.waiting
    for _ in range(5):
        scene.service.tick()
    assert not scene.pending(WriteOut)
    assert used(scene) == 10, "two that NVMe has too have left, and two have come"
    scene.settle()
    scene.clock.advance(REST_NS)
    calm(scene)
    assert used(scene) == 2, "what is leased stays"
    scene.detach(attach)


def test_while_somebody_waits_for_room_it_starts_nothing():
    scene = scene_of(ddr_marks=(0.5, 0.1))
    burst(scene)
    held = [scene.attach(document)[0] for document in list(scene.state.documents)[:6]]
    _, heard = scene.begin("large", tokens(60, 4))
    assert not heard
    assert {order.urgency for order in scene.pending(WriteOut)} == {Urgency.DEMOTE}
    before = list(scene.effects.orders)
    scene.service.tick()
    assert scene.effects.orders == before
    for attach in held:
        scene.detach(attach)
    scene.settle()
    assert heard


def test_who_comes_to_wait_for_what_is_leaving_hastens_it(monkeypatch):
    monkeypatch.setattr("holdfast.kvstore.writes.IN_FLIGHT_BYTES", EXTENT_BYTES)
    scene = scene_of()
    burst(scene)
    scene.service.tick()
    assert len(scene.pending(WriteOut)) == 1
    scene.begin("large", tokens(60, 6))
    first = scene.pending(WriteOut)
    while scene.pending(WriteOut) in (first, []):
        scene.end(scene.effects.orders[0])
    assert scene.pending(WriteOut)[0].urgency is Urgency.DEMOTE
    scene.settle()


def test_what_is_leased_pinned_or_guaranteed_stays():
    least = TenantConfig(ddr_guaranteed_bytes=4 * EXTENT_BYTES)
    scene = scene_of(ddr_marks=(0.5, 0.1), tenants={"a": least})
    for number in range(3):
        scene.store(f"a/{number}", tokens(number, 2), WritePolicy.BACK)
    documents = burst(scene, 4)
    (attach,) = scene.attach(documents[0])
    scene.service.pin(documents[1], Tier.DDR, None, "me", "test")
    calm(scene)
    assert scene.state.usage.used(Tier.DDR, "a") == 4 * EXTENT_BYTES
    assert [Tier.DDR in tiers for d in documents for tiers in scene.tiers(d)] == [True] * 4 + [False] * 4
    scene.detach(attach)


def test_where_nothing_may_leave_it_rests_before_it_looks_again(monkeypatch):
    scene = scene_of(ddr_marks=(0.5, 0.1))
    documents = burst(scene)
    for document in documents:
        scene.service.pin(document, Tier.DDR, None, "me", "test")
    scene.settle()
    looks = []
    planner = scene.service.planner
    monkeypatch.setattr(planner, "relieve", lambda *_: looks.append(1))
    scene.service.tick()
    tries = len(looks)
    assert tries
    scene.service.tick()
    assert len(looks) == tries
    scene.clock.advance(REST_NS)
    scene.service.tick()
    assert len(looks) > tries


def test_a_part_leaves_where_not_all_may():
    scene = scene_of(ddr_marks=(0.5, 0.1))
    documents = burst(scene)
    for document in documents[:5]:
        scene.service.pin(document, Tier.DDR, None, "me", "test")
    calm(scene)
    scene.clock.advance(REST_NS)
    calm(scene)
    assert used(scene) == 10


def test_what_cannot_be_written_for_nobody_stays_in_memory():
    scene = scene_of()
    burst(scene)
    scene.service.tick()
    for order in scene.pending(WriteOut):
        scene.end(order, StorageFailed("the device is broken"))
    assert used(scene) == 14
    assert all(r.ddr.state is State.RESIDENT for r in scene.state.extents.values())


def test_on_nvme_too():
    scene = Scene(ddr=16, nvme=16, nvme_marks=(0.8, 0.5))
    documents = burst(scene, policy=WritePolicy.THROUGH)
    for document in documents:
        scene.evict(document, Tier.DDR)
    calm(scene)
    assert used(scene, Tier.NVME) == 8
    assert scene.state.ledger.counts["watermark_nvme"] == 6


@pytest.mark.parametrize("marks", [(1, 1), (1, 0.5)])
def test_a_high_mark_of_one_switches_it_off(marks):
    scene = scene_of(ddr_marks=marks)
    burst(scene, 8)
    calm(scene)
    assert used(scene) == 16
