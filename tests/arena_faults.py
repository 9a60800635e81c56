"""Faults for the start of a real daemon: called in its process before it begins, see daemon_process."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.kvstore import backing as backing_module
from holdfast.kvstore.arena import Arena


@dataclass(frozen=True)
class Stuck:
    """From the 6th slab on, none is made before the file `go` is there. `made` beside it lists them."""

    go: Path

    def __call__(self) -> None:
        make, go = Arena.make, self.go

        def stuck(arena, slab):
            while slab >= 5 and not go.exists():
                time.sleep(0.002)
            make(arena, slab)
            with go.with_name("made").open("a") as made:
                made.write(f"{slab}\n")

        Arena.make = stuck


@dataclass(frozen=True)
class SlowToShare:
    """Descriptors are opened, but not handed out before the file `go` is there. `asked` beside it says that one was."""

    go: Path

    def __call__(self) -> None:
        descriptor, go = Arena.descriptor, self.go

        def slow(arena, slab, serial):
            opened = descriptor(arena, slab, serial)
            go.with_name("asked").touch()
            while not go.exists():
                time.sleep(0.002)
            return opened

        Arena.descriptor = slow


def full() -> None:
    """There is room for four slabs."""
    allocate, left = os.posix_fallocate, iter(range(4))

    def limited(descriptor, offset, size):
        if "slab-" in str(Path(f"/proc/self/fd/{descriptor}").readlink()) and next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, size)

    os.posix_fallocate = limited


def refused_mount() -> None:
    def refused(at, size_bytes):
        raise OSError(errno.EPERM, "Operation not permitted")

    backing_module.mount_huge_tmpfs = refused
