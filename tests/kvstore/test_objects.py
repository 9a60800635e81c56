"""Opaque objects in the service: who leaves first, what a loss costs, limits, deadlines, and what people are told."""

import pytest
from holdfast.kvstore.claims import PinKind, Refresh
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import (
    ClaimNotFound,
    DeadlineExceeded,
    HoldfastError,
    InUse,
    InvalidName,
    InvalidRequest,
    LeasesOvercommitted,
    NoCapacity,
    QuotaExceeded,
    SpecMismatch,
)
from holdfast.kvstore.explain_view import explain_view
from holdfast.kvstore.holders import Kind
from holdfast.kvstore.opaque import object_id
from holdfast.kvstore.orders import ReadIn, Write, WriteOut
from holdfast.kvstore.putting import Incoming, runs
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.sections import TenantConfig
from holdfast.kvstore.views import document_view

from fakes import CLIENT, EXTENT_BYTES, FAR_NS, put_objects
from scene import Scene, named, rows, tokens

SEAL = bytes(range(8))


class Space(Scene):
    """A scene with a namespace of objects that take as much as an extent."""

    def put(self, keys, size_bytes=EXTENT_BYTES, policy=WritePolicy.MEMORY, **said):
        return put_objects(
            self.service, self.effects, "ns", keys, size_bytes=size_bytes, tenant="t", write_policy=policy, **said
        )

    def begin_put(self, keys, size_bytes=EXTENT_BYTES, policy=WritePolicy.MEMORY, deadline_ns=FAR_NS, tenant="t"):
        """What is heard of it."""
        heard = []
        incoming = Incoming(tenant, "ns", policy)
        self.service.objects.begin_put(CLIENT, incoming, [(key, size_bytes) for key in keys], deadline_ns, heard.append)
        self.state.check()
        return heard

    def get(self, keys, deadline_ns=FAR_NS, client=CLIENT):
        """What is heard of it."""
        heard = []
        self.service.objects.get(client, "t", "ns", keys, deadline_ns, heard.append)
        self.state.check()
        return heard

    def find(self, keys):
        return self.service.objects.find("t", "ns", keys)


def letters(text):
    return [letter.encode() for letter in text]


def test_a_put_behind_what_is_no_key_is_refused_and_not_begun():
    scene = Space()
    for behind in (b"", bytes(129)):
        with pytest.raises(InvalidName):
            scene.service.objects.begin_put(
                CLIENT, Incoming("t", "ns", WritePolicy.MEMORY, behind=behind), [(b"a", 99)], FAR_NS, [].append
            )
    assert not scene.service.objects.puts.open


def test_a_put_behind_what_has_expired_stores_that_anew():
    """It is followed, and then, as it is in the batch too, found to have expired."""
    scene, heard = Space(), []
    objects, incoming = scene.service.objects, Incoming("t", "ns", WritePolicy.MEMORY, ttl_ns=10**9)
    objects.begin_put(CLIENT, incoming, [(b"a", 99)], FAR_NS, heard.append)
    scene.settle()
    objects.commit_put(CLIENT, heard[0].id, [SEAL], FAR_NS, heard.append)
    scene.settle()
    scene.clock.advance(2 * 10**9)
    objects.begin_put(CLIENT, incoming._replace(behind=b"a"), [(b"a", 99), (b"b", 99)], FAR_NS, heard.append)
    scene.settle()
    put = heard[-1]
    assert list(put.ingests) == [0, 1]
    assert not put.refused


# Who leaves, and what that costs -----------------------------------------------------------------


def test_of_a_batch_the_last_leave_first():
    scene = Space(ddr=8)
    scene.put(letters("abcdefgh"))
    scene.put(letters("xyz"))
    assert scene.find(letters("abcde")) == [Tier.DDR] * 5
    assert scene.find(letters("fgh")) == [None] * 3


def test_what_follows_an_object_that_is_there_is_its_tail():
    scene = Space(ddr=8)
    scene.put(letters("abc"))
    scene.put(letters("abcde"))
    extents = [scene.state.documents[object_id("t", "ns", key)].document.extents[0] for key in letters("abcde")]
    assert [scene.state.extents[extent].extent.previous for extent in extents] == [None, *extents[:-1]]


def test_no_order_of_puts_makes_a_ring():
    scene = Space(ddr=8)
    scene.put(letters("ab"))
    scene.service.objects.delete("t", "ns", [b"a"], lambda _: None)
    scene.put(letters("ba"))
    scene.service.objects.delete("t", "ns", [b"b"], lambda _: None)
    scene.put(letters("ab"))
    scene.settle()
    scene.put(letters("stuvwxyz"))
    assert scene.find(letters("ab")) == [None, None]


def test_an_object_is_worth_what_its_writer_says_else_by_its_bytes():
    scene = Space()
    dear, cheap = (
        scene.state.extents[scene.state.documents[document].document.extents[0]]
        for document in (*scene.put([b"dear"], tokens_each=1000), *scene.put([b"cheap"]))
    )
    curve = scene.service.planner.prefills.curve(b"")
    assert scene.service.planner.recompute_ns(dear) >= curve.marginal_prefill_ns(0, 1000)
    assert scene.service.planner.recompute_ns(cheap) == curve.marginal_prefill_ns(0, 1)
    assert dear.extent.slot_bytes == cheap.extent.slot_bytes


def test_dear_objects_outlive_cheap_ones():
    scene = Space(ddr=8)
    for number in range(4):
        scene.put([f"dear{number}".encode()], tokens_each=5000)
        scene.put([f"cheap{number}".encode()], tokens_each=2)
    scene.put(letters("wxyz"), tokens_each=5000)
    assert scene.find([f"dear{number}".encode() for number in range(4)]) == [Tier.DDR] * 4
    assert scene.find([f"cheap{number}".encode() for number in range(4)]) == [None] * 4


def test_a_batch_is_one_use():
    scene = Space()
    scene.put(letters("abcd"))
    scene.get(letters("abcd"))
    scene.get(letters("bc"))
    scene.get([b"a", b"d"])
    recent = scene.service.planner.uses.recent.since(0, 1000)
    assert [(use.extent_count, use.token_count) for use in recent] == [(4, 4), (4, 4), (2, 2), (1, 1), (1, 1)]
    assert scene.state.documents[object_id("t", "ns", b"a")].use_count == 3


def test_objects_do_not_spoil_the_rate_of_comebacks_of_documents():
    scene = Space(ddr=64, nvme=64)
    comebacks, now_ns = scene.service.planner.comebacks, scene.clock.monotonic_ns()
    for first in range(0, 200, 20):
        scene.put([bytes([n]) for n in range(first, first + 20)], size_bytes=4096)
    scene.clock.advance(10**13)
    assert comebacks.rate("t", scene.clock.monotonic_ns()) == comebacks.rate("nobody", now_ns) == 1
    assert comebacks.rate("t/ns", scene.clock.monotonic_ns()) < 1


def test_an_object_that_is_read_again_is_written():
    scene = Space()
    (document,) = scene.put([b"key"], policy=WritePolicy.AUTO)
    assert not scene.state.documents[document].writes_through
    (get,) = scene.get([b"key"])
    scene.service.objects.release(CLIENT, get.id)
    scene.settle()
    assert scene.tiers(document) == [{Tier.DDR, Tier.NVME}]


def test_evictions_are_explained_and_objects_leave_no_name():
    scene = Space(ddr=4)
    scene.put(letters("abcd"))
    scene.put(letters("x"))
    verdict = scene.state.ledger.verdicts[-1]
    assert verdict.documents == (f"t/ns/{b'd'.hex()}",)
    assert (verdict.reason, verdict.action) == ("pressure", "drop")
    assert object_id("t", "ns", b"d") not in scene.state.documents
    assert len(scene.state.documents.of("t", "ns")) == 4
    document = object_id("t", "ns", b"a")
    view = explain_view(scene.state, scene.service.planner, document)
    assert (view.state, view.token_count) == ("complete", EXTENT_BYTES)
    assert [cache.tier for cache in view.caches] == ["ddr"]
    assert view.caches[0].standing.in_line >= 1
    shown = document_view(scene.state, scene.service.planner, scene.state.documents[document])
    assert shown.model == "ns"


def test_pressure_writes_out_what_may_be_written():
    scene = Space(ddr=4, nvme=8)
    scene.put(letters("abcd"), policy=WritePolicy.BACK)
    scene.put(letters("wx"), policy=WritePolicy.BACK)
    assert scene.find(letters("abcdwx")) == [Tier.DDR, Tier.DDR, Tier.NVME, Tier.NVME, Tier.DDR, Tier.DDR]


def test_watermarks_take_objects():
    scene = Space(ddr=8, nvme=16, ddr_marks=(0.5, 0.25))
    scene.put(letters("abcdefgh"), policy=WritePolicy.THROUGH)
    scene.service.tick()
    scene.settle()
    assert scene.find(letters("ab")) == [Tier.DDR] * 2
    assert scene.find(letters("efgh")) == [Tier.NVME] * 4


# Batches -----------------------------------------------------------------------------------------


def test_each_object_of_a_put_ends_by_itself():
    scene = Space(ddr=4)
    scene.put(letters("a"))
    heard = scene.begin_put(letters("abcdef"))
    assert not heard[0].pending
    assert set(heard[0].ingests) == {1, 2, 3}
    assert {number: type(error) for number, error in heard[0].refused.items()} == {4: NoCapacity, 5: NoCapacity}
    assert {holder.kind for holder in heard[0].refused[4].holders} == {Kind.INGEST}
    ended = []
    scene.service.objects.commit_put(CLIENT, heard[0].id, [SEAL, b"", b"short"], FAR_NS, ended.append)
    assert {number: type(error) for number, error in ended[0].refused.items()} == {
        2: InvalidRequest,
        3: InvalidRequest,
        4: NoCapacity,
        5: NoCapacity,
    }
    assert scene.find(letters("abcd")) == [Tier.DDR, Tier.DDR, None, None]
    assert not scene.state.private


def test_a_put_waits_for_room_until_its_deadline():
    scene = Space(ddr=2, nvme=8)
    scene.put(letters("ab"), policy=WritePolicy.BACK)
    heard = scene.begin_put(letters("xy"), deadline_ns=scene.clock.monotonic_ns() + 1000)
    assert not heard
    assert len(scene.pending(WriteOut)) == 1
    scene.settle()
    assert set(heard[0].ingests) == {0, 1}
    scene.service.objects.abort_put(CLIENT, heard[0].id)
    scene.put(letters("cd"), policy=WritePolicy.BACK)
    late = scene.begin_put(letters("xy"), deadline_ns=scene.clock.monotonic_ns() + 1000)
    scene.clock.advance(1000)
    scene.service.tick()
    assert {type(error) for error in late[0].refused.values()} == {DeadlineExceeded}
    scene.settle()
    assert not scene.state.private


def test_the_same_key_is_stored_once_at_a_time():
    scene = Space()
    first = scene.begin_put(letters("aab"))
    assert isinstance(first[0].refused[1], InUse)
    second = scene.begin_put(letters("a"))
    assert isinstance(second[0].refused[0], InUse)
    scene.service.objects.commit_put(CLIENT, first[0].id, [SEAL] * 2, FAR_NS, first.append)
    assert scene.find(letters("ab")) == [Tier.DDR] * 2


@pytest.mark.parametrize("kind", [WriteOut, Write])
def test_what_is_stored_anew_is_not_taken_for_what_was_deleted(kind):
    """The old copy is on its way to NVMe, or out of the catalog, when other bytes come under its key."""
    scene = Space()
    if kind is WriteOut:
        (put,) = scene.begin_put([b"key"], policy=WritePolicy.THROUGH)
        scene.service.objects.commit_put(CLIENT, put.id, [SEAL], FAR_NS, lambda _: None)
    else:
        scene.put([b"key"], policy=WritePolicy.THROUGH)
    old = scene.state.documents[object_id("t", "ns", b"key")].document.extents[0]
    copies = [copy.slot for copy in scene.state.extents[old].placements()]
    scene.service.objects.delete("t", "ns", [b"key"], lambda _: None)
    assert scene.pending(kind)
    assert scene.find([b"key"]) == [None]
    (put,) = scene.begin_put([b"key"], size_bytes=EXTENT_BYTES - 1)
    assert scene.find([b"key"]) == [None]
    scene.service.objects.commit_put(CLIENT, put.id, [SEAL[::-1]], FAR_NS, lambda _: None)
    (get,) = scene.get([b"key"])
    record = get.found[0].loading.records[0]
    assert record.extent.id != old
    assert record.extent.valid_tokens == EXTENT_BYTES - 1
    assert record.ddr.checksums == SEAL[::-1]
    assert record.ddr.slot not in copies or kind is Write
    scene.settle()
    assert scene.find([b"key"]) == [Tier.DDR]


def test_numbers_that_are_not_ones_own_or_over():
    scene = Space()
    (put,) = scene.begin_put(letters("a"))
    objects = scene.service.objects
    for call in (
        lambda: objects.commit_put(8, put.id, [SEAL], FAR_NS, lambda _: None),
        lambda: objects.abort_put(8, put.id),
        lambda: objects.release(CLIENT, put.id),
        lambda: objects.commit_put(CLIENT, put.id + 1, [SEAL], FAR_NS, lambda _: None),
    ):
        with pytest.raises(ClaimNotFound):
            call()
    with pytest.raises(InvalidRequest):
        objects.commit_put(CLIENT, put.id, [SEAL] * 2, FAR_NS, lambda _: None)
    objects.abort_put(CLIENT, put.id)
    with pytest.raises(ClaimNotFound):
        objects.abort_put(CLIENT, put.id)
    for keys in ([], [b"a"] * 257):
        with pytest.raises(InvalidRequest):
            objects.find("t", "ns", keys)


def test_a_get_ends_at_its_deadline_with_what_has_come():
    scene = Space(ddr=4, nvme=8)
    scene.put(letters("ab"), policy=WritePolicy.THROUGH)
    scene.service.evict(object_id("t", "ns", b"b"), Tier.DDR, 0, FAR_NS, lambda _: None)
    scene.settle()
    heard = scene.get(letters("abc"), deadline_ns=scene.clock.monotonic_ns() + 1000)
    assert not heard
    (read,) = scene.pending(ReadIn)
    scene.clock.advance(1000)
    scene.service.tick()
    assert set(heard[0].found) == {0}
    assert {number: type(error) for number, error in heard[0].refused.items()} == {1: DeadlineExceeded}
    assert len(scene.state.leases) == 1
    scene.end(read)
    scene.service.objects.release(CLIENT, heard[0].id)
    assert not scene.state.leases
    assert scene.find(letters("ab")) == [Tier.DDR] * 2
    assert not list(scene.state.held())


def test_a_get_of_more_than_fits_gets_what_fits():
    scene = Space(ddr=4, nvme=16)
    for batch in ("abcd", "efgh"):
        scene.put(letters(batch), policy=WritePolicy.THROUGH)
    heard = scene.get(letters("abcdefgh"))
    scene.settle()
    assert len(heard[0].found) == 4
    assert {type(error) for error in heard[0].refused.values()} == {NoCapacity}
    scene.service.objects.release(CLIENT, heard[0].id)
    assert not list(scene.state.held())


def test_a_client_that_goes_in_the_middle_leaves_nothing():
    scene = Space(ddr=4, nvme=16)
    scene.put(letters("ab"), policy=WritePolicy.THROUGH)
    scene.service.evict(object_id("t", "ns", b"b"), Tier.DDR, 0, FAR_NS, lambda _: None)
    scene.settle()
    scene.get(letters("ab"))
    scene.begin_put(letters("cdefgh"), deadline_ns=scene.clock.monotonic_ns() + 10**9)
    scene.service.disconnect(CLIENT)
    scene.settle()
    assert not scene.state.leases
    assert not scene.state.private
    assert not list(scene.state.held())
    assert not scene.service.objects.puts.open
    assert not scene.service.objects.gets.open
    assert scene.find(letters("abc")) == [Tier.DDR, Tier.DDR, None]


# Limits ------------------------------------------------------------------------------------------


def test_there_is_a_limit_of_unnamed_documents():
    scene = Space(ddr=16, unnamed=3, documents=1)
    scene.put(letters("ab"))
    (put,) = scene.begin_put(letters("cd"))
    assert set(put.ingests) == {0}
    assert isinstance(put.refused[1], NoCapacity)
    scene.service.objects.abort_put(CLIENT, put.id)
    scene.store("document", tokens(1, 1))


def test_quotas_and_lease_limits_are_of_objects_too():
    limits = TenantConfig(ddr_maximum_bytes=4 * EXTENT_BYTES, ddr_lease_bytes=2 * EXTENT_BYTES)
    scene = Space(ddr=16, tenants={"t": limits})
    (put,) = scene.begin_put(letters("abcdef"))
    assert {type(error) for error in put.refused.values()} == {QuotaExceeded}
    assert len(put.ingests) == 4
    scene.service.objects.commit_put(CLIENT, put.id, [SEAL] * 4, FAR_NS, lambda _: None)
    (get,) = scene.get(letters("abcd"))
    assert set(get.found) == {0, 1}
    assert {type(error) for error in get.refused.values()} == {LeasesOvercommitted}


def test_no_group_takes_an_object():
    scene = Space()
    scene.group()
    (document,) = scene.put(letters("a"))
    with pytest.raises(SpecMismatch):
        scene.service.attach(CLIENT, document, None, "g", None, FAR_NS, lambda _: None)
    with pytest.raises(HoldfastError):
        scene.service.prefetching.hint(CLIENT, document, "g", 1, None, "")
    assert not scene.state.leases


# Pins --------------------------------------------------------------------------------------------


def pin(scene, keys=None, prefix=None, floor=Tier.DDR, kind=PinKind.HARD):
    objects = scene.service.objects
    documents = objects.chosen("t", "ns", keys, prefix)
    pins = objects.pin(documents, floor, None, "me", "why", kind, Refresh.NEVER, lambda _: None)
    scene.settle()
    return pins


def test_pinned_objects_stay_and_come_back_after_a_restart():
    scene = Space(ddr=8, nvme=16)
    scene.put([b"aa", b"ab", b"b"], policy=WritePolicy.THROUGH)
    assert len(pin(scene, prefix=b"a")) == 2
    scene.put(letters("stuvwx"))
    assert scene.find([b"aa", b"ab", b"b"]) == [Tier.DDR, Tier.DDR, Tier.NVME]
    _, extents, documents, pins = rows(scene)
    again = Space(ddr=8, nvme=16)
    again.service.restore(scene.state.specs.values(), extents, documents, pins)
    again.service.tick()
    again.settle()
    assert again.find([b"aa", b"ab", b"b"]) == [Tier.DDR, Tier.DDR, Tier.NVME]
    assert len(again.state.pins) == 2


def test_more_pinned_objects_than_may_wait_for_room_all_come_back():
    scene = Space(ddr=16, nvme=16)
    keys = letters("abcdefghij")
    scene.put(keys, policy=WritePolicy.THROUGH)
    assert len(pin(scene, keys)) == 10
    kept = rows(scene)
    again = Space(ddr=16, nvme=16, pending_reservations=2)
    again.service.restore(scene.state.specs.values(), *kept[1:])
    for _ in range(10):
        again.service.tick()
        again.settle()
    assert again.find(keys) == [Tier.DDR] * 10


def test_as_many_pins_come_back_as_the_budget_allows():
    scene = Space(ddr=16, nvme=16)
    keys = letters("abcdefghij")
    scene.put(keys, policy=WritePolicy.THROUGH)
    pin(scene, keys)
    kept = rows(scene)
    again = Space(ddr=16, nvme=16, ddr_pin_bytes=5 * EXTENT_BYTES)
    again.service.restore(scene.state.specs.values(), *kept[1:])
    again.settle()
    assert len(again.state.pins) == 5
    assert again.state.ledger.counts["pins_not_restored"] == 5


def test_pins_at_nvme_and_soft_ones():
    scene = Space(ddr=4, nvme=16)
    scene.put(letters("ab"), policy=WritePolicy.THROUGH)
    pin(scene, [b"a"], floor=Tier.NVME)
    pin(scene, [b"b"], kind=PinKind.SOFT)
    scene.put(letters("wxyz"))
    assert scene.find(letters("ab")) == [Tier.NVME] * 2
    with pytest.raises(InvalidRequest):
        pin(scene, [b"w"], floor=Tier.NVME)
    with pytest.raises(InvalidRequest):
        pin(scene, [b"a"], b"a")


def test_a_pinned_object_that_is_lost_keeps_its_place_and_can_be_stored_again():
    scene = Space(ddr=4, nvme=4)
    scene.put(letters("a"))
    pin(scene, [b"a"])
    record = scene.state.extents[scene.state.documents[object_id("t", "ns", b"a")].document.extents[0]]
    scene.service.store.fail(record.ddr)
    scene.settle()
    scene.service.tick()
    assert scene.find(letters("a")) == [None]
    scene.put(letters("a"))
    assert scene.find(letters("a")) == [Tier.DDR]


# Values ------------------------------------------------------------------------------------------


def test_runs_are_what_follows_each_other():
    scene = Space()
    scene.put(letters("abcd"))
    found = {}
    for key in letters("abcd"):
        document = scene.state.documents[object_id("t", "ns", key)].document
        found[key] = document, scene.state.extents[document.extents[0]].extent

    def told(text):
        return [
            "".join(bytes.fromhex(one.id.name.partition("/")[2]).decode() for one in run)
            for run in runs([found[key] for key in letters(text)])
        ]

    assert told("abcd") == ["abcd"]
    assert told("bc") == ["bc"]
    assert told("acdb") == ["a", "cd", "b"]
    assert told("") == []


def test_objects_and_documents_do_not_meet():
    scene = Space()
    scene.put(letters("a"))
    scene.store("report", tokens(1, 2))
    assert list(scene.state.documents.named) == [named("report")]
    assert list(scene.state.documents.unnamed) == [DocumentId("t", "ns/61")]
    scene.service.objects.delete("t", "ns", letters("a"), lambda _: None)
    scene.settle()
    assert scene.state.documents.namespaces == []
    assert scene.tiers(named("report")) == [{Tier.DDR, Tier.NVME}] * 2
