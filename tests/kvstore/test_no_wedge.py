"""No sequence of pins, leases and open ingests can wedge the cache.

Whoever asks for room that could ever be had either gets it once the effects have completed, without the clock moving,
or is refused with the holders; and when those have let go, the same request is met.
"""

import numpy as np
import pytest
from holdfast.kvstore.claims import PinKind, PinSelection, Refresh
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import CorruptExtent, DocumentTooLarge, HoldfastError, StorageFailed
from holdfast.kvstore.orders import CloseShard, OpenShard, ReadIn, RetireSlab, SaveShard, Write, WriteOut
from holdfast.kvstore.residency import Tier
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fakes import EXTENT_BYTES
from scene import FINGERPRINT, Scene, tokens

NAMES = "abcd"
HOLDERS = (1, 2)  # clients
ASKING = 3
SELDOM = st.sampled_from([False] * 4 + [True])
NOT_ANSWERED = (OpenShard, CloseShard, RetireSlab)
REFUSALS = {"no-capacity", "in-use", "document-incomplete", "document-not-found", "document-exists"}


class Claims(RuleBasedStateMachine):
    """Claims come and go in any order, with orders in flight or not; then somebody asks for room."""

    @initialize(ddr=st.sampled_from([4, 6]), nvme=st.sampled_from([4, 8, 16]))
    def start(self, ddr, nvme):
        self.scene = Scene(ddr=ddr, nvme=nvme)
        self.scene.group(rows=64)
        self.ddr = ddr
        self.attached = {}  # lease -> attach
        self.ingests = {}
        self.number = 0

    @property
    def service(self):
        return self.scene.service

    def document(self, name):
        return DocumentId("t", name)

    # Claims ------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        size=st.integers(1, 4),
        policy=st.sampled_from(WritePolicy),
        grouped=SELDOM,
        settles=st.booleans(),
    )
    def store(self, name, size, policy, grouped, settles):
        self.begin(1, name, size, policy, grouped)
        if settles:
            self.scene.settle()
        for number in list(self.ingests):
            if self.ingests[number].document.id == self.document(name):
                self.commit_one(number)
        if settles:
            self.scene.settle()

    @rule(
        client=st.sampled_from(HOLDERS),
        name=st.sampled_from(NAMES),
        size=st.integers(1, 6),
        policy=st.sampled_from(WritePolicy),
        grouped=SELDOM,
    )
    def begin(self, client, name, size, policy, grouped):
        if name in {ingest.document.id.name for ingest in self.ingests.values()}:
            return

        def granted(result):
            if not isinstance(result, HoldfastError):
                self.ingests[result.id] = result

        ids = np.asarray(tokens(NAMES.index(name), size), dtype=np.uint32)
        self.ask_ingest(client, name, ids, policy, "g" if grouped else None, granted)

    def ask_ingest(self, client, name, ids, policy, group, granted):
        far_ns = self.scene.clock.monotonic_ns() + 10**12
        try:
            self.service.begin_ingest(client, self.document(name), FINGERPRINT, ids, policy, group, 64, far_ns, granted)
        except HoldfastError as error:
            granted(error)

    @precondition(lambda self: self.ingests)
    @rule(data=st.data(), commits=st.booleans())
    def end_ingest(self, data, commits):
        number = data.draw(st.sampled_from(sorted(self.ingests)))
        if commits:
            self.commit_one(number)
        else:
            self.abort_one(number)

    def commit_one(self, number):
        ingest = self.ingests.pop(number)
        try:
            self.service.commit_ingest(ingest.client, number, lambda _: None)
        except HoldfastError:
            self.ingests[number] = ingest
            self.abort_one(number)

    def abort_one(self, number):
        ingest = self.ingests.pop(number)
        if ingest.stage != "ended":
            self.service.abort_ingest(ingest.client, number)

    @rule(client=st.sampled_from(HOLDERS), name=st.sampled_from(NAMES), grouped=st.booleans())
    def attach(self, client, name, grouped):
        def granted(result):
            if not isinstance(result, HoldfastError):
                self.attached[result.lease.id] = result

        self.ask_attach(client, name, "g" if grouped else None, granted)

    def ask_attach(self, client, name, group, granted):
        far_ns = self.scene.clock.monotonic_ns() + 10**12
        try:
            self.service.attach(client, self.document(name), None, group, None, far_ns, granted)
        except HoldfastError as error:
            granted(error)

    @precondition(lambda self: self.attached)
    @rule(data=st.data())
    def detach(self, data):
        self.detach_one(data.draw(st.sampled_from(sorted(self.attached))))

    def detach_one(self, number):
        attach = self.attached.pop(number)
        self.service.detach(attach.lease.owner, number)

    @rule(
        name=st.sampled_from(NAMES),
        floor=st.sampled_from(Tier),
        kind=st.sampled_from(PinKind),
        seconds=st.sampled_from([None, 1.0]),
    )
    def pin(self, name, floor, kind, seconds):
        refresh = Refresh.HIT if seconds else Refresh.NEVER
        try:
            self.service.pin(self.document(name), floor, seconds, "ops", "test", kind, refresh)
        except HoldfastError as error:
            assert error.code in {"document-not-found", "pins-overcommitted", "invalid-request"}, error  # noqa: PT017

    @rule(name=st.sampled_from(NAMES))
    def unpin(self, name):
        self.service.unpin_all(PinSelection(documents={self.document(name)}))

    @rule(name=st.sampled_from(NAMES), tier=st.sampled_from(Tier))
    def evict(self, name, tier):
        try:
            self.service.evict(self.document(name), tier, 0, self.scene.clock.monotonic_ns() + 10**12, lambda _: None)
        except HoldfastError:
            return

    @rule(seconds=st.sampled_from([1, 400]))
    def time_passes(self, seconds):
        self.scene.clock.advance(seconds * 10**9)
        self.service.tick()

    # Orders ------------------------------------------------------------------------------------

    def endable(self):
        """Catalog writes and a group's commands keep their order, the rest does not."""
        found, seen = [], set()
        for order in self.scene.effects.orders:
            lane = "catalog" if isinstance(order, Write) else getattr(order, "group", None)
            if lane is None or lane not in seen:
                found.append(order)
            seen.add(lane)
        return found

    @rule(data=st.data(), count=st.integers(1, 4))
    def orders_end(self, data, count):
        for _ in range(count):
            if self.endable():
                self.scene.end(data.draw(st.sampled_from(self.endable())))

    @rule(data=st.data())
    def an_order_fails(self, data):
        kinds = (ReadIn, WriteOut, SaveShard)
        orders = [order for order in self.endable() if isinstance(order, kinds)]
        if orders:
            order = data.draw(st.sampled_from(orders))
            corrupt = isinstance(order, ReadIn) and data.draw(st.booleans())
            self.scene.end(order, CorruptExtent("planted") if corrupt else StorageFailed("planted"))

    @rule(name=st.sampled_from(NAMES), size=st.integers(1, 4), failing=st.integers(0, 3), grouped=st.booleans())
    def is_read_badly(self, name, size, failing, grouped):
        """A document comes back from NVMe for somebody, and some of it cannot be read."""
        self.store(name, size, WritePolicy.THROUGH, False, True)
        self.evict(name, Tier.DDR)
        self.scene.settle()
        self.attach(1, name, grouped)
        for order in self.scene.pending(ReadIn)[:failing]:
            self.scene.end(order, StorageFailed("planted"))

    @rule(name=st.sampled_from(NAMES), size=st.integers(1, 2))
    def is_made_again(self, name, size):
        """What a document lost is computed again in a group, by somebody who takes his time."""
        self.store(name, size, WritePolicy.THROUGH, False, True)
        self.evict(name, Tier.NVME)
        self.scene.settle()
        self.begin(2, name, size, WritePolicy.MEMORY, True)

    # What is promised --------------------------------------------------------------------------

    def listening(self, heard):
        """Hears one answer, and looks at the holders as they are then."""

        def hear(answer):
            heard.append(answer)
            if isinstance(answer, HoldfastError):
                self.is_told_why(answer)

        return hear

    def new_document(self, size):
        """Ask for room for a document that nobody has; returns what will be heard."""
        self.number += 1
        heard = []
        ids = np.asarray([(1 + self.number * 31 + i * 13) % 1000 for i in range(32 * size)], dtype=np.uint32)
        self.ask_ingest(ASKING, f"new{self.number}", ids, WritePolicy.MEMORY, None, self.listening(heard))
        return heard

    @rule(size=st.integers(1, 6), completes=st.booleans())
    def ask_for_room(self, size, completes):
        size = min(size, self.ddr)
        heard = self.new_document(size)
        if not heard and not completes:
            return  # with its claim among the others'
        self.scene.settle()
        self.answered(heard, lambda: self.new_document(size))
        self.asker_goes()

    @rule(name=st.sampled_from(NAMES), grouped=st.booleans())
    def ask_for_a_document(self, name, grouped):
        group = "g" if grouped else None
        heard = []
        self.ask_attach(ASKING, name, group, self.listening(heard))
        self.scene.settle()

        def again():
            more = []
            self.ask_attach(ASKING, name, group, self.listening(more))
            return more

        self.answered(heard, again)
        self.asker_goes()

    def answered(self, heard, again):
        """All orders have ended and the clock stood still: there is an answer, and it tells who is in the way."""
        assert len(heard) == 1, "somebody still waits while nothing moves"
        if not isinstance(heard[0], HoldfastError):
            return
        error = heard[0]
        assert error.code in REFUSALS | {"document-too-large"}, error
        if error.code in ("no-capacity", "in-use"):
            self.everybody_lets_go()
            more = again()
            self.scene.settle()
            (result,) = more
            is_gone = isinstance(result, HoldfastError) and result.code in REFUSALS - {"no-capacity", "in-use"}
            assert is_gone or not isinstance(result, HoldfastError), f"first {error}; with no holders {result}"

    def is_told_why(self, error):
        """The holders are claims that there are."""
        if error.code != "no-capacity":
            return
        assert error.holders, error
        for holder in error.holders:
            assert holder.size_bytes > 0
            document = DocumentId(holder.tenant, holder.document)
            match holder.kind:
                case "lease":
                    assert any(lease.document == document for lease in self.scene.state.leases.values())
                case "pin":
                    assert self.scene.state.pins.hard(document) is not None
                case "ingest":
                    assert any(i.document.id == document for i in self.service.ingests.open.values())

    def asker_goes(self):
        self.service.disconnect(ASKING)
        self.scene.settle()

    def everybody_lets_go(self):
        for client in (*HOLDERS, ASKING):
            self.service.disconnect(client)
        self.attached.clear()
        self.ingests.clear()
        self.service.unpin_all(PinSelection())
        self.scene.settle()
        self.service.tick()  # what the catalog refused is said again
        self.scene.settle()

    def teardown(self):
        if hasattr(self, "scene"):
            self.everybody_lets_go()
            assert not self.service.room.waiting
            assert not any(copy.holds for copy in self.scene.state.all_placements())


Claims.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    report_multiple_bugs=False,
    phases=(Phase.generate,),
)
TestClaims = pytest.mark.timeout(300)(Claims.TestCase)


def test_a_move_that_cannot_help_is_not_waited_for():
    """The catalog is busy, and all of DDR is leased: whoever asks is refused now, and keeps nobody else waiting."""
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 4))
    scene.attach(document)
    scene.service.pin(document, Tier.NVME, None, "me", "")
    assert scene.pending(Write)
    _, (refused,) = scene.begin("b", tokens(2, 1))
    assert [(holder.kind, holder.size_bytes) for holder in refused.holders] == [("lease", 4 * EXTENT_BYTES)]


def test_an_overdue_lease_is_named_first_with_its_owner():
    """It lost its priority, not its bytes: of all holders it is the first who should be asked."""
    scene = Scene(ddr=6, lease_seconds=10)
    late, large = scene.store("late", tokens(1, 2)), scene.store("large", tokens(2, 4))
    scene.service.introduce(31, 4711)
    scene.attach(late, client=31)
    scene.clock.advance(11 * 10**9)
    scene.attach(large, client=32)
    _, (refused,) = scene.begin("b", tokens(3, 1))
    assert [holder.document for holder in refused.holders] == ["late", "large"]
    assert refused.holders[0].owner == "client 31 (pid 4711)"
    assert refused.holders[0].remaining_seconds == -1
    assert "t/late" in refused.message
    scene.service.disconnect(31)
    assert scene.begin("b", tokens(3, 1))[1][0] is not refused


def test_a_shard_larger_than_any_arena_is_too_large_and_not_a_matter_of_room():
    """Nobody could let go of enough."""
    scene = Scene()
    scene.group(rows=32)
    document = scene.store("a", tokens(1, 3))
    with pytest.raises(DocumentTooLarge, match="48 rows on rank 0"):
        scene.attach(document, "g")
    assert not scene.state.leases


def test_giving_up_an_ingest_of_what_is_all_there_leaves_its_shard_to_those_who_read_it():
    """Nothing was computed into it; closing it would pull the rows from under a lease."""
    scene = Scene()
    scene.group()
    document = scene.store("a", tokens(1, 1))
    ingest, _ = scene.begin("a", tokens(1, 1), WritePolicy.MEMORY, group="g")
    scene.settle()
    (attach,) = scene.attach(document, "g")
    scene.service.abort_ingest(ingest.client, ingest.id)
    scene.settle()
    assert attach.loading.shard.complete
    scene.detach(attach)


def test_giving_up_a_new_document_that_was_all_cached_leaves_no_shard_of_nobody():
    scene = Scene()
    scene.group()
    scene.store("other", tokens(1, 2))
    ingest, _ = scene.begin("a", tokens(1, 2), group="g")
    scene.settle()
    assert ingest.shard.complete
    scene.service.abort_ingest(ingest.client, ingest.id)
    scene.settle()
    assert not scene.state.groups["g"].shards
    scene.store("a", tokens(1, 4))


def test_what_another_brings_near_does_not_leave_for_the_load_that_waits_for_it():
    """Else its own victim is one slot more that it needs, after its room was counted."""
    scene = Scene(ddr=4, nvme=32)
    document = scene.store("a", tokens(1, 3))
    scene.evict(document, Tier.DDR)
    scene.store("b", tokens(2, 4), WritePolicy.BACK)
    part = scene.attach(document, tokens=(0, 32))
    whole = scene.attach(document)
    scene.end(scene.pending(WriteOut)[0])
    while others := [order for order in scene.effects.orders if not isinstance(order, WriteOut)]:
        scene.end(others[0])
    assert part
    assert not whole, "it waits for more room"
    scene.detach(part[0])
    scene.service.tick()
    front = scene.state.extents[scene.state.documents[document].document.extents[0]]
    assert front.ddr.readable
    assert front.ddr.holds == 1
    scene.settle()
    assert whole
    scene.detach(whole[0])
    assert not list(scene.state.held())
