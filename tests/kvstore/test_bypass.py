"""The bypass: one switch, and nobody finds, reads or stores KV, until it is turned back."""

from __future__ import annotations

import pytest
from holdfast.kvstore.errors import Bypassed

from daemon_process import DaemonProcess, fetch, put, tokens_of
from fakes import tiny_spec

FINGERPRINT = tiny_spec().fingerprint()


@pytest.fixture
def daemon():
    with DaemonProcess() as daemon:
        yield daemon.start()


def turn_on(daemon, reason="wrong answers"):
    return daemon.rest().put("/v1/bypass", {"reason": reason})


def asked(client):
    """Whatever an engine may ask."""
    tokens = tokens_of("report", 64)
    return (
        lambda: client.lookup_tokens(FINGERPRINT, tokens),
        lambda: client.lookup(FINGERPRINT, b""),
        lambda: client.attach("report"),
        lambda: client.begin_ingest("other", FINGERPRINT, tokens),
        lambda: client.objects.find("space", [b"key"]),
    )


def test_all_are_refused_and_served_again(daemon):
    client = daemon.client()
    content = put(client, "report", 64)
    assert turn_on(daemon)["on"]
    for ask in asked(client):
        with pytest.raises(Bypassed, match="wrong answers"):
            ask()
    assert daemon.rest().get("/v1/bypass")["refused"] == 5
    assert daemon.rest().get("/v1/status")["bypassed"]
    assert daemon.metric("holdfast_bypassed_total") == 5
    assert not daemon.rest().delete("/v1/bypass")["on"]
    assert fetch(client, "report") == content


def test_who_reads_goes_on_reading(daemon):
    client = daemon.client()
    put(client, "report", 64)
    attached = client.attach("report")
    turn_on(daemon)
    assert client.wait_layers(attached.lease, 1) >= 1
    client.detach(attached.lease)


def test_people_still_look_and_tidy_up(daemon):
    client = daemon.client()
    put(client, "report", 64)
    turn_on(daemon)
    assert [view.name for view in client.documents()] == ["report"]
    client.delete("report")
    assert client.documents() == []


def test_it_outlives_the_daemon(daemon):
    first = turn_on(daemon)
    daemon.restart()
    found = daemon.rest().get("/v1/bypass")
    assert (found["on"], found["reason"], found["since_wall_ns"]) == (True, "wrong answers", first["since_wall_ns"])
    with pytest.raises(Bypassed):
        daemon.client().lookup(FINGERPRINT, b"")
    daemon.rest().delete("/v1/bypass")
    daemon.restart()
    assert not daemon.rest().get("/v1/bypass")["on"]
