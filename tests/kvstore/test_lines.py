"""Who leaves before whom, as people are told it."""

from __future__ import annotations

from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import NS
from holdfast.kvstore.views import extent_views

from fakes import CLIENT, EXTENT_BYTES, FAR_NS
from scene import Scene, tokens


def standings(scene, document, tier=Tier.DDR):
    found = []
    for extent in scene.state.documents[document].document.extents:
        record = scene.state.extents[extent]
        found.append(scene.service.planner.explain(record, record.ddr if tier is Tier.DDR else record.nvme))
    return found


def test_the_order_is_that_in_which_eviction_takes_them():
    """However many are taken: who has nobody ahead of it leaves first, and so on."""
    scene = Scene(ddr=8)
    documents = []
    for seed in range(4):
        documents.append(scene.store(f"d{seed}", tokens(seed + 1, 2)))
        scene.clock.advance((seed + 1) * 60 * NS)
    ahead = {}
    for document in documents:
        front, last = standings(scene, document)
        assert last.is_leaf
        assert not front.is_leaf
        assert last.in_line == 4
        assert last.is_movable
        ahead[last.ahead] = scene.state.documents[document].document.extents[-1], last.scores
    assert sorted(ahead) == [0, 1, 2, 3]
    (victim,) = scene.service.upkeep.plan_eviction(None, Tier.DDR, EXTENT_BYTES)
    assert (victim.extent, victim.scores) == ahead[0]


def test_what_is_leased_or_pinned_is_not_in_line():
    scene = Scene(ddr=8)
    first, second = scene.store("a", tokens(1, 1)), scene.store("b", tokens(2, 1))
    scene.service.attach(CLIENT, first, None, None, None, FAR_NS, [].append)
    (leased,), (free,) = standings(scene, first), standings(scene, second)
    assert (leased.is_movable, leased.in_line) == (False, 1)
    assert (free.is_movable, free.ahead) == (True, 0)


def test_each_tier_has_its_own_line():
    scene = Scene(ddr=8)
    first = scene.store("a", tokens(1, 2))
    scene.store("b", tokens(2, 1), WritePolicy.MEMORY)
    assert standings(scene, first)[-1].in_line == 2
    assert standings(scene, first, Tier.NVME)[-1].in_line == 1, "what only DDR holds cannot leave NVMe"
    scene.evict(first, Tier.DDR)
    views = extent_views(scene.state, scene.service.planner, scene.state.documents[first])
    assert [view.standing.tier for view in views] == ["nvme", "nvme"]
    scene.evict(first, Tier.NVME)
    views = extent_views(scene.state, scene.service.planner, scene.state.documents[first])
    assert [view.standing for view in views] == [None, None]
