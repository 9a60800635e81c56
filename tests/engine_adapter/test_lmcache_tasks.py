"""Tasks are done on few threads, told through a descriptor, and always come to an end."""

from __future__ import annotations

import os
import select
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from holdfast.engine_adapter.lmcache import tasks as module
from holdfast.engine_adapter.lmcache.tasks import Tasks
from holdfast.kvstore.errors import DaemonUnavailable


class Eventfd:
    def __init__(self):
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK)

    def notify(self):
        os.eventfd_write(self._descriptor, 1)

    def fileno(self):
        return self._descriptor

    def close(self):
        os.close(self._descriptor)


@pytest.fixture
def heard():
    return []


@pytest.fixture
def tasks(heard):
    with ThreadPoolExecutor(1) as pool:
        made = Tasks(pool, Eventfd(), heard.append)
        yield made
    made.close()


def done(tasks, number):
    """The outcome, as soon as the descriptor says that something is done."""
    while (outcome := tasks.pop(number)) is None:  # one signal may have told of several
        readable, _, _ = select.select([tasks.descriptor], [], [], 20)
        assert readable
        os.eventfd_read(tasks.descriptor)
    return outcome


def test_an_outcome_is_fetched_once(tasks):
    number = tasks.submit(lambda: "done", "failed")
    assert done(tasks, number) == "done"
    assert tasks.pop(number) is None
    assert tasks.waiting == 0


@pytest.mark.parametrize("error", [DaemonUnavailable("gone"), ZeroDivisionError()])
def test_what_fails_ends_too(tasks, heard, error):
    def work():
        raise error

    assert done(tasks, tasks.submit(work, "failed")) == "failed"
    assert heard == [error]


def test_too_many_fail_at_once(tasks, monkeypatch):
    monkeypatch.setattr(module, "WAITING_MAX", 2)
    gate = threading.Event()
    first, second = (tasks.submit(gate.wait, "failed") for _ in range(2))
    third = tasks.submit(gate.wait, "failed")
    assert tasks.pop_all() == {third: "failed"}
    gate.set()
    assert done(tasks, first) is True
    assert done(tasks, second) is True


def test_when_stopped_what_has_not_begun_fails(tasks):
    gate, begun = threading.Event(), threading.Event()
    first = tasks.submit(lambda: begun.set() or gate.wait(), "failed")
    second = tasks.submit(gate.wait, "failed")
    assert begun.wait(20)
    tasks.stop()
    gate.set()
    assert done(tasks, first) is True
    assert done(tasks, second) == "failed"


def test_outcomes_that_nobody_fetches_are_few(tasks, monkeypatch):
    monkeypatch.setattr(module, "KEPT_MAX", 2)
    numbers = [tasks.submit(lambda: "done", "failed") for _ in range(4)]
    assert done(tasks, numbers[3]) == "done"
    assert [tasks.pop(number) for number in numbers] == [None, None, "done", None]
