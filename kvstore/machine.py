"""Machine: what the machine and its control groups leave us, and how it mounts memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CAP_SYS_ADMIN: Final = 21  # linux/capability.h
MADV_POPULATE_WRITE: Final = 23  # linux/mman.h, from Linux 5.14
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 2, 4, 8, 32  # linux/mount.h
MNT_DETACH: Final = 2
MOUNT_SOURCE: Final = "holdfast-arena"  # what /proc/self/mounts shows as the device of mounts that we made
MOUNT_FLAGS: Final = MS_NOSUID | MS_NODEV | MS_NOEXEC
# Limits, what counts against them, and the part of that which the kernel gives up first (in memory.stat). Version 1 of
# control groups, and version 2: see memory.rst and cgroup-v2.rst in the kernel's admin-guide.
CGROUP_1: Final[tuple[tuple[str, ...], str, str]] = (
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
)
CGROUP_2: Final[tuple[tuple[str, ...], str, str]] = (("memory.max", "memory.high"), "memory.current", "inactive_file")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo. `root` is the part of the file system that is seen at `at`."""

    at: Path
    root: Path
    kind: str
    source: str
    options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """The value of an option "name=value"."""
        return next((o.partition("=")[2] for o in self.options if o.startswith(f"{name}=")), None)

    @property
    def is_ours(self) -> bool:
        """Whether a daemon of ours made it."""
        return self.kind == "tmpfs" and self.source == MOUNT_SOURCE


class Machine:
    """Facts of the kernel's, asked anew each time. `root` is where /proc and /sys are."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def available_memory(self) -> int:
        """Bytes that we may still take: MemAvailable, or less where a limit of our control group or one above says so.

        Page cache that nobody used lately does not count as taken: the kernel gives it up first.
        """
        return min([self._meminfo("MemAvailable"), *self._headrooms()])

    def total_memory(self) -> int:
        """Bytes of memory the machine has."""
        return self._meminfo("MemTotal")

    def hardware(self) -> str:
        """The processor and the memory in one line: what was measured on another line says nothing of this machine."""
        lines = self._text("proc/cpuinfo").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, platform.processor() or platform.machine())
        return f"{name}, {os.cpu_count()} cores, {self.total_memory() / (1 << 30):.0f} GiB"

    def mounts(self) -> list[Mount]:
        """Everything mounted where we look, in the order of mounting."""
        return [_mount(line) for line in self._text("proc/self/mountinfo").splitlines()]

    def mount_of(self, path: Path) -> Mount:
        """The mount that holds `path`."""
        target = path.resolve()
        found = [mount for mount in self.mounts() if target.is_relative_to(mount.at)]
        nowhere = Mount(Path("/"), Path("/"), "unknown", "unknown", ())
        deepest = max((len(mount.at.parts) for mount in found), default=0)
        return next((mount for mount in reversed(found) if len(mount.at.parts) == deepest), nowhere)

    def may_mount(self) -> bool:
        """Whether we have the capability to mount; a security module may refuse all the same."""
        return bool(self._status("CapEff") >> CAP_SYS_ADMIN & 1)

    def shmem_policy(self) -> str:
        """The choice in shmem_enabled: "deny" and "force" override what a tmpfs was mounted with."""
        text = self._text("sys/kernel/mm/transparent_hugepage/shmem_enabled")
        return text.partition("[")[2].partition("]")[0]

    def free_huge_pages(self, page_bytes: int) -> int:
        """Pages in the hugetlbfs pool of that page size that nobody has, or was promised."""
        pool = f"sys/kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB"
        return max(0, self._number(f"{pool}/free_hugepages") - self._number(f"{pool}/resv_hugepages"))

    def _text(self, path: str) -> str:
        """A file's text, "" where there is none: an older kernel, or a container that hides it."""
        with suppress(OSError):
            return (self._root / path).read_text(encoding="utf-8", errors="replace")
        return ""

    def _number(self, path: str) -> int:
        text = self._text(path).strip()
        return int(text) if text.isdecimal() else 0

    def _meminfo(self, name: str) -> int:
        for line in self._text("proc/meminfo").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) << 10
        return 0

    def _status(self, name: str) -> int:
        for line in self._text("proc/self/status").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value, 16)
        return 0

    def _headrooms(self) -> Iterator[int]:
        """What each memory limit that holds for us leaves, in no order."""
        mounts = self.mounts()
        for line in self._text("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                at = next((mount for mount in mounts if mount.kind == "cgroup2"), None)
                files = CGROUP_2
            elif "memory" in controllers.split(","):
                at = next((m for m in mounts if m.kind == "cgroup" and "memory" in m.options), None)
                files = CGROUP_1
            else:
                continue
            if at is not None:
                yield from self._headrooms_up(at, Path(path), *files)

    def _headrooms_up(
        self, mount: Mount, group: Path, limits: tuple[str, ...], usage: str, reclaimable: str
    ) -> Iterator[int]:
        """From our group up to the top of what is mounted, which in a container may itself be a group below the top."""
        inside = group.relative_to(mount.root) if group.is_relative_to(mount.root) else group.relative_to("/")
        for directory in (inside, *inside.parents):
            at = (mount.at / directory).relative_to("/")
            texts = [self._text(f"{at}/{name}").strip() for name in limits]
            set_limits = [int(text) for text in texts if text.isdecimal()]  # "max" is none
            if set_limits:
                yield max(
                    0, min(set_limits) - self._number(f"{at}/{usage}") + self._stat(f"{at}/memory.stat", reclaimable)
                )

    def _stat(self, path: str, name: str) -> int:
        for line in self._text(path).splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
        return 0


def _mount(line: str) -> Mount:
    """Parse a line of mountinfo: see proc_pid_mountinfo(5). Options of mount and file system are put together."""
    before, _, after = line.partition(" - ")
    _, _, _, root, at, own, *_ = before.split(" ")
    kind, source, shared = after.split(" ")
    return Mount(
        Path(_unescaped(at)), Path(_unescaped(root)), kind, _unescaped(source), (*own.split(","), *shared.split(","))
    )


def _unescaped(text: str) -> str:
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, character)
    return text


def mount_huge_tmpfs(at: Path, size_bytes: int) -> None:
    """Mount memory in huge pages on a directory, ours alone. Raises OSError where it may not be, or is not known."""
    _mounted(at, MOUNT_FLAGS, f"huge=always,mode=0700,size={size_bytes}")


def resize_tmpfs(at: Path, size_bytes: int) -> None:
    """Let a mounted tmpfs hold that much. Raises OSError, for example where more is in use."""
    _mounted(at, MOUNT_FLAGS | MS_REMOUNT, f"size={size_bytes}")


def unmount(at: Path) -> None:
    """Unmount; its memory goes when the last process has let go of it. Raises OSError."""
    if _libc.umount2(os.fsencode(at), MNT_DETACH):
        raise _last_error(at)


def populate(mapping: mmap.mmap) -> None:
    """Fill in every page of a shared mapping, cleared and writable: allocated ones (fallocate) are neither yet.

    A kernel before 5.14 cannot, and does it page by page on first use. Raises OSError when memory is short.
    """
    first = ctypes.c_char.from_buffer(mapping)
    try:
        # Through libc, because mmap.madvise keeps the interpreter's lock, for as long as clearing the pages takes.
        failed = _libc.madvise(ctypes.byref(first), ctypes.c_size_t(len(mapping)), MADV_POPULATE_WRITE)
        error = ctypes.get_errno()
    finally:
        del first
    if failed and error != errno.EINVAL:
        raise OSError(error, os.strerror(error))


def _mounted(at: Path, flags: int, options: str) -> None:
    if _libc.mount(MOUNT_SOURCE.encode(), os.fsencode(at), b"tmpfs", ctypes.c_ulong(flags), options.encode()):
        raise _last_error(at)


def _last_error(at: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), str(at))
