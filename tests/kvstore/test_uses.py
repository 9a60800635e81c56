"""What the eviction policy is told: uses, releases, and what each cache holds. Looking tells it nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from holdfast.eviction.lru import Lru
from holdfast.kvstore import service as service_module
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import NS

from fakes import CLIENT, EXTENT_BYTES, FAR_NS
from scene import FINGERPRINT, Scene, tokens


class Witness:
    """Writes down what it is told, and holds the protocol against it. Ranks as LRU does."""

    name = "witness"

    def __init__(self):
        self.lru = Lru()
        self.heard = []
        self.here = []

    def used(self, use):
        self.heard.append(("used", use.chain, use.token_count, use.unit_tokens, use.session))
        self.lru.used(use)

    def released(self, chain, now_ns):
        if chain:  # the first, of nothing, tells the time
            self.heard.append(("released", chain))
        self.lru.released(chain, now_ns)

    def ranking(self, capacity_bytes, worth):
        assert worth(0) == 0
        assert 0 < worth(100) <= worth(200)
        here = Counter()
        self.here.append((capacity_bytes, here))
        return WitnessRanking(self.lru.ranking(capacity_bytes, worth), here)


class WitnessRanking:
    def __init__(self, ranking, here):
        self.ranking, self.here = ranking, here
        self.scores, self.explain = ranking.scores, ranking.explain

    def came(self, unit, size_bytes):
        assert not self.here[unit], "it was here"
        assert size_bytes > 0
        self.here[unit] += 1
        self.ranking.came(unit, size_bytes)

    def left(self, unit):
        del self.here[unit]
        self.ranking.left(unit)


@pytest.fixture
def scene(monkeypatch):
    witness = Witness()
    monkeypatch.setattr(service_module, "POLICIES", {"popularity": lambda: witness})
    made = Scene()
    made.witness = witness
    return made


def caches(scene):
    """What the policy knows to be in DDR, on NVMe and in the group's HBM."""
    return [set(here) for _, here in scene.witness.here]


def test_publishing_attaching_and_detaching_are_told_with_the_documents_own_chain(scene):
    document = scene.store("a", tokens(1, 3))
    (chain,) = [heard[1] for heard in scene.witness.heard]
    owner = scene.state.documents[document]
    assert scene.witness.heard == [("used", owner.document.extents, 96, 32, "t/a")]
    heard = []
    attach = scene.service.attach(CLIENT, document, None, None, None, FAR_NS, heard.append)
    scene.service.detach(CLIENT, attach.lease.id)
    assert [told[0] for told in scene.witness.heard] == ["used", "used", "released"]
    assert all(told[1] is chain for told in scene.witness.heard), "shared, not copied"
    assert owner.use_count == 2


def test_a_range_is_a_use_of_its_extents(scene):
    document = scene.store("a", tokens(1, 3))
    extents = scene.state.documents[document].document.extents
    scene.service.attach(CLIENT, document, None, None, None, FAR_NS, [].append, (33, 96))
    assert scene.witness.heard[-1] == ("used", extents[1:], 64, 32, "t/a")


def test_a_client_that_goes_away_releases(scene):
    document = scene.store("a", tokens(1, 1))
    scene.service.attach(CLIENT, document, None, None, None, FAR_NS, [].append)
    scene.service.disconnect(CLIENT)
    assert scene.witness.heard[-1][0] == "released"


def test_a_use_is_told_before_what_is_missing_comes(scene):
    """A policy that learns from uses would take an extent that came first for one that was there before."""
    order = []
    used, came = scene.witness.used, WitnessRanking.came
    scene.witness.used = lambda use: (order.append("used"), used(use))
    ranking = scene.state.rankings["ddr"]
    ranking.came = lambda unit, size_bytes: (order.append("came"), came(ranking, unit, size_bytes))
    document = scene.store("a", tokens(1, 2))
    assert order == ["used", "came", "came"]
    scene.evict(document, Tier.DDR)
    scene.service.attach(CLIENT, document, None, None, None, FAR_NS, [].append)
    assert order[3:] == ["used", "came", "came"]


def test_looking_and_dry_runs_tell_nothing(scene):
    document = scene.store("a", tokens(1, 2))
    before = list(scene.witness.heard)
    scene.service.lookup("t", FINGERPRINT, bytes(16))
    scene.service.upkeep.plan_eviction(document, Tier.DDR, 0)
    scene.service.upkeep.plan_eviction(None, Tier.DDR, EXTENT_BYTES)
    assert scene.witness.heard == before


def test_every_cache_is_told_what_it_holds(scene):
    scene.group()
    document = scene.store("a", tokens(1, 3))
    extents = set(scene.state.documents[document].document.extents)
    assert caches(scene) == [extents, extents, set()]
    attach = scene.service.attach(CLIENT, document, None, "g", None, FAR_NS, [].append)
    scene.settle()
    assert caches(scene) == [extents, extents, extents]
    scene.service.detach(CLIENT, attach.lease.id)
    scene.evict(document, Tier.DDR)
    assert caches(scene) == [set(), extents, set()]
    scene.service.delete(document)
    scene.settle()
    assert caches(scene) == [set(), set(), set()]


def test_a_front_that_two_shards_hold_is_told_once(scene):
    scene.group()
    names = [scene.store(name, tokens(1, count)) for name, count in (("a", 2), ("b", 3))]
    leases = [scene.service.attach(CLIENT, name, None, "g", None, FAR_NS, [].append).lease.id for name in names]
    scene.settle()
    extents = set(scene.state.documents[names[1]].document.extents)
    assert caches(scene)[2] == extents
    for lease in leases:
        scene.service.detach(CLIENT, lease)
    scene.evict(names[1], Tier.HBM)
    assert caches(scene)[2] == set(scene.state.documents[names[0]].document.extents)


def test_a_groups_ranking_goes_with_it(scene):
    """What it held has left it: policies may count copies over all caches."""
    scene.group()
    assert set(scene.state.rankings) == {"ddr", "nvme", "hbm:g"}
    assert scene.witness.here[2][0] == scene.state.groups["g"].capacity_bytes
    scene.store("a", tokens(1, 2), group="g")
    assert len(caches(scene)[2]) == 2
    scene.service.disconnect(next(iter(scene.state.groups["g"].seats.values())))
    assert set(scene.state.rankings) == {"ddr", "nvme"}
    assert not caches(scene)[2]


def test_what_drains_has_not_left_until_it_is_gone(scene):
    document = scene.store("a", tokens(1, 2), WritePolicy.BACK)
    scene.clock.advance(NS)
    scene.service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
    assert len(scene.state.forests.ddr) == 0
    assert len(caches(scene)[0]) == 2
    scene.settle()
    assert [len(here) for here in caches(scene)] == [0, 2]
    assert DocumentId("t", "a") == document
