"""Segments: the NVMe tier, as few preallocated files of aligned slots.

I/O is direct (O_DIRECT) where the file system and the alignment of offset, length and buffer allow, else buffered.
What a slot holds is the caller's affair; so is verifying it. No lock is held over a system call but that of making one
segment, so a device that hangs keeps only those who asked it for something.

Writes are not synced one by one: `sync` does it for all that a segment was given until then. First writes into a new
segment are slower than later ones (extents are converted); filling it with zeros first would only move that cost.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from .errors import StorageFailed, StorageFull
from .slots import Slot

DIRECT_ALIGN_BYTES: Final = 4096
SEGMENT_NAME: Final = re.compile(r"segment-(\d+)")
PROBE_NAME: Final = "direct-probe"
REFUSES_DIRECT: Final = (errno.EINVAL, errno.ENOTSUP)
FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Io(Protocol):
    """The system calls below the tier: the seam where tests inject faults. All raise OSError.

    They may move fewer bytes than asked. EINTR they repeat themselves, as Python's own do (PEP 475).
    """

    def pread(self, descriptor: int, into: memoryview, offset: int) -> int: ...

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int: ...

    def fdatasync(self, descriptor: int) -> None: ...

    def fallocate(self, descriptor: int, size_bytes: int) -> None: ...

    def fsync(self, descriptor: int) -> None: ...


class SystemIo:
    """The real ones."""

    def pread(self, descriptor: int, into: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [into], offset)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def fdatasync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def fallocate(self, descriptor: int, size_bytes: int) -> None:
        os.posix_fallocate(descriptor, 0, size_bytes)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)


class _Segment:
    """One file, opened twice where direct I/O works: the page cache and direct I/O are coherent on Linux."""

    def __init__(self, path: Path, flags: int, direct_flags: int) -> None:
        self.takes_direct = direct_flags != 0
        self.buffered = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        try:
            wanted = os.O_RDWR | os.O_CLOEXEC | direct_flags
            self._direct = os.open(path, wanted) if direct_flags else None
        except OSError:
            os.close(self.buffered)
            raise

    def transfer(self, call: Callable[[int, memoryview, int], int], buffer: memoryview, offset: int) -> int:
        """One call of `call`: direct if everything is aligned and was never refused. Raises OSError."""
        direct = self._direct
        if direct is None or not self.takes_direct or (offset | len(buffer) | _address(buffer)) % DIRECT_ALIGN_BYTES:
            return call(self.buffered, buffer, offset)
        try:
            return call(direct, buffer, offset)
        except OSError as error:
            if error.errno not in REFUSES_DIRECT:
                raise
            self.takes_direct = False  # the probe promised too much: this file is buffered from now on
            return call(self.buffered, buffer, offset)

    def close(self) -> None:
        os.close(self.buffered)
        if self._direct is not None:
            os.close(self._direct)


class Segments:
    """Files `segment-<n>` of `segment_bytes` in `directory`, made on demand and kept. Any thread may call."""

    def __init__(self, directory: Path, segment_bytes: int, io: Io | None = None) -> None:
        """Raises StorageFailed when the directory cannot be used."""
        self.directory = directory
        self.segment_bytes = segment_bytes
        self._io = io or SystemIo()
        self._lock = threading.Lock()
        self._making: dict[int, threading.Lock] = {}  # allocating may take long; only that segment's writers wait
        self._made: set[int] = set()
        self._segments: dict[int, _Segment] = {}
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._direct_flags = _direct_flags(directory)
        except OSError as error:
            raise _failed(directory, "cannot be used", error) from error

    @property
    def direct(self) -> bool:
        """Whether the file system takes direct I/O, and no segment was refused it since."""
        return self._direct_flags != 0 and all(segment.takes_direct for segment in tuple(self._segments.values()))

    def write(self, slot: Slot, offset: int, data: memoryview) -> None:
        """Write `data` from `offset` bytes into the slot; `sync` makes it last.

        Raises StorageFailed, StorageFull where there is no room; then what was written is `moved_bytes` long.
        """
        assert 0 <= offset <= offset + len(data) <= slot.size_bytes, "writing past the slot"
        self._inside(slot)
        path, first = self._path(slot.slab), slot.offset + offset
        done = 0
        try:
            segment = self._created(slot.slab)
            while done < len(data):
                count = segment.transfer(self._io.pwrite, data[done:], first + done)
                if count == 0:
                    raise OSError(errno.EIO, "the device took nothing")
                done += count
        except OSError as error:
            raise _failed(path, f"writing {len(data)} B at {first}", error, done) from error

    def sync(self, number: int) -> None:
        """Make all that was written to the segment last. Raises StorageFailed; then none of it can be trusted to."""
        try:
            self._io.fdatasync(self._opened(number).buffered)
        except OSError as error:
            raise _failed(self._path(number), "syncing", error) from error

    def read(self, slot: Slot, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` bytes into the slot. Raises StorageFailed, also where the file ends too early."""
        assert 0 <= offset <= offset + len(into) <= slot.size_bytes, "reading past the slot"
        self._inside(slot)
        path, first = self._path(slot.slab), slot.offset + offset
        done = 0
        try:
            segment = self._opened(slot.slab)
            while done < len(into):
                count = segment.transfer(self._io.pread, into[done:], first + done)
                if count == 0:
                    at = first + done
                    raise StorageFailed(f"{path}: reading {len(into)} B at {first}: short read, the file ends at {at}")
                done += count
        except OSError as error:
            raise _failed(path, f"reading {len(into)} B at {first}", error, done) from error

    def prune(self, keep: set[int]) -> list[int]:
        """Remove the files of all segments but these; returns their numbers. Raises StorageFailed."""
        removed = []
        try:
            for path in sorted(self.directory.iterdir()):
                matched = SEGMENT_NAME.fullmatch(path.name)
                if matched and int(matched[1]) not in keep:
                    number = int(matched[1])
                    with self._lock:
                        segment = self._segments.pop(number, None)
                        self._made.discard(number)
                    if segment is not None:
                        segment.close()
                    path.unlink()
                    removed.append(number)
        except OSError as error:
            raise _failed(self.directory, "removing unused segments", error) from error
        return removed

    def close(self) -> None:
        """Close the files; the caller sees to it that nobody reads or writes."""
        with self._lock:
            for segment in self._segments.values():
                segment.close()
            self._segments.clear()
            self._made.clear()

    def _inside(self, slot: Slot) -> None:
        assert 0 <= slot.offset <= slot.offset + slot.size_bytes <= self.segment_bytes, slot

    def _path(self, number: int) -> Path:
        return self.directory / f"segment-{number}"

    def _opened(self, number: int) -> _Segment:
        """An existing segment: reading must not create one."""
        return self._segments.get(number) or self._known(number, _Segment(self._path(number), 0, self._direct_flags))

    def _known(self, number: int, segment: _Segment) -> _Segment:
        """Remember a segment that was just opened, unless somebody else was faster."""
        with self._lock:
            known = self._segments.setdefault(number, segment)
        if known is not segment:
            segment.close()
        return known

    def _created(self, number: int) -> _Segment:
        """The segment at its full size, its directory entry synced: what is written there may be called durable."""
        if number in self._made:
            return self._opened(number)
        with self._lock:
            making = self._making.setdefault(number, threading.Lock())
        with making:
            if number in self._made:
                return self._opened(number)
            path = self._path(number)
            is_new = not path.exists()
            try:
                segment = _Segment(path, os.O_CREAT, self._direct_flags)
                try:
                    self._io.fallocate(segment.buffered, self.segment_bytes)  # no cost where it is done already
                    self._io.fsync(segment.buffered)
                    self._sync_directory()
                except OSError:
                    segment.close()
                    raise
            except OSError:
                if is_new:  # gives back what was allocated before the device was full
                    path.unlink(missing_ok=True)
                raise
            known = self._known(number, segment)
            self._made.add(number)
            return known

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._io.fsync(descriptor)
        finally:
            os.close(descriptor)


def _direct_flags(directory: Path) -> int:
    """O_DIRECT if a direct read works in this directory, else 0. Takes no blocks, so it works on a full device."""
    path = directory / PROBE_NAME
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        path.unlink(missing_ok=True)  # the kernel may create the file before it refuses the flag
        if error.errno in REFUSES_DIRECT:
            return 0
        raise
    try:
        os.ftruncate(descriptor, DIRECT_ALIGN_BYTES)
        with mmap.mmap(-1, DIRECT_ALIGN_BYTES) as buffer:
            return os.O_DIRECT if os.preadv(descriptor, [buffer], 0) == DIRECT_ALIGN_BYTES else 0
    except OSError as error:
        if error.errno in REFUSES_DIRECT:
            return 0
        raise
    finally:
        os.close(descriptor)
        path.unlink()


def _address(buffer: memoryview) -> int:
    """Where the buffer begins in memory."""
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)


def _failed(path: Path, what: str, error: OSError, moved_bytes: int = 0) -> StorageFailed:
    name = errno.errorcode.get(error.errno or 0, "no errno")
    said = f"{path}: {what}: {name} ({error.strerror or error})"
    failed = StorageFull(said) if error.errno in FULL else StorageFailed(said)
    failed.moved_bytes = moved_bytes
    return failed
