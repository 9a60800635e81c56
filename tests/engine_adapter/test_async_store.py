"""The asyncio twin: the same documents; whoever is cancelled gives back what it holds, and what it would have got."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.async_store import (
    AsyncAttachment,
    AsyncObjects,
    AsyncStore,
    AsyncWriter,
    connect_async,
)
from holdfast.engine_adapter.attachment import Attachment
from holdfast.engine_adapter.objects import Objects
from holdfast.engine_adapter.writer import IngestWriter
from holdfast.kvstore.client import Client
from holdfast.kvstore.errors import DaemonUnavailable, DocumentNotFound, InvalidRequest
from holdfast.kvstore.spec import KVSpec, LayerGroup

from daemon_process import DaemonProcess, until

GROUP = LayerGroup(layers=(0, 1, 2), kv_heads=2, key_dim=8, value_dim=4)
SPEC = KVSpec(groups=(GROUP,), dtype="float32", model="m", vocabulary_size=9999, block_tokens=16, extent_blocks=2)
COUNT = 200


@pytest.fixture(scope="module")
def daemon():
    sizes = {"ddr__slab_bytes": "64 KiB", "ddr__capacity_bytes": "16 MiB", "nvme__capacity_bytes": "16 MiB"}
    with DaemonProcess(**sizes, nvme__segment_bytes="256 KiB") as process:
        yield process.start()


@pytest.fixture
async def store(daemon):
    async with connect_async(daemon.socket) as opened:
        yield opened
        for document in await opened.documents():
            await opened.delete(document.name)


@pytest.fixture
def gate(monkeypatch):
    """Attaches wait in the client until the gate is opened; `leases` are those that were made."""
    found = Gate()
    inner = Client.attach

    def attach(client, name, **options):
        found.reached.set()
        assert found.opened.wait(20)
        attached = inner(client, name, **options)
        found.leases.append(attached.lease)
        return attached

    def detach(client, lease):
        found.left.append(threading.current_thread().name)
        return leave(client, lease)

    leave = Client.detach
    monkeypatch.setattr(Client, "detach", detach)
    found.close = lambda: monkeypatch.setattr(Client, "attach", attach)
    yield found
    found.opened.set()


class Gate:
    def __init__(self):
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.leases = []
        self.left = []  # the threads that gave one back


def made(seed):
    rng = np.random.default_rng(seed)
    return {
        layer: tuple(rng.standard_normal((2, COUNT, dim), dtype=np.float32) for dim in (8, 4)) for layer in GROUP.layers
    }


def tokens(seed):
    return np.random.default_rng(seed).integers(0, 9999, COUNT)


async def put(store, name, seed):
    kv = made(seed)
    async with store.ingest(name, SPEC, tokens(seed)) as writer:
        for start, stop in writer.missing:
            for layer, (key, value) in kv.items():
                await writer.write(layer, start, key[:, start:stop], value[:, start:stop])
    return kv


async def read(store, name):
    async with store.attach(name, spec=SPEC) as document:
        assert document.spec == SPEC
        assert document.tokens == (0, document.token_count)
        return {layer.index: layer.gathered() async for layer in document.layers()}


async def test_many_at_once(daemon, store):
    names = [f"doc {seed}" for seed in range(20)]
    written = await asyncio.gather(*(put(store, name, seed) for seed, name in enumerate(names)))
    found = await asyncio.gather(*(read(store, name) for name in names))
    for theirs, ours in zip(found, written, strict=True):
        assert list(theirs) == [0, 1, 2]
        assert all(np.array_equal(a, b) for layer in ours for a, b in zip(theirs[layer], ours[layer], strict=True))
    assert [view.name for view in await store.documents()] == sorted(names)
    assert await asyncio.to_thread(daemon.leases) == []
    assert sum(thread.name.startswith("holdfast-") for thread in threading.enumerate()) <= 3 * 8 + 20


async def test_a_prefix_is_found_by_tokens(store):
    kv = await put(store, "report", 1)
    asked = np.concatenate([tokens(1)[:100], tokens(2)])
    assert (await store.lookup(SPEC, asked)).token_count == 96
    async with store.attach_prefix(SPEC, asked) as prefix:
        assert prefix.tokens == (0, 96)
        async for layer in prefix.layers():
            assert np.array_equal(layer.gathered()[0], kv[layer.index][0][:, :96])


async def test_claims_and_refusals_are_the_synchronous_ones(store):
    await put(store, "report", 1)
    assert (await store.pin("report", "ddr", owner="me")).owner == "me"
    assert [pin.owner for pin in await store.pins()] == ["me"]
    await store.unpin("report")
    assert (await store.prefetch("report")).queries == 1
    assert (await store.document("report")).token_count == COUNT
    assert {view.tier for view in await store.tiers()} >= {"ddr", "nvme"}
    with pytest.raises(DocumentNotFound):
        await store.document("nothing")
    with pytest.raises(DocumentNotFound):
        async with store.attach("nothing"):
            pass
    with pytest.raises(InvalidRequest, match="one row"):
        async with store.ingest("b", SPEC, np.ones((2, 3), int)):
            pass
    assert AsyncStore.pin.__doc__.startswith("Keep a document")


async def test_objects(daemon, store):
    objects = store.objects("things")
    items = [(f"key {number}".encode(), bytes([number]) * 1000) for number in range(10)]
    assert [result.status for result in await objects.put(items)] == ["stored"] * 10
    async with objects.get([b"key 3", b"nothing"]) as (found, missing):
        assert bytes(found) == items[3][1]
        assert missing is None
    into = bytearray(1000)
    assert await objects.load_into([b"key 9"], [into]) == [True]
    assert bytes(into) == items[9][1]
    await objects.touch([b"key 1"])
    assert await objects.find([b"key 1", b"nothing"]) == ["ddr", None]
    listed = objects.keys()
    assert [key async for key, _ in listed] == [key for key, _ in items]
    assert (await objects.stats()).objects == 10
    assert await objects.delete([key for key, _ in items]) == [True] * 10
    assert await asyncio.to_thread(daemon.leases) == []


def test_nothing_of_the_synchronous_api_is_missing():
    """But what ends with a block here, and `windows`, which reads ahead of its reader."""
    twins = {Store: AsyncStore, Objects: AsyncObjects, Attachment: AsyncAttachment, IngestWriter: AsyncWriter}
    inside = {"close", "detach", "windows", "check_complete", "seals", "release"}
    for sync, twin in twins.items():
        public = {name for name in vars(sync) if not name.startswith("_")}
        assert public - inside <= set(vars(twin)), sync


async def test_an_error_inside_an_ingest_leaves_no_trace(daemon, store):
    with pytest.raises(ZeroDivisionError):
        async with store.ingest("a", SPEC, tokens(1)):
            raise ZeroDivisionError
    with pytest.raises(InvalidRequest, match="never written"):
        async with store.ingest("a", SPEC, tokens(1)):
            pass
    assert await store.documents() == []


async def test_a_task_that_is_cancelled_inside_gives_back_what_it_holds(daemon, store):
    await put(store, "report", 1)
    inside = asyncio.Event()

    async def holds(context):
        async with context:
            inside.set()
            await asyncio.Event().wait()

    for context in (store.attach("report"), store.ingest("other", SPEC, tokens(2))):
        inside.clear()
        task = asyncio.create_task(holds(context))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(daemon.leases) == []
    assert [view.name for view in await store.documents()] == ["report"]


async def test_slots_are_given_back_when_nobody_copies_into_them_any_more(store, monkeypatch):
    """The thread goes on copying: whoever got the slots meanwhile would have its bytes."""
    inside, go_on, order = threading.Event(), threading.Event(), []
    abort = Client.abort_ingest

    def aborts(client, ingest):
        order.append("given back")
        abort(client, ingest)

    def fill(_first, view):
        inside.set()
        assert go_on.wait(20)
        view.fill(7)
        order.append("copied")

    monkeypatch.setattr(Client, "abort_ingest", aborts)
    spec = replace(SPEC, page_format="vllm-cpu-vec/1:tokens=16")

    async def writes():
        async with store.ingest("pages", spec, tokens(1)[:32]) as writer:
            await writer.write_pages(0, 0, 1, fill)

    task = asyncio.create_task(writes())
    await asyncio.to_thread(inside.wait, 20)
    task.cancel()
    await asyncio.wait([task], timeout=0.2)  # a slot that is given back too early is given back by then
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["copied", "given back"]


async def test_a_task_that_is_cancelled_while_it_waits_gives_back_what_it_gets(daemon, store, gate):
    await put(store, "report", 1)
    gate.close()
    task = asyncio.create_task(read(store, "report"))
    await asyncio.to_thread(gate.reached.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    await asyncio.to_thread(until, lambda: gate.leases and not daemon.leases(), "the lease is given back")
    assert gate.left[0].startswith("holdfast-leave")  # not whenever garbage is collected


async def test_so_does_one_whose_connection_is_closed_meanwhile(daemon, gate):
    async def reads():
        async with connect_async(daemon.socket) as store:
            await put(store, "report", 1)
            gate.close()
            await read(store, "report")

    task = asyncio.create_task(reads())
    await asyncio.to_thread(gate.reached.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    await asyncio.to_thread(until, lambda: not daemon.leases(), "nothing is held")


async def test_who_leaves_is_never_queued_behind_who_waits(daemon, gate):
    """One thread, and it waits."""
    async with connect_async(daemon.socket, threads=1) as store:
        await put(store, "report", 1)
        async with store.attach("report") as document:
            gate.close()
            waiting = asyncio.create_task(read(store, "report"))
            await asyncio.to_thread(gate.reached.wait, 20)
            assert [layer.index async for layer in document.layers()] == [0, 1, 2]
        assert await asyncio.to_thread(daemon.leases) == []
        gate.opened.set()
        assert list(await waiting) == [0, 1, 2]
        await store.delete("report")


async def test_what_outlives_its_connection_is_told(daemon):
    async with connect_async(daemon.socket) as store:
        await put(store, "report", 1)
        left = store.attach("report")
        document = await left.__aenter__()
    with pytest.raises(DaemonUnavailable, match="closed"):
        await store.documents()
    with pytest.raises(DaemonUnavailable, match="closed"):
        _ = [layer async for layer in document.layers()]
    await left.__aexit__(None, None, None)
    async with connect_async(daemon.socket) as store:
        assert await asyncio.to_thread(daemon.leases) == []
        await store.delete("report")


async def test_without_a_daemon(tmp_path):
    with pytest.raises(DaemonUnavailable):
        async with connect_async(tmp_path / "nothing.sock"):
            pass
