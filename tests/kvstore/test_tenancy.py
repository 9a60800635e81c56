"""Tenancy: quotas in the daemon. Nobody loses what it is guaranteed, nobody has more than its maximum."""

import random

import pytest
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    DocumentIncomplete,
    DocumentTooLarge,
    HoldfastError,
    InUse,
    NoCapacity,
    QuotaExceeded,
)
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.sections import TenantConfig

from daemon_process import DaemonProcess, fetch, put
from fakes import EXTENT_BYTES
from scene import Scene, tokens

TIERS = (Tier.DDR, Tier.NVME)


def quota(ddr=(0, None), nvme=(0, None)):
    """Guaranteed and maximum extents of each tier."""
    (ddr_least, ddr_most), (nvme_least, nvme_most) = ddr, nvme
    return TenantConfig(
        ddr_guaranteed_bytes=ddr_least * EXTENT_BYTES,
        ddr_maximum_bytes=None if ddr_most is None else ddr_most * EXTENT_BYTES,
        nvme_guaranteed_bytes=nvme_least * EXTENT_BYTES,
        nvme_maximum_bytes=None if nvme_most is None else nvme_most * EXTENT_BYTES,
    )


def used(scene, tenant, tier=Tier.DDR):
    """Extents of a tenant in a tier."""
    return scene.state.usage.used(tier, tenant) // EXTENT_BYTES


def test_a_tenant_at_its_maximum_makes_room_of_its_own_although_there_is_more():
    scene = Scene(ddr=16, nvme=16, tenants={"a": quota(ddr=(0, 4))})
    first = scene.store("a/1", tokens(1, 3))
    scene.store("b/1", tokens(2, 3))
    scene.store("a/2", tokens(3, 3))
    assert (used(scene, "a"), used(scene, "b")) == (4, 3)
    assert sum(Tier.DDR in tiers for tiers in scene.tiers(first)) == 1
    assert {verdict.documents for verdict in scene.state.ledger.verdicts} == {("a/1",)}


def test_more_than_a_tenant_may_ever_have_is_refused_at_once_by_name():
    scene = Scene(ddr=16, nvme=0, tenants={"*": quota(ddr=(0, 4))})
    with pytest.raises(HoldfastError, match="of DDR"):
        scene.begin("a/1", tokens(1, 5), WritePolicy.MEMORY)
    scene = Scene(ddr=16, nvme=16, tenants={"a": quota(ddr=(0, 4))})
    document = scene.store("a/1", tokens(1, 4))
    ingest, heard = scene.begin("a/2", tokens(2, 3))
    scene.settle()
    (attach,) = scene.attach(document)
    assert isinstance(attach, QuotaExceeded)
    assert attach.code == "quota-exceeded"
    assert "'a'" in str(attach)
    assert "ddr_maximum_bytes" in str(attach)
    assert [holder.size_bytes for holder in attach.holders] == [4 * EXTENT_BYTES]
    scene.service.abort_ingest(ingest.client, ingest.id)
    assert heard == [ingest]


def test_what_is_larger_than_the_maximum_passes_through_it():
    scene = Scene(ddr=16, nvme=16, tenants={"a": quota(ddr=(0, 4))})
    scene.group()
    document = scene.store("a/1", tokens(1, 5), group="g")
    assert used(scene, "a") <= 4
    assert all(Tier.NVME in tiers for tiers in scene.tiers(document))
    (attach,) = scene.attach(document, group="g")
    while scene.effects.orders:
        scene.end(scene.effects.orders[0])
        assert used(scene, "a") <= 4
    assert attach.loading.error is None
    scene.detach(attach)


def test_a_guarantee_is_kept_against_others_but_not_against_its_owner():
    scene = Scene(ddr=8, nvme=32, tenants={"a": quota(ddr=(4, None))})
    scene.store("a/1", tokens(1, 6))
    for number in range(4):
        scene.store(f"b/{number}", tokens(10 + number, 3))
        assert used(scene, "a") == 4, "what is lent comes back, what is guaranteed stays"
    with_lease = scene.attach(scene.store("b/9", tokens(20, 4)))
    assert used(scene, "a") == 4
    scene.detach(with_lease[0])
    scene.store("a/2", tokens(2, 4))
    assert used(scene, "a") >= 4


def test_who_is_above_its_fair_share_loses_first_however_lately_it_was_used():
    scene = Scene(ddr=8, nvme=32, tenants={"*": quota()})
    scene.store("small/1", tokens(1, 2))
    scene.clock.advance(10**9)
    scene.store("large/1", tokens(2, 6))
    scene.store("new/1", tokens(3, 2))
    assert (used(scene, "small"), used(scene, "large"), used(scene, "new")) == (2, 4, 2)


def test_without_quotas_only_worth_counts():
    scene = Scene(ddr=8, nvme=32)
    scene.store("small/1", tokens(1, 2))
    scene.clock.advance(10**12)
    scene.store("large/1", tokens(2, 6))
    scene.store("new/1", tokens(3, 2))
    assert (used(scene, "small"), used(scene, "large")) == (0, 6)


def test_on_nvme_a_tenant_at_its_maximum_loses_of_its_own():
    scene = Scene(ddr=16, nvme=16, tenants={"a": quota(nvme=(0, 4)), "b": quota(nvme=(6, None))})
    scene.store("b/1", tokens(9, 6))
    for number in range(3):
        scene.store(f"a/{number}", tokens(number, 3))
        assert used(scene, "a", Tier.NVME) <= 4
    assert used(scene, "b", Tier.NVME) == 6
    assert used(scene, "a", Tier.NVME) == 4
    scene.store("c/1", tokens(20, 8))
    assert used(scene, "b", Tier.NVME) == 6


def test_nothing_is_written_for_who_may_have_nothing_there():
    scene = Scene(ddr=4, nvme=16, tenants={"a": quota(nvme=(0, 0))})
    scene.store("a/1", tokens(1, 3), WritePolicy.BACK)
    scene.store("b/1", tokens(2, 4))
    assert used(scene, "a", Tier.NVME) == 0
    assert {verdict.action for verdict in scene.state.ledger.verdicts} == {"drop"}


def test_a_maximum_counts_the_slabs_that_nobody_else_can_use():
    """Slabs have two slots here, and serve one size of one tenant."""
    scene = Scene(ddr=8, nvme=16, tenants={"a": quota(ddr=(0, 3))})
    assert scene.service.planner.tenancy.slabs_most("a") == 2
    scene.store("a/1", tokens(1, 3))
    assert scene.state.ddr.slabs_of("a") == 2
    scene.store("a/2", tokens(2, 3))
    assert scene.state.ddr.slabs_of("a") == 2


def test_who_waits_for_its_own_copies_holds_up_nobody_else():
    scene = Scene(ddr=16, nvme=16, tenants={"a": quota(ddr=(0, 4))})
    scene.store("a/1", tokens(1, 4))
    scene.store("b/1", tokens(2, 1))
    scene.evict(scene.store("b/2", tokens(3, 1)), Tier.DDR)
    (attach,) = scene.attach(next(d for d in scene.state.documents if d.tenant == "a"))
    _, waiting = scene.begin("a/2", tokens(4, 2))
    assert [type(error) for error in waiting] == [QuotaExceeded] or not waiting
    (other,) = scene.attach(next(d for d in scene.state.documents if d.name == "2" and d.tenant == "b"))
    assert not isinstance(other, HoldfastError)
    scene.settle()
    assert isinstance(waiting[0], QuotaExceeded), "its own bytes are leased, so it is told at once"
    scene.detach(attach)


@pytest.mark.parametrize("seed", range(24))
def test_no_sequence_of_demands_breaks_a_guarantee_or_a_maximum(seed):
    dice = random.Random(seed)
    tables = {
        "a": quota(ddr=(dice.choice([0, 2, 4]), None), nvme=(dice.choice([0, 4]), None)),
        "b": quota(ddr=(2, dice.choice([2, 4, 6])), nvme=(0, dice.choice([0, 3, 8]))),
        "*": quota(ddr=(0, dice.choice([None, 3, 8])), nvme=(0, dice.choice([None, 6]))),
    }
    scene = Scene(ddr=10, nvme=12, tenants=tables)
    quotas = scene.state.quotas
    leases = []
    for step in range(40):
        tenant = dice.choice("abcd")
        before = {(name, tier): used(scene, name, tier) for name in "abcd" for tier in TIERS}
        act(scene, dice, tenant, step, leases)
        if dice.random() < 0.7:
            scene.settle()
        for tier in TIERS:
            for name in "abcd":
                limits, now = quotas.of(name, tier), used(scene, name, tier) * EXTENT_BYTES
                assert limits.maximum_bytes is None or now <= limits.maximum_bytes, (name, tier)
                least = min(before[name, tier] * EXTENT_BYTES, limits.guaranteed_bytes)
                # What left for a demand of its own may have been on its way for a while.
                assert name in scene_touched(scene) or now >= least, (name, tier)
        if not scene.effects.orders:
            scene_touched(scene).clear()
    for lease in leases:
        scene.detach(lease)
    scene.settle()
    scene.state.check()


def scene_touched(scene):
    """Who has demanded something since all was quiet."""
    if not hasattr(scene, "touched"):
        scene.touched = set()
    return scene.touched


def hand_over(scene, ingest):
    """Write a document that does not fit at once, extent by extent; False when it cannot be."""
    handed = set()
    while ingest.passage.todo:
        filled = [extent for extent in ingest.missing if extent.id in ingest.filled and extent.id not in handed]
        if not filled:
            scene.service.abort_ingest(ingest.client, ingest.id)
            return False
        handed |= {extent.id for extent in filled}
        names = [(extent.start, extent.group) for extent in filled]
        scene.service.next_slots(ingest.client, ingest.id, names, [], lambda _: None)
        scene.settle()
        if ingest.error is not None:
            scene.service.abort_ingest(ingest.client, ingest.id)
            return False
    return True


def act(scene, dice, tenant, step, leases):
    """One thing that a tenant may do; refusals are fine, and say why."""
    scene_touched(scene).add(tenant)
    documents = [document for document in scene.state.documents if document.tenant == tenant]
    try:
        if leases and dice.random() < 0.3:
            scene.detach(leases.pop(dice.randrange(len(leases))))
        elif documents and dice.random() < 0.4:
            (attach,) = scene.attach(dice.choice(documents)) or [None]
            if isinstance(attach, HoldfastError):
                assert isinstance(attach, NoCapacity), attach
            elif attach is not None:
                leases.append(attach)
        else:
            policy = dice.choice([WritePolicy.THROUGH, WritePolicy.BACK, WritePolicy.MEMORY])
            ingest, heard = scene.begin(f"{tenant}/{step}", tokens(step, dice.randint(1, 4)), policy)
            scene.settle()
            if heard == [ingest] and hand_over(scene, ingest):
                scene.commit(ingest)
    except (NoCapacity, DocumentTooLarge, DocumentIncomplete, InUse):
        pass


def test_a_real_daemon_keeps_to_its_configuration():
    quota = {"tenants__acme__ddr_maximum_bytes": "128 KiB", "tenants__acme__nvme_maximum_bytes": "1 MiB"}
    with DaemonProcess(**quota) as daemon:
        client = daemon.start().client("acme")
        for number in range(3):
            put(client, f"d{number}", 160)
        (shown,) = daemon.rest().get("/v1/tenants")["tenants"]
        assert (shown["tenant"], shown["quota"], shown["documents"]) == ("acme", "acme", 3)
        _, ddr, _ = shown["tiers"]
        assert ddr["maximum_bytes"] == 128 << 10
        assert 0 < ddr["used_bytes"] <= 128 << 10
        content = [fetch(client, f"d{number}") for number in range(3)]
        assert [len(found) for found in content] == [5, 5, 5]
