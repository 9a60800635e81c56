"""Arena: the DDR tier's memory, as shared-memory slabs that clients map through passed descriptors.

A slab is a named file `slab-<number>-<serial>`. Retiring one unlinks its file, so its next use is a new inode with a
new serial: whoever still holds the old descriptor keeps seeing the old bytes, and never the next owner's. No slab is
ever truncated, for that would kill whoever has it mapped. A slab's serial is known before its memory is made, so that
those who only name it never wait for pages.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .errors import StorageFailed
from .machine import populate
from .slots import Slot

SLAB_NAME: Final = re.compile(r"slab-(\d{1,9})-(\d{1,15})")


@dataclass(frozen=True, slots=True)
class _Memory:
    descriptor: int
    mapping: mmap.mmap
    content: memoryview


@dataclass(eq=False, slots=True)
class _Slab:
    """`lock` is held while the memory is made or given back, and guards `memory`; the arena's lock guards the rest."""

    path: Path
    serial: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    memory: _Memory | None = None
    is_retired: bool = False


class Arena:
    """Slabs of `slab_bytes` in `directory`, each made by whoever needs its memory first, or by `make`.

    Any thread may call any method. Making a slab holds up those who want its memory, nobody else. The caller must hold
    the lock of the daemon's data directory: slab files found in the directory are a predecessor's, and `found` tells
    their serials by number. `keep` must say which of them to go on with before anything else is asked.
    """

    def __init__(self, directory: Path, slab_bytes: int) -> None:
        """Raises StorageFailed when the directory cannot be made or is not ours alone."""
        assert slab_bytes > 0, slab_bytes
        assert slab_bytes % mmap.PAGESIZE == 0, slab_bytes
        self.directory = directory
        self.slab_bytes = slab_bytes
        self._lock = threading.Lock()
        self._slabs: dict[int, _Slab] = {}
        self._retired: list[_Slab] = []
        self._last_serial = 0
        try:
            _make_private(directory)
            self._left = self._find()
        except OSError as error:
            raise StorageFailed(f"arena directory {directory}: {error.strerror}") from error
        self.adopted: frozenset[int] = frozenset()
        self.found: Mapping[int, int] = {number: serial for number, (serial, _) in self._left.items()}

    def _find(self) -> dict[int, tuple[int, int]]:
        """Open what a predecessor left: serial and descriptor by number, the newest of each; the rest is removed."""
        left: dict[int, tuple[int, int]] = {}
        for path in self.directory.iterdir():
            name = SLAB_NAME.fullmatch(path.name)
            if name is None:
                continue
            number, serial = int(name[1]), int(name[2])
            self._last_serial = max(self._last_serial, serial)
            descriptor = _opened(path, self.slab_bytes)
            newest, other = left.get(number, (-1, None))
            if descriptor is None or serial < newest:
                path.unlink()
            else:
                left[number] = serial, descriptor
                descriptor = other
                if other is not None:
                    self._path(number, newest).unlink()
            if descriptor is not None:
                os.close(descriptor)
        return left

    def keep(self, slabs: Collection[int]) -> None:
        """Go on with these of the slabs found, same memory and same serials, and remove the others.

        Raises StorageFailed when one cannot be mapped.
        """
        assert set(slabs) <= set(self.found), slabs
        self.adopted = frozenset(slabs)
        while self._left:
            number, (serial, descriptor) = self._left.popitem()
            path = self._path(number, serial)
            if number in slabs:
                try:
                    self._slabs[number] = _Slab(path, serial, memory=_mapped(descriptor, self.slab_bytes))
                except OSError as error:
                    os.close(descriptor)
                    raise StorageFailed(f"slab {path}: {error.strerror}") from error
            else:
                os.close(descriptor)
                path.unlink(missing_ok=True)

    def serial(self, slab: int) -> int:
        """Which inode the slab is, or will be once it is made: a number that no other has had. Quick."""
        return self._slab(slab).serial

    def serials(self) -> dict[int, int]:
        """The serials of all slabs that anybody has asked for, by number."""
        with self._lock:
            return {number: slab.serial for number, slab in self._slabs.items()}

    def make(self, slab: int) -> None:
        """See to it that the slab has its memory. Raises StorageFailed when it cannot be made."""
        found = self._slab(slab)
        with found.lock:
            self._made(found)

    def view(self, slot: Slot) -> memoryview:
        """The slot's bytes, writable. Raises StorageFailed when its slab cannot be made."""
        assert 0 <= slot.offset <= slot.offset + slot.size_bytes <= self.slab_bytes, slot
        found = self._slab(slot.slab)
        with found.lock:
            return self._made(found).content[slot.offset : slot.offset + slot.size_bytes]

    def descriptor(self, slab: int, serial: int) -> int | None:
        """A new descriptor of that inode of the slab, the caller's to close; None when it has been retired.

        Raises StorageFailed when the slab cannot be made.
        """
        found = self._slab(slab)
        with found.lock:
            if found.serial != serial or found.is_retired:
                return None
            return os.dup(self._made(found).descriptor)

    def retire(self, slab: int) -> None:
        """Forget the slab's memory; its next use is a new inode. Quick: `sweep` gives the memory back.

        The caller sees to it that nobody of ours still works on it.
        """
        with self._lock:
            retired = self._slabs.pop(slab, None)
            if retired is not None:
                retired.is_retired = True
                self._retired.append(retired)
                # There is none when it was never made, or when somebody cleaned up the directory.
                with contextlib.suppress(FileNotFoundError):
                    retired.path.unlink()

    def sweep(self) -> int:
        """Unmap and close retired slabs. Returns how many are left, because somebody of ours still has a view."""
        with self._lock:
            retired, self._retired = self._retired, []
        held = [slab for slab in retired if not _released(slab)]
        with self._lock:
            self._retired += held
            return len(self._retired)

    def close(self, keep: Collection[int] = ()) -> int:
        """Let go of every slab; the files of those in `keep` stay for a successor, those of others are removed.

        Returns the bytes that stay. The directory goes too, if nothing is in it.
        """
        left_bytes = 0
        for number, (_, descriptor) in self._left.items():
            os.close(descriptor)
            left_bytes += self.slab_bytes if number in keep else 0
        self._left = {number: left for number, left in self._left.items() if number not in keep}
        with self._lock:
            kept = [self._slabs.pop(number) for number in list(self._slabs) if number in keep]
            self._retired += kept
        left_bytes += sum(self.slab_bytes for slab in kept if slab.memory is not None)
        for number, (serial, _) in self._left.items():
            self._path(number, serial).unlink(missing_ok=True)
        self._left = {}
        for number in list(self._slabs):
            self.retire(number)
        self.sweep()
        with contextlib.suppress(OSError):  # not empty, or gone: nothing of ours is left in it
            self.directory.rmdir()
        return left_bytes

    def _path(self, number: int, serial: int) -> Path:
        return self.directory / f"slab-{number}-{serial}"

    def _slab(self, number: int) -> _Slab:
        assert not self._left, "keep() comes first"
        with self._lock:
            found = self._slabs.get(number)
            if found is None:
                self._last_serial += 1
                found = self._slabs[number] = _Slab(self._path(number, self._last_serial), self._last_serial)
            return found

    def _made(self, slab: _Slab) -> _Memory:
        """The slab's memory, under its lock."""
        if slab.memory is None:
            slab.memory = _created(slab.path, self.slab_bytes)
            with self._lock:
                if slab.is_retired:  # meanwhile, when there was no file yet to unlink
                    slab.path.unlink(missing_ok=True)
        return slab.memory


def _created(path: Path, slab_bytes: int) -> _Memory:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Sparse files would be quicker to make, but a full tmpfs then kills with SIGBUS whoever touches a page.
            os.posix_fallocate(descriptor, 0, slab_bytes)
            memory = _mapped(descriptor, slab_bytes)
            populate(memory.mapping)
        except OSError:
            os.close(descriptor)
            path.unlink()
            raise
        return memory
    except OSError as error:
        advice = "; lower ddr.capacity_bytes" if error.errno in (errno.ENOSPC, errno.ENOMEM) else ""
        raise StorageFailed(f"slab {path} of {slab_bytes} B: {error.strerror}{advice}") from error


def _opened(path: Path, slab_bytes: int) -> int | None:
    """A descriptor of a slab file that we made whole, or None: whatever else it is, it is none of ours."""
    try:
        # A FIFO of that name must not hold us up, nor a link lead us out of our directory.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    found = os.fstat(descriptor)
    is_ours = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600 and found.st_uid == os.geteuid()
    if is_ours and found.st_size == slab_bytes <= found.st_blocks * 512:
        return descriptor
    os.close(descriptor)
    return None


def _mapped(descriptor: int, slab_bytes: int) -> _Memory:
    """Map a slab's file; the descriptor is the memory's from then on. Raises OSError."""
    mapping = mmap.mmap(descriptor, slab_bytes)
    if hasattr(mmap, "MADV_DONTFORK"):
        mapping.madvise(mmap.MADV_DONTFORK)  # a forked child must not keep retired slabs alive
    return _Memory(descriptor, mapping, memoryview(mapping))


def _released(slab: _Slab) -> bool:
    """Unmap; False when views of the slab are still around (then nothing more is closed than our own view)."""
    with slab.lock:
        memory = slab.memory
        if memory is None:
            return True
        try:
            memory.content.release()
            memory.mapping.close()
        except BufferError:
            return False
        os.close(memory.descriptor)
        slab.memory = None
        return True


def _make_private(directory: Path) -> None:
    """Make the directory, 0700. Raises StorageFailed where somebody else made it first: they could read our slabs."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StorageFailed(f"arena directory {directory} belongs to user {found.st_uid}, not to us; remove it")
    directory.chmod(0o700)
