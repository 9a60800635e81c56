"""Locks hold leases from a lookup to its unlock, by key and by lookup, and never longer than their time."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
from holdfast.engine_adapter.lmcache.locks import Locks

PATIENCE_SECONDS = 20.0


class Lease(ExitStack):
    """Leases that say when they end."""

    def __init__(self):
        super().__init__()
        self.ended = threading.Event()
        self.ends = 0
        self.callback(self._end)

    def _end(self):
        self.ends += 1
        self.ended.set()


@pytest.fixture
def locks():
    made = Locks(lambda work: work())
    yield made
    made.close()


def held(locks, *keys):
    lease = Lease()
    locks.hold(lease, {key: memoryview(key.encode()) for key in keys})
    return lease


def read(locks, key):
    with locks.reading(key) as view:
        return None if view is None else bytes(view)


def test_a_lease_ends_with_the_last_unlock(locks):
    lease = held(locks, "a", "b")
    locks.unlock(["a"])
    assert not lease.ended.is_set()
    locks.unlock(["b", "nobody's"])
    assert lease.ends == 1
    assert locks.count == 0


def test_a_lease_ends_when_all_is_read_because_it_keeps_memory_from_what_comes_next(locks):
    lease = held(locks, "a", "b")
    assert read(locks, "a") == b"a"
    assert not lease.ended.is_set()
    assert read(locks, "b") == b"b"
    assert lease.ends == 1
    assert read(locks, "a") is None  # it is over
    locks.unlock(["a", "b"])
    assert lease.ends == 1
    assert locks.count == 0


def test_each_lookup_holds_for_itself(locks):
    first, second = held(locks, "a"), held(locks, "a")
    assert read(locks, "a") == b"a"
    assert first.ended.is_set()
    locks.unlock(["a"])  # of the one that has been read
    assert not second.ended.is_set()
    assert read(locks, "a") == b"a"
    locks.unlock(["a"])
    assert second.ends == 1
    assert locks.count == 0


def test_what_is_being_read_is_not_given_up(locks):
    lease = held(locks, "a")
    with locks.reading("a") as view:
        locks.unlock(["a"])
        assert not lease.ended.is_set()
        assert bytes(view) == b"a"
    assert lease.ends == 1


def test_all_are_given_up_for_want_of_room_but_what_is_being_read(locks):
    read_now, waiting = held(locks, "a", "b"), held(locks, "a")
    with locks.reading("a") as view:
        locks.give_up()
        assert waiting.ended.is_set()
        assert not read_now.ended.is_set()
        assert bytes(view) == b"a"
    assert read_now.ends == 1
    assert [read(locks, key) for key in ("a", "b")] == [None, None]
    locks.unlock(["a", "b", "a"])
    assert locks.count == 0
    assert (read_now.ends, waiting.ends) == (1, 1)


def test_a_lookup_that_found_nothing_in_reach_holds_nothing(locks):
    lease = Lease()
    locks.hold(lease, {})
    assert lease.ends == 1


def test_locks_end_by_themselves():
    locks = Locks(lambda work: work(), lock_seconds=0.01)
    lease = held(locks, "a", "b")
    assert lease.ended.wait(PATIENCE_SECONDS)
    assert locks.count == 0
    locks.unlock(["a", "b"])
    locks.close()
    assert lease.ends == 1


def test_closing_gives_all_up(locks):
    leases = [held(locks, "a"), held(locks, "a", "b")]
    locks.close()
    assert [lease.ends for lease in leases] == [1, 1]
    assert locks.count == 0
