"""Documents that grow, at real daemons that are killed: a durable version is whole until the longer one is durable."""

import pytest
from holdfast.kvstore.document import WritePolicy

from daemon_process import DaemonProcess, durable, expected, fetch, put, tokens_of, until

LONG = tokens_of("talk", 90)


@pytest.fixture
def daemon():
    with DaemonProcess() as found:
        yield found.start()


def findings(daemon):
    found = daemon.rest().post("/v1/check", {"data": True, "deadline_seconds": 20})
    assert found["state"] == "done"
    return found["findings"]


def grow(client, policy):
    """From 50 tokens, durable, to 90."""
    put(client, "talk", 50, tokens=LONG[:50])
    until(lambda: durable(client, "talk"), "it is durable")
    put(client, "talk", 90, policy, tokens=LONG)
    assert client.document("talk").token_count == 90


def test_a_version_that_is_only_in_memory_is_found_there_and_lost_with_it(daemon):
    """After a kill the longer one is there; after a reboot the durable one, bit-exact; a check finds nothing amiss."""
    grow(daemon.client(), WritePolicy.MEMORY)
    assert not findings(daemon)
    for _ in range(2):
        daemon.kill()
        client = daemon.start().client()
        assert client.document("talk").token_count == 90
        assert fetch(client, "talk") == expected("talk", 90)
        assert not findings(daemon)
    daemon.kill()
    daemon.cool()
    client = daemon.start().client()
    assert client.document("talk").token_count == 50
    assert fetch(client, "talk") == expected("talk", 50)
    put(client, "talk", 90, tokens=LONG)
    client.delete("talk")
    until(lambda: not daemon.used("ddr") + daemon.used("nvme"), "all bytes are free")
    assert not findings(daemon)


def test_a_durable_version_replaces_the_one_before(daemon):
    client = daemon.client()
    grow(client, WritePolicy.AUTO)
    until(lambda: durable(client, "talk"), "the longer one is durable")
    until(lambda: daemon.used("nvme") == 3 << 14, "what it replaced is gone")
    assert not findings(daemon)
    daemon.kill()
    daemon.cool()
    client = daemon.start().client()
    assert fetch(client, "talk") == expected("talk", 90)
