"""A recording of what a real daemon does to its disk: the system calls below the NVMe tier, and every commit."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

from holdfast.kvstore import daemon as daemon_module
from holdfast.kvstore.catalog import Catalog
from holdfast.kvstore.segments import Segments, SystemIo


@dataclass(frozen=True)
class Record:
    """Picklable; called in the daemon's process before it starts: its calls go to a file, one after another."""

    directory: Path

    def __call__(self) -> None:
        out = (self.directory / "trace").open("ab", buffering=0)
        copies = self.directory / "commits"
        copies.mkdir(exist_ok=True)

        def path_of(descriptor):
            return Path(f"/proc/self/fd/{descriptor}").readlink().name

        def note(*event):
            out.write(pickle.dumps(event))

        class Io(SystemIo):
            def pread(self, descriptor, into, offset):
                note("pread", path_of(descriptor), offset)
                return super().pread(descriptor, into, offset)

            def pwrite(self, descriptor, data, offset):
                count = super().pwrite(descriptor, data, offset)
                note("pwrite", path_of(descriptor), offset, bytes(data[:count]))
                return count

            def fdatasync(self, descriptor):
                note("sync begins", path_of(descriptor))
                super().fdatasync(descriptor)
                note("sync", path_of(descriptor))

            def fsync(self, descriptor):
                super().fsync(descriptor)
                note("fsync", path_of(descriptor))

            def fallocate(self, descriptor, size_bytes):
                super().fallocate(descriptor, size_bytes)
                note("fallocate", path_of(descriptor), size_bytes)

        class RecordingSegments(Segments):
            def __init__(self, directory, segment_bytes):
                super().__init__(directory, segment_bytes, Io())

        class RecordingCatalog(Catalog):
            def commit(self, records):
                note("commit begins", list(records))
                super().commit(records)
                number = len(list(copies.iterdir()))
                (copies / str(number)).mkdir()
                for path in self.path.parent.glob("catalog.sqlite*"):
                    if not path.name.endswith("-shm"):  # it is in memory only
                        shutil.copy(path, copies / str(number))
                note("commit", number)

        daemon_module.Segments, daemon_module.Catalog = RecordingSegments, RecordingCatalog


def trace(directory) -> list[tuple]:
    found = []
    with (directory / "trace").open("rb") as file:
        while True:
            try:
                found.append(pickle.load(file))
            except EOFError:
                return found
