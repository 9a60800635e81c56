"""Where the arena lies: real mounts where we may, made-up ones for what this machine does not have."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from holdfast.kvstore import backing as backing_module
from holdfast.kvstore.backing import configured, open_backing
from holdfast.kvstore.errors import ConfigError, StorageFailed
from holdfast.kvstore.machine import Machine, Mount, mount_huge_tmpfs, unmount

from fakes import tiny_config

SLAB = 64 << 10
MIB = 1 << 20


class Made(Machine):
    """This machine, but for what a test says."""

    def __init__(self, *, memory=64 << 30, mounts=None, may_mount=False, policy="never", huge_pages=0):
        super().__init__()
        self.memory, self.made_mounts, self.mountable, self.policy = memory, mounts, may_mount, policy
        self.huge_pages = huge_pages

    def available_memory(self):
        return self.memory

    def mounts(self):
        return super().mounts() if self.made_mounts is None else self.made_mounts

    def may_mount(self):
        return self.mountable

    def shmem_policy(self):
        return self.policy

    def free_huge_pages(self, page_bytes):
        assert page_bytes == 2 << 20
        return self.huge_pages


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """What stands for /dev/shm."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(backing_module, "SHARED_MEMORY", tmp_path / "shm")
    return tmp_path / "shm"


@pytest.fixture
def data_dir(tmp_path, shared):
    """A daemon's data directory; what is mounted in it is unmounted."""
    (tmp_path / "data").mkdir()
    yield tmp_path / "data"
    while (tmp_path / "data" / "arena").is_mount():
        unmount(tmp_path / "data" / "arena")


@pytest.fixture
def mountable(tmp_path):
    (tmp_path / "try").mkdir()
    try:
        mount_huge_tmpfs(tmp_path / "try", MIB)
    except OSError as error:
        pytest.skip(f"mounting is refused here: {error.strerror}")
    unmount(tmp_path / "try")


def of(data_dir, **overrides):
    return tiny_config(daemon__data_dir=str(data_dir), **overrides)


def slab(directory, name="slab-0-1"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(b"x" * SLAB)
    (directory / name).chmod(0o600)
    return directory / name


def device(monkeypatch, *, free_bytes, block_bytes=4096, blocks=1000):
    found = SimpleNamespace(
        f_bavail=free_bytes // block_bytes, f_frsize=block_bytes, f_bsize=block_bytes, f_blocks=blocks
    )
    monkeypatch.setattr(os, "statvfs", lambda _: found)


# The operator's choice -------------------------------------------------------------------------


def test_a_named_directory_is_used_by_each_daemon_for_itself(tmp_path, data_dir):
    (tmp_path / "named").mkdir()
    (tmp_path / "other").mkdir()
    first = open_backing(of(data_dir, ddr__directory=str(tmp_path / "named")), Made(may_mount=True))
    second = open_backing(of(tmp_path / "other", ddr__directory=str(tmp_path / "named")), Made())
    assert first.directory.parent == second.directory.parent == tmp_path / "named"
    assert first.directory != second.directory
    again = open_backing(of(data_dir / ".." / "data", ddr__directory=str(tmp_path / "named")), Made())
    assert again == first
    assert not first.is_own_mount
    assert first.free_command == f"rm -r {first.directory}"
    first.release()
    assert list((tmp_path / "named").iterdir()) == list(data_dir.iterdir()) == []


def test_a_named_directory_that_cannot_be_used_is_refused(tmp_path, data_dir, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("absent", "file"):
        with pytest.raises(StorageFailed, match=rf"{name} is no directory; make it"):
            open_backing(of(data_dir, ddr__directory=str(tmp_path / name)), Made())
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(StorageFailed, match=r"cannot be written by user \d+; chown it"):
        open_backing(of(data_dir, ddr__directory=str(tmp_path)), Made(may_mount=True))


@pytest.mark.parametrize(
    ("kind", "options", "policy", "said"),
    [
        ("tmpfs", "rw,huge=always", "never", "tmpfs, huge pages (huge=always), at "),
        ("tmpfs", "rw,huge=within_size", "advise", "tmpfs, huge pages (huge=within_size), at "),
        ("tmpfs", "rw,huge=advise", "never", "tmpfs, 4 KiB pages, at "),
        ("tmpfs", "rw", "always", "tmpfs, 4 KiB pages, at "),
        ("tmpfs", "rw", "force", "tmpfs, huge pages (huge=never), at "),
        ("tmpfs", "rw,huge=always", "deny", "tmpfs, 4 KiB pages, at "),
        ("ramfs", "rw", "", "ramfs, at "),
        ("ext4", "rw", "", "ext4, no memory, at "),
    ],
)
def test_the_description_is_what_the_kernel_says(tmp_path, data_dir, kind, options, policy, said):
    mounts = [Mount(Path("/"), Path("/"), kind, "x", tuple(options.split(",")))]
    found = open_backing(of(data_dir, ddr__directory=str(tmp_path)), Made(mounts=mounts, policy=policy))
    assert found.description == f"{said}{found.directory}"
    assert ("on a disk" in found.warning) == (kind == "ext4")


def test_hugetlbfs_wants_whole_pages_and_has_a_pool(tmp_path, data_dir, monkeypatch):
    device(monkeypatch, free_bytes=0, block_bytes=2 << 20, blocks=0)
    mounts = [Mount(Path("/"), Path("/"), "hugetlbfs", "x", ("rw", "pagesize=2M"))]
    sizes = {"ddr__directory": str(tmp_path), "ddr__capacity_bytes": "8 MiB"}
    with pytest.raises(
        ConfigError, match=r"ddr\.slab_bytes = 64 KiB .* is no multiple of the 2 MiB pages of hugetlbfs"
    ):
        open_backing(of(data_dir, **sizes), Made(mounts=mounts, huge_pages=4))
    config = of(data_dir, **sizes, ddr__slab_bytes="2 MiB")
    with pytest.raises(ConfigError, match=r"8 MiB .* there are 6\.0 MiB in "):
        open_backing(config, Made(mounts=mounts, huge_pages=3))
    found = open_backing(config, Made(mounts=mounts, huge_pages=4, memory=0))  # the pool is not available memory
    assert found.description == f"hugetlbfs, 2 MiB pages, at {found.directory}"


# auto ------------------------------------------------------------------------------------------


def test_auto_mounts_huge_pages_of_our_own(data_dir, mountable):
    found = open_backing(of(data_dir), Machine())
    assert found.directory == data_dir / "arena"
    assert found.description == f"tmpfs, huge pages (huge=always), at {data_dir}/arena"
    assert (found.is_own_mount, found.warning, found.free_command) == (True, "", f"umount {data_dir}/arena")
    assert found.directory.is_mount()
    left = slab(found.directory)
    found.release()
    assert left.exists(), "what is left is the next daemon's"
    before = os.statvfs(found.directory).f_blocks
    again = open_backing(of(data_dir, ddr__capacity_bytes="8 MiB"), Machine())
    assert again == found
    assert os.statvfs(found.directory).f_blocks > before
    assert left.read_bytes() == b"x" * SLAB
    assert sum(mount.at == found.directory for mount in Machine().mounts()) == 1
    left.unlink()
    again.release()
    assert list(data_dir.iterdir()) == []


def test_auto_takes_what_the_operator_mounted_and_leaves_it_mounted(data_dir, mountable, monkeypatch):
    (data_dir / "arena").mkdir()
    monkeypatch.setattr("holdfast.kvstore.machine.MOUNT_SOURCE", "theirs")
    mount_huge_tmpfs(data_dir / "arena", 8 * MIB)
    monkeypatch.undo()
    found = open_backing(of(data_dir), Made(may_mount=True))
    assert found.directory.parent == data_dir / "arena"
    assert (found.is_own_mount, found.warning) == (False, "")
    assert "huge=always" in found.description
    found.release()
    assert (data_dir / "arena").is_mount()
    with pytest.raises(ConfigError, match=r"8\.0 MiB in "):
        open_backing(of(data_dir, ddr__capacity_bytes="9 MiB"), Made(may_mount=True))


def test_where_we_may_not_mount_it_is_shared_memory_and_a_warning(data_dir, shared):
    found = open_backing(of(data_dir), Made())
    assert found.directory.parent == shared
    assert found.warning.startswith("the DDR arena has no mount with huge pages; ")
    options = f"huge=always,mode=0700,uid={os.geteuid()},size={5 * MIB // 4},X-mount.mkdir"
    assert f"mount -t tmpfs -o {options} tmpfs {data_dir}/arena" in found.warning
    assert f"tmpfs {data_dir}/arena tmpfs {options} 0 0" in found.warning
    assert list(data_dir.iterdir()) == list(shared.iterdir()) == []


def test_a_mount_that_is_refused_leaves_nothing_and_is_said(data_dir, shared, monkeypatch):
    def refused(at, size_bytes):
        assert at.is_dir()
        raise OSError(errno.EPERM, "Operation not permitted", str(at))

    monkeypatch.setattr(backing_module, "mount_huge_tmpfs", refused)
    found = open_backing(of(data_dir), Made(may_mount=True))
    assert found.directory.parent == shared
    assert "(mounting a tmpfs ourselves: Operation not permitted)" in found.warning
    assert list(data_dir.iterdir()) == []


def test_without_shared_memory_it_is_the_temporary_directory(tmp_path, data_dir, shared, monkeypatch):
    shared.rmdir()
    monkeypatch.setattr(backing_module.tempfile, "gettempdir", lambda: str(tmp_path))
    found = open_backing(of(data_dir), Made())
    assert found.directory.parent == tmp_path
    assert found.warning.startswith("the DDR arena lies among the temporary files; ")


def test_slabs_left_in_another_place_are_given_back(tmp_path, data_dir, shared, mountable):
    name = open_backing(of(data_dir), Made()).directory.name
    left = slab(shared / name)
    mine = shared / name / "mine"
    mine.write_text("no slab")
    elsewhere = slab(shared / "holdfast-of-another")
    own = open_backing(of(data_dir), Machine())
    assert not left.exists()
    assert mine.exists()
    assert elsewhere.exists()
    slab(own.directory)
    mine.unlink()
    (tmp_path / "named").mkdir()
    open_backing(of(data_dir, ddr__directory=str(tmp_path / "named")), Made())
    assert list(data_dir.iterdir()) == [], "our mount went with its slabs"
    assert [path.name for path in shared.iterdir()] == ["holdfast-of-another"]


# How much there is -----------------------------------------------------------------------------


def test_more_than_there_is_is_refused_before_anything_changes(data_dir, shared, monkeypatch):
    left = slab(shared / open_backing(of(data_dir), Made()).directory.name)
    device(monkeypatch, free_bytes=8 * MIB)
    config = of(data_dir, ddr__capacity_bytes="9 MiB")
    said = (
        r"ddr\.capacity_bytes = 9 MiB \(flag ddr\.capacity_bytes\) .* 5\.1 MiB of memory .* and 8\.1 MiB in .*lower it"
    )
    with pytest.raises(ConfigError, match=said):
        open_backing(config, Made(memory=5 * MIB))
    with pytest.raises(ConfigError, match=r"5\.1 MiB of memory"):
        open_backing(config, Made(memory=5 * MIB, may_mount=True))
    assert left.exists()
    assert list(data_dir.iterdir()) == []
    # What lies there already is not needed twice.
    fits = 8 * MIB + SLAB
    assert open_backing(of(data_dir, ddr__capacity_bytes=str(fits)), Made(memory=8 * MIB)).directory == left.parent
    with pytest.raises(ConfigError, match="lower it"):
        open_backing(of(data_dir, ddr__capacity_bytes=str(fits + SLAB)), Made(memory=8 * MIB))


def test_a_tmpfs_without_a_limit_has_none(data_dir, monkeypatch):
    device(monkeypatch, free_bytes=0, blocks=0)
    assert open_backing(of(data_dir), Made()).warning


def test_the_default_capacity_is_a_quarter_of_what_there_is(data_dir, shared, monkeypatch):
    overrides = {"daemon.data_dir": str(data_dir)}
    assert configured(None, {}, overrides, Made(memory=64 << 30, may_mount=True)).ddr.capacity_bytes == 16 << 30
    device(monkeypatch, free_bytes=1 << 30)
    config = configured(None, {}, overrides, Made(memory=64 << 30))
    assert config.ddr.capacity_bytes == 256 * MIB
    assert config.origins["ddr.capacity_bytes"] == "default, a quarter of 1.0 GiB available"
    given = configured(None, {}, overrides | {"ddr.capacity_bytes": "2 GiB"}, Made(memory=0))
    assert given.ddr.capacity_bytes == 2 << 30
    absent = configured(None, {}, overrides | {"ddr.directory": str(data_dir / "absent")}, Made())
    assert absent.ddr.capacity_bytes == 1 << 30, "the directory is refused when it is opened"
    assert list(data_dir.iterdir()) == []


def test_what_a_daemon_left_does_not_shrink_the_next_ones_default(data_dir, shared, monkeypatch):
    free_bytes = (1 << 30) - SLAB
    device(monkeypatch, free_bytes=free_bytes)
    slab(shared / open_backing(of(data_dir), Made()).directory.name)
    found = configured(None, {}, {"daemon.data_dir": str(data_dir)}, Made(memory=free_bytes))
    assert found.ddr.capacity_bytes == 256 * MIB
