"""A link to a daemon that goes away, comes back, and is too slow."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest
from holdfast.engine_adapter.api import connect
from holdfast.engine_adapter.link import Link
from holdfast.kvstore.errors import DaemonUnavailable, DeadlineExceeded

from daemon_process import DaemonProcess, until


def link_to(daemon: DaemonProcess, news: list) -> Link:
    return Link(lambda: connect(daemon.socket), on_change=news.append, retry_seconds=0.02, rest_seconds=60.0)


def used(link: Link) -> bool:
    with suppress(DaemonUnavailable), link.use() as store:
        return store.tiers() != []
    return False


def test_it_comes_back_with_its_daemon_and_says_each_change_once():
    news: list = []
    with DaemonProcess() as daemon:
        link = link_to(daemon, news)
        try:
            until(lambda: news, "it says that nobody is there")
            with pytest.raises(DaemonUnavailable, match="go on without the cache"), link.use():
                pass
            daemon.start()
            assert link.wait(20.0)
            assert used(link)
            daemon.kill()
            until(lambda: len(news) == 3, "it notices")
            assert not used(link)
            daemon.start()
            until(lambda: used(link), "it is back")
            assert [reason is None for reason in news] == [False, True, False, True]
        finally:
            link.close()
        assert not link.is_up
        assert len(news) == 4  # our own goodbye is no news


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("can't start new thread")], ids=str)
def test_a_process_without_descriptors_or_threads_is_connected_when_it_has_some_again(error):
    errors, news = [error], []

    def connecting():
        if errors:
            raise errors.pop()
        return SimpleNamespace(is_open=True, close=lambda: None)

    link = Link(connecting, on_change=news.append, retry_seconds=0.02)
    try:
        assert link.wait(20.0)
    finally:
        link.close()
    assert str(error) in news[0].message
    assert news[1] is None


def test_a_daemon_that_has_just_died_is_not_called_slow():
    store = SimpleNamespace(is_open=True, close=lambda: None)
    link = Link(lambda: store, retry_seconds=1000.0)  # it does not look again
    try:
        assert link.wait(20.0)
        store.is_open = False
        with pytest.raises(DaemonUnavailable, match="went away"), link.use():
            pass
    finally:
        link.close()


def test_a_connection_is_closed_when_its_last_user_leaves():
    news: list = []
    with DaemonProcess() as daemon:
        daemon.start()
        link = link_to(daemon, news)
        assert link.wait(20.0)
        with link.use() as first, link.use() as same:
            assert first is same
            closer = threading.Thread(target=link.close)
            closer.start()
            until(lambda: not link.is_up, "it is closed for others")
            closer.join()
            assert first.tiers()  # still ours
        assert not first.is_open


def test_a_deadline_costs_one_wait_and_not_one_a_request():
    news: list = []
    with DaemonProcess() as daemon:
        daemon.start()
        link = link_to(daemon, news)
        assert link.wait(20.0)
        with pytest.raises(DeadlineExceeded), link.use():
            raise DeadlineExceeded("slow")
        assert not link.is_up
        with pytest.raises(DaemonUnavailable, match="too slow"), link.use():
            pass
        link.close()
