"""Explanations: where a document's copies are in line, what it has lost and why, and what that costs."""

from __future__ import annotations

import msgspec
import pytest
from holdfast.kvstore.claims import PinKind
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import DocumentNotFound
from holdfast.kvstore.explain_view import explain_view
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.sections import TenantConfig
from holdfast.kvstore.service import NS

from daemon_process import DaemonProcess, put
from fakes import CLIENT, EXTENT_BYTES, FAR_NS
from scene import Scene, named, rows, tokens


def explained(scene, document):
    """What is told, which changes nothing: not even what is told next."""
    victims = scene.service.upkeep.plan_eviction(None, Tier.NVME, EXTENT_BYTES) if scene.state.extents else ()
    view = explain_view(scene.state, scene.service.planner, document)
    assert explain_view(scene.state, scene.service.planner, document) == view
    if scene.state.extents:
        assert scene.service.upkeep.plan_eviction(None, Tier.NVME, EXTENT_BYTES) == victims
    scene.state.check()
    return view


def test_each_cache_says_what_it_holds_and_who_leaves_before_it():
    scene = Scene(ddr=16)
    documents = []
    for seed in range(4):
        documents.append(scene.store(f"d{seed}", tokens(seed + 1, 2)))
        scene.clock.advance((seed + 1) * 60 * NS)
    ahead = []
    for document in documents:
        view = explained(scene, document)
        ddr, nvme = view.caches
        assert (view.state, ddr.device, nvme.device) == ("complete", "ddr", "nvme")
        assert (ddr.extents, ddr.size_bytes, ddr.start, ddr.stop) == (2, 2 * EXTENT_BYTES, 32, 64)
        assert ddr.standing.is_leaf
        assert ddr.standing.in_line == 4
        assert ddr.scores["score"] is not None
        assert 0 < ddr.restore_seconds < nvme.restore_seconds, "a reload, a recompute"
        assert view.restore.nvme_bytes == 0
        assert view.restore.missing_tokens == []
        ahead.append(ddr.standing.ahead)
    assert sorted(ahead) == [0, 1, 2, 3]
    (victim,) = scene.service.upkeep.plan_eviction(None, Tier.DDR, EXTENT_BYTES)
    assert victim.documents == (str(documents[ahead.index(0)]),)


def test_what_keeps_a_copy_is_told():
    scene = Scene(ddr=16, tenants={"t": TenantConfig(ddr_guaranteed_bytes=8 * EXTENT_BYTES)})
    leased, pinned, soft = (scene.store(name, tokens(seed, 1)) for seed, name in ((1, "a"), (2, "b"), (3, "c")))
    scene.service.attach(CLIENT, leased, None, None, None, FAR_NS, [].append)
    scene.service.pin(pinned, Tier.NVME, None, "me", "")
    scene.service.keeping.pin(soft, Tier.DDR, 60, "me", "", PinKind.SOFT)
    (ddr, nvme) = explained(scene, leased).caches
    assert (ddr.leases, ddr.standing.is_movable, nvme.leases, nvme.standing.is_movable) == (1, False, 0, True)
    assert ddr.is_guaranteed
    assert not nvme.is_guaranteed
    (ddr, nvme) = explained(scene, pinned).caches
    assert (ddr.pin, nvme.pin, nvme.standing.is_movable) == (None, "hard", False)
    (ddr, _) = explained(scene, soft).caches
    assert ddr.pin == "soft"
    assert ddr.standing.rank > 0


def test_what_is_in_hbm_is_in_line_too():
    scene = Scene()
    scene.group()
    document = scene.store("a", tokens(1, 2))
    heard = scene.attach(document, group="g")
    scene.settle()
    hbm = explained(scene, document).caches[0]
    assert (hbm.device, hbm.tier, hbm.extents) == ("hbm:g", "hbm", 2)
    assert not hbm.standing.is_movable
    scene.detach(heard[0])
    hbm = explained(scene, document).caches[0]
    assert (hbm.standing.ahead, hbm.standing.in_line, hbm.standing.is_movable) == (0, 1, True)
    assert (hbm.start, hbm.stop) == (32, 64)


def test_what_has_sunk_and_what_is_gone():
    scene = Scene(ddr=4, nvme=4)
    document = scene.store("a", tokens(1, 4))
    scene.clock.advance(60 * NS)
    scene.store("b", tokens(2, 3))
    view = explained(scene, document)
    assert view.state != "complete"
    assert view.restore.recompute_seconds > 0
    nvme, ddr = view.departures
    assert (nvme.tier, nvme.action, nvme.wanted_by, nvme.is_back) == ("nvme", "drop", "t/b", False)
    assert (ddr.tier, ddr.action, ddr.wanted_by, ddr.is_back) == ("ddr", "demote", "t/b", False)
    assert nvme.restore_seconds > ddr.restore_seconds > 0
    assert view.restore.missing_tokens == [(nvme.start, nvme.stop)]


def test_what_came_back_is_said_to_be_back():
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 4))
    scene.evict(document, Tier.DDR)
    assert [one.is_back for one in explained(scene, document).departures] == [False]
    view = explained(scene, document)
    assert view.restore.nvme_bytes == 4 * EXTENT_BYTES
    scene.attach(document)
    scene.settle()
    assert [(one.reason, one.is_back) for one in explained(scene, document).departures] == [("admin", True)]


def test_the_setting_that_binds_is_named():
    """A tenant at its maximum has nothing of a larger tier."""
    scene = Scene(nvme=16, tenants={"t": TenantConfig(nvme_maximum_bytes=4 * EXTENT_BYTES), "*": TenantConfig()})
    document = scene.store("a", tokens(1, 2))
    ddr, nvme = explained(scene, document).caches
    assert (ddr.bound, nvme.bound) == ("ddr.capacity_bytes", "tenants.t.nvme_maximum_bytes")
    assert explained(scene, document).restore.bound == "tenants.t.nvme_maximum_bytes"
    scene = Scene(nvme=4, tenants={"*": TenantConfig(nvme_maximum_bytes=8 * EXTENT_BYTES)})
    assert explained(scene, scene.store("a", tokens(1, 2))).restore.bound == "nvme.capacity_bytes"
    scene = Scene(nvme=8, tenants={"*": TenantConfig(nvme_maximum_bytes=4 * EXTENT_BYTES)})
    assert explained(scene, scene.store("a", tokens(1, 2))).restore.bound == "tenants.*.nvme_maximum_bytes"


def test_what_a_restart_finds_is_as_old_as_the_daemon():
    """Not as the machine: that would make all of it look worthless."""
    scene = Scene()
    document = scene.store("a", tokens(1, 2))
    again = Scene()
    began_ns = again.clock.monotonic_ns()
    assert began_ns > 0
    again.service.restore(*rows(scene))
    again.settle()
    again.clock.advance(5 * NS)
    (nvme,) = explained(again, document).caches
    assert nvme.scores["age_seconds"] == 5


def test_a_document_that_is_no_more():
    scene = Scene()
    document = scene.store("a", tokens(1, 4), WritePolicy.MEMORY)
    price = scene.service.planner.prefills.curve(scene.state.documents[document].document.fingerprint)
    scene.service.delete(document)
    scene.settle()
    view = explained(scene, document)
    assert (view.state, view.token_count, view.caches) == ("deleted", 128, [])
    assert view.restore.recompute_seconds == price.marginal_prefill_ns(0, 128) / 1e9
    scene.store("a", tokens(2, 1))
    assert explained(scene, document).state == "complete"
    with pytest.raises(DocumentNotFound, match="nothing is remembered"):
        explain_view(scene.state, scene.service.planner, named("never"))


def test_a_daemon_explains():
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        put(client, "a", 100)
        client.free("a")
        rest = daemon.rest()
        found = rest.get("/v1/documents/default/a/explain")
        assert [cache["device"] for cache in found["caches"]] == ["nvme"]
        assert found["departures"][0]["reason"] == "admin"
        assert msgspec.to_builtins(client.explain("a"))["departures"] == found["departures"]
        rest.delete("/v1/documents/default/a")
        assert rest.get("/v1/documents/default/a/explain")["state"] == client.explain("a").state == "deleted"
        with pytest.raises(DocumentNotFound):
            rest.get("/v1/documents/default/b/explain")
        assert [one["tier"] for one in rest.get("/v1/status")["quality"]] == ["hbm", "ddr", "nvme"]
