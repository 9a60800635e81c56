"""Faults for a real daemon: at the Nth call of a kind it is killed, by SIGKILL, from within.

FAULTS lists the kinds. `Kill("commit, after", 2)` ends the process as soon as its second catalog commit is durable.
Counting starts when the file `armed` appears beside the data directory, so that a test can set the stage first.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from holdfast.kvstore import catalog as catalog_module
from holdfast.kvstore import daemon, warm
from holdfast.kvstore.arena import Arena
from holdfast.kvstore.catalog import Catalog
from holdfast.kvstore.segments import Segments, SystemIo

FAULTS = (
    "pwrite, before",
    "pwrite, half",
    "pwrite, after",
    "fdatasync, before",
    "fdatasync, after",
    "commit, before",
    "commit, within",
    "commit, after",
    "view, before",
)
CREATION_FAULTS = (  # strike when a segment is made
    "fallocate, before",
    "fallocate, after",
    "fsync, before",
    "fsync, after",
)
ALL_FAULTS = (  # the last strike when a slab changes its tenant
    *FAULTS,
    *CREATION_FAULTS,
    "retire, before",
    "retire, after",
    "sweep, before",
    "sweep, after",
)
NOTES = ("note, before", "note, within", "note, after")  # commits of the warm index


@dataclass(frozen=True)
class Kill:
    """Picklable; called in the daemon's process before it starts."""

    kind: str
    count: int
    armed: Path
    commit_ms: int = 0  # how slow the catalog's disk is: what happens between data and commit happens more often

    counter: ClassVar[itertools.count] = itertools.count(1)
    lock: ClassVar[threading.Lock] = threading.Lock()

    def hit(self, kind: str) -> bool:
        """Whether this is the moment."""
        if kind != self.kind or not self.armed.exists():
            return False
        with self.lock:
            return next(self.counter) == self.count

    def check(self, kind: str) -> None:
        if self.hit(kind):
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self) -> None:
        fault = self

        class Io(SystemIo):
            def pwrite(self, descriptor, data, offset):
                fault.check("pwrite, before")
                if fault.hit("pwrite, half"):
                    super().pwrite(descriptor, data[: len(data) // 8192 * 4096], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                count = super().pwrite(descriptor, data, offset)
                fault.check("pwrite, after")
                return count

            def fdatasync(self, descriptor):
                fault.check("fdatasync, before")
                super().fdatasync(descriptor)
                fault.check("fdatasync, after")

            def fallocate(self, descriptor, size_bytes):
                fault.check("fallocate, before")
                super().fallocate(descriptor, size_bytes)
                fault.check("fallocate, after")

            def fsync(self, descriptor):
                fault.check("fsync, before")
                super().fsync(descriptor)
                fault.check("fsync, after")

        class FaultySegments(Segments):
            def __init__(self, directory, segment_bytes):
                super().__init__(directory, segment_bytes, Io())

        class FaultyCatalog(Catalog):
            def commit(self, records):
                if fault.commit_ms and fault.armed.exists():
                    time.sleep(fault.commit_ms / 1000)
                fault.check("commit, before")
                super().commit([*records, _Hook(fault)] if fault.kind == "commit, within" else records)
                fault.check("commit, after")

        class FaultyIndex(Catalog):
            def commit(self, records):
                fault.check("note, before")
                super().commit([*records, _Hook(fault)] if fault.kind == "note, within" else records)
                fault.check("note, after")

        class FaultyArena(Arena):
            def view(self, slot):
                fault.check("view, before")
                return super().view(slot)

            def retire(self, slab):
                fault.check("retire, before")
                super().retire(slab)
                fault.check("retire, after")

            def sweep(self):
                fault.check("sweep, before")
                found = super().sweep()
                fault.check("sweep, after")
                return found

        class _Hook:
            """A record whose statement is never made: the process ends while the transaction is open."""

            def __init__(self, fault):
                self.fault = fault

        statement = catalog_module._statement

        def hooked(record):
            if isinstance(record, _Hook):
                record.fault.check(fault.kind)
                return "SELECT 1", ()
            return statement(record)

        catalog_module._statement = hooked
        warm.Catalog = FaultyIndex
        daemon.Segments, daemon.Catalog, daemon.Arena = FaultySegments, FaultyCatalog, FaultyArena


@dataclass(frozen=True)
class Full:
    """Picklable: the device has no room for another segment while the file `armed` exists."""

    armed: Path

    def __call__(self) -> None:
        fault = self

        class Io(SystemIo):
            def fallocate(self, descriptor, size_bytes):
                if fault.armed.exists():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                super().fallocate(descriptor, size_bytes)

        class FullSegments(Segments):
            def __init__(self, directory, segment_bytes):
                super().__init__(directory, segment_bytes, Io())

        daemon.Segments = FullSegments
