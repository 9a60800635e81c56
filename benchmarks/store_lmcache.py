"""LMCache's storage managers beside the store: the same bytes through both, round by round.

LMCache runs in an environment and a process of its own (lmcache_worker.py). Both sides copy with as many threads. Its
figure in a row is its best manager's. Loads end in an engine's buffers in the order of the stored objects, because
LMCache's managers do not change it; what it takes us to bring a document into an engine's order is in raw. Stores:
LMCache copies whole objects, we take the KV of prefill chunks apart into extents.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from documents import GIB, LLAMA, Sizes, Source, Stage, Tokens
from holdfast.engine_adapter.attachment import LayerKV
from holdfast.kvstore.document import WritePolicy
from peer import Peer
from rows import Row, row
from samples import Samples
from store_memory import alternate

HERE: Final = Path(__file__).resolve().parent
PYTHON: Final = HERE.parent / ".venv-lmcache" / "bin" / "python"
WORKER: Final = HERE / "lmcache_worker.py"
RAM: Final = ("local_ram", "shared_ram")
DISK: Final = ("local_disk", "local_disk_direct", "shared_files")
OBJECT_BYTES: Final = 256 * LLAMA.bytes_per_token
LLAMA_EXTENT_BYTES: Final = LLAMA.extent_tokens * LLAMA.bytes_per_token
CHUNK_TOKENS: Final = 2048  # of a prefill: an engine does not make KV extent by extent


@contextmanager
def peer(directory: Path, sizes: Sizes) -> Iterator[Peer]:
    """A worker with every manager. Its complaints go to a log in `directory`."""
    directory.mkdir()
    with (directory / "lmcache.log").open("w") as log:
        process = subprocess.Popen(
            [PYTHON, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=directory
        )
        asked = Peer(process, "LMCache's worker")
        try:
            objects = sizes.document_bytes // OBJECT_BYTES
            asked.ask(
                "start", directory=str(directory), objects=objects, rounds=sizes.peer_rounds, managers=[*RAM, *DISK]
            )
            yield asked
        finally:
            asked.close(60)


class Versus:
    """Retrieve from RAM; store to disk, synced; load from disk, cold."""

    def __init__(self, stage: Stage, sizes: Sizes, worker: Peer) -> None:
        self.stage, self.sizes, self.peer = stage, sizes, worker
        self.samples = Samples()
        self.source = Source(LLAMA, sizes.document_bytes, CHUNK_TOKENS)
        self.threads = len(os.sched_getaffinity(0))
        self.target = np.ones((self.source.tokens // LLAMA.extent_tokens, LLAMA_EXTENT_BYTES), np.uint8)
        self.ordered = self.source.buffers()

    def run(self) -> None:
        """First writes go to blocks that nobody wrote to, overwrites to those of a document that leaves."""
        rounds = self.sizes.peer_rounds
        self.round(0, "first")  # touches every buffer; does not count
        self.samples.forget()
        for number in range(1, rounds + 1):
            self.round(number, "first")
        for number in range(1, rounds + 1):
            self.forget(number)
            self.round(rounds + number, "again")
        for number in (0, *range(rounds + 1, 2 * rounds + 1)):
            self.forget(number)

    def forget(self, number: int) -> None:
        self.stage.forget(f"document-{number}")
        for name in DISK:
            self.peer.ask("drop", name=name, number=number)

    def round(self, number: int, kind: str) -> None:
        name, tokens = f"document-{number}", self.source.renew()
        self.peer.ask("fill", number=number)

        def ours() -> None:
            self.samples.timed(f"store_{kind}", lambda: self.store(name, tokens))
            self.load("retrieve", name, self.threads)
            self.load("retrieve_1", name, 1)
            self.order("retrieve_in_order", name)
            self.stage.store.free(name)
            drop_cache(self.stage.segments)
            self.load("load", name, self.threads)
            self.stage.store.free(name)

        def theirs() -> None:
            for manager in RAM:
                self.peer.ask("store", name=manager, number=number)
                for key, threads in (("retrieve", self.threads), ("retrieve_1", 1)):
                    seconds = self.peer.seconds("load", name=manager, number=number, threads=threads)
                    self.samples.add(f"{key}_{manager}", seconds)
                self.peer.ask("drop", name=manager, number=number)
            for manager in DISK:
                seconds = self.peer.seconds("store", name=manager, number=number)
                self.samples.add(f"store_{kind}_{manager}", seconds)
                seconds = self.peer.seconds("load", name=manager, number=number, threads=self.threads)
                self.samples.add(f"load_{manager}", seconds)

        alternate(number, ours, theirs)

    def store(self, name: str, tokens: Tokens) -> None:
        self.stage.ingest(name, self.source, WritePolicy.THROUGH, tokens)
        self.stage.until_durable(name)

    def load(self, key: str, name: str, threads: int) -> None:
        """Attach, and copy what is there as soon as it is; every byte is compared afterwards."""
        self.target.fill(0)
        client = self.stage.client
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(abs, range(threads)))  # threads are there before the clock starts
            started = time.perf_counter()
            attached = client.attach(name)
            slots = [np.frombuffer(view, np.uint8) for view in client.views(attached.parts)]
            copies: list[Future[None]] = []
            ready = 0
            while ready < self.source.layers:
                before, ready = ready, client.wait_layers(attached.lease, ready + 1)
                share = slice(*(self.target.shape[1] * n // self.source.layers for n in (before, ready)))
                copies += [pool.submit(np.copyto, t[share], s[share]) for t, s in zip(self.target, slots, strict=True)]
            for copied in copies:
                copied.result()
            self.samples.add(key, time.perf_counter() - started)
            assert all(np.array_equal(t, s) for t, s in zip(self.target, slots, strict=True))
            del slots
            client.detach(attached.lease)
        self.stage.check(name, self.source)

    def order(self, key: str, name: str) -> None:
        """The same into an engine's order, layer by layer."""
        with ThreadPoolExecutor(self.threads) as pool:
            started = time.perf_counter()
            with self.stage.store.attach(name) as attachment:
                list(pool.map(self.copy, attachment.layers()))
                self.samples.add(key, time.perf_counter() - started)
        self.source.check_engine(self.ordered)

    def copy(self, layer: LayerKV) -> None:
        layer.copy_into(*self.ordered[layer.index])

    # Rows --------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        return [
            self.against("lmcache_ram_retrieve_vs_ours", 1.0, "retrieve", RAM, "retrieve_1"),
            self.against("lmcache_disk_store_vs_ours", 1.3, "store_first", DISK),
            self.against("lmcache_disk_overwrite_vs_ours", 2.0, "store_again", DISK),
            self.against("lmcache_disk_load_cold_vs_ours", 1.2, "load", DISK),
        ]

    def against(self, name: str, goal: float, key: str, managers: Sequence[str], *beside: str) -> Row:
        """The best manager's time over ours, round by round; every manager's time stands in `raw`."""
        s = self.samples
        best = min(managers, key=lambda manager: s.ms(f"{key}_{manager}"))
        found = s.ratio(name, goal, key, f"{key}_{best}")
        raw = found.raw | {f"{manager}_ms": s.ms(f"{key}_{manager}") for manager in managers}
        for other in beside:
            raw |= {f"{other}_ms": s.ms(other)} | {f"{other}_{m}_ms": s.ms(f"{other}_{m}") for m in managers}
        if key == "retrieve":
            raw["in_engine_order_ms"] = s.ms("retrieve_in_order")
        raw |= {"gib": self.source.size_bytes / GIB, "threads": float(self.threads)}
        return row(name, found.value, goal, "higher", raw)


def drop_cache(directory: Path) -> None:
    """Tell the page cache to forget the segments; direct reads do not ask it anyway."""
    for path in directory.glob("segment-*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
