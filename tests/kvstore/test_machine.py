"""What the machine has: made-up /proc and /sys trees, and this machine's own."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
from holdfast.kvstore.machine import MOUNT_SOURCE, Machine, mount_huge_tmpfs, populate, resize_tmpfs, unmount

GIB = 1 << 30
V1 = "36 32 0:33 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2 = "30 25 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def tree(root, files):
    """A /proc and /sys with these files; everything else is absent."""
    for name, text in {"proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root)


def limited(root, at, limit, used, reclaimable="", *, names):
    limit_name, used_name = names
    return {f"{root}/{at}{limit_name}": limit, f"{root}/{at}{used_name}": used, f"{root}/{at}memory.stat": reclaimable}


def v1(at, limit, used, stat=""):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    return limited("sys/fs/cgroup/memory", at, f"{limit}\n", f"{used}\n", stat, names=names)


def v2(at, limit, used, stat=""):
    return limited("sys/fs/cgroup", at, f"{limit}\n", f"{used}\n", stat, names=("memory.max", "memory.current"))


def test_the_hardware_in_one_line(tmp_path):
    cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n\nprocessor\t: 1\nmodel name\t: Some CPU @ 3 GHz\n"
    found = tree(tmp_path, {"proc/cpuinfo": cpuinfo}).hardware()
    assert found == f"Some CPU @ 3 GHz, {os.cpu_count()} cores, 32 GiB"
    assert ", 32 GiB" in tree(tmp_path, {"proc/cpuinfo": ""}).hardware()


def test_without_control_groups_it_is_what_the_machine_has(tmp_path):
    assert tree(tmp_path, {}).available_memory() == 16 * GIB


@pytest.mark.parametrize(
    ("files", "available"),
    [
        (v1("pod/we/", 4 * GIB, GIB), 3 * GIB),
        (v1("pod/we/", 9223372036854771712, GIB), 16 * GIB),
        (v1("pod/", 6 * GIB, 2 * GIB) | v1("pod/we/", 5 * GIB, 2 * GIB), 3 * GIB),
        (v1("pod/", 6 * GIB, 4 * GIB) | v1("pod/we/", 5 * GIB, GIB), 2 * GIB),
        (v1("pod/we/", 4 * GIB, 3 * GIB, f"cache 5\ntotal_inactive_file {GIB}\n"), 2 * GIB),
        (v1("pod/we/", 4 * GIB, 5 * GIB), 0),
        (v1("other/", GIB, GIB), 16 * GIB),
    ],
)
def test_version_1_of_control_groups(tmp_path, files, available):
    cgroup = {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/pod/we\n0::/\n"}
    assert tree(tmp_path, cgroup | {"proc/self/mountinfo": V1.format(root="/")} | files).available_memory() == available


@pytest.mark.parametrize(
    ("files", "available"),
    [
        (v2("pod/we/", 4 * GIB, GIB), 3 * GIB),
        (v2("pod/we/", "max", GIB), 16 * GIB),
        (v2("pod/we/", "max", GIB) | v2("pod/", 8 * GIB, 3 * GIB), 5 * GIB),
        (v2("pod/we/", 4 * GIB, 3 * GIB, f"anon 7\ninactive_file {GIB}\nactive_file 9\n"), 2 * GIB),
        (v2("pod/we/", 4 * GIB, GIB) | {"sys/fs/cgroup/pod/we/memory.high": f"{2 * GIB}\n"}, GIB),
    ],
)
def test_version_2_of_control_groups(tmp_path, files, available):
    files = {"proc/self/cgroup": "0::/pod/we\n", "proc/self/mountinfo": V2.format(root="/")} | files
    assert tree(tmp_path, files).available_memory() == available


@pytest.mark.parametrize("group", ["/docker/abc/inner", "/inner"], ids=["the host's path", "a namespace's path"])
def test_in_a_container_the_mount_shows_only_a_part(tmp_path, group):
    files = v1("", 3 * GIB, GIB) | v1("inner/", 2 * GIB, 0)
    files |= {"proc/self/cgroup": f"4:memory:{group}\n", "proc/self/mountinfo": V1.format(root="/docker/abc")}
    assert tree(tmp_path, files).available_memory() == 2 * GIB


def test_files_that_say_nothing_we_know_are_no_limit(tmp_path):
    files = v2("pod/we/", "", "") | {"proc/self/cgroup": "0::/pod/we\n", "proc/self/mountinfo": V2.format(root="/")}
    assert tree(tmp_path, files).available_memory() == 16 * GIB


def test_mounts_are_read_as_the_kernel_writes_them(tmp_path):
    lines = (
        "24 1 259:1 / / rw,relatime shared:1 master:2 - ext4 /dev/root rw",
        "25 24 0:23 / /dev/shm rw - tmpfs tmpfs rw,size=24684084k",
        f"26 24 0:24 / /srv/a\\040b/arena rw,nosuid - tmpfs {MOUNT_SOURCE} rw,size=1M,mode=700,huge=always",
        "27 24 0:25 / /dev/shm rw - tmpfs tmpfs rw,huge=advise",
    )
    machine = tree(tmp_path, {"proc/self/mountinfo": "\n".join(lines) + "\n"})
    ours = machine.mount_of(Path("/srv/a b/arena/slab-1-1"))
    assert (ours.at, ours.option("huge"), ours.is_ours) == (Path("/srv/a b/arena"), "always", True)
    assert machine.mount_of(Path("/srv/a b")).kind == "ext4"
    shared = machine.mount_of(Path("/dev/shm/x"))
    assert (shared.option("huge"), shared.option("size"), shared.is_ours) == ("advise", None, False), (
        "the topmost counts"
    )


def test_capabilities_huge_pages_and_the_policy(tmp_path):
    files = {
        "proc/self/status": "Name:\tx\nCapEff:\t0000000000200000\n",
        "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force\n",
        "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "7\n",
        "sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages": "2\n",
    }
    machine = tree(tmp_path / "one", files)
    assert machine.may_mount()
    assert machine.shmem_policy() == "never"
    assert machine.free_huge_pages(2 << 20) == 5
    none = tree(tmp_path / "none", {"proc/self/status": "CapEff:\t00000000a80425fb\n"})
    assert not none.may_mount()
    assert none.shmem_policy() == ""
    assert none.free_huge_pages(2 << 20) == 0


def test_this_machine_has_memory_and_mounts():
    machine = Machine()
    assert 0 < machine.available_memory() <= machine.total_memory()
    assert machine.mount_of(Path("/proc/self/status")).kind == "proc"


def resident_bytes(name):
    """Of the mapping of that file, from smaps."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(name))
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))


def test_populate_fills_in_every_page(tmp_path):
    with (tmp_path / "pages").open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * mmap.PAGESIZE)
        mapping = mmap.mmap(file.fileno(), 64 * mmap.PAGESIZE)
    assert resident_bytes("/pages") == 0
    populate(mapping)
    assert resident_bytes("/pages") == 64 * mmap.PAGESIZE
    mapping.close()  # nothing of ours still points into it


def test_populate_says_when_there_is_no_memory_behind(tmp_path):
    with (tmp_path / "hole").open("w+b") as file:
        file.truncate(mmap.PAGESIZE)
        mapping = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        file.truncate(0)
    with pytest.raises(OSError, match=r"."):  # a touch would end the process with SIGBUS
        populate(mapping)


@pytest.fixture
def mount_point(tmp_path):
    """A directory to mount on; whatever a test leaves on it is unmounted."""
    if not Machine().may_mount():
        pytest.skip("mounting needs CAP_SYS_ADMIN")
    at = tmp_path / "at"
    at.mkdir()
    yield at
    while at.is_mount():
        unmount(at)


def test_a_mount_of_ours_has_huge_pages_a_size_and_an_end(mount_point):
    try:
        mount_huge_tmpfs(mount_point, 8 << 20)
    except OSError as error:
        pytest.skip(f"mounting is refused here: {error.strerror}")
    found = Machine().mount_of(mount_point)
    assert found.is_ours
    assert found.option("huge") == "always"
    assert {"nosuid", "nodev", "noexec"} <= set(found.options)
    assert mount_point.stat().st_mode & 0o777 == 0o700
    resize_tmpfs(mount_point, 16 << 20)
    device = os.statvfs(mount_point)
    assert device.f_blocks * device.f_frsize == 16 << 20
    assert Machine().mount_of(mount_point).option("huge") == "always"
    with (mount_point / "file").open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 12 << 20)
        with pytest.raises(OSError, match=r".") as refused:
            resize_tmpfs(mount_point, 8 << 20)
        assert refused.value.errno == errno.EINVAL
        unmount(mount_point)  # although it is in use
    assert not mount_point.is_mount()


def test_mounting_on_nothing_names_it(tmp_path):
    with pytest.raises(OSError, match="nowhere") as refused:
        mount_huge_tmpfs(tmp_path / "nowhere", 1 << 20)
    assert refused.value.errno in (errno.ENOENT, errno.EPERM)
    with pytest.raises(OSError, match="nowhere"):
        unmount(tmp_path / "nowhere")
