"""Opaque objects through a real daemon: the Python API, two clients, restarts, damage."""

from contextlib import contextmanager

import numpy as np
import pytest
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.objects import Gathered, PutStatus
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    DaemonUnavailable,
    DocumentExists,
    DocumentTooLarge,
    InvalidName,
    InvalidRequest,
    InvalidSpec,
    NoCapacity,
    PinsOvercommitted,
    SpecMismatch,
)
from holdfast.kvstore.object_client import ObjectClient
from holdfast.kvstore.opaque import opaque_spec

from daemon_process import DaemonProcess, until
from fakes import tiny_spec


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


def written(store, keys):
    """All of these will survive a power loss."""
    until(lambda: all(store.document(f"ns/{key.hex()}").durable for key in keys), "all is written")


def spoil(daemon, payload):
    """Change what the disk has of it."""
    for segment in (daemon.data_dir / "nvme").rglob("segment-*"):
        at = segment.read_bytes().find(payload)
        if at >= 0:
            with segment.open("r+b") as file:
                file.seek(at + 100)
                file.write(b"damage")
            return
    raise AssertionError("the disk does not have it")


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


def test_what_follows_an_earlier_put_leaves_before_it():
    with stores(eviction__policy="lru") as (_, store):
        objects, payload = store.objects("ns"), bytes(20_000)
        first, second = ([(b"%s-%d" % (part, n), payload) for n in range(3)] for part in (b"first", b"second"))
        objects.put(first, write_policy=WritePolicy.MEMORY)
        objects.put(second, behind=first[-1][0], write_policy=WritePolicy.MEMORY)
        objects.put([(b"alone", payload)], behind=b"nobody", write_policy=WritePolicy.MEMORY)
        keys = [key for key, _ in (*first, *second)]
        number = 0
        while None not in objects.find(keys):
            objects.put([(b"more-%d" % number, payload)], write_policy=WritePolicy.MEMORY)
            number += 1
        found = [tier is not None for tier in objects.find(keys)]
        assert any(found)
        assert found == sorted(found, reverse=True)


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


def test_more_than_fits_is_loaded_bit_by_bit():
    made = some(200, 8000)  # twice what DDR has
    with stores() as (_, store):
        objects = store.objects("ns")
        for key, payload in made.items():
            assert objects.put([(key, payload)], write_policy=WritePolicy.THROUGH)[0].is_there
        buffers = [bytearray(len(payload)) for payload in made.values()]
        assert objects.load_into(list(made), buffers) == [True] * 200
        assert [bytes(buffer) for buffer in buffers] == list(made.values())


def test_arrays_are_stored_as_their_bytes():
    array = np.arange(600, dtype=np.float32).reshape(20, 30)
    with stores() as (_, store):
        objects = store.objects("ns")
        assert statuses(objects.put([(b"array", array), (b"view", memoryview(b"abc"))])) == [PutStatus.STORED] * 2
        got = np.zeros_like(array)
        assert objects.load_into([b"array"], [got]) == [True]
        assert np.array_equal(got, array)


def test_payloads_may_lie_in_several_buffers():
    with stores("t") as (_, store):
        objects = store.objects("ns")
        parts = [b"abc", np.arange(3, dtype=np.uint16), bytearray(5000)]
        whole = b"".join(bytes(part) for part in parts)
        assert statuses(objects.put([(b"a", Gathered(parts)), (b"b", Gathered([])), (b"c", b"x")])) == (
            [PutStatus.STORED, PutStatus.REFUSED, PutStatus.STORED]
        )
        buffer = bytearray(len(whole))
        assert objects.load_into([b"a"], [buffer]) == [True]
        assert buffer == whole
        assert Gathered(parts).nbytes == len(whole)


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


# Pins and namespaces -----------------------------------------------------------------------------


def test_pins_by_keys_and_by_prefix_of_keys():
    made = {bytes([n // 2, n]): bytes([n]) * 5000 for n in range(8)}
    with stores() as (_, store):
        objects = store.objects("ns")
        objects.put(list(made.items()))
        assert objects.pin([b"\0\0", b"other"], owner="me") == 1
        assert objects.pin(key_prefix=b"\1") == 2
        assert objects.stats().pinned == 3
        assert {pin.document for pin in store.pins()} == {"ns/0000", "ns/0102", "ns/0103"}
        assert objects.delete(list(made)) == [False, True, False, False, True, True, True, True]
        assert objects.unpin(key_prefix=b"\1") == 2
        assert objects.unpin([b"\0\0", b"other"]) == 1
        assert objects.clear() == 3
        for wrong in ({}, {"keys": [b"a"], "key_prefix": b"a"}):
            with pytest.raises(InvalidRequest):
                objects.pin(**wrong)
        with pytest.raises(InvalidRequest):
            objects.pin([b"a"], tier="hbm")


def test_pins_that_do_not_fit_pin_nothing():
    made = some(20)
    settings = {"limits.ddr_pin_bytes": "64 KiB"}
    with stores(**settings) as (_, store):
        objects = store.objects("ns")
        objects.put(list(made.items()))
        with pytest.raises(PinsOvercommitted):
            objects.pin(list(made))
        assert store.pins() == []
        assert objects.pin(list(made)[:4]) == 4
        with pytest.raises(PinsOvercommitted) as refused:
            objects.pin(list(made)[4:9])
        assert {holder.document.partition("/")[0] for holder in refused.value.holders} == {"ns"}
        assert objects.pin(list(made)[:4], kind="soft") == 4


def test_a_namespace_is_counted_and_cleared():
    made = some(10)
    with stores("a", "b") as (daemon, first, second):
        objects = first.objects("ns")
        objects.put(list(made.items()), write_policy=WritePolicy.THROUGH)
        first.objects("other").put([(b"key", b"kept")])
        second.objects("ns").put([(b"key", b"kept")])
        content(objects, [*made, b"other"])
        written(first, made)
        stats = objects.stats()
        assert (stats.tenant, stats.namespace, stats.objects, stats.asked, stats.hits) == ("a", "ns", 10, 11, 10)
        assert stats.size_bytes == sum(map(len, made.values()))
        assert stats.resident_bytes["ddr"] >= stats.size_bytes
        rest = daemon.rest()
        shown = rest.get("/v1/objects")["namespaces"]
        assert [(n["tenant"], n["namespace"], n["objects"]) for n in shown] == [
            ("a", "ns", 10),
            ("a", "other", 1),
            ("b", "ns", 1),
        ]
        assert len(rest.get("/v1/objects", {"tenant": "b"})["namespaces"]) == 1
        assert rest.post("/v1/objects/a/ns/pin", {"keys": [b"key-0-0".hex()]})["objects"] == 1
        assert rest.delete("/v1/objects/a/ns") == {"objects": 9, "size_bytes": None}
        assert rest.post("/v1/objects/a/ns/unpin", {})["objects"] == 1
        assert objects.clear() == 1
        assert objects.stats().objects == 0
        assert [(n.namespace, n.objects) for n in first.namespaces()] == [("other", 1)]
        assert rest.get("/v1/objects/a/ns")["objects"] == 0
        assert second.objects("ns").find([b"key"]) == first.objects("other").find([b"key"]) == ["ddr"]


def test_objects_appear_where_documents_are_looked_at_by_name_only():
    with stores() as (daemon, store):
        objects = store.objects("ns")
        objects.put([(b"key", b"payload")])
        assert store.documents() == []
        assert daemon.rest().get("/v1/documents")["documents"] == []
        assert store.document("ns/6b6579").token_count == 7
        for name in ("ns/6b6579", "ns/00"):
            with pytest.raises(InvalidName), store.ingest(name, tiny_spec(), [1, 2, 3]):
                pass


def test_the_specs_of_objects_are_no_models():
    with stores() as (_, store):
        store.objects("ns").put([(b"key", b"payload")])
        spec, _ = opaque_spec("ns", 7, 0)
        with pytest.raises(InvalidSpec):
            store.lookup(spec, [0])
        client = store._client
        for call in (
            lambda: client.begin_ingest("doc", spec.fingerprint(), [0]),
            lambda: client.lookup_tokens(spec.fingerprint(), [0]),
            lambda: client.register_rank("g", 0, 1, 1, spec.fingerprint(), 64),
        ):
            with pytest.raises(SpecMismatch):
                call()


# Restarts and damage -----------------------------------------------------------------------------


def test_objects_survive_a_kill_in_memory_and_on_disk():
    through, memory = some(6, seed=1), some(6, seed=2)
    with stores() as (daemon, store):
        objects = store.objects("ns")
        objects.put(list(through.items()), write_policy=WritePolicy.THROUGH, tokens_each=7)
        objects.put(list(memory.items()), write_policy=WritePolicy.MEMORY)
        objects.pin(list(through)[:2])
        written(store, through)
        objects = Store(daemon.restart().client("t")).objects("ns")
        assert content(objects, [*through, *memory]) == [*through.values(), *memory.values()]
        assert objects.stats().pinned == 2
        objects = Store(daemon.restart_cold().client("t")).objects("ns")
        assert content(objects, [*through, *memory]) == [*through.values(), *[None] * 6]
        assert objects.stats().pinned == 2
        assert statuses(objects.put(list(memory.items()))) == [PutStatus.STORED] * 6
        assert content(objects, list(memory)) == list(memory.values())


def test_what_is_deleted_stays_deleted_and_its_key_can_be_used_anew():
    with stores() as (daemon, store):
        objects = store.objects("ns")
        objects.put([(b"key", b"one" * 100)], write_policy=WritePolicy.THROUGH)
        for number, restart in enumerate((daemon.restart, daemon.restart_cold)):
            assert objects.delete([b"key"]) == [True]
            objects = Store(restart().client("t")).objects("ns")
            assert objects.find([b"key"]) == [None]
            new = bytes([number]) * 300
            assert statuses(objects.put([(b"key", new)], write_policy=WritePolicy.THROUGH)) == [PutStatus.STORED]
            assert content(objects, [b"key"]) == [new]


def test_a_damaged_object_is_a_miss_and_is_stored_again():
    made = some(3, size_bytes=50_000)
    with stores() as (daemon, store):
        objects = store.objects("ns")
        objects.put(list(made.items()), write_policy=WritePolicy.THROUGH)
        written(store, made)
        daemon.kill()
        daemon.cool()
        spoil(daemon, made[b"key-0-1"])
        objects = Store(daemon.start().client("t")).objects("ns")
        assert content(objects, list(made)) == [made[b"key-0-0"], None, made[b"key-0-2"]]
        assert objects.find(list(made)) == ["ddr", None, "ddr"]
        assert statuses(objects.put(list(made.items()))) == [PutStatus.PRESENT, PutStatus.STORED, PutStatus.PRESENT]
        assert content(objects, list(made)) == list(made.values())


def test_a_full_store_evicts_objects_and_keeps_pinned_ones():
    with stores() as (_, store):
        objects = store.objects("ns")
        kept = some(8, seed=1)
        objects.put(list(kept.items()), write_policy=WritePolicy.MEMORY)
        objects.pin(list(kept))
        for seed in range(2, 12):
            more = some(20, size_bytes=10_000, seed=seed)
            assert statuses(objects.put(list(more.items()), write_policy=WritePolicy.MEMORY)) == [PutStatus.STORED] * 20
        assert content(objects, list(kept)) == list(kept.values())
        found = [tier for seed in range(2, 12) for tier in objects.find(list(some(20, seed=seed)))]
        assert {None, "ddr"} == set(found)


def test_what_does_not_fit_beside_leases_is_refused_and_told_by_whom():
    made = some(16, size_bytes=50_000)
    with stores() as (_, store):
        objects = store.objects("ns")
        with objects.get(list(made)):
            pass
        results = objects.put(list(made.items()), write_policy=WritePolicy.MEMORY)
        assert {result.status for result in results} == {PutStatus.STORED}
        with objects.get(list(made)) as views:
            assert None not in views
            (refused,) = objects.put([(b"more", bytes(50_000))], write_policy=WritePolicy.MEMORY)
            assert isinstance(refused.error, NoCapacity)
        (stored,) = objects.put([(b"more", bytes(50_000))], write_policy=WritePolicy.MEMORY)
        assert stored.is_there


def test_a_client_that_dies_gives_back_what_it_leased_and_was_storing():
    made = some(4)
    with stores("t", "t") as (daemon, first, second):
        objects = first.objects("ns")
        objects.put(list(made.items()))
        first._client.objects.begin_put("ns", [(b"half", 5000)])
        first._client.objects.get("ns", list(made))
        assert second.objects("ns").delete([b"key-0-0"]) == [False]
        first.close()
        until(lambda: second.objects("ns").delete([b"key-0-0"]) == [True], "the lease ends")
        assert statuses(second.objects("ns").put([(b"half", b"whole")])) == [PutStatus.STORED]
        assert daemon.leases() == []


def test_a_daemon_that_is_gone():
    with stores() as (daemon, store):
        objects = store.objects("ns")
        objects.put([(b"key", b"payload")])
        with objects.get([b"key"]) as (view,):
            daemon.kill()
            assert bytes(view) == b"payload"  # what was leased can be read to the end
        for call in (lambda: objects.put([(b"key", b"payload")]), lambda: content(objects, [b"key"])):
            with pytest.raises(DaemonUnavailable):
                call()


def test_a_time_to_live():
    with stores() as (_, store):
        objects = store.objects("ns")
        objects.put([(b"short", b"lived")], ttl_seconds=0.01)
        until(lambda: objects.find([b"short"]) == [None], "it expires")
        assert statuses(objects.put([(b"short", b"again")])) == [PutStatus.STORED]
        assert content(objects, [b"short"]) == [b"again"]


def test_check_finds_objects_sound_and_damaged_ones_not():
    made = some(5, size_bytes=20_000)
    with stores() as (daemon, store):
        objects = store.objects("ns")
        objects.put(list(made.items()), write_policy=WritePolicy.THROUGH, tokens_each=3)
        written(store, made)
        wanted = {"fix": False, "data": True, "deadline_seconds": 20}
        assert daemon.rest().post("/v1/check", wanted)["findings"] == []
        spoil(daemon, made[b"key-0-2"])
        found = daemon.rest().post("/v1/check", wanted | {"fix": True})["findings"]
        assert [finding["code"] for finding in found] == ["extent-corrupt"]
        assert f"t/ns/{b'key-0-2'.hex()}" in found[0]["subject"]
        assert daemon.rest().post("/v1/check", wanted)["findings"] == []
        assert content(objects, list(made)) == list(made.values())  # DDR has it still
