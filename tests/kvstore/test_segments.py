"""The NVMe tier's files: direct and buffered, and what happens when the device says no."""

from __future__ import annotations

import errno
import mmap
import os
import random
from pathlib import Path

import pytest
from holdfast.kvstore import segments as module
from holdfast.kvstore.errors import StorageFailed
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
    tier.write(slot, aligned(len(data), data))
    into = aligned(8 * PAGE)
    tier.read(slot, 0, into)
    assert into == data
    part = aligned(2 * PAGE)
    tier.read(slot, 3 * PAGE, part)
    assert part == data[3 * PAGE : 5 * PAGE]


def test_bytes_survive_reopening(tier):
    slot = Slot(0, PAGE, PAGE)
    tier.write(slot, aligned(PAGE, noise(PAGE)))
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
    tier.write(slot, aligned(size + shift, bytes(shift) + data)[shift:])
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
    tier.write(Slot(0, 0, PAGE), buffer[:PAGE])
    tier.write(Slot(0, 512, PAGE), buffer[:PAGE])
    tier.write(Slot(0, 0, PAGE), buffer[:100])
    tier.write(Slot(0, 0, PAGE), buffer[100 : 100 + PAGE])
    tier.write(Slot(0, 0, PAGE), memoryview(bytes(PAGE + 1))[1:])
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
    tier.write(slot, aligned(len(data), data))
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
    tier.write(Slot(0, 0, 2 * PAGE), aligned(2 * PAGE, data))
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
    tier.write(Slot(0, 0, PAGE), aligned(PAGE))
    tier.close()


def test_a_file_is_allocated_once_at_full_size_and_synced_with_its_name(tmp_path):
    io = FaultyIo()
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    tier.write(Slot(1, 0, PAGE), aligned(PAGE))
    assert io.names() == ["fallocate", "fsync", "fsync", "pwrite", "fdatasync"]
    tier.write(Slot(1, PAGE, PAGE), aligned(PAGE))
    assert io.names()[5:] == ["pwrite", "fdatasync"]
    (path,) = tmp_path.iterdir()
    assert path.name == "segment-1"
    assert path.stat().st_size == SEGMENT_BYTES
    assert path.stat().st_blocks * 512 >= SEGMENT_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    tier.close()


@pytest.mark.parametrize("call", ["fallocate", "fsync", "pwrite", "fdatasync"])
@pytest.mark.parametrize("name", ["ENOSPC", "EIO"])
def test_a_write_that_fails_says_how_and_the_next_works(tmp_path, call, name):
    io = FaultyIo(**{call: [getattr(errno, name)]})
    tier = Segments(tmp_path, SEGMENT_BYTES, io)
    with pytest.raises(StorageFailed, match=rf"segment-0.*4096.*{name}"):
        tier.write(Slot(0, PAGE, PAGE), aligned(PAGE))
    tier.write(Slot(0, PAGE, PAGE), aligned(PAGE, b"abc"))
    into = aligned(PAGE)
    tier.read(Slot(0, PAGE, PAGE), 0, into)
    assert into[:3] == b"abc"
    tier.close()


def test_a_segment_that_cannot_be_allocated_leaves_no_file(tmp_path):
    tier = Segments(tmp_path, SEGMENT_BYTES, FaultyIo(fallocate=errno.ENOSPC))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    with pytest.raises(StorageFailed):
        tier.write(Slot(0, 0, PAGE), aligned(PAGE))
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - a count


def test_an_old_segment_survives_a_failed_allocation(tmp_path):
    tier = Segments(tmp_path, SEGMENT_BYTES)
    tier.write(Slot(0, 0, PAGE), aligned(PAGE, b"old"))
    tier.close()
    again = Segments(tmp_path, SEGMENT_BYTES, FaultyIo(fallocate=errno.ENOSPC))
    with pytest.raises(StorageFailed):
        again.write(Slot(0, PAGE, PAGE), aligned(PAGE))
    into = aligned(PAGE)
    again.read(Slot(0, 0, PAGE), 0, into)
    assert into[:3] == b"old"
    again.close()


def test_a_read_that_fails_says_how(tmp_path):
    tier = Segments(tmp_path, SEGMENT_BYTES, FaultyIo(pread=errno.EIO))
    tier.write(Slot(0, 0, PAGE), aligned(PAGE))
    with pytest.raises(StorageFailed, match=r"segment-0: reading 4096 B at 0: EIO"):
        tier.read(Slot(0, 0, PAGE), 0, aligned(PAGE))
    tier.close()


def test_a_file_that_ends_too_early_is_a_short_read(tier):
    tier.write(Slot(0, 0, PAGE), aligned(PAGE))
    os.truncate(tier.directory / "segment-0", 3 * PAGE)
    with pytest.raises(StorageFailed, match=rf"short read, the file ends at {3 * PAGE}"):
        tier.read(Slot(0, 2 * PAGE, 4 * PAGE), 0, aligned(4 * PAGE))


def test_reading_creates_nothing(tier):
    with pytest.raises(StorageFailed, match=r"segment-5.*ENOENT"):
        tier.read(Slot(5, 0, PAGE), 0, aligned(PAGE))
    assert not list(tier.directory.iterdir())


def test_prune_keeps_what_it_is_told_to(tier):
    for number in (0, 1, 2, 10):
        tier.write(Slot(number, 0, PAGE), aligned(PAGE, b"old"))
    (tier.directory / "notes").write_text("not a segment")
    assert sorted(tier.prune({1, 2})) == [0, 10]
    assert sorted(path.name for path in tier.directory.iterdir()) == ["notes", "segment-1", "segment-2"]
    tier.write(Slot(0, PAGE, PAGE), aligned(PAGE))
    into = aligned(PAGE)
    tier.read(Slot(0, 0, PAGE), 0, into)
    assert into == bytes(PAGE)


def test_slots_outside_the_segment_are_our_bug(tier):
    with pytest.raises(AssertionError):
        tier.write(Slot(0, SEGMENT_BYTES, PAGE), aligned(PAGE))
    with pytest.raises(AssertionError):
        tier.write(Slot(0, 0, PAGE), aligned(2 * PAGE))
    with pytest.raises(AssertionError):
        tier.read(Slot(0, 0, PAGE), PAGE, aligned(PAGE))


def test_a_directory_that_cannot_be_made_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="file"):
        Segments(tmp_path / "file", SEGMENT_BYTES)
