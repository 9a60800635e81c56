"""Leases and pins."""

import pytest
from holdfast.kvstore.claims import Lease, Pin, Pins
from holdfast.kvstore.document import DocumentId
from holdfast.kvstore.errors import ClaimNotFound, PinsOvercommitted
from holdfast.kvstore.residency import Tier


def pin(name, size_bytes, expires=None):
    """A pin in DDR."""
    return Pin(
        document=DocumentId("t", name),
        floor=Tier.DDR,
        size_bytes=size_bytes,
        owner="me",
        reason="",
        created_wall_ns=0,
        expires_wall_ns=expires,
    )


def test_the_budget_holds_and_a_refusal_changes_nothing():
    """All pins together stay within the budget; the refusal names what takes it up."""
    pins = Pins(100)
    pins.add(pin("a", 60))
    with pytest.raises(PinsOvercommitted, match="t/a 60 B"):
        pins.add(pin("b", 41))
    pins.add(pin("b", 40))
    assert pins.pinned_bytes == 100
    with pytest.raises(PinsOvercommitted):
        pins.add(pin("a", 61))
    assert pins.get(DocumentId("t", "a")) == pin("a", 60)


def test_a_new_pin_replaces_the_old():
    """One pin per document; the old one's bytes are free for the new one."""
    pins = Pins(100)
    pins.add(pin("a", 100))
    pins.add(pin("a", 90))
    assert pins.all() == [pin("a", 90)]


def test_unpinning_what_is_not_pinned_is_an_error():
    """A second unpin is noticed."""
    pins = Pins(100)
    pins.add(pin("a", 1))
    assert pins.remove(DocumentId("t", "a")) == pin("a", 1)
    with pytest.raises(ClaimNotFound):
        pins.remove(DocumentId("t", "a"))


def test_pins_end_at_their_time_and_not_before():
    """A pin without an end stays."""
    pins = Pins(100)
    for item in (pin("a", 1, 10), pin("b", 1, 11), pin("c", 1)):
        pins.add(item)
    assert [found.document.name for found in pins.expired(10)] == ["a"]
    assert [found.document.name for found in pins.expired(10**18)] == ["a", "b"]


def test_a_lease_is_overdue_after_its_deadline():
    """At the deadline it is still in time."""
    lease = Lease(id=1, owner=2, document=DocumentId("t", "a"), granted_ns=0, deadline_ns=10)
    assert not lease.overdue(10)
    assert lease.overdue(11)
