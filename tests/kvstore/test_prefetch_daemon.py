"""Hints over the socket of a real daemon: bytes are there before their query, and hints end with their connection."""

import pytest
from holdfast.kvstore.client import Client
from holdfast.kvstore.errors import DocumentNotFound, GroupNotFound

from daemon_process import DaemonProcess, fetch, put, until


def states(daemon):
    found = daemon.rest().get("/v1/hints")
    return {h["document"]: h["state"] for h in found["hints"]}, [h["state"] for h in found["ended"]]


def test_what_was_announced_is_there_when_it_is_asked_for():
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        wanted = {name: put(client, name, 100) for name in ("a", "b")}
        for name in wanted:
            client.free(name)
            hint = client.prefetch(name, queries=2, deadline_seconds=60.0, owner="test")
            assert (hint.document, hint.queries, hint.owner, hint.target) == (name, 2, "test", "ddr")
        until(lambda: set(states(daemon)[0].values()) == {"promoted"}, "both are near")
        assert {name: fetch(client, name) for name in wanted} == wanted
        assert [swap["moved_bytes"] for swap in daemon.swaps()] == [0, 0]
        assert states(daemon) == ({}, ["used", "used"])
        assert daemon.metric("holdfast_hints_in_time_total") == 2


def test_hints_go_with_their_connection_and_by_their_owners_word():
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        for name in ("a", "b"):
            put(client, name, 100)
        other = Client(daemon.socket)
        other.prefetch("a")
        client.prefetch("b")
        client.cancel_prefetch("b")
        client.cancel_prefetch("b")
        other.close()
        until(lambda: states(daemon) == ({}, ["cancelled", "cancelled"]), "both are over")
        with pytest.raises(DocumentNotFound):
            client.prefetch("nobody")
        with pytest.raises(GroupNotFound):
            client.prefetch("a", group="nobody")
