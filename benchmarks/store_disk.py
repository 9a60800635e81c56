"""NVMe rows: reads, durable writes and a small attach in a storm of writes, beside a bare pool of direct I/O."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from bare import Piece, located, open_direct, read_views, write_views
from documents import LLAMA, MIB, PLANES_4MIB, PLANES_256KIB, Sizes, Source, Stage
from holdfast.kvstore.document import WritePolicy
from rows import Row, percentile, row
from samples import Samples
from store_memory import alternate

THREADS: Final = 4  # nvme.threads of the default configuration
WRITE_CHUNK_BYTES: Final = 4 * MIB
READ_SHAPES: Final = (
    ("nvme_read_vs_raw", 0.95, "read_4mib", PLANES_4MIB, 4 * MIB),
    ("nvme_read_vs_raw_256kib", 0.9, "read_256kib", PLANES_256KIB, 256 << 10),
)
WRITE_GOAL: Final = 0.9
STORM_GOAL: Final = 3.0
STORM_DOCUMENTS: Final = 2
ATTACHES: Final = 4  # idle ones a round


class Reads:
    """A document on NVMe comes back; bare: the same bytes of the same files into other slots of the same arena."""

    def __init__(self, stage: Stage, sizes: Sizes, pool: ThreadPoolExecutor) -> None:
        self.stage, self.sizes, self.pool = stage, sizes, pool
        self.samples = Samples()

    def run(self) -> None:
        for _, _, name, spec, chunk_bytes in READ_SHAPES:
            source = Source(spec, self.sizes.document_bytes, spec.extent_tokens)
            self.stage.ingest("read", source, WritePolicy.THROUGH, source.renew())
            self.stage.until_durable("read")
            with self.segments() as descriptors, self.private_slots(source) as views:
                pieces = located(descriptors, source.extents, chunk_bytes)
                self.round(0, name, source, pieces, views)
                for key in (name, f"{name}_bare", f"{name}_first"):
                    del self.samples.times[key]
                for number in range(self.sizes.rounds):
                    self.round(number, name, source, pieces, views)
            self.stage.forget("read")

    def round(self, number: int, name: str, source: Source, pieces: list[Piece], views: list[memoryview]) -> None:
        def ours() -> None:
            self.stage.store.free("read")
            started = time.perf_counter()
            with self.stage.store.attach("read") as attachment:
                layers = attachment.layers()
                next(layers)
                self.samples.add(f"{name}_first", time.perf_counter() - started)
                for _ in layers:
                    pass
                self.samples.add(name, time.perf_counter() - started)
                source.check(attachment)

        def bare() -> None:
            for view in views:
                np.frombuffer(view, np.uint8).fill(0)
            self.samples.timed(f"{name}_bare", lambda: read_views(self.pool, pieces, views))
            for view, extent in zip(views, source.extents, strict=True):
                assert np.array_equal(np.frombuffer(view, np.uint8), extent), "the bare read found other bytes"

        alternate(number, ours, bare)

    @contextmanager
    def segments(self) -> Iterator[list[int]]:
        descriptors = [open_direct(path, os.O_RDONLY) for path in self.stage.segments.glob("segment-*")]
        try:
            yield descriptors
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    @contextmanager
    def private_slots(self, source: Source) -> Iterator[list[memoryview]]:
        """Slots of the arena that are ours to write: those of an ingest that is never committed."""
        other = Source(source.spec, source.size_bytes, source.chunk_tokens, seed=1)  # other tokens: nothing is cached
        opened = self.stage.open("scratch", other, WritePolicy.MEMORY, other.renew())
        try:
            yield opened.views
        finally:
            opened.abort()

    def rows(self) -> list[Row]:
        return [
            self.samples.ratio(row_name, goal, name, f"{name}_bare", f"{name}_first")
            for row_name, goal, name, _, _ in READ_SHAPES
        ]


class Writes:
    """A document of which nothing was written early, from its commit until it is durable.

    Bare: the same memory into fallocated files, then fdatasync.
    """

    def __init__(self, stage: Stage, sizes: Sizes, pool: ThreadPoolExecutor) -> None:
        self.stage, self.sizes, self.pool = stage, sizes, pool
        self.samples = Samples()
        self.source = Source(LLAMA, sizes.document_bytes, LLAMA.extent_tokens)
        self.raw = stage.directory / "raw"
        self.raw.mkdir()

    def run(self) -> None:
        """First writes into files nobody wrote to, then the same number of overwrites."""
        rounds = self.sizes.rounds
        for number in range(rounds):
            self.round(number, "first", f"document-{number}", self.prepared(number))
        for number in range(rounds):
            self.stage.forget(f"document-{number}")
            self.round(number, "again", f"document-{rounds + number}", self.prepared(number))
        self.stage.forget(*(f"document-{rounds + number}" for number in range(rounds)))
        shutil.rmtree(self.raw)

    def prepared(self, number: int) -> Path:
        """A file with all of its blocks, as a segment is made."""
        path = self.raw / f"file-{number}"
        if not path.exists():
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.source.size_bytes)
                os.fsync(file.fileno())
        return path

    def round(self, number: int, kind: str, name: str, path: Path) -> None:
        opened = self.stage.open(name, self.source, WritePolicy.THROUGH, self.source.renew())
        opened.write()
        descriptor = open_direct(path, os.O_RDWR)

        def persist() -> None:
            opened.commit()
            self.stage.until_durable(name)

        def bare() -> None:
            self.samples.timed(
                f"{kind}_bare", lambda: write_views(self.pool, descriptor, opened.views, WRITE_CHUNK_BYTES)
            )
            check_file(descriptor, self.source)

        alternate(number, lambda: self.samples.timed(kind, persist), bare)
        os.close(descriptor)
        self.stage.store.free(name)  # so that what is checked comes from NVMe
        self.stage.check(name, self.source)
        self.stage.store.free(name)

    def rows(self) -> list[Row]:
        s = self.samples
        first = s.ratio("nvme_write_durable_vs_raw", WRITE_GOAL, "first", "first_bare")
        again = s.ratio("nvme_write_durable_vs_raw", WRITE_GOAL, "again", "again_bare")
        raw = {f"first_{key}": value for key, value in first.raw.items()}
        raw |= {f"overwrite_{key}": value for key, value in again.raw.items()}
        raw |= {"first_ratio": first.value, "overwrite_ratio": again.value}
        worse = min(first, again, key=lambda one: one.value)
        return [row(first.name, worse.value, WRITE_GOAL, "higher", worse.raw | raw)]


class Storm:
    """A small document comes from NVMe while large ones are being written, and while nothing else happens."""

    def __init__(self, stage: Stage, sizes: Sizes) -> None:
        self.stage, self.sizes = stage, sizes
        self.samples = Samples()
        self.small = Source(LLAMA, sizes.small_bytes, LLAMA.extent_tokens, seed=1)
        self.storm = Source(LLAMA, sizes.document_bytes, LLAMA.extent_tokens, seed=2)

    def run(self) -> None:
        self.stage.ingest("small", self.small, WritePolicy.THROUGH, self.small.renew())
        self.stage.until_durable("small")
        self.attach("idle")
        self.samples.forget()
        for _ in range(self.sizes.rounds):
            for _ in range(ATTACHES):
                self.attach("idle")
            self.blow()
        self.stage.forget("small")

    def blow(self) -> None:
        """Attach as often as writes are queued; an attach that outlives the storm does not count."""
        names = [f"storm-{number}" for number in range(STORM_DOCUMENTS)]
        opened = []
        for name in names:
            opened.append(self.stage.open(name, self.storm, WritePolicy.THROUGH, self.storm.renew()))
            opened[-1].write()
        for one in opened:
            one.commit()
        while True:
            seconds = self.attach("beside")
            if self.stage.is_durable(names[-1]):
                break
            self.samples.add("storm", seconds)
        for name in names:
            self.stage.until_durable(name)
        self.stage.forget(*names)

    def attach(self, name: str) -> float:
        self.stage.store.free("small")
        started = time.perf_counter()
        with self.stage.store.attach("small") as attachment:
            for _ in attachment.layers():
                pass
            seconds = time.perf_counter() - started
            self.small.check(attachment)
        self.samples.add(name, seconds)
        return seconds

    def rows(self) -> list[Row]:
        times = self.samples.times
        storm, idle = (1e3 * percentile(times[name], 50) for name in ("storm", "idle"))
        raw = {
            "ours_ms": storm,
            "bare_ms": idle,
            "storm_p99_ms": 1e3 * percentile(times["storm"], 99),
            "idle_p99_ms": 1e3 * percentile(times["idle"], 99),
            "samples": float(len(times["storm"])),
            "rounds": float(self.sizes.rounds),
            "idle_samples": float(len(times["idle"])),
            "queued_mib": STORM_DOCUMENTS * self.storm.size_bytes / MIB,
        }
        return [row("attach_under_write_storm", storm / idle, STORM_GOAL, "lower", raw)]


def check_file(descriptor: int, source: Source) -> None:
    """What a bare write left there."""
    with mmap.mmap(-1, source.extents.shape[1]) as buffer:
        for index, extent in enumerate(source.extents):
            assert os.preadv(descriptor, [buffer], index * len(extent)) == len(extent)
            assert np.array_equal(np.frombuffer(buffer, np.uint8), extent), "the bare write left other bytes"
