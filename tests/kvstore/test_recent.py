"""Recent uses: numbered, bounded, and what the admin API hands out of them."""

from __future__ import annotations

from holdfast.kvstore.document import DocumentId
from holdfast.kvstore.ledger import Seen
from holdfast.kvstore.recent import RecentUses

from fakes import CLIENT, FAR_NS
from scene import Scene, tokens

NAME = DocumentId("t", "a")


def add(recent, chain):
    return recent.add(7, NAME, chain, len(chain), 32, 32 * len(chain))


def numbers(recent, number, extents_max=100):
    return [use.number for use in recent.since(number, extents_max)]


def test_the_oldest_are_forgotten_where_there_are_too_many():
    recent = RecentUses(1, uses_max=3)
    for _ in range(5):
        add(recent, ("x",))
    assert recent.next_number == 5
    assert numbers(recent, 0) == numbers(recent, 2) == [2, 3, 4]
    assert numbers(recent, 4) == [4]
    assert numbers(recent, 5) == []


def test_extents_of_one_version_count_once_and_bound_what_is_remembered():
    recent = RecentUses(1, extents_max=5)
    first, other, large = ("a", "b"), ("c", "d", "e"), tuple("fghijkl")
    for chain in (first, first, other, first):
        add(recent, chain)
    assert numbers(recent, 0) == [0, 1, 2, 3]
    add(recent, ("m",))
    assert numbers(recent, 0) == [3, 4], "others are forgotten until the sum fits; 3 shares what 0 and 1 had"
    add(recent, large)
    assert numbers(recent, 0) == [5], "one is always remembered"
    add(recent, ("m",))
    assert numbers(recent, 0) == [6]


def test_a_page_names_few_extents_but_at_least_one_use():
    recent = RecentUses(1)
    for length in (4, 2, 1):
        add(recent, tuple("abcd"[:length]))
    assert numbers(recent, 0, 3) == [0]
    assert numbers(recent, 0, 6) == [0, 1]
    assert numbers(recent, 1, 3) == [1, 2]


def test_publishing_attaching_reporting_and_detaching_are_remembered():
    scene = Scene()
    document = scene.store("a", tokens(1, 3))
    recent = scene.service.planner.uses.recent
    (published,) = recent.since(0, 100)
    extents = scene.state.documents[document].document.extents
    assert (published.chain, published.extent_count, published.token_count) == (extents, 3, 96)
    assert not published.is_open
    attach = scene.service.attach(CLIENT, document, None, None, None, FAR_NS, [].append, (33, 40))
    _, part = recent.since(0, 100)
    assert (part.extent_count, part.token_count, part.is_open) == (2, 64, True), "all that is in front of it too"
    seen = Seen(exposed_ns=0, prefill_ns=0, decode_ns=0, answer_tokens=5)
    scene.service.report(CLIENT, attach.lease.id, seen)
    scene.service.report(CLIENT, attach.lease.id, seen)
    scene.service.detach(CLIENT, attach.lease.id)
    assert (part.answer_tokens, part.is_open) == (10, False)
