"""Leases and pins as values: budgets, decay, caps."""

from dataclasses import replace

import pytest
from holdfast.kvstore.claims import (
    Lease,
    Pin,
    PinBudget,
    PinKind,
    Pins,
    PinSelection,
    Refresh,
    check_leases,
)
from holdfast.kvstore.document import DocumentId
from holdfast.kvstore.errors import ClaimNotFound, LeasesOvercommitted, PinsOvercommitted
from holdfast.kvstore.residency import Tier

A, B = DocumentId("t", "a"), DocumentId("t", "b")


def pin(name, size_bytes, expires=None, tenant="t", floor=Tier.DDR, **terms):
    """A pin in DDR."""
    return Pin(
        document=DocumentId(tenant, name),
        floor=floor,
        size_bytes=size_bytes,
        owner="me",
        reason="",
        created_wall_ns=0,
        expires_wall_ns=expires,
        **terms,
    )


def add(pins, made):
    """Pin as the service does."""
    pins.check(made, 0)
    pins.put(made)


def test_the_budget_holds_and_a_refusal_names_what_would_have_to_go():
    """All pins together stay within the budget; the largest are named first, and no more than it takes."""
    pins = Pins(PinBudget(nvme_bytes=100))
    for made in (pin("a", 60), pin("b", 10), pin("c", 30)):
        add(pins, made)
    with pytest.raises(PinsOvercommitted, match=r"t/a \(60 B\), or raise limits.pin_bytes") as refused:
        add(pins, pin("d", 60))
    assert [(h.document, h.size_bytes, h.kind, h.tier) for h in refused.value.holders] == [("a", 60, "pin", "nvme")]
    with pytest.raises(PinsOvercommitted) as refused:
        add(pins, pin("d", 61))
    assert [h.document for h in refused.value.holders] == ["a", "c"]
    with pytest.raises(PinsOvercommitted, match="by itself") as refused:
        add(pins, pin("d", 101))
    assert refused.value.holders == ()
    add(pins, pin("a", 59))
    assert pins.bytes_in(Tier.NVME) == 99


@pytest.mark.parametrize(
    ("budget", "tenants", "refused"),
    [
        (PinBudget(ddr_bytes=50), PinBudget(), {"ddr2", "other", "hbm"}),
        (PinBudget(nvme_bytes=79), PinBudget(), {"ddr2", "other", "hbm"}),
        (PinBudget(), PinBudget(ddr_bytes=50), {"ddr2", "hbm"}),
        (PinBudget(), PinBudget(nvme_bytes=80), {"nvme", "hbm"}),
        (PinBudget(), PinBudget(), set()),
    ],
)
def test_a_pin_counts_in_its_floor_and_below(budget, tenants, refused):
    """Whole or per tenant: DDR counts what is pinned at DDR or HBM, NVMe counts all."""
    pins = Pins(budget, lambda _: tenants)
    tried = [
        pin("ddr1", 40),
        pin("ddr2", 40, kind=PinKind.SOFT),
        pin("other", 40, tenant="u"),
        pin("nvme", 1, floor=Tier.NVME),
        pin("hbm", 40, floor=Tier.HBM),
    ]
    found = set()
    for made in tried:
        try:
            add(pins, made)
        except PinsOvercommitted:
            found.add(made.document.name)
    assert found == refused


def test_a_new_pin_replaces_the_old():
    """One pin per document; the old one's bytes are free for the new one, and so is its kind."""
    pins = Pins(PinBudget(nvme_bytes=100))
    add(pins, pin("a", 100, kind=PinKind.SOFT))
    assert pins.quarters([A, B], Tier.DDR, 0) == 4
    assert pins.hard(A) is None
    add(pins, pin("a", 90))
    assert pins.all() == [pin("a", 90)]
    assert pins.quarters([A], Tier.DDR, 0) == 0
    assert pins.hard(A) == pins.get(A)


def test_unpinning_what_is_not_pinned_is_an_error():
    """A second unpin is noticed."""
    pins = Pins(PinBudget())
    add(pins, pin("a", 1))
    assert pins.remove(A) == pin("a", 1)
    with pytest.raises(ClaimNotFound):
        pins.remove(A)


def test_pins_end_at_their_time_and_not_before():
    """A pin without an end stays."""
    pins = Pins(PinBudget())
    for item in (pin("a", 1, 10), pin("b", 1, 11), pin("c", 1)):
        add(pins, item)
    assert [found.document.name for found in pins.expired(10)] == ["a"]
    assert [found.document.name for found in pins.expired(10**18)] == ["a", "b"]


def test_a_soft_pin_decays_by_quarters_of_its_life():
    """New it has four, and one at its very end; without an end it keeps all."""
    made = pin("a", 1, 100, kind=PinKind.SOFT, ttl_ns=100)
    assert [made.quarters(wall_ns) for wall_ns in (0, 1, 25, 26, 50, 75, 99, 100, 500)] == [4, 4, 3, 3, 2, 1, 1, 1, 1]
    assert pin("a", 1, kind=PinKind.SOFT).quarters(10**18) == 4
    pins = Pins(PinBudget())
    add(pins, made)
    add(pins, pin("b", 1, 100, kind=PinKind.SOFT, ttl_ns=200, floor=Tier.NVME))
    assert pins.quarters([A, B], Tier.DDR, 25) == 3
    assert pins.quarters([B], Tier.NVME, 25) == 2
    assert pins.quarters([B], Tier.DDR, 25) == 0, "above its floor it says nothing"


def test_a_refresh_starts_the_life_again_only_if_asked_for():
    """And of what has no end there is nothing to start again."""
    made = pin("a", 1, 100, ttl_ns=100, refresh=Refresh.HIT)
    assert made.refreshed(70).expires_wall_ns == 170
    assert replace(made, refresh=Refresh.NEVER).refreshed(70).expires_wall_ns == 100
    assert pin("a", 1, refresh=Refresh.HIT).refreshed(70).expires_wall_ns is None


def test_a_selection_is_of_all_that_everything_said_is_true_of():
    """Tenant, owner, beginning of the reason, names; nothing said is everything."""
    pins = Pins(PinBudget())
    for name, tenant, owner, reason in (
        ("a", "t", "ann", "demo 1"),
        ("b", "t", "bob", "demo 2"),
        ("c", "u", "bob", ""),
    ):
        add(pins, replace(pin(name, 1, tenant=tenant), owner=owner, reason=reason))

    def names(**wanted):
        return [found.document.name for found in pins.select(PinSelection(**wanted))]

    assert names() == ["a", "b", "c"]
    assert names(owner="bob") == ["b", "c"]
    assert names(owner="bob", tenant="t") == ["b"]
    assert names(reason_prefix="demo") == ["a", "b"]
    assert names(documents={A, DocumentId("u", "c")}, owner="ann") == ["a"]


def lease(number, name, size_bytes, tenant="t", tier=Tier.DDR):
    """A lease of a client with the same number."""
    return Lease(
        id=number,
        owner=number,
        document=DocumentId(tenant, name),
        granted_ns=0,
        deadline_ns=10,
        size_bytes=size_bytes,
        tier=tier,
    )


def test_a_lease_is_overdue_after_its_deadline():
    """At the deadline it is still in time."""
    assert not lease(1, "a", 1).overdue(10)
    assert lease(1, "a", 1).overdue(11)


def test_a_tenants_leases_are_capped_and_one_document_counts_once():
    """In DDR, of the tenant; the refusal names whose leases are in the way, and how late they are."""
    held = [lease(1, "a", 40), lease(2, "a", 40), lease(3, "b", 30), lease(4, "c", 99, tenant="u")]
    held.append(lease(5, "d", 99, tier=Tier.HBM))
    check_leases(lease(6, "a", 40), held, 70, 0, str)
    check_leases(lease(6, "e", 10), held, 80, 0, str)
    with pytest.raises(LeasesOvercommitted, match="ddr_lease_bytes = 80") as refused:
        check_leases(lease(6, "e", 11), held, 80, 20 * 10**9, "client {}".format)
    (holder,) = refused.value.holders
    assert (holder.document, holder.owner, holder.size_bytes) == ("a", "client 1", 40)
    assert holder.remaining_seconds == pytest.approx(-20)
