"""Pins and leases of a real daemon: what an answered pin outlives, and what becomes of a holder that hangs."""

import pytest
from holdfast.kvstore.errors import InUse

from daemon_clients import client_process, holds_lease
from daemon_process import DaemonProcess, durable, put, until


def test_a_pin_that_was_answered_survives_a_kill_and_so_does_its_document():
    """Its kind, its life and what refreshes it; and one that was answered as ended does not come back."""
    with DaemonProcess() as process:
        client = process.start().client()
        for name in ("hard", "soft", "ended"):
            put(client, name, 64)
        client.pin("hard", "nvme", owner="ops", reason="audit")
        client.pin("soft", kind="soft", ttl_seconds=3600, refresh="hit")
        client.pin("ended")
        client.unpin("ended")
        for name in ("hard", "soft"):
            until(lambda name=name: durable(client, name), "it is durable")
        client = process.restart().client()  # it is killed
        hard, soft = client.pins()
        assert (hard.document, hard.tier, hard.kind, hard.owner, hard.reason) == (
            "hard",
            "nvme",
            "hard",
            "ops",
            "audit",
        )
        assert (soft.document, soft.kind, soft.refresh, soft.ttl_seconds, soft.strength) == (
            "soft",
            "soft",
            "hit",
            3600,
            1,
        )
        assert 0 < soft.remaining_seconds < 3600


def test_a_lease_whose_holder_hangs_is_shown_and_named_until_its_process_has_ended():
    """It is alive, so it may still look; the moment it is gone its bytes are free."""
    with DaemonProcess(limits__lease_seconds="0.01") as process:
        client = process.start().client()
        put(client, "report", 100)
        with client_process(holds_lease, process.socket, "report") as holder:
            holder.hear()
            until(lambda: process.leases()[0]["overdue"], "the lease is overdue")
            (lease,) = process.leases()
            assert lease["pid"] == holder.process.pid
            assert process.metric("holdfast_leases_overdue") == 1
            with pytest.raises(InUse) as refused:
                client.delete("report")
            (told,) = refused.value.holders
            assert (told.kind, told.owner) == ("lease", f"client {lease['client']} (pid {lease['pid']})")
            holder.kill()
        until(lambda: not process.leases(), "the lease ends with its process")
        client.delete("report")
