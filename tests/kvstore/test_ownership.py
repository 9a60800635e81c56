"""The NVMe directory knows its catalog: nothing durable is written off because a disk is not mounted."""

import pytest
from holdfast.kvstore.errors import StorageFailed
from holdfast.kvstore.ownership import OWNER_NAME, claim

from daemon_process import DaemonProcess, durable, fetch, put, until


def test_a_new_directory_is_claimed_once_and_for_all(tmp_path):
    claim(tmp_path, "one", 0)
    assert (tmp_path / OWNER_NAME).read_text() == "one\n"
    claim(tmp_path, "one", 7)
    with pytest.raises(StorageFailed, match="another catalog"):
        claim(tmp_path, "two", 0)
    assert [path.name for path in tmp_path.iterdir()] == [OWNER_NAME]


def test_a_directory_without_segments_is_not_taken_for_one_that_lost_them(tmp_path):
    with pytest.raises(StorageFailed, match=r"7 extents on NVMe.*mount the disk.*check --fix"):
        claim(tmp_path, "one", 7)
    assert not list(tmp_path.iterdir())
    (tmp_path / "segment-0").touch()  # of a daemon that wrote no owner yet
    claim(tmp_path, "one", 7)


def test_a_disk_that_is_not_mounted_stops_the_start_and_loses_nothing(tmp_path):
    with DaemonProcess() as daemon:
        client = daemon.start().client()
        content = put(client, "report", 100)
        until(lambda: durable(client, "report"), "it is durable")
        daemon.stop()
        right = daemon.data_dir / "nvme"
        daemon.settings["nvme.directory"] = str(tmp_path)
        daemon.spawn()
        assert daemon.wait() == 1
        assert "mount the disk, or set nvme.directory" in daemon.log_text()
        daemon.settings["nvme.directory"] = str(right)
        assert fetch(daemon.start().client(), "report") == content


def test_a_loss_is_logged():
    with DaemonProcess(ddr__on_stop="free") as daemon:
        client = daemon.start().client()
        put(client, "report", 100)
        until(lambda: durable(client, "report"), "it is durable")
        daemon.stop()
        (daemon.data_dir / "nvme" / "segment-0").write_bytes(bytes(1 << 18))
        client = daemon.start().client()
        with pytest.raises(Exception, match="tokens"):
            fetch(client, "report")
        until(lambda: any("lost or not kept" in event for event in daemon.events()), "it is logged")
