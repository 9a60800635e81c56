"""The service, scene by scene: effects end when the test says so, and the state agrees with itself after each step."""

from dataclasses import replace

import numpy as np
import pytest
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import (
    ClaimNotFound,
    CorruptExtent,
    DeadlineExceeded,
    DocumentExists,
    DocumentIncomplete,
    DocumentNotFound,
    DocumentTooLarge,
    EmptyDocument,
    GroupFailed,
    GroupNotFound,
    HoldfastError,
    InUse,
    InvalidRequest,
    LayoutError,
    NoCapacity,
    PartialPage,
    PinsOvercommitted,
    SpecMismatch,
    StorageFailed,
    TokenOutOfRange,
)
from holdfast.kvstore.layout import chunked, contiguous, zigzag
from holdfast.kvstore.orders import (
    LoadShard,
    OpenShard,
    ReadIn,
    RetireSlab,
    SaveShard,
    Seal,
    Write,
    WriteOut,
)
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import NS

import fakes
from fakes import CLIENT, EXTENT_BYTES, FAR_NS, tiny_config, tiny_service
from scene import FINGERPRINT, RANKS, SPEC, Scene, rows, tokens

# Ingest ----------------------------------------------------------------------------------------------


def test_a_document_is_visible_when_it_is_complete():
    """Not before its last seal; the acknowledgement is the first sight of it."""
    scene = Scene()
    ingest, heard = scene.begin("a", tokens(1, 2))
    assert heard == [ingest]
    done = scene.commit(ingest)
    seals = scene.pending(Seal)
    assert len(seals) == 2
    for seal in seals:
        assert not scene.state.documents
        assert not done
        scene.end(seal)
    assert done == [ingest.document]
    assert not scene.state.document(ingest.document.id).durable
    scene.settle()
    assert scene.state.document(ingest.document.id).durable
    assert scene.tiers(ingest.document.id) == [{Tier.DDR, Tier.NVME}] * 2


@pytest.mark.parametrize("stage", ["opened", "sealing", "saving", "loading", "waiting"])
@pytest.mark.parametrize("how", ["abort", "disconnect"])
def test_an_ingest_that_ends_early_leaves_nothing(stage, how):
    """Whatever it was doing, its slots, rows, holds and orders are gone once its moves have ended."""
    scene = Scene(ddr=4)
    scene.group()
    group = "g" if stage in ("saving", "loading") else None
    if stage == "waiting":
        blocker = scene.store("blocker", tokens(9, 4), WritePolicy.BACK)
    ingest, heard = scene.begin("a", tokens(1, 3), group=group)
    assert bool(heard) == (stage != "waiting")
    done = scene.commit(ingest) if stage in ("sealing", "saving") else []
    if stage == "sealing":
        scene.end(scene.pending(Seal)[0])
    if how == "abort":
        scene.service.abort_ingest(CLIENT, ingest.id)
    else:
        scene.service.disconnect(CLIENT)
    scene.state.check()
    scene.settle()
    if stage == "waiting":
        scene.service.delete(blocker)
        scene.settle()
    assert scene.empty()
    assert all(isinstance(error, HoldfastError) for error in done)
    assert not scene.state.documents
    with pytest.raises(ClaimNotFound):
        scene.service.commit_ingest(CLIENT, ingest.id, done.append)


def test_what_its_writer_sealed_is_not_sealed_again():
    """And what it left to the daemon is."""
    scene = Scene()
    ingest, _ = scene.begin("a", tokens(1, 3))
    heard = []
    seals = [b"12345678" * 4, b"", b"abcdefgh" * 4]
    scene.service.commit_ingest(CLIENT, ingest.id, heard.append, seals)
    scene.state.check()
    (order,) = scene.pending(Seal)
    assert order.slot == ingest.filled[ingest.missing[1].id].slot
    assert not heard
    scene.settle()
    assert heard == [ingest.document]
    sealed = [scene.state.extents[e].ddr.checksums for e in ingest.document.extents]
    assert [sealed[0], sealed[2]] == [seals[0], seals[2]]
    assert sealed[1]


def test_a_commit_with_all_seals_is_complete_at_once():
    scene = Scene()
    ingest, _ = scene.begin("a", tokens(1, 2), WritePolicy.MEMORY)
    heard = []
    scene.service.commit_ingest(CLIENT, ingest.id, heard.append, [b"12345678" * 4] * 2)
    scene.state.check()
    assert heard == [ingest.document]


@pytest.mark.parametrize("seals", [[b""], [b"x" * 32] * 3, [b"x" * 31, b""], [b"x" * 40, b"x" * 32]])
def test_seals_of_another_shape_are_refused_and_the_ingest_stays_open(seals):
    scene = Scene()
    ingest, _ = scene.begin("a", tokens(1, 2))
    with pytest.raises(InvalidRequest):
        scene.service.commit_ingest(CLIENT, ingest.id, [].append, seals)
    scene.state.check()
    heard = scene.commit(ingest)
    scene.settle()
    assert heard == [ingest.document]


def test_ranks_shares_are_sealed_by_the_daemon():
    scene = Scene()
    scene.group()
    ingest, _ = scene.begin("a", tokens(1, 2), group="g")
    with pytest.raises(InvalidRequest, match="by the daemon"):
        scene.service.commit_ingest(CLIENT, ingest.id, [].append, [b"12345678" * 4] * 2)


def test_two_ingests_of_one_prefix_share_it():
    """Neither waits for the other; the second to commit gives its duplicates back, and deleting one keeps the other."""
    scene = Scene()
    first, _ = scene.begin("a", tokens(1, 2))
    second, _ = scene.begin("b", tokens(1, 3))
    assert len(second.missing) == 3
    for ingest in (first, second):
        scene.commit(ingest)
        scene.settle()
    assert scene.state.used_bytes()["ddr"] == 3 * EXTENT_BYTES
    assert len(scene.state.extents) == 3
    scene.service.delete(first.document.id)
    scene.settle()
    assert scene.tiers(second.document.id) == [{Tier.DDR, Tier.NVME}] * 3
    scene.service.delete(second.document.id)
    scene.settle()
    assert scene.empty()


def test_a_known_prefix_is_not_written_again():
    """Only what is missing takes slots; the same document again takes none."""
    scene = Scene()
    document = scene.store("a", tokens(1, 2))
    longer, _ = scene.begin("b", tokens(1, 3))
    assert (len(longer.missing), longer.cached_tokens) == (1, 64)
    again, _ = scene.begin("a", tokens(1, 2))
    assert not again.missing
    assert scene.commit(again) == [again.document]
    assert list(scene.state.documents) == [document]


def test_bad_documents_are_refused_at_once():
    """Each for its own reason, and nothing is left behind."""
    scene = Scene(ddr=4, documents=1)
    for ids, error in ([], EmptyDocument), ([1000], TokenOutOfRange), (tokens(1, 9), DocumentTooLarge):
        with pytest.raises(error):
            scene.begin("a", ids)
    with pytest.raises(SpecMismatch):
        scene.service.begin_ingest(
            CLIENT, DocumentId("t", "a"), bytes(16), [1], WritePolicy.BACK, None, 64, FAR_NS, [].append
        )
    with pytest.raises(GroupNotFound):
        scene.begin("a", [1], group="g")
    scene.store("a", tokens(1, 1))
    with pytest.raises(DocumentExists):
        scene.begin("a", tokens(2, 1))
    with pytest.raises(NoCapacity, match="documents"):
        scene.begin("b", tokens(2, 1))


def test_one_ingest_per_name_at_a_time():
    """A second one is refused while the first is open."""
    scene = Scene()
    ingest, _ = scene.begin("a", tokens(1, 1))
    with pytest.raises(InUse):
        scene.begin("a", tokens(1, 1))
    with pytest.raises(ClaimNotFound):
        scene.service.commit_ingest(CLIENT + 1, ingest.id, [].append)


# Attach ----------------------------------------------------------------------------------------------


def test_an_attach_from_nvme_brings_layers_in_order():
    """It is granted when the moves begin, and its layers count up as the slowest extent's do."""
    scene = Scene()
    document = scene.store("a", tokens(1, 2))
    scene.evict(document, Tier.DDR)
    (attach,) = scene.attach(document)
    reads = scene.pending(ReadIn)
    ready = []
    for layers in (1, 2):
        scene.service.wait_layers(CLIENT, attach.lease.id, layers, ready.append)
    scene.service.advanced(reads[0].id, 1)
    assert not ready
    scene.service.advanced(reads[1].id, 1)
    assert ready == [1]
    scene.end(reads[1])
    assert ready == [1]
    scene.end(reads[0])
    assert ready == [1, 2]
    assert attach.loading.swap.source_bytes == {"nvme": 2 * EXTENT_BYTES}
    with pytest.raises(InUse):
        scene.service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
    with pytest.raises(InUse):
        scene.service.delete(document)


def test_an_attach_from_ddr_moves_nothing():
    """All layers are ready at once."""
    scene = Scene()
    (attach,) = scene.attach(scene.store("a", tokens(1, 2)))
    assert attach.loading.phase == "ready"
    assert attach.loading.layers == 2
    assert not scene.effects.orders
    swap = attach.loading.swap
    assert (swap.outcome, swap.moved_bytes, swap.predicted_ns, swap.source_bytes) == (
        "ready",
        0,
        0,
        {"ddr": 2 * EXTENT_BYTES},
    )
    assert list(scene.state.leases) == [attach.lease.id]
    assert all(copy.holds == 1 for copy in scene.state.all_placements() if copy.tier is Tier.DDR)
    scene.detach(attach)
    assert all(copy.holds == 0 for copy in scene.state.all_placements())


def test_an_attach_that_needs_no_room_waits_for_nobody_who_does():
    """And what it holds does not leave for them."""
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 2), WritePolicy.BACK)
    scene.store("b", tokens(2, 2), WritePolicy.BACK)
    _, waiting = scene.begin("c", tokens(3, 2))
    assert not waiting
    front = [scene.state.extents[e].ddr.state for e in scene.state.documents[document].document.extents]
    (attach,) = scene.attach(document) if set(front) == {"resident"} else scene.attach(DocumentId("t", "b"))
    assert attach.loading.phase == "ready"
    scene.settle()
    assert waiting


@pytest.mark.parametrize("from_nvme", [False, True])
def test_an_attach_to_a_group_opens_a_shard_and_loads_it(from_nvme):
    """The ranks hear of the rows first, then of the bytes; a second attach moves nothing."""
    scene = Scene()
    scene.group()
    document = scene.store("a", tokens(1, 3))
    if from_nvme:
        scene.evict(document, Tier.DDR)
    (attach,) = scene.attach(document, "g")
    opened = scene.effects.orders[0]
    assert isinstance(opened, OpenShard)
    assert opened.resident_tokens == 0
    assert sum(count for _, count in attach.loading.shard.rows) == 96
    scene.settle()
    assert attach.loading.phase == "ready"
    (again,) = scene.attach(document, "g")
    assert again.loading.phase == "ready"
    assert not scene.pending(LoadShard)
    assert not scene.pending(OpenShard), "the ranks know it: whoever reads it by the first opening goes on"
    assert again.loading.generation == attach.loading.generation
    assert again.loading.swap.source_tier == "hbm"


def test_the_ranks_hear_in_which_form_a_documents_kv_is():
    """And who runs a model may attach its KV as pages too, but not prefill it so."""
    scene = Scene()
    scene.group()
    native = replace(SPEC, page_format="pages/1", block_tokens=24)
    other = replace(native, model="tiny@2")
    begin = scene.service.begin_ingest
    for name, spec in (("pages", native), ("other", other)):
        scene.service.register_spec(spec)
        document, policy = DocumentId("t", name), WritePolicy.MEMORY
        ingest = begin(CLIENT, document, spec.fingerprint(), tokens(1, 3), policy, None, 64, FAR_NS, [].append)
        scene.settle()
        scene.commit(ingest)
    (attach,) = scene.attach(DocumentId("t", "pages"), "g")
    assert [order.native for order in scene.pending(OpenShard)] == [native]
    scene.settle()
    assert attach.loading.phase == "ready"
    (plain,) = scene.attach(scene.store("a", tokens(1, 1)), "g")
    assert [order.native for order in scene.pending(OpenShard)] == [None]
    assert plain.loading.layout.token_count == 32
    with pytest.raises(SpecMismatch, match="another model"):
        scene.attach(DocumentId("t", "other"), "g")
    more = CLIENT, DocumentId("t", "b"), native.fingerprint()
    with pytest.raises(SpecMismatch, match="canonical"):
        begin(*more, tokens(1, 3), WritePolicy.BACK, "g", 64, FAR_NS, [].append)
    with pytest.raises(PartialPage, match="first 24"):
        begin(*more, tokens(1, 1), WritePolicy.BACK, None, 64, FAR_NS, [].append)


def test_an_early_layer_goes_on_to_hbm_at_once():
    """Layer 0 is loaded into the group while layer 1 is still being read."""
    scene = Scene()
    scene.group()
    document = scene.store("a", tokens(1, 1))
    scene.evict(document, Tier.DDR)
    (attach,) = scene.attach(document, "g")
    (read,) = scene.pending(ReadIn)
    scene.service.advanced(read.id, 1)
    (load,) = scene.pending(LoadShard)
    assert (load.layer_start, load.layer_stop) == (0, 1)
    scene.end(load)
    assert attach.loading.layers == 1
    scene.end(read)
    (load,) = scene.pending(LoadShard)
    assert (load.layer_start, load.layer_stop) == (1, 2)
    scene.settle()
    assert attach.loading.phase == "ready"


def test_bad_attaches_are_refused_at_once():
    """Unknown documents, models and groups, and layouts that do not fit."""
    scene = Scene()
    document = scene.store("a", tokens(1, 2))
    with pytest.raises(DocumentNotFound):
        scene.attach(DocumentId("t", "nobody"))
    with pytest.raises(GroupNotFound):
        scene.attach(document, "g")
    with pytest.raises(SpecMismatch):
        scene.service.attach(CLIENT, document, bytes(16), None, None, FAR_NS, [].append)
    scene.service.register_rank(RANKS[0], "g", 0, 2, 1, FINGERPRINT, 160)
    with pytest.raises(GroupNotFound, match="1 of 2"):
        scene.attach(document, "g")
    scene.service.register_rank(RANKS[1], "g", 1, 2, 1, FINGERPRINT, 160)
    with pytest.raises(LayoutError):
        scene.attach(document, "g", layout=contiguous(63, 2))
    with pytest.raises(InUse):
        scene.service.register_rank(RANKS[0], "g", 0, 2, 1, FINGERPRINT, 160)
    assert not scene.state.leases


# HBM pressure ----------------------------------------------------------------------------------------


def attached(scene, document):
    """Bring a document into the group and let go of it."""
    (attach,) = scene.attach(document, "g")
    scene.settle()
    scene.detach(attach)
    return attach


def test_hbm_pressure_takes_the_tail_of_another_document():
    """It is freed where DDR has it, a front stays, and the next attach brings back only the tail."""
    scene = Scene()
    scene.group(rows=80)
    first, second = scene.store("a", tokens(1, 3)), scene.store("b", tokens(2, 3))
    attached(scene, first)
    scene.clock.advance(NS)
    (attach,) = scene.attach(second, "g")
    assert not scene.pending(SaveShard)
    scene.settle()
    assert attach.loading.phase == "ready"
    shards = scene.state.groups["g"].shards
    kept = sum(len(shard.copies) for shard in shards.values() if shard.document == first)
    assert kept < 3
    scene.detach(attach)
    scene.clock.advance(NS)
    (back,) = scene.attach(first, "g")
    assert back.loading.swap.source_bytes.get("hbm", 0) == kept * EXTENT_BYTES
    scene.settle()
    assert back.loading.phase == "ready"


def test_what_only_hbm_has_is_saved_to_ddr():
    """A memory-only document whose DDR copy is gone goes back to DDR when HBM needs the room."""
    scene = Scene(ddr=4)
    scene.group(rows=32)
    first = scene.store("a", tokens(1, 2), WritePolicy.MEMORY)
    attached(scene, first)
    scene.evict(None, Tier.DDR, 2 * EXTENT_BYTES)
    assert scene.tiers(first) == [set(), set()]
    scene.service.evict(first, Tier.HBM, 0, FAR_NS, [].append)
    assert scene.pending(SaveShard)
    scene.settle()
    assert scene.tiers(first) == [{Tier.DDR}, {Tier.DDR}]
    assert not scene.state.groups["g"].shards
    assert {v.action for v in scene.state.ledger.verdicts if v.tier == "hbm"} == {"demote"}


def test_an_attach_to_ddr_waits_for_a_save_out_of_hbm():
    """Bytes that are on their way from HBM are used when they have arrived."""
    scene = Scene(ddr=4)
    scene.group(rows=32)
    document = scene.store("a", tokens(1, 1), WritePolicy.MEMORY)
    attached(scene, document)
    scene.evict(None, Tier.DDR, EXTENT_BYTES)
    scene.service.evict(document, Tier.HBM, 0, FAR_NS, [].append)
    heard = scene.attach(document)
    assert not heard
    scene.settle()
    assert heard[0].loading.phase == "ready"


def test_a_lost_rank_fails_the_attach_and_frees_everything():
    """At once, for whoever waits; late answers are ignored."""
    scene = Scene()
    scene.group()
    document = scene.store("a", tokens(1, 2))
    (attach,) = scene.attach(document, "g")
    ready = []
    scene.service.wait_layers(CLIENT, attach.lease.id, 2, ready.append)
    scene.service.disconnect(RANKS[1])
    scene.state.check()
    assert isinstance(ready[0], GroupFailed)
    scene.settle()
    assert not scene.state.groups
    assert all(copy.holds == 0 for copy in scene.state.all_placements())
    scene.detach(attach)


def test_a_group_that_goes_takes_all_who_wait_for_it():
    """Ingests and attaches in the queue, and attaches whose bytes are still being read."""
    scene = Scene(ddr=4)
    scene.group()
    document = scene.store("a", tokens(1, 2))
    scene.evict(document, Tier.DDR)
    (reading,) = scene.attach(document, "g")
    blocker, _ = scene.begin("b", tokens(2, 2))
    _, heard = scene.begin("c", tokens(3, 2), group="g")
    assert not heard
    scene.service.disconnect(RANKS[0])
    scene.state.check()
    assert isinstance(heard[0], GroupFailed)
    assert isinstance(reading.loading.error, GroupFailed)
    scene.settle()
    scene.service.abort_ingest(CLIENT, blocker.id)
    assert all(copy.holds == 0 for copy in scene.state.all_placements())


def test_slots_of_a_save_stay_until_the_ranks_have_answered():
    """A rank that is still there may write to them after another was lost."""
    scene = Scene()
    scene.group()
    ingest, _ = scene.begin("a", tokens(1, 2), group="g")
    scene.settle()
    done = scene.commit(ingest)
    (save,) = scene.pending(SaveShard)
    scene.service.disconnect(RANKS[0])
    scene.state.check()
    assert isinstance(done[0], GroupFailed)
    assert scene.state.ddr.used_bytes == 2 * EXTENT_BYTES
    scene.end(save, GroupFailed("gone"))
    assert scene.state.ddr.used_bytes == 0


# DDR pressure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "left"),
    [(WritePolicy.THROUGH, {Tier.NVME}), (WritePolicy.BACK, {Tier.NVME}), (WritePolicy.MEMORY, set())],
)
def test_ddr_pressure_by_write_policy(policy, left):
    """Written-through KV is there already, write-back KV is written first, memory-only KV is dropped, by verdict."""
    scene = Scene(ddr=4)
    first = scene.store("a", tokens(1, 3), policy)
    scene.clock.advance(NS)
    ingest, heard = scene.begin("b", tokens(2, 3))
    assert bool(heard) == (policy is not WritePolicy.BACK)
    scene.settle()
    assert heard == [ingest]
    assert scene.tiers(first) == [{Tier.DDR} | (left if policy is WritePolicy.THROUGH else set()), left, left]
    starts = [v.start for v in scene.state.ledger.verdicts]
    assert starts == [64, 32], "the tail goes first"
    assert {v.last_copy for v in scene.state.ledger.verdicts} == {not left}


def test_pinned_and_leased_documents_stay_and_the_refusal_names_them():
    """A demand that no set of victims can meet is refused at once, not queued."""
    scene = Scene(ddr=4)
    pinned, leased = scene.store("pinned", tokens(1, 2)), scene.store("leased", tokens(2, 2))
    scene.service.pin(pinned, Tier.DDR, None, "me", "demo")
    scene.settle()
    scene.attach(leased)
    _, heard = scene.begin("b", tokens(3, 1))
    assert isinstance(heard[0], NoCapacity)
    assert "t/pinned" in str(heard[0])
    assert "t/leased" in str(heard[0])
    assert not scene.state.private


def test_a_hit_cancels_a_drain():
    """A document that is on its way out stays when it is asked for."""
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 2), WritePolicy.BACK)
    scene.service.evict(document, Tier.DDR, 0, FAR_NS, [].append)
    assert scene.pending(WriteOut)
    (attach,) = scene.attach(document)
    scene.settle()
    assert attach.loading.phase == "ready"
    assert scene.tiers(document) == [{Tier.DDR, Tier.NVME}] * 2
    assert scene.state.ledger.counts["drains_cancelled"] == 2


def test_popular_documents_stay():
    """Of two documents the one that is asked for more often survives pressure."""
    scene = Scene(ddr=4)
    popular, rare = scene.store("a", tokens(1, 2)), scene.store("b", tokens(2, 2))
    for _ in range(8):
        (attach,) = scene.attach(popular)
        scene.detach(attach)
    scene.store("c", tokens(3, 2))
    assert scene.tiers(popular) == [{Tier.DDR, Tier.NVME}] * 2
    assert scene.tiers(rare) == [{Tier.NVME}] * 2


# NVMe ------------------------------------------------------------------------------------------------


def test_a_full_nvme_makes_room_after_the_catalog_forgot():
    """No slot is written to before the deletion of what it held is committed."""
    scene = Scene(nvme=2)
    first = scene.store("a", tokens(1, 2))
    scene.evict(first, Tier.DDR)
    scene.clock.advance(NS)
    ingest, _ = scene.begin("b", tokens(2, 2))
    scene.commit(ingest)
    for order in scene.pending(Seal):
        scene.end(order)
    drops = [r.kind for write in scene.pending(Write) for r in write.records]
    assert drops == ["drop-extent"] * 2, "room for all that is queued, at once"
    assert not scene.pending(WriteOut)
    scene.end(scene.pending(Write)[0])
    assert scene.pending(WriteOut)
    scene.settle()
    assert scene.tiers(ingest.document.id) == [{Tier.DDR, Tier.NVME}] * 2
    assert scene.tiers(first) == [set()] * 2


def test_a_copy_on_its_way_out_of_nvme_is_not_read():
    """It counts as gone from the moment that its deletion was asked for; a new one may be written meanwhile."""
    scene = Scene()
    document = scene.store("a", tokens(1, 1))
    scene.evict(document, Tier.DDR)
    scene.service.evict(document, Tier.NVME, 0, FAR_NS, [].append)
    with pytest.raises(DocumentIncomplete):
        scene.attach(document)
    ingest, _ = scene.begin("a", tokens(1, 1))
    scene.commit(ingest)
    scene.end(scene.pending(Seal)[0])
    assert scene.pending(WriteOut)
    scene.settle()
    assert scene.tiers(document) == [{Tier.DDR, Tier.NVME}]
    assert scene.state.nvme.used_bytes == EXTENT_BYTES


def test_a_deletion_that_the_catalog_refused_is_tried_again():
    """The slot stays taken until the row is known to be gone."""
    scene = Scene()
    document = scene.store("a", tokens(1, 1))
    scene.service.delete(document)
    scene.end(scene.pending(Write)[0])
    scene.end(scene.pending(Write)[0], StorageFailed("full"))
    assert scene.state.nvme.used_bytes == EXTENT_BYTES
    scene.service.tick()
    scene.settle()
    assert scene.empty()


@pytest.mark.parametrize("kind", [WriteOut, Write])
def test_a_write_that_fails_leaves_the_document_in_memory(kind):
    """It is acknowledged all the same, is not durable, and no slot is lost."""
    scene = Scene()
    ingest, _ = scene.begin("a", tokens(1, 1))
    heard = scene.commit(ingest)
    scene.end(scene.pending(Seal)[0])
    if kind is Write:
        scene.end(scene.pending(WriteOut)[0])
    scene.end(scene.pending(kind)[0], StorageFailed("broken"))
    scene.settle()
    assert heard == [ingest.document]
    assert not scene.state.document(ingest.document.id).durable
    assert scene.tiers(ingest.document.id) == [{Tier.DDR}]
    assert scene.state.nvme.used_bytes == 0
    scene.service.write_back()
    scene.settle()
    assert scene.state.document(ingest.document.id).durable


def test_a_demotion_that_cannot_be_written_is_a_verdict():
    """Who needs the room gets it; the document loses its tail, and the ledger says why."""
    scene = Scene(ddr=2)
    document = scene.store("a", tokens(1, 2), WritePolicy.BACK)
    _, heard = scene.begin("b", tokens(2, 1))
    scene.end(scene.pending(WriteOut)[0], StorageFailed("broken"))
    scene.settle()
    assert heard
    assert scene.tiers(document) == [{Tier.DDR}, set()]
    assert scene.state.ledger.verdicts[-1].last_copy
    assert "broken" in scene.state.ledger.verdicts[-1].reason


def test_corruption_is_quarantined_and_only_the_hole_is_filled():
    """The attach hears of it, the document names what it lost, and what lies behind is kept."""
    scene = Scene()
    document = scene.store("a", tokens(1, 3))
    scene.evict(document, Tier.DDR)
    (attach,) = scene.attach(document)
    scene.end(scene.pending(ReadIn)[1], CorruptExtent("bad"))
    assert isinstance(attach.loading.error, CorruptExtent)
    scene.settle()
    scene.detach(attach)
    with pytest.raises(DocumentIncomplete, match=r"\[32, 64\)"):
        scene.attach(document)
    ingest, _ = scene.begin("a", tokens(1, 3))
    assert [(e.start, e.stop) for e in ingest.missing] == [(32, 64)]
    assert ingest.cached_tokens == 32
    scene.commit(ingest)
    scene.settle()
    assert all(Tier.NVME in tiers for tiers in scene.tiers(document))
    assert scene.attach(document)[0].loading.phase in ("ready", "moving")


def test_a_failed_attach_keeps_its_slots_until_it_is_detached():
    """Its holder may be reading the layers that did arrive."""
    scene = Scene(ddr=2)
    document = scene.store("a", tokens(1, 2))
    scene.evict(document, Tier.DDR)
    (attach,) = scene.attach(document)
    for read in scene.pending(ReadIn):
        scene.end(read, StorageFailed("broken"))
    assert scene.state.ddr.used_bytes == 2 * EXTENT_BYTES
    _, (refused,) = scene.begin("b", tokens(2, 1))
    (holder,) = refused.holders
    assert (holder.kind, holder.document, holder.size_bytes) == ("lease", "a", 2 * EXTENT_BYTES)
    scene.detach(attach)
    ingest, heard = scene.begin("b", tokens(2, 1))
    assert heard == [ingest]


@pytest.mark.parametrize("end", ["abort", "commit", "disconnect", "group"])
def test_rows_of_an_ingest_whose_front_is_corrupt_stay_until_its_ranks_are_done(end):
    """They prefill behind the front, and would write into rows that another document got meanwhile."""
    scene = Scene()
    scene.group()
    scene.evict(scene.store("a", tokens(1, 2)), Tier.DDR)
    ingest, heard = scene.begin("b", tokens(1, 3), group="g")
    assert heard == [ingest]
    for read in scene.pending(ReadIn):
        scene.end(read, CorruptExtent("broken"))
    pools = scene.state.groups["g"].pools
    assert [pool.used_rows for pool in pools.values()] == [48, 48]
    match end:
        case "abort":
            scene.service.abort_ingest(CLIENT, ingest.id)
        case "commit":
            (error,) = scene.commit(ingest)
            assert isinstance(error, CorruptExtent)
        case "disconnect":
            scene.service.disconnect(CLIENT)
        case "group":
            scene.service.disconnect(RANKS[0])
            assert not scene.state.groups
    scene.state.check()
    scene.settle()
    if end != "group":
        assert [pool.used_rows for pool in pools.values()] == [0, 0]
    assert not scene.service.ingests.open
    assert all(copy.holds == 0 for copy in scene.state.all_placements())


# Waiting ---------------------------------------------------------------------------------------------


def test_who_waits_is_served_in_order():
    """Nobody overtakes the first; each is granted as soon as its room is free."""
    scene = Scene(ddr=4)
    scene.store("a", tokens(1, 4), WritePolicy.BACK)
    large, first = scene.begin("large", tokens(2, 3))
    small, second = scene.begin("small", tokens(3, 1))
    assert not first
    for _ in range(2):
        scene.end(scene.pending(WriteOut)[0])
        scene.end(scene.pending(Write)[0])
    assert scene.state.ddr.used_bytes == 2 * EXTENT_BYTES
    assert not second
    scene.settle()
    assert (first, second) == ([large], [small])


def test_open_ingests_are_counted_among_the_holders():
    """They cannot be evicted, so the next is refused at once and told why."""
    scene = Scene(ddr=4)
    scene.begin("blocker", tokens(1, 4))
    _, heard = scene.begin("a", tokens(2, 1))
    assert isinstance(heard[0], NoCapacity)
    (holder,) = heard[0].holders
    assert (holder.kind, holder.document, holder.size_bytes) == ("ingest", "blocker", 4 * EXTENT_BYTES)


def test_the_queue_has_a_limit_and_a_deadline():
    """Too many are refused at once, the others when their time is up."""
    scene = Scene(ddr=2, pending_reservations=1)
    scene.store("a", tokens(1, 2), WritePolicy.BACK)
    _, heard = scene.begin("b", tokens(2, 2), deadline_ns=scene.clock.monotonic_ns() + 10)
    assert not heard
    with pytest.raises(NoCapacity, match="wait"):
        scene.begin("c", tokens(3, 1))
    scene.clock.advance(10)
    scene.service.tick()
    scene.state.check()
    assert isinstance(heard[0], DeadlineExceeded)
    scene.settle()
    assert not scene.state.private


# Claims ----------------------------------------------------------------------------------------------


def test_a_client_that_goes_gives_everything_back():
    """Leases, ingests and groups."""
    scene = Scene()
    document = scene.store("a", tokens(1, 1))
    scene.attach(document, client=5)
    scene.service.disconnect(5)
    scene.state.check()
    assert not scene.state.leases
    assert all(copy.holds == 0 for copy in scene.state.all_placements())


def test_pins_have_a_budget_and_an_end():
    """Over budget nothing changes; a pin whose time is up is gone at the next tick."""
    scene = Scene(pin_bytes=2 * EXTENT_BYTES)
    first, second = scene.store("a", tokens(1, 2)), scene.store("b", tokens(2, 1))
    scene.service.pin(first, Tier.NVME, 2.0, "me", "")
    with pytest.raises(PinsOvercommitted):
        scene.service.pin(second, Tier.NVME, None, "me", "")
    scene.clock.advance(2 * NS)
    scene.service.tick()
    assert not scene.state.pins.all()
    scene.service.pin(second, Tier.NVME, None, "me", "")
    with pytest.raises(ClaimNotFound):
        scene.service.unpin(first)
    with pytest.raises(InUse, match="pinned"):
        scene.service.delete(second)


@pytest.mark.parametrize("floor", [Tier.HBM, Tier.DDR])
def test_a_pin_brings_the_document_to_ddr_and_keeps_it_there(floor):
    """A document pinned in HBM stays in DDR too, because HBM goes with its process."""
    scene = Scene(ddr=4)
    document = scene.store("a", tokens(1, 2))
    scene.evict(document, Tier.DDR)
    scene.service.pin(document, floor, None, "me", "")
    scene.settle()
    assert scene.tiers(document) == [{Tier.DDR, Tier.NVME}] * 2
    _, heard = scene.begin("b", tokens(2, 3))
    assert isinstance(heard[0], NoCapacity)


def snapshot(scene):
    """All that a look must not change."""
    state = scene.state
    copies = sorted((c.extent, c.device, c.state, c.holds, c.slot or ()) for c in state.all_placements())
    return copies, dict(state.ledger.counts), len(state.ledger.verdicts), len(scene.effects.orders)


@pytest.mark.parametrize("tier", Tier)
def test_a_dry_run_changes_nothing_and_says_what_happens(tier):
    """The plan is the one that evict then carries out."""
    scene = Scene()
    scene.group()
    document = scene.store("a", tokens(1, 3))
    attached(scene, document)
    before = snapshot(scene)
    plan = scene.service.upkeep.plan_eviction(document, tier, 0)
    assert snapshot(scene) == before
    assert scene.evict(document, tier) == plan
    verdicts = list(scene.state.ledger.verdicts)
    assert [(v.extent, v.tier, v.action) for v in verdicts] == [(p.extent, p.tier.label, p.action) for p in plan]
    left = {Tier.HBM: {Tier.DDR, Tier.NVME}, Tier.DDR: {Tier.NVME}, Tier.NVME: set()}[tier]
    assert scene.tiers(document) == [left] * 3


# Restart ---------------------------------------------------------------------------------------------


def test_a_restart_brings_back_what_was_durable():
    """And only that; missing extents are named, pins and NVMe bytes are accounted."""
    scene = Scene()
    durable = scene.store("a", tokens(1, 2))
    scene.store("b", tokens(2, 2), WritePolicy.MEMORY)
    scene.service.pin(durable, Tier.NVME, None, "me", "")
    specs, extents, documents, pins = rows(scene)
    again = Scene()
    again.service.restore(specs, extents, documents, pins)
    again.settle()
    again.state.check()
    assert again.tiers(durable) == [{Tier.NVME}] * 2
    assert list(again.state.documents) == [durable]
    assert again.state.pins.get(durable)
    holed = Scene()
    holed.service.restore(specs, extents[:1], documents, ())
    with pytest.raises(DocumentIncomplete, match=r"\[32, 64\)"):
        holed.attach(durable)
    assert [e.start for e in holed.begin("a", tokens(1, 2))[0].missing] == [32]


def test_a_restart_with_less_room_gives_up_visibly():
    """Slots outside the budget, and pins beyond theirs, go; the daemon starts all the same."""
    scene = Scene()
    first, second = scene.store("a", tokens(1, 3)), scene.store("b", tokens(2, 3))
    for document in (first, second):
        scene.service.pin(document, Tier.NVME, None, "me", "")
    less = Scene(nvme=4, pin_bytes=4 * EXTENT_BYTES)
    less.service.restore(*rows(scene))
    less.settle()
    less.state.check()
    assert less.state.ledger.counts["not_restored"] == 2
    assert less.state.ledger.counts["pins_not_restored"] == 1
    assert less.state.nvme.used_bytes == 4 * EXTENT_BYTES


def test_a_slab_keeps_its_memory_for_its_owner():
    """Nothing is retired when a tenant's slab empties, nor when the same tenant fills it again."""
    scene = Scene()
    document = scene.store("a", tokens(1, 2), WritePolicy.MEMORY)
    scene.service.delete(document)
    scene.store("b", tokens(3, 2), WritePolicy.MEMORY)
    assert not scene.pending(RetireSlab)


def test_another_tenant_gets_a_slab_without_its_old_memory():
    """What one tenant wrote is gone before another's first slot of that slab is handed out."""
    service, effects, _ = tiny_service(tiny_config(ddr__slab_bytes="1 MiB"))  # one slab is all of DDR
    for tenant, retired in (("one", []), ("two", [0])):
        answers = []
        name = DocumentId(tenant, "a")
        array = np.asarray(tokens(1, 2), dtype=np.uint32)
        begun = service.begin_ingest(
            CLIENT, name, FINGERPRINT, array, WritePolicy.MEMORY, None, 64, FAR_NS, answers.append
        )
        assert [order.slab for order in effects.orders if isinstance(order, RetireSlab)] == retired
        service.abort_ingest(CLIENT, begun.id)


def test_what_could_grow_without_end_is_refused():
    """Endless layouts, endless reasons and endless models get a typed error, and nothing is left of them."""
    with pytest.raises(LayoutError, match="larger chunks"):
        chunked(zigzag(0, 2), 10**7, 1)
    service, effects, _ = tiny_service()
    document = fakes.ingest(service, effects, "a")
    with pytest.raises(InvalidRequest, match="at most 255"):
        service.pin(document, Tier.DDR, None, "me", "x" * 256)
    assert not service.state.pins.all()
    for number in range(4095):  # the scene's own is the first
        service.register_spec(replace(SPEC, model=f"model-{number}"))
    with pytest.raises(NoCapacity, match="4096 models"):
        service.register_spec(replace(SPEC, model="one too many"))
