"""The Python API: arrays go in and come out, however they are cut, sealed by their writer."""

from contextlib import closing

import numpy as np
import pytest
from holdfast.engine_adapter.api import Store
from holdfast.kvstore.client import Client
from holdfast.kvstore.errors import InvalidRequest, PrefixNotFound
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.seal import seal_planes
from holdfast.kvstore.spec import GroupKind, KVSpec, LayerGroup

from daemon_process import DaemonProcess, durable, until

STEP = 32  # tokens an extent
PLAIN = LayerGroup(layers=(0, 2), kv_heads=2, key_dim=8, value_dim=4)
LATENT = LayerGroup(kind=GroupKind.MLA, layers=(1,), kv_heads=1, key_dim=24, value_dim=0)
SPEC = KVSpec(
    groups=(PLAIN, LATENT), dtype="float32", model="m", vocabulary_size=9999, block_tokens=16, extent_blocks=2
)


@pytest.fixture(scope="module")
def daemon():
    sizes = {"ddr__slab_bytes": "64 KiB", "ddr__capacity_bytes": "4 MiB", "nvme__capacity_bytes": "4 MiB"}
    with DaemonProcess(**sizes, nvme__segment_bytes="256 KiB") as process:
        yield process.start()


@pytest.fixture
def store(daemon):
    with Store(Client(daemon.socket)) as opened:
        yield opened
        for document in opened.documents():
            opened.delete(document.name)


def made(count, seed=0):
    """Key and value by layer. Equal tokens have equal KV: what a test before left in the cache may be used again."""
    rng = np.random.default_rng(seed)
    found = {}
    for group in SPEC.groups:
        for layer in group.layers:
            dims = (group.key_dim, group.value_dim)
            found[layer] = [rng.standard_normal((group.kv_heads, 1000, dim), dtype=np.float32) for dim in dims]
    return {layer: [array[:, :count] for array in both] for layer, both in found.items()}


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 9999, count)


def ingest(store, name, count, cuts, seed=0):
    """Write every layer in these pieces, in their order."""
    kv = made(count, seed)
    with store.ingest(name, SPEC, tokens(count, seed)) as writer:
        for layer, (key, value) in kv.items():
            for start, stop in cuts:
                writer.write(layer, start, key[:, start:stop], value[:, start:stop])
    return kv


def check(store, name, kv):
    with store.attach(name, spec=SPEC) as document:
        for layer in document.layers():
            key, value = layer.gathered()
            assert np.array_equal(key, kv[layer.index][0])
            assert np.array_equal(value, kv[layer.index][1])
            pieces = list(layer.pieces)
            assert [piece.start for piece in pieces] == list(range(0, document.token_count, STEP))
            assert np.array_equal(np.concatenate([piece.key for piece in pieces], axis=1), key)
            assert np.array_equal(layer.pieces[-1].key, pieces[-1].key)
            assert [piece.start for piece in layer.pieces[1:3]] == [piece.start for piece in pieces[1:3]]


CUTS = {
    "whole": [(0, 1000)],
    "extents": [(start, min(start + STEP, 1000)) for start in range(0, 1000, STEP)],
    "askew": [(start, min(start + 77, 1000)) for start in range(0, 1000, 77)],
    "backwards": [(start, min(start + 50, 1000)) for start in reversed(range(0, 1000, 50))],
    "twice": [(0, 1000), (100, 200), (0, 32)],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_what_is_written_in_any_pieces_comes_back_also_from_nvme(daemon, store, cuts):
    """Reading from NVMe verifies the seals that the writer made."""
    kv = ingest(store, "a", 1000, cuts)
    check(store, "a", kv)
    with closing(Client(daemon.socket)) as client:
        until(lambda: durable(client, "a"), "it is durable")
    store.free("a")
    check(store, "a", kv)


def test_what_is_announced_is_in_ddr_before_it_is_attached(daemon, store):
    kv = ingest(store, "a", 1000, [(0, 1000)])
    with closing(Client(daemon.socket)) as client:
        until(lambda: durable(client, "a"), "it is durable")
    store.free("a")
    assert store.prefetch("a", queries=2, deadline_seconds=60).queries == 2
    until(lambda: store.prefetch("a").state == "promoted", "it is near")
    check(store, "a", kv)
    assert daemon.swaps()[0]["moved_bytes"] == 0


def test_a_plane_that_is_written_again_is_sealed_again(daemon, store):
    """The last bytes count."""
    kv, other = made(64), made(64, seed=5)
    with store.ingest("a", SPEC, tokens(64)) as writer:
        for version in (other, kv):
            for layer, (key, value) in version.items():
                writer.write(layer, 0, key, value)
    with closing(Client(daemon.socket)) as client:
        until(lambda: durable(client, "a"), "it is durable")
    store.free("a")
    check(store, "a", kv)


def test_the_writers_seals_are_the_daemons(daemon, store):
    """Padding and rows that no token fills included."""
    kv = made(70)
    with store.ingest("a", SPEC, tokens(70)) as writer:
        for layer, (key, value) in kv.items():
            writer.write(layer, 0, key, value)
        seals = writer.seals()
        for seal, part in zip(seals, writer._opened.parts, strict=True):
            view = store._client.view(part)
            assert seal == seal_planes(view, extent_geometry(SPEC, part.group))


def test_a_shared_front_is_neither_written_nor_sealed(store):
    ingest(store, "a", 64, [(0, 64)])
    longer = np.concatenate([tokens(64), tokens(40, seed=7)])
    kv = made(104, seed=3)
    front = made(64)
    with store.ingest("b", SPEC, longer) as writer:
        assert writer.cached_tokens == 64
        assert writer.missing == [(64, 96), (96, 104)]
        for layer, (key, value) in kv.items():
            writer.write(layer, 0, key, value)
    merged = {n: [np.concatenate([front[n][p], kv[n][p][:, 64:]], axis=1) for p in (0, 1)] for n in kv}
    check(store, "b", merged)


def test_what_is_not_complete_is_not_published(store):
    with pytest.raises(InvalidRequest, match="token 99"):
        ingest(store, "a", 100, [(0, 99)])
    assert store.documents() == []
    until(lambda: all(tier.used_bytes == 0 for tier in store.tiers()), "nothing is left, of the test before neither")


def test_a_layer_is_copied_into_the_callers_arrays(store):
    """Parts of larger ones too; arrays of another shape or dtype are refused untouched."""
    kv = ingest(store, "a", 100, [(0, 100)])
    with store.attach("a") as document:
        for layer in document.layers():
            key, value = kv[layer.index]
            room = np.full((key.shape[0] + 1, 130, key.shape[2]), 7, np.float32)
            other = np.zeros_like(value)
            layer.copy_into(room[1:, 30:], other)
            assert np.array_equal(room[1:, 30:], key)
            assert np.array_equal(other, value)
            assert (room[0] == 7).all()
            assert (room[:, :30] == 7).all()
            for wrong in (key[:, :99].copy(), key.astype(np.float64), key[:, :, :3].copy()):
                with pytest.raises(InvalidRequest):
                    layer.copy_into(wrong, other)


def test_attached_arrays_cannot_be_written(store):
    ingest(store, "a", 40, [(0, 40)])
    with store.attach("a") as document:
        for layer in document.layers():
            with pytest.raises(ValueError, match="read-only"):
                layer.pieces[0].key[:] = 0


def test_a_prompt_is_looked_up(store):
    ingest(store, "a", 100, [(0, 100)])
    asked = np.concatenate([tokens(100)[:70], tokens(50, seed=9)])
    assert store.lookup(SPEC, asked).token_count == 64
    assert store.lookup(SPEC, tokens(100)).tier_tokens["ddr"] == 100
    assert store.lookup(SPEC, tokens(100, seed=9)).token_count == 0


def test_a_prompt_without_a_name_is_found_and_read(store):
    """As far as it is known; a longer one takes its place."""
    salt = {0: b"salt"}
    kv = made(150)
    for count in (70, 150):
        with store.ingest(None, SPEC, tokens(count), extras=salt) as writer:
            for layer, (key, value) in kv.items():
                start = writer.cached_tokens
                writer.write(layer, start, key[:, start:count], value[:, start:count])
    asked = np.concatenate([tokens(150)[:100], tokens(50, seed=9)])
    with store.attach_prefix(SPEC, asked, extras=salt) as prefix:
        assert prefix.tokens == (0, 96)
        for layer in prefix.layers():
            key, value = layer.gathered()
            assert np.array_equal(key, kv[layer.index][0][:, :96])
            assert np.array_equal(value, kv[layer.index][1][:, :96])
        receipt = prefix.report(exposed_ns=5, queries=2)
        assert (receipt.exposed_ns, receipt.queries, receipt.token_count) == (5, 2, 96)
        assert prefix.document == store.lookup(SPEC, asked, extras=salt).document
    assert store.documents() == []
    with pytest.raises(PrefixNotFound), store.attach_prefix(SPEC, asked):
        pass
