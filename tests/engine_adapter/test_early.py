"""Clients hand over what is complete while they write on; real daemons write it to NVMe, and are killed on the way."""

import numpy as np
import pytest
from holdfast.engine_adapter import writer as writer_module
from holdfast.engine_adapter.api import connect
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import DocumentNotFound, HoldfastError, InvalidRequest
from holdfast.kvstore.spec import KVSpec, LayerGroup

from daemon_process import DaemonProcess, until

SPEC = KVSpec(
    groups=(
        LayerGroup(layers=(0, 2), kv_heads=1, key_dim=8, value_dim=8),
        LayerGroup(layers=(1,), kv_heads=2, key_dim=8, value_dim=4),
    ),
    dtype="float32",
    model="two-groups@1",
    vocabulary_size=1000,
    block_tokens=16,
    extent_blocks=2,
)
LAYERS = {0: SPEC.groups[0], 1: SPEC.groups[1], 2: SPEC.groups[0]}
TOKENS = 1999
ROOM = {"ddr__capacity_bytes": "8 MiB", "nvme__capacity_bytes": "16 MiB", "nvme__backlog_bytes": "4 MiB"}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(writer_module, "EARLY_BATCH_BYTES", 256 << 10)


@pytest.fixture
def daemon():
    with DaemonProcess(**ROOM) as found:
        yield found.start()


def ids(seed):
    return np.random.default_rng(seed).integers(0, 1000, TOKENS, dtype=np.uint32)


def kv(seed):
    """Key and value by layer."""
    rng = np.random.default_rng(seed)
    return {
        layer: tuple(
            rng.standard_normal((group.kv_heads, TOKENS, dim), dtype=np.float32)
            for dim in (group.key_dim, group.value_dim)
        )
        for layer, group in LAYERS.items()
    }


def write(writer, seed, start=0, stop=TOKENS, step=100):
    arrays = kv(seed)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        for layer, (key, value) in arrays.items():
            writer.write(layer, first, key[:, first:last], value[:, first:last])


def check(store, name, seed):
    arrays = kv(seed)
    with store.attach(name, spec=SPEC) as attachment:
        for layer in attachment.layers():
            for found, wanted in zip(layer.gathered(), arrays[layer.index], strict=True):
                assert np.array_equal(found, wanted)
            del layer


def findings(daemon):
    found = daemon.rest().post("/v1/check", {"data": True, "deadline_seconds": 20})
    assert found["state"] == "done"
    return found["findings"]


def test_what_is_complete_goes_to_nvme_while_the_rest_is_written(daemon):
    """Long before the commit; a check finds nothing amiss; after it, the document survives a crash bit-exact."""
    with connect(daemon.socket) as store:
        with store.ingest("a", SPEC, ids(1), write_policy=WritePolicy.THROUGH) as writer:
            write(writer, 1, stop=1500)
            until(lambda: daemon.used("nvme") > 256 << 10, "some of it is on NVMe")
            assert not findings(daemon)
            with pytest.raises(InvalidRequest, match="write them once"):
                write(writer, 1, stop=100)
            write(writer, 1, start=1500)
        until(lambda: store.document("a").durable, "it is durable")
        assert not findings(daemon)
        store.free("a")
        check(store, "a", 1)
    daemon.kill()
    with connect(daemon.start().socket) as store:
        check(store, "a", 1)
        assert not findings(daemon)
        store.delete("a")
        until(lambda: not daemon.used("ddr") + daemon.used("nvme"), "all bytes are free")


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_document_that_was_handed_over_in_part_is_absent(daemon, how):
    """Killed between hand-over and commit, or given up: no name, no byte, and the next attempt stores it."""

    def half():
        with connect(daemon.socket) as store, store.ingest("a", SPEC, ids(1)) as writer:
            write(writer, 1, stop=1500)
            until(lambda: daemon.used("nvme") > 256 << 10, "some of it is on NVMe")
            if how == "kill":
                daemon.kill()
                write(writer, 1, start=1500)
            else:
                raise InvalidRequest("the engine gives up")

    with pytest.raises(HoldfastError):
        half()
    if how == "kill":
        daemon.start()
    with connect(daemon.socket) as store:
        with pytest.raises(DocumentNotFound):
            store.document("a")
        until(lambda: not daemon.used("ddr") + daemon.used("nvme"), "all bytes are free")
        assert not findings(daemon)
        with store.ingest("a", SPEC, ids(1)) as writer:
            write(writer, 1)
        check(store, "a", 1)


@pytest.mark.parametrize("policy", [WritePolicy.BACK, WritePolicy.MEMORY])
def test_what_is_not_written_through_stays_where_it_is(daemon, policy):
    """Nothing is handed over, so it may be written again until the end."""
    with connect(daemon.socket) as store:
        with store.ingest("a", SPEC, ids(1), write_policy=policy) as writer:
            write(writer, 2)
            write(writer, 1)
            assert not daemon.used("nvme")
        check(store, "a", 1)


def test_layer_after_layer_works_too(daemon):
    """All extents are complete at the end only; what is then still to be handed over is so by the commit."""
    arrays = kv(1)
    with connect(daemon.socket) as store:
        with store.ingest("a", SPEC, ids(1), write_policy=WritePolicy.THROUGH) as writer:
            for layer, (key, value) in arrays.items():
                writer.write(layer, 0, key, value)
        until(lambda: store.document("a").durable, "it is durable")
        store.free("a")
        check(store, "a", 1)
