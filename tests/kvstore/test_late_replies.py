"""Replies that nobody waits for any more: what they gave is given back, without waiting for the connection's end."""

import os
import signal

import pytest
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.objects import PutStatus
from holdfast.kvstore.errors import DeadlineExceeded, InUse

from daemon_process import DaemonProcess, put, until
from fakes import tiny_spec


@pytest.fixture
def daemon():
    with DaemonProcess() as found:
        yield found.start()


def too_late(daemon, client, ask):
    """Ask while the daemon stands still, and do not wait for the answer."""
    connection = client._connection
    call = connection.call
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        connection.call = lambda body, _: call(body, 0.01)
        with pytest.raises(DeadlineExceeded, match="not answered within"):
            ask()
    finally:
        connection.call = call
        os.kill(daemon.pid, signal.SIGCONT)
    client.tiers()  # was read behind it


def works(ask, *refusals):
    """Whether it is not refused like that."""

    def tried():
        try:
            ask()
        except refusals:
            return False
        return True

    return tried


def test_a_lease_is_given_back(daemon):
    late, other = daemon.client(), daemon.client()
    put(other, "report", 100)
    uses = other.document("report").use_count
    too_late(daemon, late, lambda: late.attach("report"))
    until(lambda: other.document("report").use_count > uses, "it was leased")
    until(works(lambda: other.delete("report"), InUse), "the lease has ended")
    assert late.is_open


def test_an_ingest_is_dropped(daemon):
    late, other = daemon.client(), daemon.client()
    fingerprint = late.register_spec(tiny_spec())
    too_late(daemon, late, lambda: late.begin_ingest("report", fingerprint, [1] * 40))
    until(works(lambda: other.begin_ingest("report", fingerprint, [1] * 40), InUse), "it was dropped")


def test_objects_are_let_go(daemon):
    late, objects = daemon.client(), Store(daemon.client()).objects("ns")
    too_late(daemon, late, lambda: late.objects.begin_put("ns", [(b"a", 10)]))
    until(lambda: objects.put([(b"a", bytes(10))])[0].status is PutStatus.STORED, "the put was dropped")
    too_late(daemon, late, lambda: late.objects.get("ns", [b"a"]))
    until(lambda: objects.stats().hits == 1, "it was leased")
    until(lambda: objects.delete([b"a"]) == [True], "the lease has ended")
