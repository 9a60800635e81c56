"""Documents larger than DDR pass through it in windows: scenes with effects that end when the test says so."""

from dataclasses import replace

import pytest
from holdfast.kvstore.claims import PinKind
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import (
    ClaimNotFound,
    CorruptExtent,
    DocumentIncomplete,
    DocumentTooLarge,
    GroupFailed,
    HoldfastError,
    InUse,
    InvalidRequest,
    NoCapacity,
    PinsOvercommitted,
    StorageFailed,
    from_code,
)
from holdfast.kvstore.orders import LoadShard, ReadIn, SaveShard, Seal, Write, WriteOut
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import Service

from fakes import CLIENT, EXTENT_BYTES, FAR_NS
from scene import FINGERPRINT, RANKS, SPEC, Scene, rows, tokens

OTHER_RANKS = (31, 32)


class Narrow(Scene):
    """DDR of a few extents, a window of fewer, and a larger NVMe."""

    def __init__(self, ddr=4, window=2, nvme=32):
        super().__init__(ddr=ddr, nvme=nvme)
        self.config = replace(self.config, ddr=replace(self.config.ddr, window_bytes=window * EXTENT_BYTES))
        self.service = Service(self.config, self.clock, self.effects, lambda _: bytes(32))
        self.service.register_spec(SPEC)
        self.settle()
        self.group(rows=320)
        for rank, client in enumerate(OTHER_RANKS):
            self.service.register_rank(client, "h", rank, 2, 1, FINGERPRINT, 320)

    def on_nvme(self, **documents):
        """Documents that lie on NVMe only, however they came there."""
        other = Scene(ddr=32, nvme=32)
        found = [other.store(name, ids) for name, ids in documents.items()]
        self.service.restore(*rows(other))
        self.settle()
        return found[0] if len(found) == 1 else found

    def end_up_to(self, kind):
        """Let orders end until one of that kind is next; returns it."""
        while not self.pending(kind):
            self.end(self.effects.orders[0])
        return self.pending(kind)[0]

    def idle(self):
        """Nobody holds anything, and nothing is under way."""
        assert not self.service.store.orders_in_flight
        assert not self.service.room.waiting
        assert not self.service.loader._active
        assert not self.service.loader.reads.waiting
        assert not self.state.private
        assert all(copy.holds == 0 for copy in self.state.all_placements())


# Into a group ----------------------------------------------------------------------------------------


def test_a_document_larger_than_ddr_streams_into_a_group():
    """Never more than a window of it is under way, each arrival starts the next read, and its front is what stays."""
    scene = Narrow()
    document = scene.on_nvme(a=tokens(1, 10))
    (attach,) = scene.attach(document, "g")
    seen = 0
    while scene.effects.orders:
        reads = len(scene.pending(ReadIn))
        assert reads <= 2
        assert len(attach.loading.inside) == min(2, 10 - seen), "the next extent follows each arrival"
        order = scene.effects.orders[0]
        seen += isinstance(order, LoadShard)
        assert attach.loading.layers == 0 or seen == 10
        scene.end(order)
    assert attach.loading.phase == "ready"
    assert attach.loading.swap.source_bytes == {"nvme": 10 * EXTENT_BYTES}
    assert [Tier.DDR in tiers for tiers in scene.tiers(document)] == [True] * 4 + [False] * 6
    scene.detach(attach)
    scene.idle()


@pytest.mark.parametrize(("ddr", "extents"), [(4, 10), (5, 10), (4, 5)])
def test_a_document_does_not_keep_itself_out_of_ddr(ddr, extents):
    """Its own front may be all that DDR holds, and was held for the next stream: then that makes place."""
    scene = Narrow(ddr=ddr)
    document = scene.on_nvme(a=tokens(1, extents))
    for group in ("g", "h"):
        (attach,) = scene.attach(document, group)
        scene.settle()
        assert attach.loading.phase == "ready"
        scene.detach(attach)
    scene.idle()


def test_a_document_that_cannot_make_place_is_refused_once():
    """Others have all of DDR: an error, holding nothing."""
    scene = Narrow(ddr=4)
    document = scene.on_nvme(a=tokens(1, 10))
    (attach,) = scene.attach(document, "g")
    scene.settle()
    scene.detach(attach)
    scene.service.evict(document, Tier.DDR, 0, FAR_NS, lambda _: None)
    scene.settle()
    (leased,) = scene.attach(scene.store("r", tokens(2, 4)))
    scene.settle()
    (refused,) = scene.attach(document, "h")
    assert isinstance(refused, NoCapacity)
    scene.detach(leased)
    scene.idle()


def test_what_others_have_in_ddr_stays_beside_a_stream():
    """It takes one window from them, not all of DDR."""
    scene = Narrow(ddr=6)
    document = scene.on_nvme(a=tokens(1, 10))
    resident = scene.store("r", tokens(2, 4))
    (attach,) = scene.attach(document, "g")
    scene.settle()
    assert attach.loading.phase == "ready"
    assert all(Tier.DDR in tiers for tiers in scene.tiers(resident))


def test_two_streams_share_a_ddr_of_one_window():
    """The second waits for the first one's window, and nothing else."""
    scene = Narrow(ddr=2)
    first, second = scene.on_nvme(a=tokens(1, 6), b=tokens(2, 6))
    (attach,) = scene.attach(first, "g")
    heard = scene.attach(second, "h")
    assert not heard
    scene.settle()
    assert attach.loading.phase == heard[0].loading.phase == "ready"
    scene.detach(attach)
    scene.detach(heard[0])
    scene.idle()


def test_two_groups_stream_one_document():
    """What one has passed the other may still use; neither waits for ever for a slot that the other keeps."""
    scene = Narrow(ddr=4)
    document = scene.on_nvme(a=tokens(1, 9))
    (attach,) = scene.attach(document, "g")
    (other,) = scene.attach(document, "h")
    read = 0
    while scene.effects.orders:
        # The second group is slower: what the first has passed is still in use.
        order = next((o for o in scene.effects.orders if getattr(o, "group", "") != "h"), scene.effects.orders[0])
        read += isinstance(order, ReadIn)
        scene.end(order)
    assert attach.loading.phase == other.loading.phase == "ready"
    assert read < 18, "an extent that both want at once is read once"
    scene.detach(attach)
    scene.detach(other)
    scene.idle()


@pytest.mark.parametrize("taken", ["leased", "waited"])
def test_a_stream_whose_slots_others_use_waits_for_them(taken):
    """A lease on what has passed takes its slot away; the stream goes on when one is free, or is told why not."""
    scene = Narrow(ddr=2, window=1)
    document = scene.on_nvme(a=tokens(1, 3))
    scene.begin("blocker", tokens(9, 1))
    (attach,) = scene.attach(document, "g")
    (read,) = scene.pending(ReadIn)
    scene.end(read)
    (load,) = scene.pending(LoadShard)
    if taken == "leased":
        held = scene.state.extents[scene.state.documents[document].document.extents[2]]
        scene.service.store.hold(held.ddr)
        scene.end(load)
        assert isinstance(attach.loading.error, NoCapacity)
        scene.service.store.unhold(held.ddr)
    else:
        waiting, heard = scene.begin("c", tokens(3, 1))
        assert not heard
        scene.end(load)
        assert scene.pending(ReadIn), "its own slot goes to its next extent, whoever waits"
        scene.settle()
        assert attach.loading.phase == "ready"
        assert heard == [waiting]
        scene.service.abort_ingest(CLIENT, waiting.id)
    scene.detach(attach)
    scene.service.disconnect(CLIENT)
    scene.settle()
    scene.idle()


@pytest.mark.parametrize("end", ["corrupt", "broken", "group", "disconnect", "detach", "load"])
@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_stream_that_ends_early_leaves_nothing_held(end, after):
    """Whatever happens, and whenever, all of its slots and rows are free once its moves have ended."""
    scene = Narrow()
    document = scene.on_nvme(a=tokens(1, 10))
    (attach,) = scene.attach(document, "g", client=5)
    for _ in range(after):
        scene.end(scene.effects.orders[0])
    match end:
        case "corrupt" | "broken":
            error = CorruptExtent("bad") if end == "corrupt" else StorageFailed("EIO")
            scene.end(scene.end_up_to(ReadIn), error)
            assert type(attach.loading.error) is type(error)
            scene.settle()
            scene.detach(attach)
        case "group":
            scene.service.disconnect(RANKS[0])
            assert isinstance(attach.loading.error, GroupFailed)
            scene.detach(attach)
        case "disconnect":
            scene.service.disconnect(5)
        case "detach":
            scene.detach(attach)
        case "load":
            scene.end(scene.end_up_to(LoadShard), GroupFailed("no"))
            scene.settle()
            scene.detach(attach)
    scene.settle()
    scene.idle()
    assert not scene.state.leases
    if end != "corrupt":
        assert scene.attach(document, "h")


# Ingest from a group ---------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["h", None])
def test_a_document_whose_front_fills_ddr_is_ingested_behind_it(group):
    """What is cached of it is held while it waits for room, but not in DDR."""
    scene = Narrow(ddr=4)
    document = scene.on_nvme(a=tokens(1, 10))
    (attach,) = scene.attach(document, "g")
    scene.settle()
    scene.detach(attach)
    ids = [*tokens(1, 10), *tokens(2, 2)]
    scene.store("longer", ids, group=group)
    scene.service.disconnect(CLIENT)
    scene.settle()
    scene.idle()


def private_bytes(scene):
    """Bytes that open ingests hold, by device."""
    used = {"ddr": 0, "nvme": 0}
    for copies in scene.state.private.values():
        for copy in copies:
            used[copy.device] += copy.size_bytes
    return used


def test_a_document_larger_than_ddr_comes_out_of_a_group_through_a_window():
    """DDR gives no more than the window; what is not in DDR is on NVMe, with its row, before anybody sees it."""
    scene = Narrow(ddr=6)
    resident = scene.store("r", tokens(2, 4))
    ingest, _ = scene.begin("a", tokens(1, 10), group="g")
    scene.settle()
    done = scene.commit(ingest)
    most = 0
    while scene.effects.orders:
        most = max(most, private_bytes(scene)["ddr"])
        assert bool(done) == (ingest.document.id in scene.state.documents)
        scene.end(scene.effects.orders[0])
    assert done == [ingest.document]
    assert most == 2 * EXTENT_BYTES
    assert all(Tier.DDR in tiers for tiers in scene.tiers(resident)), "it took no room from others"
    assert scene.tiers(ingest.document.id) == [{Tier.DDR, Tier.NVME}] * 2 + [{Tier.NVME}] * 8
    assert scene.state.document(ingest.document.id).durable
    assert len(rows(scene)[1]) == 14
    scene.idle()
    (attach,) = scene.attach(ingest.document.id, "g")
    assert attach.loading.phase == "ready", "it is in the group already"


def test_it_is_seen_only_when_the_catalog_has_its_rows():
    """The seals of NVMe copies lie there: nothing could be read before."""
    scene = Narrow()
    ingest, _ = scene.begin("a", tokens(1, 6), group="g")
    scene.settle()
    done = scene.commit(ingest)
    put = scene.end_up_to(Write)
    assert [record.kind for record in put.records] == ["put-extent"] * 4 + ["put-wear"]
    assert not done
    assert not scene.state.documents
    scene.end(put)
    assert done == [ingest.document]


def steps_of(length):
    """How many orders a streamed ingest takes, from its commit on."""
    scene = Narrow()
    ingest, _ = scene.begin("a", tokens(1, length), group="g")
    scene.settle()
    scene.commit(ingest)
    count = 0
    while scene.effects.orders:
        scene.end(scene.effects.orders[0])
        count += 1
    return count


@pytest.mark.parametrize("end", ["abort", "disconnect", "group", "fail"])
def test_a_streamed_ingest_that_ends_early_leaves_nothing(end):
    """After any number of its orders: all bytes of both tiers are free, and the catalog has no row."""
    for after in range(steps_of(6)):
        scene = Narrow()
        ingest, _ = scene.begin("a", tokens(1, 6), group="g")
        scene.settle()
        done = scene.commit(ingest)
        for _ in range(after):
            scene.end(scene.effects.orders[0])
        if done:
            assert after == 6 + 6 + 4 + 1, "saves, seals, writes of what makes place, and one commit of their rows"
            break
        match end:
            case "abort":
                scene.service.abort_ingest(CLIENT, ingest.id)
            case "disconnect":
                scene.service.disconnect(CLIENT)
            case "group":
                scene.service.disconnect(RANKS[1])
            case "fail":
                scene.end(scene.effects.orders[0], StorageFailed("broken"))
        scene.state.check()
        scene.settle()
        assert len(done) == 1
        assert isinstance(done[0], HoldfastError)
        assert not +scene.state.used_bytes(), after
        assert not scene.state.extents
        scene.idle()


def test_a_document_that_no_tier_takes_is_refused_at_once():
    """A memory-only one that DDR cannot hold, and any that NVMe cannot."""
    scene = Narrow(nvme=8)
    with pytest.raises(DocumentTooLarge, match="memory-only"):
        scene.begin("a", tokens(1, 5), WritePolicy.MEMORY, group="g")
    with pytest.raises(DocumentTooLarge, match=r"nvme\.capacity_bytes"):
        scene.begin("a", tokens(1, 9), group="g")
    assert scene.begin("a", tokens(1, 8), group="g")
    assert len(scene.state.private) == 1


def test_a_document_streams_when_ddr_is_leased():
    """One that would fit an empty DDR goes through what is left of it; as memory-only it is refused."""
    scene = Narrow(ddr=8, window=2)
    leased = scene.store("r", tokens(2, 4))
    (attach,) = scene.attach(leased)
    ingest, heard = scene.begin("a", tokens(1, 6), group="g")
    scene.settle()
    assert heard == [ingest]
    assert private_bytes(scene)["ddr"] == 2 * EXTENT_BYTES
    _, refused = scene.begin("b", tokens(3, 6), WritePolicy.MEMORY, group="h")
    assert isinstance(refused[0], NoCapacity)
    done = scene.commit(ingest)
    scene.settle()
    assert done == [ingest.document]
    scene.detach(attach)
    scene.idle()


def test_a_stream_makes_room_on_nvme_after_the_catalog_forgot():
    """Older documents leave for it; what is pinned stays, and then the ingest is refused without a trace."""
    scene = Narrow(ddr=4, nvme=8)
    old = scene.store("old", tokens(2, 4))
    ingest, _ = scene.begin("a", tokens(1, 6), group="g")
    scene.settle()
    done = scene.commit(ingest)
    scene.settle()
    assert done == [ingest.document]
    assert any(Tier.NVME not in tiers for tiers in scene.tiers(old))
    scene.service.pin(ingest.document.id, Tier.NVME, None, "me", "")
    second, _ = scene.begin("b", tokens(3, 8), group="h")
    scene.settle()
    refused = scene.commit(second)
    scene.settle()
    assert isinstance(refused[0], NoCapacity)
    assert DocumentId("t", "b") not in scene.state.documents
    scene.idle()


def test_two_streams_of_one_prefix_share_it():
    """The second to be complete gives its duplicates back, on both tiers; one row is left for each extent."""
    scene = Narrow(ddr=8)
    first, _ = scene.begin("a", tokens(1, 9), group="g")
    second, _ = scene.begin("b", tokens(1, 10), group="h")
    scene.settle()
    heard = scene.commit(first), scene.commit(second)
    scene.settle()
    assert heard == ([first.document], [second.document])
    assert len(scene.state.extents) == 10
    assert scene.state.nvme.used_bytes == 10 * EXTENT_BYTES
    assert all(owner.durable for owner in scene.state.documents.values())
    scene.idle()


def test_only_the_hole_of_a_large_document_is_written_again():
    """What lies behind it is kept."""
    scene = Narrow()
    document = scene.on_nvme(a=tokens(1, 10))
    (attach,) = scene.attach(document, "g")
    scene.end(scene.end_up_to(ReadIn), CorruptExtent("bad"))
    scene.settle()
    scene.detach(attach)
    before = scene.state.nvme.used_bytes
    ingest, _ = scene.begin("a", tokens(1, 10), group="g")
    assert len(ingest.missing) == 1
    scene.settle()
    done = scene.commit(ingest)
    scene.settle()
    assert done == [ingest.document]
    assert scene.state.nvme.used_bytes == before + EXTENT_BYTES
    assert all(Tier.NVME in tiers for tiers in scene.tiers(document))
    scene.idle()


# Holes -----------------------------------------------------------------------------------------------


def test_a_bad_extent_names_its_tokens():
    """The engine is told what to recompute, by the error and, later, by the document; what lies behind is kept."""
    scene = Scene()
    document = scene.store("a", tokens(1, 4))
    scene.evict(document, Tier.DDR)
    (attach,) = scene.attach(document)
    reads = scene.pending(ReadIn)
    scene.end(reads[1], CorruptExtent("bad"))
    assert isinstance(attach.loading.error, CorruptExtent)
    assert attach.loading.error.token_ranges == ((32, 64),)
    scene.end(reads[2], CorruptExtent("bad"))
    scene.end(reads[0], CorruptExtent("bad"))
    scene.settle()
    scene.detach(attach)
    with pytest.raises(DocumentIncomplete, match=r"tokens \[0, 96\) are gone") as refused:
        scene.attach(document)
    assert refused.value.token_ranges == ((0, 96),)
    assert from_code(refused.value.code, refused.value.message).token_ranges == ((0, 96),)
    assert scene.state.ledger.counts["quarantined"] == 3


def test_a_read_that_the_device_refuses_twice_makes_place_for_a_new_copy():
    """Once may be of the moment: nothing is given up. Both times the tokens are named."""
    scene = Scene()
    document = scene.store("a", tokens(1, 3))
    scene.evict(document, Tier.DDR)
    for attempt in (1, 2):
        (attach,) = scene.attach(document)
        scene.end(scene.pending(ReadIn)[1], StorageFailed("EIO"))
        assert isinstance(attach.loading.error, StorageFailed)
        assert attach.loading.error.token_ranges == ((32, 64),)
        scene.settle()
        scene.detach(attach)
        scene.evict(document, Tier.DDR)
        assert scene.state.ledger.counts["quarantined"] == attempt - 1
    ingest, _ = scene.begin("a", tokens(1, 3))
    assert [(extent.start, extent.stop) for extent in ingest.missing] == [(32, 64)]
    scene.commit(ingest)
    scene.settle()
    assert all(Tier.NVME in tiers for tiers in scene.tiers(document))


def test_a_read_that_goes_well_clears_the_first_refusal():
    """Two refusals with a good read between them are two moments."""
    scene = Scene()
    document = scene.store("a", tokens(1, 1))
    for error in (StorageFailed("EIO"), None, StorageFailed("EIO")):
        scene.evict(document, Tier.DDR)
        (attach,) = scene.attach(document)
        scene.end(scene.pending(ReadIn)[0], error)
        scene.settle()
        scene.detach(attach)
    assert not scene.state.ledger.counts["quarantined"]
    assert scene.tiers(document) == [{Tier.NVME}]


@pytest.mark.parametrize("end", ["saved", "failed", "group"])
def test_a_good_copy_is_not_given_up_for_one_that_may_fail(end):
    """An ingest that is complete while the same KV is still being saved out of HBM is kept until that has ended."""
    scene = Scene()
    scene.group()
    document = scene.store("a", tokens(1, 1), WritePolicy.MEMORY)
    (attach,) = scene.attach(document, "g")
    scene.settle()
    scene.detach(attach)
    scene.evict(None, Tier.DDR, EXTENT_BYTES)
    ingest, _ = scene.begin("b", tokens(1, 1), WritePolicy.MEMORY)
    assert ingest.missing
    scene.service.evict(document, Tier.HBM, 0, FAR_NS, [].append)
    (save,) = scene.pending(SaveShard)
    scene.service.commit_ingest(CLIENT, ingest.id, [].append)
    scene.end(scene.pending(Seal)[0])
    assert scene.state.used_bytes()["ddr"] == 2 * EXTENT_BYTES
    if end == "group":
        scene.service.disconnect(RANKS[0])
        scene.state.check()
    scene.end(save, GroupFailed("gone") if end != "saved" else None)
    scene.settle()
    assert scene.state.used_bytes()["ddr"] == EXTENT_BYTES
    assert scene.tiers(ingest.document.id) == [{Tier.DDR}]
    (attach,) = scene.attach(ingest.document.id)
    assert attach.loading.phase == "ready"
    scene.detach(attach)
    scene.service.delete(ingest.document.id)
    scene.service.delete(document)
    scene.settle()
    assert scene.empty()


# Ingest by a client without a group ------------------------------------------------------------------


def hand_over(scene, ingest, count, seals=()):
    """The writer has filled its first `count` slots; returns what it hears of the next ones."""
    filled = [(extent.start, extent.group) for extent in ingest.passage.unsealed[:count]]
    heard = []
    scene.service.next_slots(CLIENT, ingest.id, filled, list(seals), heard.append)
    scene.state.check()
    return heard


def test_a_writer_moves_a_window_over_its_document():
    """It fills slots in the order of the tokens, hands them over and gets the next; DDR holds a window of it."""
    scene = Narrow(ddr=6)
    resident = scene.store("r", tokens(2, 4))
    ingest, heard = scene.begin("a", tokens(1, 9))
    assert heard == [ingest]
    assert [extent.start for extent in ingest.passage.unsealed] == [0, 32]
    with pytest.raises(InvalidRequest, match=r"\[64, 96\) have no slot"):
        scene.commit(ingest)
    seal = bytes(8 * 4)
    given = []
    while ingest.passage.todo:
        (heard,) = (hand_over(scene, ingest, 1, [seal] if len(given) % 2 else []),)
        assert not heard
        scene.settle()
        assert private_bytes(scene)["ddr"] == 2 * EXTENT_BYTES
        given += [extent.start for extent in heard[0][1]]
    assert given == [32 * number for number in range(2, 9)]
    assert hand_over(scene, ingest, 0) == [(ingest, [])], "no extent waits any more"
    done = scene.commit(ingest)
    scene.settle()
    assert done == [ingest.document]
    assert all(Tier.NVME in tiers for tiers in scene.tiers(ingest.document.id))
    assert all(Tier.DDR in tiers for tiers in scene.tiers(resident))
    assert scene.state.document(ingest.document.id).durable
    scene.idle()


def test_only_what_is_filled_can_be_handed_over():
    """Each once, in one question at a time; nothing else is taken for it."""
    scene = Narrow()
    ingest, _ = scene.begin("a", tokens(1, 9))
    for filled, seals in (([(64, 0)], []), ([(0, 1)], []), ([], []), ([(0, 0)], [b"short"]), ([(0, 0)], [b"", b""])):
        with pytest.raises(InvalidRequest):
            scene.service.next_slots(CLIENT, ingest.id, filled, seals, [].append)
    assert not hand_over(scene, ingest, 1)
    with pytest.raises(InUse):
        hand_over(scene, ingest, 1)
    scene.settle()
    with pytest.raises(InvalidRequest, match="token 0"):
        scene.service.next_slots(CLIENT, ingest.id, [(0, 0)], [], [].append)
    with pytest.raises(ClaimNotFound):
        scene.service.next_slots(CLIENT + 1, ingest.id, [(32, 0)], [], [].append)


@pytest.mark.parametrize("end", ["abort", "disconnect", "fail"])
def test_a_window_that_ends_early_leaves_nothing(end):
    """After any number of its orders, and whoever waits for slots hears of it."""
    for after in range(12):
        scene = Narrow()
        ingest, _ = scene.begin("a", tokens(1, 9))
        heard = hand_over(scene, ingest, 2)
        for _ in range(after):
            if not scene.effects.orders:
                heard = hand_over(scene, ingest, 2)
            scene.end(scene.effects.orders[0])
        match end:
            case "abort":
                scene.service.abort_ingest(CLIENT, ingest.id)
            case "disconnect":
                scene.service.disconnect(CLIENT)
            case "fail":
                if not scene.effects.orders:
                    heard = hand_over(scene, ingest, 2)
                scene.end(scene.effects.orders[0], StorageFailed("broken"))
                scene.service.abort_ingest(CLIENT, ingest.id)
        assert len(heard) == 1
        scene.settle()
        assert not +scene.state.used_bytes(), after
        assert not scene.state.extents
        scene.idle()


def test_a_writer_hears_that_slots_of_one_size_are_wanted_no_more():
    """Else it would wait, with slots of the other size in its hands, until its question times out."""
    (group,) = SPEC.groups
    spec = replace(SPEC, groups=(replace(group, layers=(0,)), replace(group, layers=(1,), kv_heads=16)))
    scene = Narrow(ddr=8, window=2, nvme=64)
    fingerprint = scene.service.register_spec(spec)
    ids, name, heard = tokens(1, 12), DocumentId("t", "a"), []
    policy = WritePolicy.THROUGH
    ingest = scene.service.begin_ingest(CLIENT, name, fingerprint, ids, policy, None, 64, FAR_NS, heard.append)
    scene.settle()
    while any(extent.group == 0 for extent in ingest.passage.todo):
        hand_over(scene, ingest, 1)
        scene.settle()
    heard = hand_over(scene, ingest, 1)
    scene.settle()
    assert heard == [(ingest, [])]
    assert ingest.passage.todo
    while ingest.passage.todo:
        (answer,) = (hand_over(scene, ingest, 1),)
        scene.settle()
        assert answer
    done = scene.commit(ingest)
    scene.settle()
    assert done == [ingest.document]


def test_slots_stay_their_writers_until_it_has_heard_of_a_failure():
    """It fills one of them while the other cannot be written out: nobody else gets it before its writer gives up."""
    scene = Narrow()
    ingest, _ = scene.begin("a", tokens(1, 6))
    heard = hand_over(scene, ingest, 1)
    mine = {copy.slot for copy in ingest.filled.values()}
    scene.end(scene.end_up_to(WriteOut), StorageFailed("broken"))
    (error,) = heard
    assert isinstance(error, StorageFailed)
    other, _ = scene.begin("b", tokens(2, 2))
    assert not mine & {copy.slot for copy in other.filled.values()}
    with pytest.raises(StorageFailed):
        hand_over(scene, ingest, 1)
    assert isinstance(scene.commit(ingest)[0], StorageFailed)
    scene.commit(other)
    scene.settle()
    scene.service.delete(other.document.id)
    scene.settle()
    assert scene.empty()


def test_what_is_too_large_for_ddr_is_pinned_below_it_or_softly():
    """A hard pin would keep DDR full for ever, and never be met."""
    scene = Narrow()
    document = scene.on_nvme(a=tokens(1, 6))
    for floor in (Tier.DDR, Tier.HBM):
        with pytest.raises(PinsOvercommitted, match="at nvme, or softly") as refused:
            scene.service.pin(document, floor, None, "me", "")
        assert refused.value.holders == ()
    assert not scene.state.pins.all()
    scene.service.pin(document, Tier.NVME, None, "me", "")
    scene.service.pin(document, Tier.DDR, None, "me", "", PinKind.SOFT)
    scene.settle()
    assert scene.state.pins.get(document).floor is Tier.DDR


# Ranges of tokens ------------------------------------------------------------------------------------


def test_a_range_leases_the_extents_that_hold_it():
    """And no others: what is behind a hole, for one."""
    scene = Narrow()
    document = scene.on_nvme(a=tokens(1, 10))
    with pytest.raises(DocumentTooLarge, match="windows"):
        scene.attach(document)
    (attach,) = scene.attach(document, tokens=(40, 97))
    assert [read.source for read in scene.pending(ReadIn)] == [
        scene.state.extents[extent].nvme.slot for extent in scene.state.documents[document].document.extents[1:4]
    ]
    scene.end(scene.pending(ReadIn)[1], CorruptExtent("bad"))
    scene.settle()
    scene.detach(attach)
    with pytest.raises(DocumentIncomplete, match=r"\[64, 96\)"):
        scene.attach(document, tokens=(32, 96))
    (attach,) = scene.attach(document, tokens=(96, 200))
    scene.settle()
    assert attach.loading.phase == "ready"
    assert attach.loading.swap.token_count == 104
    for bad in ((0, 0), (5, 4), (0, 321), (320, 321)):
        with pytest.raises(InvalidRequest):
            scene.attach(document, tokens=bad)
    with pytest.raises(InvalidRequest, match="group"):
        scene.attach(document, "g", tokens=(0, 32))


@pytest.mark.parametrize("size", [1, 2])
def test_a_window_moves_forward_through_a_ddr_of_two(size):
    """The next range is asked for before the present one is given back; what is behind it leaves, though a front."""
    scene = Narrow(ddr=2 * size)
    document = scene.on_nvme(a=tokens(1, 10))
    present = None
    for start in range(0, 320, 32 * size):
        (attach,) = scene.attach(document, tokens=(start, min(start + 32 * size, 320)))
        scene.settle()
        assert attach.loading.phase == "ready"
        if present is not None:
            scene.detach(present)
        present = attach
    scene.detach(present)
    scene.idle()
