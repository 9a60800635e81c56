"""The daemon's arena from start to stop: real processes, and real mounts where they are allowed."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import pytest
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import HoldfastError
from holdfast.kvstore.machine import Machine, mount_huge_tmpfs, unmount

from arena_faults import SlowToShare, Stuck, full, refused_mount
from daemon_process import DaemonProcess, durable, fetch, put, until
from fakes import tiny_spec

SLABS = 16  # of 64 KiB, see daemon_process


@pytest.fixture
def daemon():
    with DaemonProcess() as daemon:
        yield daemon


@pytest.fixture
def mountable(tmp_path):
    try:
        mount_huge_tmpfs(tmp_path, 1 << 20)
    except OSError as error:
        pytest.skip(f"mounting is refused here: {error.strerror}")
    unmount(tmp_path)


def slabs(directory):
    return sorted(path.name for path in directory.rglob("slab-*"))


def reason(daemon):
    """Why it is not ready; None while it cannot be asked."""
    try:
        return daemon.rest().get("/v1/status")["not_ready"]
    except HoldfastError:
        return None


def test_it_is_ready_when_every_slab_is_made_and_says_how_far_it_is(daemon):
    go = daemon.directory / "go"
    daemon.spawn(Stuck(go))
    until(lambda: reason(daemon) == "starting: pre-faulting 31 %", "it waits with 5 of 16 slabs")
    with pytest.raises(HoldfastError, match="starting: pre-faulting 31 %"):
        daemon.rest().get("/readyz")
    assert len(slabs(daemon._shared)) == 5
    assert not daemon.socket.exists()
    until(lambda: "pre-faulting" in daemon.events(), "progress is logged")
    go.touch()
    until(daemon._is_ready, "it is ready")
    assert len(slabs(daemon._shared)) == SLABS
    assert daemon.socket.exists()
    assert daemon.stop() == 0
    assert list(daemon._shared.iterdir()) == []


def test_sigterm_while_slabs_are_made_ends_it_and_leaves_nothing(daemon):
    go = daemon.directory / "go"
    daemon.settings["ddr.on_stop"] = "keep"
    daemon.spawn(Stuck(go))
    until(lambda: reason(daemon) == "starting: pre-faulting 31 %", "it waits")
    daemon.terminate()
    until(lambda: reason(daemon) == "stopping", "it has noticed")
    go.touch()
    assert daemon.wait() == 0
    assert len(go.with_name("made").read_text().split()) < SLABS, "it began more slabs only to remove them"
    assert list(daemon._shared.iterdir()) == []
    assert "ready" not in daemon.events()


def test_slabs_that_cannot_be_made_end_the_start_and_leave_nothing(daemon):
    daemon.spawn(full)
    assert daemon.wait() == 1
    assert "error: storage-failed: slab " in daemon.log_text()
    assert "No space left on device; lower ddr.capacity_bytes" in daemon.log_text()
    assert list(daemon._shared.iterdir()) == []
    assert {path.name for path in daemon.data_dir.iterdir()}.isdisjoint({"rest.json", "holdfast.sock"})


def test_more_memory_than_there_is_ends_the_start_at_once(daemon):
    daemon.settings["ddr.capacity_bytes"] = "512 TiB"
    daemon.spawn()
    assert daemon.wait() == 1
    assert "error: config-error: ddr.capacity_bytes = 512 TiB (flag ddr.capacity_bytes)" in daemon.log_text()
    assert list(daemon._shared.iterdir()) == []


def test_descriptors_of_a_client_that_has_gone_are_closed(daemon):
    go = daemon.directory / "go"
    client = daemon.start(SlowToShare(go)).client()
    parts = client.begin_ingest("report", tiny_spec().fingerprint(), [1] * 32).parts

    def shared():
        """The slabs that the daemon's descriptors are of."""
        found = []
        for path in Path(f"/proc/{daemon.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since
                found.append(path.readlink().name)
        return sorted(name for name in found if name.startswith("slab-"))

    before = shared()

    def ask():
        with suppress(HoldfastError):
            client.view(parts[0])

    asking = threading.Thread(target=ask)
    asking.start()
    until((daemon.directory / "asked").exists, "the daemon has opened it")
    client.close()
    asking.join()
    until(lambda: daemon.used("ddr") == 0, "the daemon knows that the client is gone")
    assert len(shared()) == len(before) + 1
    go.touch()
    until(lambda: shared() == before, "it is closed again")


def test_auto_is_a_mount_of_our_own_that_outlives_a_kill_and_goes_with_a_stop(mountable):
    with DaemonProcess(ddr__directory="auto") as daemon:
        at = daemon.data_dir / "arena"
        client = daemon.start().client()
        content = put(client, "report", 100)
        until(lambda: durable(client, "report"), "it is durable")
        assert daemon.rest().get("/v1/status")["ddr_backing"] == f"tmpfs, huge pages (huge=always), at {at}"
        daemon.kill()
        assert at.is_mount()
        assert len(slabs(at)) == SLABS
        daemon.start()
        assert sum(mount.at == at for mount in Machine().mounts()) == 1
        assert len(slabs(at)) == SLABS
        assert fetch(daemon.client(), "report") == content
        assert daemon.stop() == 0
        assert not at.exists()


def test_kept_slabs_are_named_with_what_frees_them(mountable):
    with DaemonProcess(ddr__directory="auto", ddr__on_stop="keep") as daemon:
        at = daemon.data_dir / "arena"
        put(daemon.start().client(), "report", 64, WritePolicy.MEMORY)
        assert daemon.stop() == 0
        assert at.is_mount()
        assert len(slabs(at)) == 1, "what holds nothing is not kept"
        (line,) = (line for line in daemon.log_text().splitlines() if "slabs are left" in line)
        assert f'"size_bytes": {64 << 10}' in line
        assert f'"free_with": "umount {at}"' in line
        daemon.settings["ddr.on_stop"] = "free"
        assert daemon.start().stop() == 0
        assert not at.exists()


def test_where_it_may_not_mount_it_serves_from_shared_memory_and_warns():
    with DaemonProcess(ddr__directory="auto") as daemon:
        daemon.start(refused_mount)
        backing = daemon.rest().get("/v1/status")["ddr_backing"]
        assert "at /dev/shm/holdfast-" in backing
        directory = Path(backing.rpartition(" at ")[2])
        assert len(slabs(directory)) == SLABS
        assert daemon.stop() == 0
        assert not directory.exists()
        assert "mount -t tmpfs -o huge=always" in daemon.log_text()
