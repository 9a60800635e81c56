"""How good evictions were: what nobody had used, for how long, and what came back."""

from __future__ import annotations

import pytest
from holdfast.kvstore.quality import Quality
from holdfast.kvstore.residency import Placement, Tier
from holdfast.kvstore.service import NS
from holdfast.kvstore.state import ExtentRecord

from fakes import EXTENT_BYTES
from scene import Scene, tokens


def copy_of(extent, tier=Tier.DDR, came_ns=0):
    return Placement(extent=extent, tenant="t", tier=tier, device=tier.label, size_bytes=1, came_ns=came_ns)


def attach_and_detach(scene, document):
    heard = scene.attach(document)
    scene.settle()
    scene.detach(heard[0])


def make_room(scene, name="new", extents=4):
    """Somebody needs room, and so all that is older leaves."""
    ingest, _ = scene.begin(name, tokens(99, extents))
    scene.settle()
    scene.service.abort_ingest(ingest.client, ingest.id)
    scene.settle()


def test_what_was_never_used_and_what_was():
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 4))
    scene.clock.advance(30 * NS)
    make_room(scene)
    quality = scene.state.quality.tiers[Tier.DDR]
    assert (quality.evicted, quality.unfetched, quality.returned) == (4, 4, 0)
    assert quality.idle.mean_seconds == pytest.approx(30)
    attach_and_detach(scene, document)
    assert quality.returned == 4
    scene.clock.advance(5 * NS)
    attach_and_detach(scene, document)
    scene.clock.advance(7 * NS)
    make_room(scene)
    assert (quality.evicted, quality.unfetched) == (8, 4), "those that were read back were used later"
    assert quality.idle.sum_ns == 4 * 30 * NS + 4 * 7 * NS
    assert quality.idle.counts[1:3] == [4, 4], "at most 10 s, at most 60 s"


def test_what_comes_back_is_regretted_at_the_price_of_its_verdict():
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 4))
    make_room(scene)
    price_ns = sum(verdict.restore_ns for verdict in scene.state.ledger.verdicts)
    scene.clock.advance(100 * NS)
    attach_and_detach(scene, document)
    quality = scene.state.quality.tiers[Tier.DDR]
    assert quality.gap.mean_seconds == pytest.approx(100)
    assert quality.regret_ns == price_ns > 0
    attach_and_detach(scene, document)
    assert quality.returned == 4, "once for each eviction"
    assert scene.state.quality.tiers[Tier.NVME].returned == 0


def test_a_drain_that_a_hit_called_back_is_no_regret():
    """Its verdict was written, but it never left."""
    quality = Quality(30)
    here = copy_of("a", came_ns=5)
    quality.evicted(here, "pressure", 1000, 10)
    quality.used(["a"], {"a": ExtentRecord(extent=None, ddr=here)}, [], 20)
    assert quality.tiers[Tier.DDR].returned == 0
    assert here.used_ns == 20


def test_a_return_that_was_brought_near_before_its_use_counts():
    quality = Quality(30)
    quality.evicted(copy_of("a", came_ns=5), "watermark", 1000, 10)
    quality.used(["a"], {"a": ExtentRecord(extent=None, ddr=copy_of("a", came_ns=15))}, [], 20)
    assert quality.tiers[Tier.DDR].returned == 1


def test_only_what_the_policy_chose_counts():
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 4))
    scene.evict(document, Tier.DDR)
    attach_and_detach(scene, document)
    quality = scene.state.quality.tiers[Tier.DDR]
    assert (quality.evicted, quality.returned) == (0, 0)
    scene.service.upkeep.delete(document, reason="expired")
    assert (quality.evicted, quality.returned) == (0, 0)


def test_nvme_is_used_where_ddr_has_nothing():
    scene = Scene(ddr=8)
    document = scene.store("a", tokens(1, 2))
    attach_and_detach(scene, document)
    used = [scene.state.extents[e].nvme.used_ns for e in scene.state.documents[document].document.extents]
    assert used == [None, None]
    scene.evict(document, Tier.DDR)
    attach_and_detach(scene, document)
    used = [scene.state.extents[e].nvme.used_ns for e in scene.state.documents[document].document.extents]
    assert None not in used


def test_hbm_is_told_apart_from_what_is_below():
    quality = Quality(30)
    below, above = copy_of("a"), copy_of("a", Tier.HBM, came_ns=3)
    quality.evicted(above, "pressure", 7, 10)
    quality.used(["a"], {"a": ExtentRecord(extent=None, ddr=below)}, [], 20)
    assert (quality.tiers[Tier.HBM].returned, quality.tiers[Tier.HBM].regret_ns) == (1, 7)
    again = copy_of("a", Tier.HBM, came_ns=20)
    quality.used(["a"], {"a": ExtentRecord(extent=None, ddr=below)}, [{"a": again}], 30)
    assert (below.used_ns, again.used_ns) == (30, 30)
    assert quality.tiers[Tier.HBM].returned == 1


def test_ghosts_are_bounded_and_the_oldest_goes_first():
    quality = Quality(6)
    for extent in "abc":
        quality.evicted(copy_of(extent), "pressure", 1, 1)
    for extent in "abc":
        quality.used([extent], {}, [], 2)
    assert quality.tiers[Tier.DDR].returned == 2


def test_looking_is_no_use():
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 4))
    make_room(scene)
    scene.service.upkeep.plan_eviction(None, Tier.NVME, EXTENT_BYTES)
    scene.service.upkeep.plan_eviction(document, Tier.DDR, 0)
    assert scene.state.quality.tiers[Tier.DDR].returned == 0
