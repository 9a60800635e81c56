"""The mover, with real threads and files; faults, gates and clocks come in below and beside it. Nothing sleeps."""

from __future__ import annotations

import errno
import os
import random
import threading
from dataclasses import replace
from queue import Empty, SimpleQueue

import pytest
from holdfast.kvstore import mover as module
from holdfast.kvstore.arena import Arena
from holdfast.kvstore.catalog import Catalog
from holdfast.kvstore.clock import SystemClock
from holdfast.kvstore.document import Document, DocumentId, WritePolicy
from holdfast.kvstore.errors import CorruptExtent, Draining, StorageFailed, StorageFull
from holdfast.kvstore.extent import Extent
from holdfast.kvstore.geometry import Geometry
from holdfast.kvstore.mover import COMMIT_WRITES_MAX, Mover, _cut
from holdfast.kvstore.orders import (
    DropDocument,
    Hasten,
    PutDocument,
    PutExtent,
    ReadIn,
    RetireSlab,
    Seal,
    Urgency,
    Write,
    WriteOut,
)
from holdfast.kvstore.segments import Segments, SystemIo
from holdfast.kvstore.slots import Slot
from xxhash import xxh3_64_intdigest

WAIT_SECONDS = 30
PAGE = 4096
MIB = 1 << 20
# One layer is 1 MiB, and pieces are cut to that (see `house`), so every layer is a piece of its own.
GEOMETRY = Geometry(layers=5, heads=4, rows=256, key_bytes=256, value_bytes=768, align=PAGE)
SMALL = Geometry(layers=6, heads=1, rows=3, key_bytes=100, value_bytes=0, align=PAGE)
SLOT_BYTES = GEOMETRY.size_bytes
SLAB_BYTES = 4 * SLOT_BYTES
assert GEOMETRY.layer_bytes == MIB


class Heard:
    """A report that remembers, and can be waited on."""

    def __init__(self):
        self.events = []  # everything, in order
        self.ends = SimpleQueue()
        self.outcomes = {}

    def finished(self, order_id, outcome):
        self.events.append(("finished", order_id))
        self.ends.put((order_id, outcome))

    def advanced(self, order_id, layers):
        self.events.append(("advanced", order_id, layers))

    def crashed(self, error):
        self.events.append(("crashed", error))
        self.ends.put(("crashed", error))

    def outcome(self, order_id):
        """Wait for the order's end, which must come once."""
        while order_id not in self.outcomes:
            ended, outcome = self.ends.get(timeout=WAIT_SECONDS)
            assert ended not in self.outcomes, f"order {ended} is finished twice"
            self.outcomes[ended] = outcome
        return self.outcomes[order_id]

    def layers(self, order_id):
        return [event[2] for event in self.events if event[:2] == ("advanced", order_id)]


class GatedIo(SystemIo):
    """Real I/O that waits at a gate, fails on demand, and remembers the order of its calls."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        self.calls = []
        self.read_errors = []  # one errno per call, 0 lets it pass
        self.write_errors = []
        self.sync_errors = []

    def _pass(self, name, offset, errors):
        self.calls.append((name, offset))
        self.arrived.release()
        assert self.gate.wait(WAIT_SECONDS)
        failure = errors.pop(0) if errors else 0
        if failure:
            raise OSError(failure, os.strerror(failure))

    def pread(self, descriptor, into, offset):
        self._pass("read", offset, self.read_errors)
        return super().pread(descriptor, into, offset)

    def pwrite(self, descriptor, data, offset):
        self._pass("write", offset, self.write_errors)
        return super().pwrite(descriptor, data, offset)

    def fdatasync(self, descriptor):
        self._pass("sync", 0, self.sync_errors)
        super().fdatasync(descriptor)


class House:
    """A mover and all that it works on."""

    def __init__(self, directory):
        self.io = GatedIo()
        self.arena = Arena(directory / "slabs", SLAB_BYTES)
        self.segments = Segments(directory / "nvme", SLAB_BYTES, self.io)
        self.catalog = Catalog(directory / "catalog")
        self.clock = SystemClock()
        self.heard = Heard()
        self.movers = []

    def mover(self, threads=1):
        mover = Mover(self.arena, self.segments, self.catalog, self.clock, threads, self.heard, self.catalog.seal)
        self.movers.append(mover)
        return self.movers[-1]

    def soon(self, seconds=WAIT_SECONDS):
        return self.clock.monotonic_ns() + int(seconds * 1e9)

    def close(self):
        self.io.gate.set()
        for mover in self.movers:
            assert mover.close(self.soon()) == []
        self.movers.clear()
        self.segments.close()
        self.catalog.close()
        self.arena.close()

    def stored(self, index, order_id=1000):
        """Random bytes in NVMe slot `index`, written by the tier itself: (bytes, the order that reads them in)."""
        data = random.Random(index).randbytes(SLOT_BYTES)
        source = Slot(0, index * SLOT_BYTES, SLOT_BYTES)
        self.segments.write(source, 0, memoryview(data))
        self.io.calls.clear()
        return data, self.read_in(order_id, source, Slot(index, 0, SLOT_BYTES), data)

    def read_in(self, order_id, source, target, data, urgency=Urgency.ATTACH, geometry=GEOMETRY):
        """The order that reads `data` in, whose seal the catalog has."""
        extent = self.sealed(f"e{order_id}", source, sums(geometry, data))
        return ReadIn(id=order_id, extent=extent, source=source, target=target, geometry=geometry, urgency=urgency)

    def sealed(self, name, slot, seal):
        """An extent's row in the catalog."""
        extent = Extent(
            id=name,
            tenant="acme",
            fingerprint=b"f" * 16,
            group=0,
            start=0,
            valid_tokens=1,
            previous=None,
            block_keys=bytes(16),
            slot_bytes=slot.size_bytes,
        )
        self.catalog.commit([PutExtent(extent, seal, slot)])
        return name

    def blocked(self, mover):
        """Let the (one) worker stand at the gate, so that what is submitted now queues up."""
        data = bytes(PAGE)
        self.arena.view(Slot(9, 0, PAGE))[:] = data
        while self.io.arrived.acquire(blocking=False):
            pass
        self.io.gate.clear()
        mover.submit(write_out(999, Slot(9, 0, PAGE), Slot(9, 0, PAGE)))
        assert self.io.arrived.acquire(timeout=WAIT_SECONDS)
        self.io.calls.clear()


def sums(geometry, data):
    return b"".join(
        xxh3_64_intdigest(data[at : at + size]).to_bytes(8, "little")
        for _, at, size in geometry.planes(0, geometry.layers)
    )


def write_out(order_id, source, target, urgency=Urgency.DEMOTE):
    return WriteOut(id=order_id, source=source, target=target, size_bytes=source.size_bytes, urgency=urgency)


def document(name):
    return Document(
        id=DocumentId("acme", name),
        fingerprint=b"f" * 16,
        token_count=1,
        extents=(),
        write_policy=WritePolicy.BACK,
        created_wall_ns=1,
    )


def names(catalog):
    return [found.id.name for found in catalog.load().documents]


@pytest.fixture
def house(tmp_path, monkeypatch):
    for name in ("READ_FIRST_BYTES", "READ_BYTES", "WRITE_BYTES"):
        monkeypatch.setattr(module, name, MIB)
    house = House(tmp_path)
    yield house
    house.close()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("geometry", [GEOMETRY, SMALL], ids=["chunked", "in one"])
def test_bytes_go_to_disk_and_back_unchanged(house, threads, geometry):
    mover, heard = house.mover(threads), house.heard
    size = geometry.size_bytes
    here, there, back = Slot(0, 0, size), Slot(1, size, size), Slot(2, size, size)
    data = random.Random(1).randbytes(size)
    house.arena.view(here)[:] = data
    mover.submit(Seal(id=1, slot=here, geometry=geometry))
    sealed = heard.outcome(1)
    assert sealed.checksums == sums(geometry, data)
    assert (sealed.error, sealed.size_bytes) == (None, size)
    mover.submit(write_out(2, here, there))
    written = heard.outcome(2)
    assert (written.error, written.size_bytes) == (None, size)
    order = house.read_in(3, there, back, data, geometry=geometry)
    mover.submit(order)
    read = heard.outcome(3)
    assert (read.error, read.size_bytes) == (None, size)
    assert house.arena.view(back) == data
    assert heard.layers(3) == sorted(set(heard.layers(3)))
    assert heard.layers(3)[-1] == geometry.layers
    assert heard.events[-1] == ("finished", 3)
    assert 0 < read.busy_ns <= threads * read.elapsed_ns


def test_a_layer_is_announced_when_it_has_come_not_before(house):
    data, order = house.stored(0)
    seen = []

    def advanced(order_id, layers):
        front = layers * GEOMETRY.layer_bytes
        seen.append((layers, bytes(house.arena.view(order.target)[:front]) == data[:front]))

    house.heard.advanced = advanced
    house.mover(threads=3).submit(order)
    assert house.heard.outcome(order.id).error is None
    assert [layers for layers, _ in seen] == sorted({layers for layers, _ in seen})
    assert all(is_there for _, is_there in seen)
    assert seen[-1][0] == GEOMETRY.layers


def test_a_gap_holds_progress_back_until_it_closes(house):
    """Layer 0 comes last: nothing is announced before it, everything with it."""
    _, order = house.stored(0)
    first_may_go = threading.Event()
    others_left = threading.Semaphore(0)

    def pread(descriptor, into, offset):
        if offset == 0:
            assert first_may_go.wait(WAIT_SECONDS)
        others_left.release()
        return SystemIo.pread(house.io, descriptor, into, offset)

    house.io.pread = pread
    mover = house.mover(threads=2)
    mover.submit(order)
    for _ in range(GEOMETRY.layers - 1):
        assert others_left.acquire(timeout=WAIT_SECONDS)
    assert house.heard.events == []
    first_may_go.set()
    assert house.heard.outcome(order.id).error is None
    assert house.heard.layers(order.id)[0] >= GEOMETRY.layers - 1
    assert house.heard.layers(order.id)[-1] == GEOMETRY.layers


def test_first_layers_of_all_extents_come_first(house):
    mover = house.mover(threads=1)
    orders = [house.stored(index, order_id=index)[1] for index in range(3)]
    house.blocked(mover)
    for order in orders:
        mover.submit(order)
    house.io.gate.set()
    for order in orders:
        assert house.heard.outcome(order.id).error is None
    events = [event[1:] for event in house.heard.events if event[0] == "advanced"]
    assert events == [(order, layer) for layer in range(1, GEOMETRY.layers + 1) for order in range(3)]


def test_a_read_is_cut_into_whole_planes_short_ones_first():
    cut = _cut(GEOMETRY, MIB, 2 * MIB)
    assert [plane for piece in cut for plane in piece] == GEOMETRY.planes(0, GEOMETRY.layers)
    assert [sum(size for _, _, size in piece) // MIB for piece in cut] == [1, 2, 2]
    large = Geometry(layers=1, heads=1, rows=1, key_bytes=4 * MIB, value_bytes=4 * MIB, align=PAGE)
    assert [len(piece) for piece in _cut(large, MIB, 4 * MIB)] == [1, 1]
    assert len(_cut(SMALL, MIB, MIB)) == 1


def test_a_layer_whose_planes_are_read_apart_counts_when_both_have_come(house, monkeypatch):
    monkeypatch.setattr(module, "READ_FIRST_BYTES", 1)
    monkeypatch.setattr(module, "READ_BYTES", 1)
    _, order = house.stored(0)
    house.mover(threads=1).submit(order)
    assert house.heard.outcome(order.id).error is None
    assert len(house.io.calls) == GEOMETRY.plane_count
    assert house.heard.layers(order.id) == list(range(1, GEOMETRY.layers + 1))


def test_an_attach_overtakes_a_write_that_is_under_way(house):
    """One worker, a write of five pieces: an attach that comes during the first is read before the second."""
    mover, heard = house.mover(threads=1), house.heard
    _, attach = house.stored(0, order_id=1)
    house.arena.view(attach.target)
    house.io.gate.clear()
    while house.io.arrived.acquire(blocking=False):
        pass
    mover.submit(write_out(2, Slot(1, 0, SLOT_BYTES), Slot(0, SLOT_BYTES, SLOT_BYTES), Urgency.WRITE_THROUGH))
    assert house.io.arrived.acquire(timeout=WAIT_SECONDS)
    mover.submit(attach)
    house.io.gate.set()
    assert heard.outcome(1).error is None
    assert heard.outcome(2).error is None
    assert [name for name, _ in house.io.calls] == ["write"] + 5 * ["read"] + 4 * ["write"] + ["sync"]


def test_a_write_makes_progress_under_a_stream_of_attaches(house):
    """Each attach that ends is followed by the next, for as long as the write takes."""
    mover, heard = house.mover(threads=1), house.heard
    data, _ = house.stored(0)
    slots = Slot(0, 0, SLOT_BYTES), Slot(0, 0, SLOT_BYTES)
    orders = [house.read_in(1000 + index, *slots, data) for index in range(60)]
    house.blocked(mover)
    mover.submit(write_out(1, Slot(1, 0, SLOT_BYTES), Slot(0, SLOT_BYTES, SLOT_BYTES), Urgency.WRITE_THROUGH))
    mover.submit(orders.pop())
    remember = heard.finished

    def finished(order_id, outcome):
        remember(order_id, outcome)
        if orders and order_id >= 1000 and 1 not in {event[1] for event in heard.events}:
            mover.submit(orders.pop())
            mover.submit(orders.pop())

    heard.finished = finished
    house.io.gate.set()
    assert heard.outcome(1).error is None
    assert orders, "attaches still came"


def test_writes_that_end_during_a_sync_are_synced_together(house):
    """Two segments, ten writes: one sync of each, besides the one that was under way."""
    _, last = house.stored(2, order_id=50)
    mover, heard = house.mover(threads=3), house.heard
    syncing, go_on = threading.Event(), threading.Event()
    synced = []

    def fdatasync(descriptor):
        synced.append(descriptor)
        syncing.set()
        assert go_on.wait(WAIT_SECONDS)

    house.io.fdatasync = fdatasync
    page = Slot(3, 0, PAGE)
    mover.submit(write_out(0, page, Slot(0, 0, PAGE)))
    assert syncing.wait(WAIT_SECONDS)
    while house.io.arrived.acquire(blocking=False):
        pass
    for index in range(1, 11):
        mover.submit(write_out(index, page, Slot(index % 2, index * PAGE, PAGE)))
    for _ in range(10):
        assert house.io.arrived.acquire(timeout=WAIT_SECONDS)
    mover.submit(replace(last, urgency=Urgency.PREFETCH))  # not for the worker that is kept for attaches
    assert heard.outcome(50).error is None  # the other one is past the writes
    ended = {event[1] for event in heard.events if event[0] == "finished"}
    assert ended == {50}, "nothing is reported before it is synced"
    go_on.set()
    for index in range(11):
        assert heard.outcome(index).error is None
    assert len(synced) == 3


def test_written_through_is_synced_when_nothing_more_is_being_written(house, monkeypatch):
    """Nobody waits for it, so one sync does for all; but a demotion does not wait for others, nor do many bytes."""
    mover, heard = house.mover(threads=6), house.heard
    real, hanging, go_on = house.io.pwrite, threading.Event(), threading.Event()

    def pwrite(descriptor, data, offset):
        if offset == 0:
            hanging.set()
            assert go_on.wait(WAIT_SECONDS)
        return real(descriptor, data, offset)

    house.io.pwrite = pwrite
    page = Slot(3, 0, PAGE)
    mover.submit(write_out(0, page, Slot(0, 0, PAGE), Urgency.WRITE_THROUGH))
    assert hanging.wait(WAIT_SECONDS)
    monkeypatch.setattr(module, "SYNC_BYTES", 2 * PAGE)
    for index in (1, 2):
        mover.submit(write_out(index, page, Slot(0, index * PAGE, PAGE), Urgency.WRITE_THROUGH))
    for index in (1, 2):
        assert heard.outcome(index).error is None
    assert [name for name, _ in house.io.calls].count("sync") == 1, "for both"
    mover.submit(write_out(3, page, Slot(0, 3 * PAGE, PAGE), Urgency.DEMOTE))
    assert heard.outcome(3).error is None
    mover.submit(write_out(4, page, Slot(0, 4 * PAGE, PAGE), Urgency.WRITE_THROUGH))
    assert len(heard.events) == 3
    go_on.set()
    for index in (0, 4):
        assert heard.outcome(index).error is None


def test_a_sync_that_fails_fails_all_that_was_written_by_then(house):
    """Also what another segment got is not touched, and the next write to the failed one is fine."""
    mover, heard = house.mover(threads=1), house.heard
    page = Slot(3, 0, PAGE)
    house.blocked(mover)
    for index in range(4):
        mover.submit(write_out(index, page, Slot(index % 2, index * PAGE, PAGE)))
    mover.submit(write_out(4, page, Slot(9, PAGE, PAGE), Urgency.WRITE_THROUGH))
    house.io.sync_errors = [0, errno.EIO]  # of segment 9, then of segment 0
    house.io.gate.set()
    errors = [heard.outcome(index).error for index in range(5)]
    assert heard.outcome(999).error is None
    assert [isinstance(error, StorageFailed) for error in errors] == [True, False, True, False, False]
    assert "segment-0: syncing: EIO" in errors[0].message
    mover.submit(write_out(5, page, Slot(0, 0, PAGE)))
    assert heard.outcome(5).error is None


def test_a_write_that_was_under_way_while_a_sync_failed_is_not_believed(house):
    """The kernel reports a lost write once; the sync after that says nothing of what came before."""
    mover, heard = house.mover(threads=3), house.heard
    page = Slot(3, 0, PAGE)
    syncing, go_on = threading.Event(), threading.Event()

    def fdatasync(descriptor):
        first = not syncing.is_set()
        syncing.set()
        if first:
            assert go_on.wait(WAIT_SECONDS)
            raise OSError(errno.EIO, "lost")

    house.io.fdatasync = fdatasync
    mover.submit(write_out(1, page, Slot(0, 0, PAGE)))
    assert syncing.wait(WAIT_SECONDS)
    mover.submit(write_out(2, page, Slot(0, PAGE, PAGE)))
    mover.submit(write_out(3, page, Slot(1, PAGE, PAGE)))
    mover.submit(Seal(id=4, slot=Slot(3, 0, SMALL.size_bytes), geometry=SMALL))
    for _ in range(3):
        assert house.io.arrived.acquire(timeout=WAIT_SECONDS)
    go_on.set()
    assert "EIO" in heard.outcome(1).error.message
    assert "a sync failed during the write" in heard.outcome(2).error.message
    assert heard.outcome(3).error is None


def test_bytes_written_are_counted_exactly_also_of_a_write_that_failed(house):
    """Half of the second piece had come when the device was full."""
    real, calls = house.io.pwrite, []

    def pwrite(descriptor, data, offset):
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: MIB // 2] if len(calls) == 2 else data, offset)

    house.io.pwrite = pwrite
    house.mover(threads=1).submit(write_out(1, Slot(0, 0, SLOT_BYTES), Slot(0, 0, SLOT_BYTES)))
    outcome = house.heard.outcome(1)
    assert isinstance(outcome.error, StorageFull)
    assert outcome.size_bytes == MIB + MIB // 2
    assert len(calls) == 3, "the other pieces are not written"
    assert [name for name, _ in house.io.calls] == ["write", "write"], "nor is anything synced"


def test_a_disk_that_hangs_keeps_only_who_asked_it(house):
    """A write to segment 1 hangs: reads of segment 0 and commits go on, and `close` names the thread."""
    mover, heard = house.mover(threads=2), house.heard
    _, order = house.stored(0, order_id=1)
    real, hanging, repaired = house.io.pwrite, threading.Event(), threading.Event()

    def pwrite(descriptor, data, offset):
        hanging.set()
        assert repaired.wait(WAIT_SECONDS)
        return real(descriptor, data, offset)

    house.io.pwrite = pwrite
    mover.submit(write_out(2, Slot(2, 0, PAGE), Slot(1, 0, PAGE)))
    assert hanging.wait(WAIT_SECONDS)
    mover.submit(order)
    mover.submit(Write(id=3, records=(PutDocument(document("a")),)))
    assert heard.outcome(1).error is None
    assert heard.outcome(3).error is None
    (stuck,) = mover.close(house.soon(0.05))
    assert stuck in ("holdfast-mover-0", "holdfast-mover-1")
    repaired.set()
    assert mover.close(house.soon()) == []
    assert heard.outcome(2).error is None, "what had begun ends well, synced"


def test_a_sync_that_hangs_keeps_one_worker(house):
    mover, heard = house.mover(threads=2), house.heard
    _, order = house.stored(0, order_id=1)
    hanging, repaired = threading.Event(), threading.Event()

    def fdatasync(descriptor):
        hanging.set()
        assert repaired.wait(WAIT_SECONDS)

    house.io.fdatasync = fdatasync
    mover.submit(write_out(2, Slot(2, 0, PAGE), Slot(1, 0, PAGE)))
    assert hanging.wait(WAIT_SECONDS)
    for index in range(3, 6):
        mover.submit(write_out(index, Slot(2, 0, PAGE), Slot(1, index * PAGE, PAGE)))
    mover.submit(order)
    assert heard.outcome(1).error is None
    repaired.set()
    for index in range(2, 6):
        assert heard.outcome(index).error is None


def test_who_waits_goes_first(house):
    mover, heard = house.mover(threads=1), house.heard
    _, attach = house.stored(0, order_id=1)
    data, _ = house.stored(1)
    prefetch = house.read_in(2, Slot(0, SLOT_BYTES, SLOT_BYTES), Slot(1, 0, SLOT_BYTES), data, Urgency.PREFETCH)
    house.blocked(mover)
    page, seal = Slot(2, 0, PAGE), Slot(2, 0, SMALL.size_bytes)
    mover.submit(write_out(3, page, Slot(2, 0, PAGE), Urgency.WRITE_THROUGH))
    mover.submit(prefetch)
    mover.submit(write_out(4, page, Slot(2, PAGE, PAGE), Urgency.DEMOTE))
    mover.submit(attach)
    mover.submit(Seal(id=5, slot=seal, geometry=SMALL))
    house.io.gate.set()
    for order_id in (1, 2, 3, 4, 5):
        assert heard.outcome(order_id).error is None
    assert [event[1] for event in heard.events if event[0] == "finished"] == [5, 1, 999, 4, 2, 3], (
        "what was under way is synced when no attach waits any more"
    )


def test_a_read_that_is_waited_for_by_now_goes_before_others(house):
    mover, heard = house.mover(threads=1), house.heard
    datas = [house.stored(number)[0] for number in range(2)]
    reads = [
        house.read_in(
            1 + number,
            Slot(0, number * SLOT_BYTES, SLOT_BYTES),
            Slot(1, number * SLOT_BYTES, SLOT_BYTES),
            data,
            Urgency.PREFETCH,
        )
        for number, data in enumerate(datas)
    ]
    house.blocked(mover)
    for read in reads:
        mover.submit(read)
    mover.submit(Hasten(reads=frozenset({2, 77})))
    house.io.gate.set()
    for order_id in (1, 2):
        assert heard.outcome(order_id).error is None
    assert [event[1] for event in heard.events if event[0] == "finished" and event[1] in (1, 2)] == [2, 1]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_flipped_byte_is_found_and_said_once(house, threads, layer):
    _, order = house.stored(1)
    at = order.source.offset + GEOMETRY.plane_offset(layer, 1) + 77
    flip(house, at)
    house.mover(threads).submit(order)
    outcome = house.heard.outcome(order.id)
    assert isinstance(outcome.error, CorruptExtent)
    plane = layer * 2 + 1
    where = f"segment 0, offset {order.source.offset + GEOMETRY.plane_offset(layer, 1)}, plane {plane}:"
    assert outcome.error.message.startswith(where)
    assert house.catalog.seal(order.extent)[8 * plane : 8 * plane + 8].hex() in outcome.error.message
    assert all(layers <= layer for layers in house.heard.layers(order.id))
    house.close()
    assert house.heard.events.count(("finished", order.id)) == 1
    assert house.heard.ends.empty()
    if threads == 1:
        assert len(house.io.calls) == layer + 1, "the rest is not read"


def flip(house, at):
    path = house.segments.directory / "segment-0"
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_two_errors_are_one_outcome(house):
    _, order = house.stored(0)
    mover = house.mover(threads=2)
    house.io.read_errors = [errno.EIO, errno.EIO]
    house.io.gate.clear()
    while house.io.arrived.acquire(blocking=False):
        pass
    mover.submit(order)
    for _ in range(2):
        assert house.io.arrived.acquire(timeout=WAIT_SECONDS)
    house.io.gate.set()
    assert isinstance(house.heard.outcome(order.id).error, StorageFailed)
    house.close()
    assert house.heard.events == [("finished", order.id)]
    assert len(house.io.calls) <= 3


def test_a_disk_that_says_no_is_an_outcome_and_the_mover_goes_on(house):
    data, order = house.stored(0, order_id=1)
    mover, heard = house.mover(), house.heard
    house.io.read_errors = [0, errno.EIO]
    mover.submit(order)
    outcome = heard.outcome(1)
    assert isinstance(outcome.error, StorageFailed)
    assert "EIO" in outcome.error.message
    assert heard.layers(1) == [1]
    house.io.write_errors = [errno.ENOSPC]
    mover.submit(write_out(2, order.target, Slot(0, SLOT_BYTES, SLOT_BYTES)))
    assert "ENOSPC" in heard.outcome(2).error.message
    mover.submit(house.read_in(3, order.source, order.target, data))
    assert heard.outcome(3).error is None


def test_a_missing_segment_and_a_full_arena_are_outcomes(house, monkeypatch):
    data, order = house.stored(0, order_id=1)
    mover, heard = house.mover(), house.heard
    mover.submit(house.read_in(2, Slot(5, 0, SLOT_BYTES), order.target, data))
    assert "ENOENT" in heard.outcome(2).error.message

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    mover.submit(house.read_in(3, order.source, Slot(8, 0, SLOT_BYTES), data))
    assert isinstance(heard.outcome(3).error, StorageFailed)


def test_writes_that_queue_up_are_committed_together_and_in_order(house, monkeypatch):
    batches = []
    gate, arrived = threading.Event(), threading.Event()
    commit = house.catalog.commit

    def gated(records):
        arrived.set()
        assert gate.wait(WAIT_SECONDS)
        batches.append(len(records))
        commit(records)

    monkeypatch.setattr(house.catalog, "commit", gated)
    mover, heard = house.mover(), house.heard
    mover.submit(Write(id=0, records=(PutDocument(document("first")),)))
    assert arrived.wait(WAIT_SECONDS)
    for order_id in range(1, COMMIT_WRITES_MAX + 11):
        name = str(order_id % 7)
        put, drop = PutDocument(document(name)), DropDocument("acme", name)
        mover.submit(Write(id=order_id, records=(drop, put) if order_id % 2 else (put, drop)))
    last = order_id
    gate.set()
    assert heard.outcome(last).error is None
    assert batches == [1, 2 * COMMIT_WRITES_MAX, 20]
    assert [event[1] for event in heard.events] == list(range(last + 1))
    kept = [str(number) for number in range(7) if next(i for i in range(last, 0, -1) if i % 7 == number) % 2]
    assert names(house.catalog) == sorted([*kept, "first"])


def test_a_write_is_durable_when_it_is_reported(house):
    house.mover().submit(Write(id=1, records=(PutDocument(document("a")),)))
    assert house.heard.outcome(1).error is None
    other = Catalog(house.catalog.path)
    assert names(other) == ["a"]
    other.close()


def test_a_commit_that_fails_fails_its_writes(house, monkeypatch):
    def full(records):
        raise StorageFailed("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(house.catalog, "commit", full)
        mover = house.mover()
        mover.submit(Write(id=1, records=()))
        assert isinstance(house.heard.outcome(1).error, StorageFailed)
    mover.submit(Write(id=2, records=()))
    assert house.heard.outcome(2).error is None


def test_commits_do_not_wait_for_the_disk(house):
    mover = house.mover(threads=1)
    house.blocked(mover)
    mover.submit(Write(id=1, records=(PutDocument(document("a")),)))
    assert house.heard.outcome(1).error is None
    assert house.heard.events == [("finished", 1)]


def test_retire_gives_the_slab_new_memory_at_once(house):
    mover = house.mover()
    slot = Slot(0, 0, PAGE)
    house.arena.view(slot)[:6] = b"secret"
    serial = house.arena.serial(0)
    house.blocked(mover)  # no worker needs to be free
    mover.submit(RetireSlab(slab=0))
    assert house.arena.serial(0) != serial
    assert house.arena.view(slot)[:6] == bytes(6)
    house.io.gate.set()
    house.heard.outcome(999)
    mover.submit(write_out(1, slot, slot, Urgency.WRITE_THROUGH))  # behind the sweep
    assert house.heard.outcome(1).error is None
    assert house.arena._retired == []


def test_the_memory_of_a_retired_slab_is_made_by_a_worker(house):
    mover = house.mover()
    house.arena.make(0)
    house.blocked(mover)
    mover.submit(RetireSlab(slab=0))
    name = f"slab-0-{house.arena.serial(0)}"
    assert name not in {path.name for path in house.arena.directory.iterdir()}
    house.io.gate.set()
    house.heard.outcome(999)
    mover.submit(write_out(1, Slot(5, 0, PAGE), Slot(0, 0, PAGE), Urgency.WRITE_THROUGH))  # behind it
    assert house.heard.outcome(1).error is None
    assert name in {path.name for path in house.arena.directory.iterdir()}


@pytest.mark.parametrize("kind", ["seal", "read", "write"])
def test_retiring_a_slab_in_use_is_our_bug(house, kind):
    mover = house.mover()
    _, order = house.stored(0, order_id=1)
    slab = order.target.slab
    house.blocked(mover)
    orders = {
        "seal": Seal(id=1, slot=order.target, geometry=GEOMETRY),
        "read": order,
        "write": write_out(1, order.target, order.source),
    }
    mover.submit(orders[kind])
    with pytest.raises(AssertionError, match=f"slab {slab}"):
        mover.submit(RetireSlab(slab=slab))
    house.io.gate.set()
    house.heard.outcome(1)
    mover.submit(RetireSlab(slab=slab))


def test_the_report_may_submit(house):
    """A service on the same thread is called back through the loop, but nothing forbids less."""
    mover, heard = house.mover(), house.heard
    _, order = house.stored(0, order_id=1)
    heard.advanced = lambda order_id, layers: mover.submit(Write(id=100 + layers, records=()))
    mover.submit(order)
    for order_id in (1, *range(101, 101 + GEOMETRY.layers)):
        assert heard.outcome(order_id).error is None


def test_close_commits_queued_writes_and_refuses_queued_moves(house):
    mover, heard = house.mover(threads=1), house.heard
    _, order = house.stored(0, order_id=1)
    house.blocked(mover)
    mover.submit(order)
    for order_id in range(10, 30):
        mover.submit(Write(id=order_id, records=(PutDocument(document(str(order_id))),)))
    assert "holdfast-mover-0" in mover.close(house.soon(0.01)), "it stands at the gate, and is not waited for"
    assert all(heard.outcome(order_id).error is None for order_id in range(10, 30))
    assert names(house.catalog) == [str(order_id) for order_id in range(10, 30)]
    house.io.gate.set()
    assert mover.close(house.soon()) == []
    assert isinstance(heard.outcome(1).error, Draining)
    assert heard.outcome(999).error is None, "what had begun ends well"
    assert heard.layers(1) == []


def test_after_close_orders_are_dropped(house):
    mover = house.mover()
    assert mover.close(house.soon()) == []
    mover.submit(Write(id=1, records=(PutDocument(document("late")),)))
    assert names(house.catalog) == []
    with pytest.raises(Empty):
        house.heard.ends.get(block=False)


def test_a_bug_of_ours_is_reported_and_ends_everything(house, monkeypatch):
    def broken(slot):
        raise ZeroDivisionError("our bug")

    mover, heard = house.mover(threads=3), house.heard
    monkeypatch.setattr(house.arena, "view", broken)
    mover.submit(Seal(id=1, slot=Slot(0, 0, SLOT_BYTES), geometry=SMALL))
    assert isinstance(heard.outcome("crashed"), ZeroDivisionError)
    assert mover.close(house.soon()) == []
    mover.submit(Write(id=2, records=()))
    assert [event[0] for event in heard.events] == ["crashed"]


def test_a_bug_in_the_catalog_thread_is_reported_too(house, monkeypatch):
    def broken(records):
        raise ZeroDivisionError("our bug")

    monkeypatch.setattr(house.catalog, "commit", broken)
    mover = house.mover(threads=2)
    mover.submit(Write(id=1, records=()))
    assert isinstance(house.heard.outcome("crashed"), ZeroDivisionError)
    assert mover.close(house.soon()) == []


def test_after_a_bug_nothing_queued_is_committed(house, monkeypatch):
    gate, arrived = threading.Event(), threading.Event()
    commit = house.catalog.commit

    def gated(records):
        arrived.set()
        assert gate.wait(WAIT_SECONDS)
        commit(records)

    def broken(slot):
        raise ZeroDivisionError("our bug")

    monkeypatch.setattr(house.catalog, "commit", gated)
    monkeypatch.setattr(house.arena, "view", broken)
    mover = house.mover()
    mover.submit(Write(id=1, records=(PutDocument(document("begun")),)))
    assert arrived.wait(WAIT_SECONDS)
    mover.submit(Write(id=2, records=(PutDocument(document("queued")),)))
    mover.submit(Seal(id=3, slot=Slot(0, 0, SLOT_BYTES), geometry=SMALL))
    house.heard.outcome("crashed")
    gate.set()
    assert mover.close(house.soon()) == []
    assert names(house.catalog) == ["begun"]


def test_the_first_error_counts(house):
    """Layer 0 fails with EIO after layer 1 has failed with ENOSPC."""
    _, order = house.stored(0)
    second_failed = threading.Event()

    def pread(descriptor, into, offset):
        if offset == 0:
            assert second_failed.wait(WAIT_SECONDS)
            raise OSError(errno.EIO, "late")
        raise OSError(errno.ENOSPC, "early")

    house.io.pread = pread
    mover = house.mover(threads=2)
    mover.submit(order)
    mover.submit(write_out(2, Slot(1, 0, PAGE), Slot(1, 0, PAGE), Urgency.WRITE_THROUGH))
    assert house.heard.outcome(2).error is None  # the second thread is past all other layers
    second_failed.set()
    assert "ENOSPC" in house.heard.outcome(order.id).error.message


@pytest.mark.parametrize("seal", [None, b"", bytes(8)])
def test_a_seal_that_is_missing_or_too_short_is_an_outcome(house, seal):
    _, order = house.stored(0)
    if seal is None:
        order = replace(order, extent="nobody")
    else:
        house.sealed(order.extent, order.source, seal)
    house.mover().submit(order)
    outcome = house.heard.outcome(order.id)
    assert isinstance(outcome.error, StorageFailed if seal is None else CorruptExtent)
    assert not house.heard.layers(order.id)


def test_threads_have_names_and_do_not_keep_the_process_alive(house):
    before = set(threading.enumerate())
    house.mover(threads=2)
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} == {"holdfast-mover-0", "holdfast-mover-1", "holdfast-catalog"}
    assert all(thread.daemon for thread in started)


def test_orders_that_do_not_fit_are_our_bug(house):
    mover = house.mover()
    whole, small = Slot(0, 0, SLOT_BYTES), Slot(0, 0, PAGE)
    good = house.read_in(1, whole, whole, bytes(SLOT_BYTES))
    for order in (
        replace(good, source=small),
        replace(good, target=small),
        Seal(id=1, slot=small, geometry=SMALL),
        write_out(1, whole, small),
    ):
        with pytest.raises(AssertionError):
            mover.submit(order)
    mover.submit(RetireSlab(slab=0))  # none of them uses it


@pytest.mark.parametrize("threads", [1, 3])
def test_many_orders_at_once_all_end_once_and_bit_exact(house, threads):
    mover, heard = house.mover(threads), house.heard
    chosen = random.Random(7)
    contents = {}
    for index in range(40):
        slot = Slot(index % 4, index // 4 * PAGE * 8, PAGE * 8)
        data = chosen.randbytes(SMALL.size_bytes)
        house.arena.view(slot)[: len(data)] = data
        contents[index] = (slot, data)
        mover.submit(Seal(id=index, slot=slot, geometry=SMALL))
        mover.submit(write_out(100 + index, slot, slot, chosen.choice(list(Urgency))))
        mover.submit(Write(id=200 + index, records=(PutDocument(document(str(index))),)))
    ends = {base + index: heard.outcome(base + index) for base in (0, 100, 200) for index in range(40)}
    assert all(outcome.error is None for outcome in ends.values())
    for index, (slot, _) in contents.items():
        target = slot._replace(slab=slot.slab + 10)
        house.sealed(f"e{index}", slot, ends[index].checksums)
        urgency = chosen.choice(list(Urgency))
        mover.submit(
            ReadIn(id=300 + index, extent=f"e{index}", source=slot, target=target, geometry=SMALL, urgency=urgency)
        )
    for index, (slot, data) in contents.items():
        assert heard.outcome(300 + index).error is None
        back = house.arena.view(slot._replace(slab=slot.slab + 10))
        assert back[: len(data)] == data
    assert len(names(house.catalog)) == 40
