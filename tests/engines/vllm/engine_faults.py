"""Faults for the daemon behind an engine, struck when a file of their name is put beside its data directory."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

READ, COMMIT, SLOW = "kill at a read", "kill at a commit", "reads are slow"
SLOW_SECONDS = 3.0


@dataclass(frozen=True)
class Faults:
    """Picklable; called in the daemon's process before it starts."""

    directory: Path

    def arm(self, fault: str) -> None:
        (self.directory / fault).touch()

    def disarm(self) -> None:
        for fault in (READ, COMMIT, SLOW):
            (self.directory / fault).unlink(missing_ok=True)

    def _is_armed(self, fault: str) -> bool:
        return (self.directory / fault).exists()

    def __call__(self) -> None:
        from holdfast.kvstore import daemon
        from holdfast.kvstore.segments import Segments, SystemIo
        from holdfast.kvstore.service import Service

        faults = self

        class Io(SystemIo):
            def pread(self, descriptor, into, offset):
                if faults._is_armed(READ):
                    os.kill(os.getpid(), signal.SIGKILL)
                if faults._is_armed(SLOW):
                    time.sleep(SLOW_SECONDS)
                return super().pread(descriptor, into, offset)

        class FaultySegments(Segments):
            def __init__(self, directory, segment_bytes):
                super().__init__(directory, segment_bytes, Io())

        commit = Service.commit_ingest

        def fatal_commit(service, *arguments, **options):
            if faults._is_armed(COMMIT):
                os.kill(os.getpid(), signal.SIGKILL)
            return commit(service, *arguments, **options)

        daemon.Segments = FaultySegments
        Service.commit_ingest = fatal_commit
