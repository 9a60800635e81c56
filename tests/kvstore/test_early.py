"""Early write-through: extents of open ingests go to NVMe; scenes with effects that end when the test says so."""

from dataclasses import replace
from itertools import permutations

import pytest
from holdfast.kvstore import writes as writes_module
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import HoldfastError, InvalidRequest, StorageFailed, StorageFull
from holdfast.kvstore.orders import ReadIn, Seal, Write, WriteOut
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import Service
from holdfast.kvstore.writes import RETRY_NS

from fakes import CLIENT, EXTENT_BYTES, FAR_NS
from scene import FINGERPRINT, SPEC, Scene, tokens

OUTCOMES = {"well": None, "broken": StorageFailed("EIO"), "full": StorageFull("ENOSPC")}
DOCUMENT = DocumentId("t", "a")
OTHER = 8  # a client


class Early(Scene):
    """Knows which seal the bytes of every NVMe slot have, and what the catalog's rows say of them."""

    def __init__(self, ddr=12, nvme=12, backlog=12, **nvme_settings):
        super().__init__(ddr=ddr, nvme=nvme)
        settings = replace(self.config.nvme, backlog_bytes=backlog * EXTENT_BYTES, **nvme_settings)
        windowed = replace(self.config.ddr, window_bytes=2 * EXTENT_BYTES)
        self.config = replace(self.config, nvme=settings, ddr=windowed)
        self.service = Service(self.config, self.clock, self.effects, lambda _: bytes(32))
        self.service.register_spec(SPEC)
        self.content = {}
        self.rows = {}
        self.settle()

    def end(self, order, error=None):
        if isinstance(order, WriteOut) and error is None:
            copies = [c for c in self.state.all_placements() if c.tier is Tier.DDR and c.slot == order.source]
            self.content[order.target] = copies[0].checksums
        if isinstance(order, Write) and error is None:
            for record in order.records:
                if record.kind == "put-extent":
                    assert self.content[record.slot] == record.checksums, "a row tells of other bytes"
                    self.rows[record.extent.id] = record.slot
                elif record.kind == "drop-extent":
                    self.rows.pop(record.extent, None)
        super().end(order, error)

    def hand_over(self, ingest, count):
        """The writer's next extents are complete; returns the writes that this starts."""
        known = self.pending(WriteOut)
        extents = ingest.passage.unsealed[:count]
        seals = [f"{ingest.id % 10**8:08}{extent.start:024}".encode() for extent in extents]
        heard = []
        filled = [(extent.start, extent.group) for extent in extents]
        self.service.next_slots(ingest.client, ingest.id, filled, seals, heard.append)
        assert heard == [(ingest, [])], "nobody waits"
        self.state.check()
        return [order for order in self.pending(WriteOut) if order not in known]

    def publish(self, ingest):
        """It is acknowledged at once, whatever is under way."""
        heard = []
        seals = [bytes(32) for _ in ingest.passage.unsealed]
        self.service.commit_ingest(ingest.client, ingest.id, heard.append, seals)
        self.state.check()
        assert heard == [ingest.document]

    def others(self, ids):
        """Another client's ingest."""
        heard = []
        document = DocumentId("t", "b")
        return self.service.begin_ingest(
            OTHER, document, FINGERPRINT, ids, WritePolicy.THROUGH, None, 64, FAR_NS, heard.append
        )

    def settle_late(self):
        """Everything ends, what is tried again later too."""
        self.settle()
        self.clock.advance(RETRY_NS)
        self.service.tick()
        self.settle()

    def check_durable(self, name="a"):
        owner = self.state.document(DocumentId("t", name))
        assert owner.durable
        for extent in owner.document.extents:
            assert self.rows[extent] == self.state.extents[extent].nvme.slot

    def check_idle(self):
        assert not self.service.store.orders_in_flight
        assert not self.state.private
        assert not self.state.leaving
        assert not self.state.spares
        assert not self.service.writes.queued
        assert not self.service.writes.backlog_bytes
        assert not self.service.writes._in_flight_bytes
        assert all(copy.holds == 0 for copy in self.state.all_placements())


# Every order of events -------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("end", ["publish", "delete", "evict", "abort", "disconnect"])
def test_writes_and_the_end_of_their_ingest_come_in_any_order(end, outcome):
    """Published: durable, by rows that tell the truth. Otherwise: no copy, no row, no byte."""
    for events in permutations(("first", "second", "end")):
        scene = Early()
        ingest, _ = scene.begin("a", tokens(1, 3))
        first, second = scene.hand_over(ingest, 2)
        heard = []
        for event in events:
            match event, end:
                case "first", _:
                    scene.end(first, OUTCOMES[outcome])
                case "second", _:
                    scene.end(second)
                case _, "publish":
                    scene.publish(ingest)
                case _, "delete":
                    scene.publish(ingest)
                    scene.service.delete(DOCUMENT, heard.append)
                case _, "evict":
                    scene.publish(ingest)
                    scene.service.evict(DOCUMENT, Tier.DDR, 0, FAR_NS, heard.append)
                case _, "abort":
                    scene.service.abort_ingest(CLIENT, ingest.id)
                case _, "disconnect":
                    scene.service.disconnect(CLIENT)
            scene.state.check()
        scene.settle_late()
        scene.check_idle()
        if end == "evict" and outcome == "full":  # what could not be written out left all the same, by a verdict
            assert heard == [None]
            assert not scene.state.ddr.used_bytes
        elif end in ("publish", "evict"):
            scene.check_durable()
            assert set(scene.rows) == set(ingest.document.extents)
        else:
            assert scene.empty()
            assert not scene.rows
        if end == "evict" and outcome != "full":
            assert heard == [None]
            assert scene.tiers(DOCUMENT) == [{Tier.NVME}] * 3


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("end", ["publish", "abort"])
@pytest.mark.parametrize("is_early", [False, True])
def test_another_ingest_of_the_same_tokens_may_come_first_or_last(is_early, end, outcome):
    """One NVMe copy per extent remains, with the row of its own bytes; duplicates leave no trace."""
    for events in permutations(("first", "second", "end", "other")):
        scene = Early()
        ingest, _ = scene.begin("a", tokens(1, 2))
        other = scene.others(tokens(1, 2))
        first, second = scene.hand_over(ingest, 2)
        theirs = scene.hand_over(other, 2) if is_early else []
        for event in events:
            match event, end:
                case "first", _:
                    scene.end(first, OUTCOMES[outcome])
                case "second", _:
                    scene.end(second)
                case "other", _:
                    for order in theirs[:1]:
                        scene.end(order)
                    scene.publish(other)
                case _, "publish":
                    scene.publish(ingest)
                case _, "abort":
                    scene.service.abort_ingest(CLIENT, ingest.id)
            scene.state.check()
        scene.settle_late()
        scene.check_idle()
        scene.check_durable("b")
        if end == "publish":
            scene.check_durable()
        assert len(scene.rows) == 2
        assert scene.state.nvme.used_bytes == 2 * EXTENT_BYTES


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_what_lies_in_ddr_already_does_not_leave_for_an_early_write(outcome):
    """Another's copy is what the document has; its eviction writes it, whatever becomes of the early write."""
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 1))
    heard = []
    document = DocumentId("t", "b")
    other = scene.service.begin_ingest(
        OTHER, document, FINGERPRINT, tokens(1, 1), WritePolicy.BACK, None, 64, FAR_NS, heard.append
    )
    (early,) = scene.hand_over(ingest, 1)
    scene.publish(other)
    scene.publish(ingest)
    scene.service.evict(DOCUMENT, Tier.DDR, 0, FAR_NS, heard.append)
    (write,) = [order for order in scene.pending(WriteOut) if order is not early]
    scene.end(early, OUTCOMES[outcome])
    scene.end(write)
    scene.settle_late()
    assert scene.tiers(DOCUMENT) == [{Tier.NVME}]
    scene.check_durable()
    scene.check_idle()


def test_what_lies_on_nvme_already_stays():
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 1))
    scene.publish(scene.others(tokens(1, 1)))
    scene.settle()
    scene.evict(DocumentId("t", "b"), Tier.DDR)
    (early,) = scene.hand_over(ingest, 1)
    scene.publish(ingest)
    scene.end(early)
    scene.settle()
    scene.check_durable()
    scene.check_idle()
    assert scene.tiers(DOCUMENT) == [{Tier.DDR, Tier.NVME}]


def test_an_early_write_out_of_a_spare_outlives_it():
    """The extent came back to DDR while its second ingest was published with a write under way."""
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 1))
    scene.publish(scene.others(tokens(1, 1)))
    scene.settle()
    scene.evict(DocumentId("t", "b"), Tier.DDR)
    (early,) = scene.hand_over(ingest, 1)
    scene.attach(DocumentId("t", "b"))
    (read,) = scene.pending(ReadIn)
    scene.publish(ingest)
    assert scene.state.spares
    scene.end(read)
    assert not scene.state.spares
    assert scene.state.ddr.used_bytes == 2 * EXTENT_BYTES, "its bytes are still being written"
    scene.end(early)
    assert scene.state.ddr.used_bytes == EXTENT_BYTES
    assert scene.state.nvme.used_bytes == EXTENT_BYTES


@pytest.mark.parametrize("is_landed", [False, True])
def test_a_row_that_cannot_be_committed_is_written_again(is_landed):
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 1))
    (order,) = scene.hand_over(ingest, 1)
    if is_landed:
        scene.end(order)
        scene.publish(ingest)
    else:
        scene.publish(ingest)
        scene.end(order)
    scene.end(scene.pending(Write)[0], StorageFailed("EIO"))
    assert not scene.state.document(DOCUMENT).durable
    scene.settle_late()
    scene.check_durable()
    scene.check_idle()


# What it is worth, and what it costs -----------------------------------------------------------------


def test_what_has_landed_is_durable_after_one_commit_and_no_write():
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 3))
    for order in scene.hand_over(ingest, 3):
        scene.end(order)
    assert not scene.pending(Write), "the catalog hears nothing before the document is there"
    assert scene.state.private
    scene.publish(ingest)
    (put,) = scene.pending(Write)
    assert [record.kind for record in put.records] == ["put-extent"] * 3 + ["put-wear"]
    assert not scene.pending(WriteOut)
    scene.end(put)
    (document,) = scene.pending(Write)
    scene.end(document)
    scene.check_durable()


def test_every_byte_is_wear_and_counted_once():
    """Those of a document that was given up too; kv of a published one is not new when it is written again."""
    scene = Early()
    for name, ends in (("a", "abort"), ("b", "publish")):
        ingest, _ = scene.begin(name, tokens(1, 2))
        for order in scene.hand_over(ingest, 2):
            scene.end(order)
        if ends == "abort":
            scene.service.abort_ingest(CLIENT, ingest.id)
        else:
            scene.publish(ingest)
        scene.settle()
    assert scene.state.ledger.wear.write_through_bytes == 4 * EXTENT_BYTES
    assert scene.state.extents[ingest.document.extents[0]].stored


def test_daemon_seals_go_early_too():
    """A writer that makes no seals waits for none either."""
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 1))
    scene.service.next_slots(CLIENT, ingest.id, [(0, 0)], [], [].append)
    assert not scene.pending(WriteOut)
    scene.end(scene.pending(Seal)[0])
    assert len(scene.pending(WriteOut)) == 1


# Whether -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [WritePolicy.BACK, WritePolicy.MEMORY])
def test_what_is_not_written_through_is_not_written_early(policy):
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 2), policy)
    assert ingest.passage.early is None
    assert not scene.hand_over(ingest, 1)
    scene.publish(ingest)
    assert not scene.pending(WriteOut)


def test_a_document_that_passes_through_a_window_is_not_written_early():
    """Its extents give up their places in DDR instead."""
    scene = Early(ddr=2)
    ingest, _ = scene.begin("a", tokens(1, 4))
    assert ingest.passage.streams
    assert ingest.passage.early is None


def test_nothing_is_handed_over_twice():
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 2))
    scene.hand_over(ingest, 1)
    with pytest.raises(InvalidRequest, match="no slot of this writer"):
        scene.service.next_slots(CLIENT, ingest.id, [(0, 0)], [], [].append)


@pytest.mark.parametrize("when_behind", ["memory", "wait"])
def test_a_full_backlog_is_no_reason_for_a_document_to_wait_for_itself(when_behind):
    """Two extents are begun, as the backlog allows; the commit waits for none; the rest follows."""
    scene = Early(backlog=2, when_behind=when_behind)
    ingest, _ = scene.begin("a", tokens(1, 4))
    assert len(scene.hand_over(ingest, 3)) == 2
    scene.publish(ingest)
    assert not scene.state.ledger.counts["write_through_skipped"]
    scene.settle()
    scene.check_durable()


def test_who_waits_for_the_disk_is_not_overtaken():
    """A commit that waits for the backlog goes before early writes that came later."""
    scene = Early(backlog=4, when_behind="wait")
    first, _ = scene.begin("a", tokens(1, 3))
    scene.publish(first)
    second = scene.others(tokens(2, 2))
    heard = []
    scene.service.commit_ingest(OTHER, second.id, heard.append, [bytes(32)] * 2)
    assert not heard
    third, _ = scene.begin("c", tokens(3, 2))
    assert not scene.hand_over(third, 1)
    scene.settle()
    assert heard == [second.document]


def test_early_writes_go_last_and_the_device_never_has_more_than_it_may(monkeypatch):
    monkeypatch.setattr(writes_module, "IN_FLIGHT_BYTES", 2 * EXTENT_BYTES)
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 4))
    early = scene.hand_over(ingest, 4)
    assert len(early) == 2
    scene.publish(scene.others(tokens(2, 1)))
    scene.end(early[0])
    (following,) = [order for order in scene.pending(WriteOut) if order not in early]
    theirs = scene.state.extents[scene.state.document(DocumentId("t", "b")).document.extents[0]]
    assert following.source == theirs.ddr.slot
    scene.publish(ingest)
    scene.settle()
    scene.check_durable()
    scene.check_idle()


def test_it_makes_room_as_write_through_does_and_gives_up_where_nothing_may_leave():
    """A pinned document keeps its NVMe copies; the commit is acknowledged all the same."""
    scene = Early(nvme=4)
    old = scene.store("old", tokens(2, 1))
    kept = scene.store("kept", tokens(3, 3))
    scene.service.pin(kept, Tier.NVME, None, "me", "")
    scene.settle()
    ingest, _ = scene.begin("a", tokens(1, 3))
    assert not scene.hand_over(ingest, 3), "slots are free when the catalog says so"
    scene.end(scene.pending(Write)[0])
    assert scene.tiers(old) == [{Tier.DDR}]
    (order,) = scene.pending(WriteOut)
    assert scene.state.ledger.counts["nvme_full"] == 2
    scene.end(order)
    scene.publish(ingest)
    scene.settle()
    assert not scene.state.document(DOCUMENT).durable
    assert len(scene.rows) == 4
    assert scene.tiers(kept) == [{Tier.DDR, Tier.NVME}] * 3
    scene.check_idle()


def test_a_draining_service_finishes_what_has_begun():
    scene = Early()
    ingest, _ = scene.begin("a", tokens(1, 2))
    scene.hand_over(ingest, 2)
    assert scene.service.writes.queued == 2
    scene.service.write_back()
    scene.settle()
    assert not scene.service.writes.queued
    with pytest.raises(HoldfastError):
        scene.service.abort_ingest(OTHER, ingest.id)
    scene.service.abort_ingest(CLIENT, ingest.id)
    assert scene.empty()
