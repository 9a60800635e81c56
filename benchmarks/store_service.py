"""Rows of the daemon itself: lookups, the lag of its event loop, its memory and its recovery with many extents."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from documents import GIB, LLAMA, MIB, Opened, Sizes, Source, Stage, until
from holdfast.kvstore.catalog import Catalog
from holdfast.kvstore.document import Document, DocumentId, WritePolicy
from holdfast.kvstore.extent import cut
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.keys import block_keys
from holdfast.kvstore.orders import PutDocument, PutExtent, PutSpec, Record
from holdfast.kvstore.seal import CHECKSUM_BYTES
from holdfast.kvstore.slots import Slot
from holdfast.kvstore.spec import KVSpec, LayerGroup
from rows import Row, percentile, row
from samples import Samples

HELPER: Final = Path(__file__).with_name("client_process.py")
TENANT: Final = "default"
DOCUMENT_EXTENTS: Final = 1000
SEGMENT_BYTES: Final = GIB
LAG_GOAL_MS: Final = 10.0
LOOKUP_GOAL_MS: Final = 10.0
RSS_GOAL_MIB: Final = 160.0
RECOVERY_GOAL_S: Final = 5.0
IDLE_SECONDS: Final = 1.0
POLL_SECONDS: Final = 0.01  # asking is work for the loop, too
RECOVERIES: Final = 3


class Lag:
    """Round trips of a tiny request from another process: idle, and while a document is read and another written."""

    def __init__(self, stage: Stage, sizes: Sizes) -> None:
        self.stage, self.sizes = stage, sizes
        self.samples = Samples()
        self.moved_bytes = 0
        self.moving_seconds = 0.0

    def run(self) -> None:
        read = Source(LLAMA, self.sizes.document_bytes, LLAMA.extent_tokens, seed=1)
        write = Source(LLAMA, self.sizes.document_bytes, LLAMA.extent_tokens, seed=2)
        self.stage.ingest("read", read, WritePolicy.THROUGH, read.renew())
        self.stage.until_durable("read")
        with_pings(self.stage, self.samples, "idle", lambda: time.sleep(IDLE_SECONDS))
        for number in range(self.sizes.rounds):
            name = f"write-{number}"
            opened = self.stage.open(name, write, WritePolicy.THROUGH, write.renew())
            opened.write()
            self.stage.store.free("read")

            def move(name: str = name, opened: Opened = opened) -> None:
                started = time.perf_counter()
                opened.commit()
                with self.stage.store.attach("read") as attachment:
                    for _ in attachment.layers():
                        pass
                    until(lambda: self.stage.is_durable(name), POLL_SECONDS)
                    self.moving_seconds += time.perf_counter() - started

            with_pings(self.stage, self.samples, "moving", move)
            self.stage.check("read", read)
            self.stage.check(name, write)
            self.stage.forget(name)
            self.moved_bytes += read.size_bytes + write.size_bytes
        self.stage.forget("read")

    def rows(self) -> list[Row]:
        idle, moving = (sorted(self.samples.times[name]) for name in ("idle", "moving"))
        raw = {
            "ours_ms": 1e3 * percentile(moving, 99),
            "bare_ms": 1e3 * percentile(idle, 99),
            "p50_ms": 1e3 * percentile(moving, 50),
            "max_ms": 1e3 * moving[-1],
            "idle_p50_ms": 1e3 * percentile(idle, 50),
            "samples": float(len(moving)),
            "rounds": float(self.sizes.rounds),
            "gb_per_s": self.moved_bytes / self.moving_seconds / 1e9,
        }
        return [row("loop_lag_ms", raw["ours_ms"], LAG_GOAL_MS, "lower", raw)]


def with_pings(stage: Stage, samples: Samples, name: str, work: Callable[[], object]) -> None:
    """Do the work while another process asks, and keep what it waited."""
    pipe = subprocess.PIPE
    command = [sys.executable, HELPER, "ping", stage.daemon.socket]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        work()
        waited, _ = process.communicate()
    for seconds in json.loads(waited):
        samples.add(name, seconds)


class Many:
    """A daemon with many extents: its start, and its memory."""

    def __init__(self, directory: Path, sizes: Sizes) -> None:
        self.directory, self.sizes = directory, sizes
        self.samples = Samples()
        self.rss_bytes: list[float] = []
        self.slot_bytes = extent_geometry(LLAMA).size_bytes
        self.per_segment = SEGMENT_BYTES // self.slot_bytes

    def run(self) -> None:
        self.fill()
        for _ in range(RECOVERIES):
            started = time.perf_counter()
            stage = Stage(
                self.directory,
                {
                    "ddr.capacity_bytes": "256MiB",
                    "nvme.segment_bytes": str(SEGMENT_BYTES),
                    "nvme.capacity_bytes": str(SEGMENT_BYTES * (self.sizes.extents // self.per_segment + 1)),
                },
            )
            self.samples.add("ready", time.perf_counter() - started)
            documents = stage.store.documents()
            assert sum(document.extent_count for document in documents) == self.sizes.extents
            assert all(document.durable and document.complete for document in documents)
            self.rss_bytes.append(unshared_bytes(stage.pid))
            stage.daemon.kill()
            stage.close()

    def fill(self) -> None:
        """Catalog rows through the catalog's own class; segment files of the right size without content."""
        self.directory.mkdir()
        catalog = Catalog(self.directory / "catalog.sqlite")
        secret = catalog.tenant_secret(TENANT)
        catalog.commit([PutSpec(LLAMA)])
        checksums = bytes(CHECKSUM_BYTES * extent_geometry(LLAMA).plane_count)
        rng = np.random.default_rng(3)
        slots = iter(range(self.sizes.extents))
        for number in range(self.sizes.extents // DOCUMENT_EXTENTS):
            tokens = rng.integers(0, 1 << 16, DOCUMENT_EXTENTS * LLAMA.extent_tokens, dtype=np.uint32)
            extents = cut(block_keys(tokens, LLAMA, secret), len(tokens), LLAMA, TENANT)
            records: list[Record] = [PutExtent(extent, checksums, self.slot(next(slots))) for extent in extents]
            document = Document(
                id=DocumentId(TENANT, f"document-{number}"),
                fingerprint=LLAMA.fingerprint(),
                token_count=len(tokens),
                extents=tuple(extent.id for extent in extents),
                write_policy=WritePolicy.THROUGH,
                created_wall_ns=number,
            )
            catalog.commit([*records, PutDocument(document)])
        catalog.close()
        (self.directory / "nvme").mkdir(mode=0o700)
        for number in range(self.sizes.extents // self.per_segment + 1):
            with (self.directory / "nvme" / f"segment-{number}").open("wb") as file:
                file.truncate(SEGMENT_BYTES)

    def slot(self, index: int) -> Slot:
        return Slot(index // self.per_segment, index % self.per_segment * self.slot_bytes, self.slot_bytes)

    def rows(self) -> list[Row]:
        ready = self.samples.times["ready"]
        extents = float(self.sizes.extents)
        rss = statistics.median(self.rss_bytes) / MIB
        memory = {"rounds": float(len(ready)), "extents": extents, "max_mib": max(self.rss_bytes) / MIB}
        times = {"rounds": float(len(ready)), "extents": extents, "min_s": min(ready), "max_s": max(ready)}
        return [
            row("daemon_rss_mib", rss, RSS_GOAL_MIB, "lower", memory),
            row("recovery_100k_extents_s", statistics.median(ready), RECOVERY_GOAL_S, "lower", times),
        ]


def unshared_bytes(pid: int) -> float:
    """Resident memory of a process besides what it shares with clients: VmRSS - RssShmem."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    sizes = {
        key: value.split()[0] for key, value in (line.split(":", 1) for line in lines) if key.endswith(("RSS", "Shmem"))
    }
    return 1024.0 * (int(sizes["VmRSS"]) - int(sizes["RssShmem"]))


class Lookup:
    """How much of a long document is there: one question that carries the keys of all of its blocks."""

    def __init__(self, stage: Stage, sizes: Sizes) -> None:
        self.stage, self.sizes = stage, sizes
        self.samples = Samples()
        # One block an extent, as for a model of this size; a row of 4 bytes, so that the KV itself takes no room.
        group = LayerGroup(layers=(0,), kv_heads=1, key_dim=1, value_dim=1)
        self.spec = KVSpec(groups=(group,), dtype="bfloat16", model="lookup", vocabulary_size=1 << 16, extent_blocks=1)

    def run(self) -> None:
        rng = np.random.default_rng(4)
        tokens = rng.integers(0, 1 << 16, self.sizes.lookup_tokens, dtype=np.uint32)
        kv = rng.integers(0, 1 << 16, (1, len(tokens), 1), dtype=np.uint16)
        with self.stage.store.ingest("long", self.spec, tokens, write_policy=WritePolicy.MEMORY) as writer:
            writer.write(0, 0, kv, kv)
        client = self.stage.client
        fingerprint = self.spec.fingerprint()
        keys = client.keys_of(fingerprint, tokens)
        for _ in range(self.sizes.lookups):
            found = self.samples.timed("lookup", lambda: client.lookup(fingerprint, keys))
            assert found.token_count == len(tokens), found
        half = len(keys) // 2
        assert client.lookup(fingerprint, keys[:half] + bytes(half)).token_count == len(tokens) // 2
        self.stage.forget("long")

    def rows(self) -> list[Row]:
        times = self.samples.times["lookup"]
        raw = {
            "ours_ms": 1e3 * percentile(times, 99),
            "p50_ms": 1e3 * percentile(times, 50),
            "max_ms": 1e3 * max(times),
            "rounds": float(len(times)),
            "tokens": float(self.sizes.lookup_tokens),
        }
        return [row("lookup_1m_tokens_ms", raw["ours_ms"], LOOKUP_GOAL_MS, "lower", raw)]
