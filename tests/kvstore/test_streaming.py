"""Documents larger than DDR pass through it in windows: scenes with effects that end when the test says so."""

from dataclasses import replace

import pytest
from holdfast.kvstore.errors import (
    CorruptExtent,
    GroupFailed,
    NoCapacity,
    StorageFailed,
)
from holdfast.kvstore.orders import LoadShard, ReadIn
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.service import Service

from fakes import CLIENT, EXTENT_BYTES
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
        self.service.upkeep.restore(*rows(other))
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
        assert not self.service.loader._reading
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
