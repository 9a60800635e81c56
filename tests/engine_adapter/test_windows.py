"""Documents four times the size of DDR, written and read by a client in windows; the daemon is killed on the way."""

import numpy as np
import pytest
from holdfast.engine_adapter.api import connect
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import DocumentNotFound, DocumentTooLarge, HoldfastError, InvalidRequest
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
COLUMN_BYTES = 24 << 10  # 32 tokens of both groups, each plane padded to 4 KiB
COLUMNS = 4 * (1 << 20) // COLUMN_BYTES
TOKENS = 32 * COLUMNS - 7
LAYERS = {0: SPEC.groups[0], 1: SPEC.groups[1], 2: SPEC.groups[0]}
ROOM = {"nvme__capacity_bytes": "8 MiB", "ddr__slab_bytes": "64 KiB"}


def ids(seed):
    return np.random.default_rng(seed).integers(0, 1000, TOKENS, dtype=np.uint32)


def kv(seed, layer):
    rng = np.random.default_rng([seed, layer])
    group = LAYERS[layer]
    return tuple(
        rng.standard_normal((group.kv_heads, TOKENS, dim), dtype=np.float32) for dim in (group.key_dim, group.value_dim)
    )


def write(writer, seed, step=100, upto=TOKENS):
    arrays = {layer: kv(seed, layer) for layer in LAYERS}
    for start in range(0, upto, step):
        for layer, (key, value) in arrays.items():
            writer.write(layer, start, key[:, start : start + step], value[:, start : start + step])


def check(store, seed, tokens=(0, TOKENS), **options):
    """Every window in order, bit-exact; returns how many there were."""
    arrays = {layer: kv(seed, layer) for layer in LAYERS}
    at, count = tokens[0], 0
    for window in store.windows("large", spec=SPEC, tokens=tokens, **options):
        low, high = window.tokens
        assert low == at
        layers = list(window.layers())
        assert sorted(layer.index for layer in layers) == [0, 1, 2]
        for layer in layers:
            key, value = layer.gathered()
            assert np.array_equal(key, arrays[layer.index][0][:, low:high])
            assert np.array_equal(value, arrays[layer.index][1][:, low:high])
            assert sum(piece.key.shape[1] for piece in layer.pieces) == high - low
            del layer, key, value
        del layers
        at, count = high, count + 1
    assert at == tokens[1]
    return count


def test_a_document_larger_than_ddr_is_written_and_read_in_windows():
    """Bit-exact, before a crash and after it; whoever wants it whole is told how."""
    with DaemonProcess(**ROOM) as daemon:
        with connect(daemon.start().socket) as store:
            with store.ingest("large", SPEC, ids(1)) as writer:
                assert len(writer.missing) == COLUMNS
                write(writer, 1)
            assert daemon.used("ddr") <= 1 << 20
            assert check(store, 1) > 4
            assert check(store, 1, (1000, 3001), window_tokens=700) == 3
            for wrong in ({"tokens": (500, 400)}, {"tokens": (5, TOKENS + 1)}, {"window_tokens": 0}):
                with pytest.raises(InvalidRequest):
                    next(store.windows("large", **wrong))
            with (
                pytest.raises(InvalidRequest, match="write-through"),
                store.ingest("other", SPEC, [1], write_policy="through"),
            ):
                pass
            with pytest.raises(DocumentTooLarge, match="windows"), store.attach("large"):
                pass
            until(lambda: store.document("large").durable, "it is durable")
        daemon.kill()
        with connect(daemon.start().socket) as store:
            assert store.document("large").complete
            assert check(store, 1) > 4
            store.delete("large")
            until(lambda: not daemon.used("ddr") + daemon.used("nvme"), "all bytes are free")


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_streamed_ingest_that_does_not_end_is_absent(how):
    """Killed in the middle, or given up: no name, no byte, and the next attempt stores it."""
    with DaemonProcess(**ROOM) as daemon:
        daemon.start()

        def half():
            with connect(daemon.socket) as store, store.ingest("large", SPEC, ids(1)) as writer:
                write(writer, 1, upto=TOKENS // 2)
                until(lambda: daemon.used("nvme") > 1 << 20, "some of it is on NVMe")
                if how == "kill":
                    daemon.kill()
                write(writer, 1)  # backwards

        with pytest.raises(HoldfastError):
            half()
        if how == "kill":
            daemon.start()
        with connect(daemon.socket) as store:
            with pytest.raises(DocumentNotFound):
                store.document("large")
            until(lambda: not daemon.used("ddr") + daemon.used("nvme"), "all bytes are free")
            with store.ingest("large", SPEC, ids(1)) as writer:
                write(writer, 1)
            assert check(store, 1)


def test_what_does_not_move_forward_is_told_of_its_window():
    """Layer by layer over the whole document cannot work in a window; nothing is published."""
    with DaemonProcess(**ROOM) as daemon, connect(daemon.start().socket) as store:
        key, value = kv(1, 0)
        with (
            pytest.raises(InvalidRequest, match=r"outside the window .* tokens \[0, \d+\) can be written"),
            store.ingest("large", SPEC, ids(1)) as writer,
        ):
            writer.write(0, 0, key, value)
        with (
            pytest.raises(InvalidRequest, match="never written"),
            store.ingest("large", SPEC, ids(1)) as writer,
        ):
            write(writer, 1, upto=1000)
        with (
            pytest.raises(DocumentTooLarge, match="memory-only"),
            store.ingest("large", SPEC, ids(1), write_policy=WritePolicy.MEMORY),
        ):
            pass
        assert store.documents() == []
        until(lambda: not daemon.used("ddr") + daemon.used("nvme"), "all bytes are free")
