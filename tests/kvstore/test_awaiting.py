"""Attaches that come before their document, at a real daemon."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from holdfast.kvstore.errors import DeadlineExceeded, DocumentNotFound, InvalidRequest, NoCapacity

from daemon_clients import awaits, client_process
from daemon_process import DaemonProcess, fetch, put, until
from fakes import tiny_spec


@pytest.fixture
def daemon():
    with DaemonProcess(limits__pending_reservations="1") as found:
        yield found.start()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as found:
        yield found


def waiting(client, pool, name="report", seconds=20.0):
    """An attach that waits by now."""
    asked = pool.submit(client.attach, name, wait_seconds=seconds)
    until(lambda: asked.done() or client._connection._waiting, "it has asked")
    client.tiers()  # answered behind it
    return asked


def test_it_is_answered_when_the_document_is_published(daemon, pool):
    reader = daemon.client()
    asked = waiting(reader, pool)
    assert not asked.done()
    content = put(daemon.client(), "report", 100)
    attached = asked.result(20)
    assert attached.token_count == 100
    reader.detach(attached.lease)
    assert fetch(reader, "report") == content
    assert reader.attach("report", wait_seconds=1.0).token_count == 100


def test_it_ends_with_the_ingest_or_at_the_deadline(daemon, pool):
    reader, writer = daemon.client(), daemon.client()
    with pytest.raises(DeadlineExceeded, match="not published in time"):
        reader.attach("report", wait_seconds=0.05)
    asked = waiting(reader, pool)
    opened = writer.begin_ingest("report", writer.register_spec(tiny_spec()), [1] * 40)
    writer.abort_ingest(opened.ingest)
    with pytest.raises(DocumentNotFound, match="ended without it"):
        asked.result(20)
    with pytest.raises(InvalidRequest):
        reader.attach("report", wait_seconds=10**5)


def test_a_client_that_dies_leaves_no_waiter(daemon, pool):
    """Only one may wait here, so the next could not."""
    other = daemon.client()
    with client_process(awaits, daemon.socket, "report") as process:
        until(lambda: is_refused(other), "the place is taken")
        process.kill()
    until(lambda: not is_refused(other), "the place is free again")


def is_refused(client):
    try:
        client.attach("report", wait_seconds=0.01)
    except NoCapacity:
        return True
    except DeadlineExceeded:
        return False
    raise AssertionError
