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
    """From the 6th slab on, none is made before the file `go` is there."""

    go: Path

    def __call__(self) -> None:
        make, go = Arena.make, self.go

        def stuck(arena, slab):
            while slab >= 5 and not go.exists():
                time.sleep(0.002)
            make(arena, slab)

        Arena.make = stuck


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
