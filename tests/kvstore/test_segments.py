"""The NVMe tier's files: direct and buffered, and what happens when the device says no."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from holdfast.kvstore import segments as module
from holdfast.kvstore.errors import StorageFailed, StorageFull
from holdfast.kvstore.segments import Segments, SystemIo
from holdfast.kvstore.slots import Slot
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE = 4096
SEGMENT_BYTES = 64 * PAGE


class FaultyIo(SystemIo):
    """Fails calls by name, and moves at most `most` bytes at a time (whole pages where direct). Remembers the calls."""

    def __init__(self, most=1 << 40, **failures):
        self.most = most
        self.failures = failures  # name -> errno, or a list with one entry per call (0: let it pass)
        self.calls = []

    def _call(self, name, *details):
        self.calls.append((name, *details))
        failure = self.failures.get(name, 0)
        if isinstance(failure, list):
            failure = failure.pop(0) if failure else 0
        if failure:
            raise OSError(failure, os.strerror(failure))

    def _limit(self, descriptor):
        return max(PAGE, self.most // PAGE * PAGE) if is_direct(descriptor) else self.most

    def pread(self, descriptor, into, offset):
        self._call("pread", is_direct(descriptor), offset)
        return super().pread(descriptor, into[: self._limit(descriptor)], offset)

    def pwrite(self, descriptor, data, offset):
        self._call("pwrite", is_direct(descriptor), offset)
        return super().pwrite(descriptor, data[: self._limit(descriptor)], offset)

    def fdatasync(self, descriptor):
        self._call("fdatasync")
        super().fdatasync(descriptor)

    def fallocate(self, descriptor, size_bytes):
        self._call("fallocate")
        super().fallocate(descriptor, size_bytes)

    def fsync(self, descriptor):
        self._call("fsync")
        super().fsync(descriptor)

    def names(self):
        return [call[0] for call in self.calls]


def is_direct(descriptor):
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags:"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


def aligned(size_bytes, fill=b""):
    """A page-aligned buffer, as the arena's are."""
    buffer = memoryview(mmap.mmap(-1, size_bytes or 1))[:size_bytes]
    buffer[: len(fill)] = fill
    return buffer


def noise(size_bytes, seed=0):
    return random.Random(seed).randbytes(size_bytes)


@pytest.fixture(params=["as the file system allows", "buffered"])
def tier(request, tmp_path, monkeypatch):
    if request.param == "buffered":
        monkeypatch.setattr(module, "_direct_flags", lambda directory: 0)
    tier = Segments(tmp_path / "nvme", SEGMENT_BYTES)
    yield tier
    tier.close()


def test_round_trip(tier):
    data = noise(8 * PAGE)
    slot = Slot(2, 16 * PAGE, 8 * PAGE)
    tier.write(slot, 0, aligned(len(data), data))
    into = aligned(8 * PAGE)
    tier.read(slot, 0, into)
    assert into == data
    part = aligned(2 * PAGE)
    tier.read(slot, 3 * PAGE, part)
    assert part == data[3 * PAGE : 5 * PAGE]


def test_bytes_survive_reopening(tier):
    slot = Slot(0, PAGE, PAGE)
    tier.write(slot, 0, aligned(PAGE, noise(PAGE)))
    tier.close()
    again = Segments(tier.directory, SEGMENT_BYTES)
    into = aligned(PAGE)
    again.read(slot, 0, into)
    assert into == noise(PAGE)
    again.close()


@settings(max_examples=40, deadline=None)
@given(
    offset=st.integers(0, 3 * PAGE) | st.sampled_from([0, PAGE, 3 * PAGE]),
    size=st.integers(0, 3 * PAGE) | st.sampled_from([PAGE, 3 * PAGE]),
    shift=st.integers(0, 64) | st.just(0),
    most=st.sampled_from([1, 1000, PAGE, 5000, 1 << 30]),
)
def test_any_alignment_and_any_partial_transfer_reads_back(tmp_path_factory, offset, size, shift, most):
    if most == 1:
        size = min(size, 50)
    tier = Segments(tmp_path_factory.mktemp("nvme"), 8 * PAGE, FaultyIo(most))
    data = noise(size, seed=size)
    slot = Slot(0, offset, 4 * PAGE)
    tier.write(slot, 0, aligned(size + shift, bytes(shift) + data)[shift:])
    into = aligned(size + shift)[shift:]
    tier.read(slot, 0, into)
    assert into == data
    tier.close()


def test_direct_where_everything_is_aligned_and_buffered_where_not(tmp_path):
    io = FaultyIo()
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    if not tier.direct:
        pytest.skip("the file system of the temporary directory takes no direct I/O")
    buffer = aligned(4 * PAGE)
    tier.write(Slot(0, 0, PAGE), 0, buffer[:PAGE])
    tier.write(Slot(0, 512, PAGE), 0, buffer[:PAGE])
    tier.write(Slot(0, 0, PAGE), 0, buffer[:100])
    tier.write(Slot(0, 0, PAGE), 0, buffer[100 : 100 + PAGE])
    tier.write(Slot(0, 0, PAGE), 0, memoryview(bytes(PAGE + 1))[1:])
    tier.read(Slot(0, 0, PAGE), 0, buffer[:PAGE])
    tier.read(Slot(0, 0, PAGE), 8, buffer[:8])
    modes = [call[1] for call in io.calls if call[0] in ("pread", "pwrite")]
    assert modes[:4] == [True, False, False, False]
    assert modes[-2:] == [True, False]
    tier.close()


def test_buffered_writes_are_seen_by_direct_reads(tmp_path):
    tier = Segments(tmp_path, SEGMENT_BYTES)
    slot = Slot(0, 0, 2 * PAGE)
    data = noise(PAGE + 10)
    tier.write(slot, 0, aligned(len(data), data))
    into = aligned(2 * PAGE)
    tier.read(slot, 0, into)
    assert into[: len(data)] == data
    tier.close()


def test_a_direct_write_that_stops_inside_a_page_goes_on_buffered(tmp_path):
    class Stopping(FaultyIo):
        def pwrite(self, descriptor, data, offset):
            if not is_direct(descriptor):
                return super().pwrite(descriptor, data, offset)
            again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # not direct: takes any length
            count = os.pwrite(again, data[:512], offset)
            os.close(again)
            return count

    tier = Segments(tmp_path, SEGMENT_BYTES, Stopping())
    data = noise(2 * PAGE)
    tier.write(Slot(0, 0, 2 * PAGE), 0, aligned(2 * PAGE, data))
    into = aligned(2 * PAGE)
    tier.read(Slot(0, 0, 2 * PAGE), 0, into)
    assert into == data
    tier.close()


def test_probing_falls_back_and_leaves_nothing(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest, **named):
        descriptor = real(path, flags & ~os.O_DIRECT, *rest, **named)
        if flags & os.O_DIRECT:  # some file systems make the file first
            os.close(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return descriptor

    monkeypatch.setattr(os, "open", refusing)
    tier = Segments(tmp_path, SEGMENT_BYTES)
    assert not tier.direct
    assert not list(tmp_path.iterdir())
    tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE))
    tier.close()


def test_a_file_is_allocated_once_at_full_size_and_synced_with_its_name(tmp_path):
    io = FaultyIo()
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    tier.write(Slot(1, 0, PAGE), 0, aligned(PAGE))
    tier.sync(1)
    assert io.names() == ["fallocate", "fsync", "fsync", "pwrite", "fdatasync"]
    tier.write(Slot(1, PAGE, PAGE), 0, aligned(PAGE))
    assert io.names()[5:] == ["pwrite"]
    (path,) = tmp_path.iterdir()
    assert path.name == "segment-1"
    assert path.stat().st_size == SEGMENT_BYTES
    assert path.stat().st_blocks * 512 >= SEGMENT_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    tier.close()


@pytest.mark.parametrize("call", ["fallocate", "fsync", "pwrite"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("ENOSPC", StorageFull), ("EDQUOT", StorageFull), ("EIO", StorageFailed), ("EROFS", StorageFailed)],
)
def test_a_write_that_fails_says_how_and_the_next_works(tmp_path, call, name, kind):
    io = FaultyIo(**{call: [getattr(errno, name)]})
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    with pytest.raises(StorageFailed, match=rf"segment-0.*4096.*{name}") as raised:
        tier.write(Slot(0, PAGE, PAGE), 0, aligned(PAGE))
    assert type(raised.value) is kind
    tier.write(Slot(0, PAGE, PAGE), 0, aligned(PAGE, b"abc"))
    into = aligned(PAGE)
    tier.read(Slot(0, PAGE, PAGE), 0, into)
    assert into[:3] == b"abc"
    tier.close()


def test_a_sync_that_fails_says_how(tmp_path):
    io = FaultyIo(fdatasync=[errno.EIO])
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE))
    with pytest.raises(StorageFailed, match=r"segment-0: syncing: EIO"):
        tier.sync(0)
    tier.sync(0)
    with pytest.raises(StorageFailed, match=r"segment-1: syncing: ENOENT"):
        tier.sync(1)
    tier.close()


def test_what_a_failed_write_had_written_is_said(tmp_path):
    tier = Segments(tmp_path, SEGMENT_BYTES, FaultyIo(most=PAGE, pwrite=[0, 0, errno.ENOSPC]))
    with pytest.raises(StorageFull) as raised:
        tier.write(Slot(0, 0, 4 * PAGE), 0, aligned(4 * PAGE))
    assert raised.value.moved_bytes == 2 * PAGE
    tier.close()


def test_a_device_that_takes_nothing_is_an_error_not_a_loop(tmp_path):
    io = FaultyIo()
    io.pwrite = lambda descriptor, data, offset: 0
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    with pytest.raises(StorageFailed, match="took nothing"):
        tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE))
    tier.close()


@pytest.mark.parametrize("call", ["pread", "pwrite"])
def test_direct_io_that_is_refused_later_goes_on_buffered(tmp_path, call):
    """The probe worked, one segment does not: it alone is buffered from then on."""
    io = FaultyIo()
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    if not tier.direct:
        pytest.skip("the file system of the temporary directory takes no direct I/O")
    for number in (0, 1):
        tier.write(Slot(number, 0, PAGE), 0, aligned(PAGE, b"old"))
    io.failures[call] = [errno.EINVAL]
    tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE, b"new"))
    into = aligned(PAGE)
    tier.read(Slot(0, 0, PAGE), 0, into)
    assert into[:3] == b"new"
    assert not tier.direct
    io.calls.clear()
    for number in (0, 1):
        tier.read(Slot(number, 0, PAGE), 0, into)
        tier.write(Slot(number, 0, PAGE), 0, into)
    assert [call[1] for call in io.calls] == [False, False, True, True]
    tier.close()


def test_a_buffered_call_that_is_refused_is_an_error(tmp_path):
    io = FaultyIo()
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE))
    io.failures["pread"] = errno.EINVAL
    with pytest.raises(StorageFailed, match="EINVAL"):
        tier.read(Slot(0, 0, PAGE), 0, aligned(PAGE))
    tier.close()


@pytest.mark.parametrize("hung", ["fallocate", "pwrite", "pread", "fdatasync"])
def test_a_device_that_hangs_keeps_only_who_asked_it(tmp_path, hung):
    """One thread hangs on segment 0; others make, write, sync and read segment 1, and read segment 0 if they can."""
    hanging, repaired = threading.Event(), threading.Event()
    real = getattr(SystemIo, hung)
    first = []

    class Hanging(SystemIo):
        pass

    def hang(self, *arguments):
        if not first:
            first.append(True)
            hanging.set()
            assert repaired.wait(30)
        return real(self, *arguments)

    tier = Segments(tmp_path, SEGMENT_BYTES, Hanging())
    if hung != "fallocate":
        tier.write(Slot(0, PAGE, PAGE), 0, aligned(PAGE, b"other"))
    setattr(Hanging, hung, hang)
    work = {
        "pread": lambda: tier.read(Slot(0, 0, PAGE), 0, aligned(PAGE)),
        "fdatasync": lambda: tier.sync(0),
    }.get(hung, lambda: tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE)))
    thread = threading.Thread(target=work)
    thread.start()
    assert hanging.wait(30)
    into = aligned(PAGE)
    tier.write(Slot(1, 0, PAGE), 0, aligned(PAGE, b"one"))
    tier.sync(1)
    tier.read(Slot(1, 0, PAGE), 0, into)
    assert into[:3] == b"one"
    if hung != "fallocate":
        tier.read(Slot(0, PAGE, PAGE), 0, into)
        assert into[:5] == b"other"
    repaired.set()
    thread.join()
    tier.close()


def test_signals_do_not_disturb(tmp_path):
    """EINTR below is repeated, not reported."""
    heard = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    tier = Segments(tmp_path, SEGMENT_BYTES)
    slot, data, into = Slot(0, 0, SEGMENT_BYTES), aligned(SEGMENT_BYTES, noise(SEGMENT_BYTES)), aligned(SEGMENT_BYTES)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        while len(heard) < 50:
            tier.write(slot, 0, data)
            tier.sync(0)
            tier.read(slot, 0, into)
            assert into == data
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        tier.close()


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A directory on an ext4 of 8 MiB."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("only root mounts, and mkfs.ext4 makes what is mounted")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    status, said = run("mkfs.ext4", "-q", "-b", str(PAGE), "-O", "^has_journal", "-m", "0", str(image))
    assert status == 0, said
    status, said = run("mount", "-o", "loop", str(image), str(mount))
    if status:
        pytest.skip(f"mounting is not allowed here: {said.strip()}")
    try:
        yield mount
    finally:
        status, said = run("umount", str(mount))
        assert status == 0, said


def test_a_device_that_is_really_full(small_disk):
    """Segments of 2 MiB on 8 MiB: those that fit work, the one that does not is refused whole and leaves nothing."""
    tier = Segments(small_disk / "nvme", 2 << 20)
    try:
        number = 0
        while os.statvfs(small_disk).f_bavail * PAGE >= 2 << 20:
            tier.write(Slot(number, 0, PAGE), 0, aligned(PAGE, b"segment %d" % number))
            number += 1
        assert number >= 2
        free_before = os.statvfs(small_disk).f_bavail
        with pytest.raises(StorageFull, match=r"segment-\d+: .*ENOSPC"):
            tier.write(Slot(number, 0, PAGE), 0, aligned(PAGE))
        assert {path.name for path in tier.directory.iterdir()} == {f"segment-{n}" for n in range(number)}
        assert os.statvfs(small_disk).f_bavail == free_before, "nothing is left half-made"
        for kept in range(number):
            tier.write(Slot(kept, PAGE, PAGE), 0, aligned(PAGE, b"later"))
            tier.sync(kept)
            into = aligned(2 * PAGE)
            tier.read(Slot(kept, 0, 2 * PAGE), 0, into)
            assert into[:9] == b"segment %d" % kept
            assert into[PAGE : PAGE + 5] == b"later"
        assert tier.prune({0}) == list(range(1, number))
        tier.write(Slot(number, 0, PAGE), 0, aligned(PAGE))
    finally:
        tier.close()


def test_a_segment_that_cannot_be_allocated_leaves_no_file(tmp_path):
    tier = Segments(tmp_path, SEGMENT_BYTES, FaultyIo(fallocate=errno.ENOSPC))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    with pytest.raises(StorageFailed):
        tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE))
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - a count


def test_an_old_segment_survives_a_failed_allocation(tmp_path):
    tier = Segments(tmp_path, SEGMENT_BYTES)
    tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE, b"old"))
    tier.close()
    again = Segments(tmp_path, SEGMENT_BYTES, FaultyIo(fallocate=errno.ENOSPC))
    with pytest.raises(StorageFailed):
        again.write(Slot(0, PAGE, PAGE), 0, aligned(PAGE))
    into = aligned(PAGE)
    again.read(Slot(0, 0, PAGE), 0, into)
    assert into[:3] == b"old"
    again.close()


def test_a_read_that_fails_says_how(tmp_path):
    tier = Segments(tmp_path, SEGMENT_BYTES, FaultyIo(pread=errno.EIO))
    tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE))
    with pytest.raises(StorageFailed, match=r"segment-0: reading 4096 B at 0: EIO"):
        tier.read(Slot(0, 0, PAGE), 0, aligned(PAGE))
    tier.close()


def test_a_file_that_ends_too_early_is_a_short_read(tier):
    tier.write(Slot(0, 0, PAGE), 0, aligned(PAGE))
    os.truncate(tier.directory / "segment-0", 3 * PAGE)
    with pytest.raises(StorageFailed, match=rf"short read, the file ends at {3 * PAGE}"):
        tier.read(Slot(0, 2 * PAGE, 4 * PAGE), 0, aligned(4 * PAGE))


def test_reading_creates_nothing(tier):
    with pytest.raises(StorageFailed, match=r"segment-5.*ENOENT"):
        tier.read(Slot(5, 0, PAGE), 0, aligned(PAGE))
    assert not list(tier.directory.iterdir())


def test_prune_keeps_what_it_is_told_to(tier):
    for number in (0, 1, 2, 10):
        tier.write(Slot(number, 0, PAGE), 0, aligned(PAGE, b"old"))
    (tier.directory / "notes").write_text("not a segment")
    assert sorted(tier.prune({1, 2})) == [0, 10]
    assert sorted(path.name for path in tier.directory.iterdir()) == ["notes", "segment-1", "segment-2"]
    tier.write(Slot(0, PAGE, PAGE), 0, aligned(PAGE))
    into = aligned(PAGE)
    tier.read(Slot(0, 0, PAGE), 0, into)
    assert into == bytes(PAGE)


def test_slots_outside_the_segment_are_our_bug(tier):
    with pytest.raises(AssertionError):
        tier.write(Slot(0, SEGMENT_BYTES, PAGE), 0, aligned(PAGE))
    with pytest.raises(AssertionError):
        tier.write(Slot(0, 0, PAGE), 0, aligned(2 * PAGE))
    with pytest.raises(AssertionError):
        tier.read(Slot(0, 0, PAGE), PAGE, aligned(PAGE))


def test_a_directory_that_cannot_be_made_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="file"):
        Segments(tmp_path / "file", SEGMENT_BYTES)
