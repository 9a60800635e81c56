"""A real daemon on a device that has no room for another segment: an eviction, not a crash."""

from holdfast.kvstore.document import WritePolicy

from daemon_faults import Full
from daemon_process import DaemonProcess, durable, fetch, put, tiny_spec, until


def nvme(daemon):
    """The tier as people see it."""
    return next(tier for tier in daemon.rest().get("/v1/tiers")["tiers"] if tier["tier"] == "nvme")


def test_documents_evict_each_other_in_the_one_segment_that_could_be_made():
    """What is newest is durable and reads back, the capacity says what is missing, and the daemon goes on."""
    with DaemonProcess(nvme__high_watermark="1", nvme__low_watermark="1") as daemon:  # they would free some of it
        armed = daemon.directory / "armed"
        daemon.start(Full(armed))
        client = daemon.client()
        client.register_spec(tiny_spec())
        kept = {"first": put(client, "first", 32 * 16)}
        until(lambda: durable(client, "first"), "the segment is full")
        armed.touch()
        client.free("first", "nvme")
        for name in ("second", "third"):
            kept[name] = put(client, name, 32 * 8)
            until(lambda name=name: durable(client, name), f"{name} is durable")
        assert nvme(daemon)["capacity_bytes"] == nvme(daemon)["used_bytes"] == 256 << 10
        assert nvme(daemon)["withdrawn_bytes"] == (4 << 20) - (256 << 10)
        daemon.kill()
        daemon.start(Full(armed))
        client = daemon.client()
        assert fetch(client, "third") == kept["third"]
        assert nvme(daemon)["written_bytes"]["write-through"] == 32 * 16384
        client.close()


def test_on_a_device_without_any_room_documents_are_in_memory():
    with DaemonProcess() as daemon:
        armed = daemon.directory / "armed"
        armed.touch()
        daemon.start(Full(armed))
        client = daemon.client()
        client.register_spec(tiny_spec())
        kept = put(client, "a", 32 * 4)
        until(lambda: nvme(daemon)["capacity_bytes"] == 0, "the tier knows")
        put(client, "b", 32 * 4, WritePolicy.BACK)
        assert not durable(client, "a")
        assert fetch(client, "a") == kept
        until(lambda: not daemon.rest().get("/v1/status")["writes_queued"], "nothing spins")
        client.close()
