"""Opaque objects through a real daemon: the Python API, two clients, restarts, damage."""

from contextlib import contextmanager

import numpy as np
import pytest
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.objects import PutStatus
from holdfast.kvstore.errors import DocumentExists, DocumentTooLarge, InvalidName, InvalidRequest
from holdfast.kvstore.object_client import ObjectClient

from daemon_process import DaemonProcess


@contextmanager
def stores(*tenants, **settings):
    """A daemon and a store of each tenant."""
    with DaemonProcess(**settings) as daemon:
        daemon.start()
        yield (daemon, *(Store(daemon.client(tenant)) for tenant in tenants or ("t",)))


def some(count, size_bytes=5000, seed=0):
    """Objects of random bytes of a few sizes, and their keys."""
    rng = np.random.default_rng(seed)
    return {f"key-{seed}-{n}".encode(): rng.bytes(size_bytes + 3000 * (n % 3)) for n in range(count)}


def statuses(results):
    return [result.status for result in results]


def content(objects, keys):
    """What a get of these gives."""
    with objects.get(keys) as views:
        return [None if view is None else bytes(view) for view in views]


def test_what_is_put_is_got_found_and_deleted():
    made = some(20)
    keys = list(made)
    with stores() as (_, store):
        objects = store.objects("ns")
        assert content(objects, keys) == [None] * 20
        assert statuses(objects.put(list(made.items()))) == [PutStatus.STORED] * 20
        assert statuses(objects.put(list(made.items()))) == [PutStatus.PRESENT] * 20
        assert content(objects, [b"other", *keys]) == [None, *made.values()]
        assert objects.find([*keys[:2], b"other"]) == ["ddr", "ddr", None]
        objects.touch([keys[0], b"other"])
        assert objects.delete([keys[0], b"other"]) == [True, False]
        assert objects.find(keys[:2]) == [None, "ddr"]
        assert store.documents() == []


def test_keys_are_listed_in_the_order_in_which_they_came(monkeypatch):
    monkeypatch.setattr(ObjectClient.listed, "__defaults__", (8,))  # so that many are asked for several times
    made = some(20)
    with stores("t", "u") as (_, store, other):
        store.objects("ns").put(list(made.items()))
        listed = [(key, len(payload)) for key, payload in made.items()]
        assert list(store.objects("ns").keys()) == listed
        assert list(store.objects("ns").keys(13)) == listed[13:]
        assert list(store.objects("ns").keys(20)) == []
        store.objects("ns").delete([listed[3][0]])
        assert list(store.objects("ns").keys()) == listed[:3] + listed[4:]
        assert list(store.objects("empty").keys()) == list(other.objects("ns").keys()) == []


def test_loading_into_buffers():
    made = some(3)
    with stores() as (_, store):
        objects = store.objects("ns")
        objects.put(list(made.items()))
        buffers = [bytearray(len(payload)) for payload in made.values()]
        buffers.append(np.zeros((3, 7), np.float32))
        buffers[1] = np.zeros(len(list(made.values())[1]) + 1, np.uint8)
        assert objects.load_into([*made, b"other"], buffers) == [True, False, True, False]
        assert [bytes(buffers[0]), bytes(buffers[2])] == [made[b"key-0-0"], made[b"key-0-2"]]
        assert not buffers[1].any()


def test_arrays_are_stored_as_their_bytes():
    array = np.arange(600, dtype=np.float32).reshape(20, 30)
    with stores() as (_, store):
        objects = store.objects("ns")
        assert statuses(objects.put([(b"array", array), (b"view", memoryview(b"abc"))])) == [PutStatus.STORED] * 2
        got = np.zeros_like(array)
        assert objects.load_into([b"array"], [got]) == [True]
        assert np.array_equal(got, array)


def test_namespaces_tenants_and_keys_are_apart():
    with stores("a", "b") as (_, first, second):
        spaces = [first.objects("x"), first.objects("y"), second.objects("x")]
        for number, objects in enumerate(spaces):
            assert statuses(objects.put([(b"key", bytes([number]) * 100)])) == [PutStatus.STORED]
        assert [content(objects, [b"key"]) for objects in spaces] == [[bytes([n]) * 100] for n in range(3)]
        assert spaces[0].delete([b"key"]) == [True]
        assert [content(objects, [b"key"]) for objects in spaces[1:]] == [[bytes([n]) * 100] for n in (1, 2)]


def test_two_clients_share_what_is_stored():
    made = some(4)
    with stores("t", "t") as (_, first, second):
        first.objects("ns").put(list(made.items()))
        assert content(second.objects("ns"), list(made)) == list(made.values())
        with second.objects("ns").get([b"key-0-0"]):
            assert first.objects("ns").delete([b"key-0-0", b"key-0-1"]) == [False, True]
        assert first.objects("ns").delete([b"key-0-0"]) == [True]


def test_one_bad_object_does_not_fail_its_batch():
    with stores() as (_, store):
        objects = store.objects("ns")
        objects.put([(b"known", b"four")])
        results = objects.put(
            [(b"a", b"a"), (b"empty", b""), (b"huge", bytes(70_000)), (b"known", b"five!"), (b"b", b"b")]
        )
        assert statuses(results) == [PutStatus.STORED, *[PutStatus.REFUSED] * 3, PutStatus.STORED]
        assert isinstance(results[2].error, DocumentTooLarge)
        assert isinstance(results[3].error, DocumentExists)
        assert content(objects, [b"a", b"b", b"known", b"empty"]) == [b"a", b"b", b"four", None]


def test_what_a_caller_gets_wrong_is_raised():
    with stores() as (_, store):
        for namespace in ("", "a/b", "prompt"):
            with pytest.raises(InvalidName):
                store.objects(namespace)
        objects = store.objects("ns")
        for call in (
            lambda: objects.put([(b"key", 7)]),
            lambda: objects.put([(b"key", np.zeros((4, 4))[:, 1])]),
            lambda: objects.put([(b"", b"payload")]),
            lambda: objects.find([bytes(129)]),
            lambda: objects.load_into([b"key"], []),
            lambda: objects.load_into([b"key"], [b"read-only"]),
        ):
            with pytest.raises(InvalidRequest):
                call()
        assert objects.put([]) == []
        assert objects.find([]) == []
        assert content(objects, []) == []


def test_more_than_a_message_takes():
    made = {n.to_bytes(4, "big"): bytes([n % 251]) * 40 for n in range(300)}
    settings = {"ddr.capacity_bytes": "4 MiB"}
    with stores(**settings) as (_, store):
        objects = store.objects("ns")
        assert set(statuses(objects.put(list(made.items())))) == {PutStatus.STORED}
        assert content(objects, list(made)) == list(made.values())
        assert objects.find(list(made)) == ["ddr"] * 300
        assert objects.delete(list(made)) == [True] * 300
