"""Backing: where the DDR arena's slabs lie, and what its pages are.

A directory that the operator names is used as it is, or refused. Else, in this order: what is mounted on `arena` in the
data directory, a mount of our own there (a tmpfs in huge pages), /dev/shm, the directory for temporary files. What
falls short of huge pages is said at start, with what to do. How much there is to take is looked up before any of it is.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .arena import SLAB_NAME
from .config import Config, load_config
from .errors import ConfigError, StorageFailed
from .machine import Machine, Mount, mount_huge_tmpfs, resize_tmpfs, unmount
from .sizes import about_size, format_size

MOUNT_POINT: Final = "arena"  # in the data directory
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - not a temporary file
MEMORY_FILE_SYSTEMS: Final = ("tmpfs", "hugetlbfs", "ramfs")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an arena could be: its directory, to be made in `base`, which is there."""

    directory: Path
    base: Path
    mount_bytes: int | None = None  # what our own mount on the directory is to hold; it may have to be mounted first
    lacks: str = ""  # why it is second choice


@dataclass(frozen=True, slots=True)
class _Room:
    """What slabs may take at a place, those that a predecessor left counted in. None: no limit of this kind."""

    memory_bytes: int | None
    device_bytes: int | None

    @property
    def size_bytes(self) -> int | None:
        """The nearest limit."""
        return min((limit for limit in (self.memory_bytes, self.device_bytes) if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class Backing:
    """The place chosen. `description` is for people: "tmpfs, huge pages (huge=always), at /var/lib/holdfast/arena"."""

    directory: Path
    description: str
    warning: str  # what is wrong with it and what to do; empty when nothing is
    is_own_mount: bool

    @property
    def free_command(self) -> str:
        """What gives back the memory of slabs that a daemon left."""
        return f"umount {self.directory}" if self.is_own_mount else f"rm -r {self.directory}"

    def release(self) -> None:
        """Unmount what is ours, unless something still lies in it."""
        with suppress(OSError):
            if self.is_own_mount and not any(self.directory.iterdir()):
                unmount(self.directory)
                self.directory.rmdir()


def open_backing(config: Config, machine: Machine) -> Backing:
    """Choose and prepare the place, once the data directory is ours; what lies in other places of ours is removed.

    Raises ConfigError when the capacity or the slabs do not go with it, StorageFailed when it cannot be used; then
    nothing has changed.
    """
    refused = ""
    for place in _places(config, machine):
        _check(config, place, machine)
        try:
            if place.mount_bytes is not None:
                _mount(place.directory, place.mount_bytes, machine)
        except OSError as error:
            refused = f" (mounting a tmpfs ourselves: {error.strerror})"
            continue
        mount = machine.mount_of(place.directory if place.mount_bytes is not None else place.base)
        _forget((other for other in slab_directories(config) if other != place.directory), machine)
        warning = f"{place.lacks}{refused}; {_advice(config)}" if place.lacks else ""
        if mount.kind not in MEMORY_FILE_SYSTEMS:
            warning = warning or "the DDR arena lies on a disk; set ddr.directory to a tmpfs"
        return Backing(place.directory, _described(mount, place.directory, machine), warning, mount.is_ours)
    raise AssertionError("the last place needs no mounting")


def arena_directory(config: Config, machine: Machine) -> Path:
    """Where the arena is, or would be if nothing had to be mounted. Raises StorageFailed like open_backing."""
    at = config.daemon.data_dir.resolve() / MOUNT_POINT
    is_mounted = _mounted_on(at, machine) is not None
    return next(p.directory for p in _places(config, machine) if p.mount_bytes is None or is_mounted)


def configured(
    path: Path | None, environment: Mapping[str, str], overrides: Mapping[str, str], machine: Machine
) -> Config:
    """See load_config: the configuration on this machine, whose default DDR capacity is a part of what there is."""
    config = load_config(path, environment, overrides)
    available_bytes = None
    with suppress(StorageFailed):  # a directory that is not there: said when it is opened
        available_bytes = _room(config, next(_places(config, machine)), machine).size_bytes
    return load_config(path, environment, overrides, available_bytes)


# Places ----------------------------------------------------------------------------------------


def _name(config: Config) -> str:
    """Of the arena's directory among those of others."""
    path = os.fsencode(config.daemon.data_dir.resolve())
    return f"holdfast-{hashlib.blake2b(path, digest_size=8).hexdigest()}"


def _places(config: Config, machine: Machine) -> Iterator[_Place]:
    """By preference; the last needs no mounting. Raises StorageFailed for a named directory that cannot be used."""
    name, named = _name(config), config.ddr.directory
    if isinstance(named, Path):
        if not named.is_dir():
            raise StorageFailed(f"ddr.directory = {named} is no directory; make it, or mount memory on it")
        if not os.access(named, os.W_OK | os.X_OK):
            raise StorageFailed(f"ddr.directory = {named} cannot be written by user {os.geteuid()}; chown it")
        yield _Place(named / name, named)
        return
    data_dir = config.daemon.data_dir.resolve()
    at = data_dir / MOUNT_POINT
    found = _mounted_on(at, machine)
    if found is not None and not found.is_ours:
        yield _Place(at / name, at)
        return
    if found is not None or machine.may_mount():
        yield _Place(at, data_dir, mount_bytes=_mount_bytes(config))
    if os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        yield _Place(SHARED_MEMORY / name, SHARED_MEMORY, lacks="the DDR arena has no mount with huge pages")
    temporary = Path(tempfile.gettempdir())
    yield _Place(temporary / name, temporary, lacks="the DDR arena lies among the temporary files")


def slab_directories(config: Config) -> list[Path]:
    """Everywhere that a daemon on this data directory may have put slabs, but for what was named in earlier lives."""
    name, at = _name(config), config.daemon.data_dir.resolve() / MOUNT_POINT
    bases = (SHARED_MEMORY, Path(tempfile.gettempdir()), config.ddr.directory, at)
    return [at, *dict.fromkeys(base / name for base in bases if isinstance(base, Path))]


def _left(directory: Path) -> list[Path]:
    """The slab files in a directory of ours."""
    with suppress(OSError):
        status = directory.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            return [path for path in directory.iterdir() if SLAB_NAME.fullmatch(path.name)]
    return []


def _left_bytes(directory: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in _left(directory))


def _forget(directories: Iterable[Path], machine: Machine) -> None:
    """Give back the memory of slabs that nobody will look for: the arena is elsewhere now."""
    for directory in directories:
        for path in _left(directory):
            path.unlink(missing_ok=True)
        mount = _mounted_on(directory, machine)
        with suppress(OSError):  # not there, or something else is in it
            if mount is not None and mount.is_ours and not any(directory.iterdir()):
                unmount(directory)
            directory.rmdir()


# Mounting --------------------------------------------------------------------------------------


def _mounted_on(at: Path, machine: Machine) -> Mount | None:
    return next((mount for mount in reversed(machine.mounts()) if mount.at == at), None)


def _mount_bytes(config: Config) -> int:
    """A quarter more than the capacity: a retired slab keeps its pages until the last client has unmapped it."""
    return config.ddr.capacity_bytes + max(config.ddr.capacity_bytes // 4, 4 * config.ddr.slab_bytes)


def _mount(at: Path, size_bytes: int, machine: Machine) -> None:
    """Mount it, or give what a predecessor mounted the size that we want. Raises OSError where we may not mount."""
    if _mounted_on(at, machine) is not None:
        with suppress(OSError):  # more is in use: the old size is as good a limit until that has gone
            resize_tmpfs(at, size_bytes)
        return
    at.mkdir(mode=0o700, exist_ok=True)
    try:
        mount_huge_tmpfs(at, size_bytes)
    except OSError:
        with suppress(OSError):  # it was there before, with something in it
            at.rmdir()
        raise


def _advice(config: Config) -> str:
    """How to get huge pages."""
    at = config.daemon.data_dir.resolve() / MOUNT_POINT
    options = f"huge=always,mode=0700,uid={os.geteuid()},size={_mount_bytes(config)},X-mount.mkdir"
    return (
        "for faster reads and attaches run, as root, and before the next start: "
        f"mount -t tmpfs -o {options} tmpfs {at}; or in /etc/fstab: tmpfs {at} tmpfs {options} 0 0"
    )


# What there is ---------------------------------------------------------------------------------


def _room(config: Config, place: _Place, machine: Machine) -> _Room:
    left_bytes = _left_bytes(place.directory)
    device_bytes = None
    if place.mount_bytes is None:
        device = os.statvfs(place.base)
        if machine.mount_of(place.base).kind == "hugetlbfs":
            free_bytes = machine.free_huge_pages(device.f_bsize) * device.f_bsize
            limit_bytes = device.f_bavail * device.f_bsize if device.f_blocks else free_bytes
            return _Room(None, min(free_bytes, limit_bytes) + left_bytes)
        if device.f_blocks:  # a tmpfs without a limit has none
            device_bytes = device.f_bavail * device.f_frsize + left_bytes
    everywhere_bytes = sum(map(_left_bytes, slab_directories(config)))
    return _Room(machine.available_memory() + everywhere_bytes, device_bytes)


def _check(config: Config, place: _Place, machine: Machine) -> None:
    """Refuse what cannot be, before anything is taken. Raises ConfigError."""
    ddr = config.ddr
    if place.mount_bytes is None and machine.mount_of(place.base).kind == "hugetlbfs":
        page_bytes = os.statvfs(place.base).f_bsize
        if ddr.slab_bytes % page_bytes:
            raise ConfigError(
                f"ddr.slab_bytes = {format_size(ddr.slab_bytes)} ({config.origins['ddr.slab_bytes']}) is no multiple "
                f"of the {format_size(page_bytes)} pages of hugetlbfs at {place.base}"
            )
    room = _room(config, place, machine)
    wanted_bytes = ddr.capacity_bytes // ddr.slab_bytes * ddr.slab_bytes
    if room.size_bytes is not None and wanted_bytes > room.size_bytes:
        limits = {"of memory (machine and control groups)": room.memory_bytes, f"in {place.base}": room.device_bytes}
        found = " and ".join(f"{about_size(limit)} {where}" for where, limit in limits.items() if limit is not None)
        raise ConfigError(
            f"ddr.capacity_bytes = {format_size(ddr.capacity_bytes)} ({config.origins['ddr.capacity_bytes']}) is more "
            f"than can be had: there are {found}; lower it, or free memory"
        )


def _described(mount: Mount, directory: Path, machine: Machine) -> str:
    """What the slabs' pages are, as the kernel says."""
    if mount.kind == "hugetlbfs":
        return f"hugetlbfs, {format_size(os.statvfs(mount.at).f_bsize)} pages, at {directory}"
    if mount.kind != "tmpfs":
        return f"{mount.kind}{'' if mount.kind in MEMORY_FILE_SYSTEMS else ', no memory'}, at {directory}"
    huge, policy = mount.option("huge") or "never", machine.shmem_policy()
    is_huge = policy == "force" or (policy != "deny" and huge in ("always", "within_size"))
    pages = f"huge pages (huge={huge})" if is_huge else f"{format_size(mmap.PAGESIZE)} pages"
    return f"tmpfs, {pages}, at {directory}"
