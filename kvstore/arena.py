"""Arena: the DDR tier's memory, as shared-memory slabs that clients map through passed descriptors.

A slab is a named file `slab-<number>-<serial>`. Retiring one unlinks its file, so its next use is a new inode with a
new serial: whoever still holds the old descriptor keeps seeing the old bytes, and never the next owner's. No slab is
ever truncated, for that would kill whoever has it mapped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import stat
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import StorageFailed
from .slots import Slot

SLAB_NAME: Final = re.compile(r"slab-\d+-\d+")
MOUNTS: Final = Path("/proc/self/mounts")


def arena_directory(base: Path, data_dir: Path) -> Path:
    """The directory for the slabs of the daemon that owns `data_dir`; nothing is created.

    It lies in `base` where that is a directory we may write to, else among the temporary files.
    """
    digest = hashlib.blake2b(os.fsencode(data_dir.resolve()), digest_size=8).hexdigest()
    usable = base.is_dir() and os.access(base, os.W_OK | os.X_OK)
    return (base if usable else Path(tempfile.gettempdir())) / f"holdfast-{digest}"


@dataclass(frozen=True, slots=True)
class _Slab:
    path: Path
    serial: int
    descriptor: int
    mapping: mmap.mmap
    content: memoryview


class Arena:
    """Slabs of `slab_bytes` in `directory`, each made on first use.

    Any thread may call any method. The caller must hold the daemon's data directory lock: slab files found in the
    directory are taken for those of a killed predecessor, and removed.
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
            for path in directory.iterdir():
                if SLAB_NAME.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise StorageFailed(f"arena directory {directory}: {error.strerror}") from error

    @property
    def backing(self) -> str:
        """What the slabs are made of, for `status`: "tmpfs at /dev/shm/holdfast-..."."""
        return f"{_filesystem(self.directory)} at {self.directory}"

    def view(self, slot: Slot) -> memoryview:
        """The slot's bytes, writable. Raises StorageFailed when its slab cannot be made."""
        assert 0 <= slot.offset <= slot.offset + slot.size_bytes <= self.slab_bytes, slot
        return self._slab(slot.slab).content[slot.offset : slot.offset + slot.size_bytes]

    def descriptor(self, slab: int) -> int:
        """The slab's file descriptor, to be passed to a client. It stays the arena's: dup it to keep it past `retire`.

        Raises StorageFailed when the slab cannot be made.
        """
        return self._slab(slab).descriptor

    def serial(self, slab: int) -> int:
        """Which inode the slab is: a number never used before by this arena. Raises StorageFailed like `descriptor`."""
        return self._slab(slab).serial

    def retire(self, slab: int) -> None:
        """Forget the slab's memory; its next use is a new inode. Quick: `sweep` gives the memory back.

        The caller sees to it that nobody of ours still works on it.
        """
        with self._lock:
            retired = self._slabs.pop(slab, None)
            if retired is not None:
                self._retired.append(retired)
                # Already gone means that somebody cleaned up the directory: as good as unlinked.
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

    def close(self) -> None:
        """Retire every slab and remove the directory, if nothing else is in it."""
        for slab in list(self._slabs):
            self.retire(slab)
        self.sweep()
        with contextlib.suppress(OSError):  # not empty, or gone: nothing of ours is left in it
            self.directory.rmdir()

    def _slab(self, number: int) -> _Slab:
        with self._lock:
            found = self._slabs.get(number)
            if found is None:
                self._last_serial += 1
                path = self.directory / f"slab-{number}-{self._last_serial}"
                found = self._slabs[number] = _created(path, self._last_serial, self.slab_bytes)
            return found


def _created(path: Path, serial: int, slab_bytes: int) -> _Slab:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Sparse files would be quicker to make, but a full tmpfs then kills with SIGBUS whoever touches a page.
            os.posix_fallocate(descriptor, 0, slab_bytes)
            mapping = mmap.mmap(descriptor, slab_bytes)
        except OSError:
            os.close(descriptor)
            path.unlink()
            raise
    except OSError as error:
        advice = "; lower ddr.capacity_bytes" if error.errno in (errno.ENOSPC, errno.ENOMEM) else ""
        raise StorageFailed(f"slab {path} of {slab_bytes} B: {error.strerror}{advice}") from error
    if hasattr(mmap, "MADV_DONTFORK"):
        mapping.madvise(mmap.MADV_DONTFORK)  # a forked child must not keep retired slabs alive
    return _Slab(path, serial, descriptor, mapping, memoryview(mapping))


def _released(slab: _Slab) -> bool:
    """Unmap; False when views of the slab are still around (then nothing more is closed than our own view)."""
    try:
        slab.content.release()
        slab.mapping.close()
    except BufferError:
        return False
    os.close(slab.descriptor)
    return True


def _make_private(directory: Path) -> None:
    """Make the directory, 0700. Raises StorageFailed where somebody else made it first: they could read our slabs."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StorageFailed(f"arena directory {directory} belongs to user {found.st_uid}, not to us; remove it")
    directory.chmod(0o700)


def _filesystem(path: Path) -> str:
    """The type of file system that holds `path`, as the kernel names it."""
    best, kind = Path(), "unknown"
    target = path.resolve()
    with contextlib.suppress(OSError):  # no /proc: only a label is lost
        for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
            _, mounted, name, *_ = line.split(" ")
            at = Path(mounted.replace("\\040", " "))
            if target.is_relative_to(at) and len(at.parts) >= len(best.parts):
                best, kind = at, name
    return kind
