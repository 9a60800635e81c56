"""Holdfast as LMCache's L2: the adapter against LMCache's own classes and memory, and a real daemon."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.lmcache import naming
from holdfast.kvstore.errors import ConfigError
from lmcache.v1.distributed.api import MemoryLayoutDesc

from daemon_process import DaemonProcess, until
from lmcache_asking import LAYOUT, SIZE_BYTES, Asked, Memory, holds, is_untouched, key, keys, name_of


@pytest.fixture(scope="module")
def memory():
    made = Memory()
    yield made
    made.close()


@pytest.fixture
def daemon():
    with DaemonProcess() as made:
        yield made.start()


@pytest.fixture
def start(daemon):
    """Start adapters of this daemon, closed at the end."""
    started = []

    def start(**params):
        started.append(Asked(daemon, **params))
        return started[-1].connected()

    yield start
    for asked in started:
        asked.adapter.close()


@pytest.fixture
def asked(start):
    return start()


def test_what_is_stored_is_loaded_and_the_rest_is_a_miss(asked, memory):
    wanted = keys(*range(6))
    assert asked.store(wanted[:4], memory.filled(wanted[:4]))
    assert asked.look_up(wanted) == [0, 1, 2, 3]
    objects = memory.take(6)
    assert asked.load(wanted, objects) == [0, 1, 2, 3]
    assert [holds(*pair) for pair in zip(wanted, objects, strict=True)] == [True] * 4 + [False] * 2
    assert all(map(is_untouched, objects[4:]))


def test_holes_are_told(asked, memory):
    wanted = keys(*range(5))
    some = [wanted[number] for number in (0, 3)]
    assert asked.store(some, memory.filled(some))
    assert asked.fetch(wanted, memory.take(5)) == [0, 3]


def test_descriptors_are_distinct_and_outcomes_are_fetched_once(start, memory):
    adapters = [start().adapter for _ in range(2)]
    descriptors = {
        descriptor
        for adapter in adapters
        for descriptor in (
            adapter.get_store_event_fd(),
            adapter.get_lookup_and_lock_event_fd(),
            adapter.get_load_event_fd(),
        )
    }
    assert len(descriptors) == 6
    adapter = adapters[0]
    task = adapter.submit_lookup_and_lock_task(keys(1), {0: LAYOUT})
    until(lambda: adapter.query_lookup_and_lock_result(task) is not None, "it is looked up")
    assert adapter.query_lookup_and_lock_result(task) is None
    assert adapter.query_load_result(task) is None


def test_listeners_hear_of_stores_and_loads(asked, memory):
    wanted = keys(1, 2)
    assert asked.store(wanted, memory.filled(wanted))
    assert asked.store(wanted, memory.filled(wanted))  # they are there: nothing is stored
    assert asked.heard.stored == [(one, SIZE_BYTES) for one in wanted]
    asked.fetch(keys(1, 3), memory.take(2))
    assert asked.heard.accessed == keys(1)


def test_ranks_groups_salts_and_models_are_apart(asked, memory):
    variants = [{}, {"kv_rank": 0x02010201}, {"group": 1}, {"salt": "alice"}, {"model": "hub/other"}]
    for number, fields in enumerate(variants):
        one = keys(7, **fields)
        assert asked.look_up(one) == [], fields
        assert asked.store(one, memory.filled(one))
        assert asked.adapter.report_status()["objects"]["stored"] == number + 1
    for fields in variants:
        (one,) = keys(7, **fields)
        (loaded,) = memory.take(1)
        assert asked.fetch([one], [loaded]) == [0]
        assert holds(one, loaded)


@pytest.mark.parametrize(
    "other",
    [
        MemoryLayoutDesc([torch.Size((2, 2, 16, 64))], [torch.float16]),
        MemoryLayoutDesc([torch.Size((2, 2, 32, 32))], [torch.bfloat16]),
        MemoryLayoutDesc([torch.Size((2, 2, 32, 64))], [torch.bfloat16]),
    ],
    ids=["dtype", "shape", "size"],
)
def test_kv_of_another_form_is_not_found(asked, memory, other):
    wanted = keys(1)
    assert asked.store(wanted, memory.filled(wanted))
    assert asked.look_up(wanted, other) == []
    (target,) = objects = memory.take(1, other)
    assert asked.load(wanted, objects) == []
    assert is_untouched(target)
    assert asked.look_up(wanted) == [0]


def test_packed_objects_of_another_size_are_not_loaded(asked, memory):
    """What LMCache's codecs make is a row of bytes, stored under the form that lookups ask for."""
    wanted = keys(1)
    small, large = (MemoryLayoutDesc([torch.Size((size,))], [torch.uint8]) for size in (1, 5000))
    assert asked.look_up(wanted) == []
    assert asked.store(wanted, memory.filled(wanted, small))
    assert asked.look_up(wanted) == [0]
    (target,) = objects = memory.take(1, large)
    assert asked.load(wanted, objects) == []
    assert is_untouched(target)
    (target,) = objects = memory.take(1, small)
    assert asked.load(wanted, objects) == [0]
    assert holds(wanted[0], target)


def until_durable(daemon, wanted):
    client = daemon.client()
    until(lambda: all(client.document(name_of(one)).durable for one in wanted), "all are durable")


@pytest.mark.parametrize("again", [DaemonProcess.restart, DaemonProcess.restart_cold], ids=["warm", "cold"])
def test_a_daemon_that_was_killed_has_what_was_durable(daemon, asked, memory, again):
    wanted = keys(*range(4))
    assert asked.store(wanted, memory.filled(wanted))
    until_durable(daemon, wanted)
    again(daemon)
    until(lambda: asked.look_up(wanted) == [0, 1, 2, 3], "it is connected again")
    objects = memory.take(4)
    assert asked.load(wanted, objects) == [0, 1, 2, 3]
    assert all(holds(*pair) for pair in zip(wanted, objects, strict=True))


def test_without_a_daemon_everything_ends_and_nothing_is_there(daemon, asked, memory):
    wanted = keys(1, 2)
    assert asked.store(wanted, memory.filled(wanted))
    daemon.kill()
    assert not asked.store(keys(3), memory.filled(keys(3)))
    assert asked.look_up(wanted) == []
    objects = memory.take(2)
    assert asked.load(wanted, objects) == []
    assert all(map(is_untouched, objects))
    asked.adapter.submit_unlock(wanted)
    assert asked.adapter.report_status()["is_healthy"]
    assert not asked.adapter.report_status()["connected"]
    daemon.start()
    asked.connected()
    assert asked.store(keys(3), memory.filled(keys(3)))


def test_an_adapter_may_come_before_its_daemon(memory):
    with DaemonProcess() as daemon:
        asked = Asked(daemon)
        try:
            assert asked.look_up(keys(1)) == []
            daemon.start()
            assert asked.connected().store(keys(1), memory.filled(keys(1)))
        finally:
            asked.adapter.close()


def test_what_is_locked_is_loaded_though_the_daemon_died(daemon, asked, memory):
    wanted = keys(1, 2)
    assert asked.store(wanted, memory.filled(wanted))
    assert asked.look_up(wanted) == [0, 1]
    daemon.kill()
    objects = memory.take(2)
    assert asked.load(wanted, objects) == [0, 1]
    assert all(holds(*pair) for pair in zip(wanted, objects, strict=True))


def test_a_full_store_refuses_and_what_is_locked_stays(start, daemon, memory):
    asked = start(write_policy="memory-only", store_seconds=0.2)
    first = keys(*range(40))
    assert asked.store(first, memory.filled(first))
    assert asked.look_up(first) == list(range(40))
    more = keys(*range(100, 300))
    assert not asked.store(more, memory.filled(more))  # 1.6 MiB beside 320 KiB, in 1 MiB
    assert asked.adapter.report_status()["objects"]["refused"] > 0
    objects = memory.take(40)
    assert asked.load(first, objects) == list(range(40))
    assert all(holds(*pair) for pair in zip(first, objects, strict=True))
    asked.adapter.submit_unlock(first)
    last = keys(*range(400, 500))
    assert asked.store(last, memory.filled(last))  # evicts
    assert len(asked.look_up(first)) < 40


def test_what_is_locked_in_memory_makes_room_for_the_rest_of_its_prompt(asked, memory):
    wanted = keys(*range(200))  # of 128 that memory has room for
    for first in range(0, 200, 40):
        some = wanted[first : first + 40]
        assert asked.store(some, memory.filled(some))
    for _ in range(2):
        objects = memory.take(200)
        assert asked.fetch(wanted, objects) == list(range(200))
        assert all(holds(*pair) for pair in zip(wanted, objects, strict=True))


def test_a_prompt_that_waits_with_locks_does_not_keep_another_one_out(asked, memory):
    prompts = far, near = keys(*range(128)), keys(*range(128, 256))  # each fills all of memory
    for wanted in prompts:
        for first in (0, 64):
            some = wanted[first : first + 64]
            assert asked.store(some, memory.filled(some))
    assert asked.fetch(near, memory.take(128)) == list(range(128))
    assert asked.look_up(near) == asked.look_up(far) == list(range(128))
    assert asked.adapter.report_status()["locked_keys"] == 128
    for wanted in prompts:
        buffers = memory.take(128)
        assert asked.load(wanted, buffers) == list(range(128))
        asked.adapter.submit_unlock(wanted)
        assert all(holds(*pair) for pair in zip(wanted, buffers, strict=True))


def test_a_prompt_that_was_stored_bit_by_bit_leaves_from_its_end(memory):
    prompt = keys(*range(60))
    names = [naming.key_of(one) for one in prompt]
    with DaemonProcess(eviction__policy="lru") as daemon:
        asked = Asked(daemon.start(), write_policy="memory-only").connected()
        objects = Store(daemon.client()).objects(name_of(prompt[0]).partition("/")[0])
        assert asked.look_up(prompt) == []  # as LMCache does before the engine computes
        for number in range(0, 60, 4):
            bit = prompt[number : number + 4]
            assert asked.store(bit, memory.filled(bit))
        for number in range(1000, 1200):
            assert asked.store(keys(number), memory.filled(keys(number)))
            if None in objects.find(names):
                break
        left = [tier is not None for tier in objects.find(names)]
        asked.adapter.close()
    assert 0 < sum(left) < 60
    assert left == sorted(left, reverse=True), "what is left is a front"


def test_leases_end_with_the_unlock_or_with_their_time(start, daemon, memory):
    asked, hasty = start(), start(lock_seconds=0.05)
    wanted = keys(1, 2)
    assert asked.store(wanted, memory.filled(wanted))
    assert asked.look_up(wanted) == [0, 1]
    assert len(daemon.leases()) == 2
    asked.adapter.submit_unlock(wanted)
    until(lambda: not daemon.leases(), "unlocked")
    assert hasty.look_up(wanted) == [0, 1]
    until(lambda: not daemon.leases(), "its time is up")
    assert hasty.load(wanted, memory.take(2)) == [0, 1]  # it was there all the same


def test_a_daemon_that_does_not_answer_is_waited_for_once(start, daemon, memory):
    asked = start(find_seconds=0.2, load_seconds=0.2, store_seconds=0.2)
    wanted = keys(1, 2)
    assert asked.store(wanted, memory.filled(wanted))
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        assert asked.look_up(wanted) == []
        assert asked.load(wanted, memory.take(2)) == []
        assert not asked.store(keys(3), memory.filled(keys(3)))
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    until(lambda: asked.look_up(wanted) == [0, 1], "it answers again")


def test_while_the_cache_is_bypassed_nothing_is_there(daemon, asked, memory, caplog):
    wanted = keys(1, 2)
    assert asked.store(wanted, memory.filled(wanted))
    daemon.rest().put("/v1/bypass", {"reason": "a test"})
    for _ in range(3):
        assert asked.fetch(wanted, memory.take(2)) == []
        assert asked.load(wanted, memory.take(2)) == []
        assert not asked.store(keys(3), memory.filled(keys(3)))
    assert len([line for line in caplog.messages if "could not serve" in line]) == 1
    daemon.rest().delete("/v1/bypass")
    assert asked.fetch(wanted, memory.take(2)) == [0, 1]


def test_a_closed_adapter_holds_nothing(daemon, memory):
    asked = Asked(daemon).connected()
    wanted = keys(1, 2)
    assert asked.store(wanted, memory.filled(wanted))
    assert asked.look_up(wanted) == [0, 1]
    assert len(daemon.leases()) == 2
    task = asked.adapter.submit_load_task(wanted, memory.take(2))
    asked.adapter.close()
    assert daemon.leases() == []
    assert asked.adapter.query_load_result(task) is not None


def test_parameters_that_it_does_not_know_are_refused():
    with pytest.raises(ConfigError, match="lock_secnods"):
        Asked(DaemonProcess(), lock_secnods=3)


def test_what_lmcache_had_in_its_own_memory_was_used_all_the_same(daemon, asked, memory):
    """It looks up what it has itself, and unlocks it: that must not look as if nobody wanted it."""
    wanted = keys(1)
    assert asked.store(wanted, memory.filled(wanted))
    until_durable(daemon, wanted)
    daemon.restart_cold()
    until(lambda: asked.look_up(wanted) == [0], "it is connected again")
    before = daemon.client().document(name_of(wanted[0])).use_count
    asked.adapter.submit_unlock(wanted)
    until(lambda: daemon.client().document(name_of(wanted[0])).use_count > before, "it is used")
    assert daemon.used("ddr") == 0  # nobody read it


def test_what_is_there_is_listed_in_pages(start, memory):
    asked = start()
    made = keys(*range(5)) + keys(5, salt="alice") + keys(6, 7, model="hub/other")
    for one in made:
        assert asked.store([one], memory.filled([one]))
    fresh = start().adapter  # of a server that has just been started

    def listed(page_size, model=None):
        found, cursor = [], None
        while True:
            page = fresh.list_l2_keys(model, page_size, cursor)
            found += page.entries
            cursor = page.next_page_token
            if cursor is None:
                return {entry.key.to_object_key(): entry.size_bytes for entry in found}, len(found)
            assert len(page.entries) == page_size

    sizes = dict.fromkeys(made, SIZE_BYTES)
    for page_size in (1, 3, 5, 500):
        assert listed(page_size) == (sizes, 8)
    assert listed(2, "hub/other") == (dict.fromkeys(made[6:], SIZE_BYTES), 2)
    with pytest.raises(ValueError, match="page"):
        fresh.list_l2_keys(page_size=0)
    with pytest.raises(ValueError, match="nonsense"):
        fresh.list_l2_keys(cursor="nonsense")
    until(lambda: fresh.get_usage().total_bytes_used == 8 * SIZE_BYTES, "they are counted")


@pytest.mark.parametrize("wanted", [key(1), key(1, salt="alice")], ids=["plain", "salted"])
def test_deleted_objects_are_gone_and_locked_ones_stay(daemon, asked, memory, wanted):
    assert asked.store([wanted], memory.filled([wanted]))
    assert asked.look_up([wanted]) == [0]
    asked.adapter.delete([wanted])
    assert asked.heard.deleted == []
    asked.adapter.submit_unlock([wanted])
    until(lambda: not daemon.leases(), "unlocked")
    asked.adapter.delete([wanted, key(99)])
    assert asked.heard.deleted == [wanted]
    assert asked.look_up([wanted]) == []
    assert asked.adapter.get_usage().bytes_by_cache_salt == {}


def test_a_server_deletes_what_another_one_stored(start, memory):
    before, after = start(), start()
    made = keys(1, kv_rank=0x02000200) + keys(1, kv_rank=0x02010201) + keys(2, kv_rank=0x02010201)
    assert before.store(made, memory.filled(made))
    after.adapter.delete(made[:2])
    assert after.heard.deleted == made[:2]
    assert after.look_up(made) == [2]
