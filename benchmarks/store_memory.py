"""DDR rows: put, attach of what is resident, copy out; each beside a memcpy of the same bytes, or a bare echo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from bare import echo_peer
from documents import GIB, KV, LLAMA, Copies, Sizes, Source, Stage, copy
from holdfast.engine_adapter.planes import Planes
from holdfast.kvstore.document import WritePolicy
from rows import Row, percentile, row
from samples import Samples

CHUNK_TOKENS: Final = 2048  # what an engine prefills at once
ATTACH_GOAL_MS: Final = 2.0
GROWTH_GOAL: Final = 1.5
HELPER: Final = Path(__file__).with_name("client_process.py")


class Memory:
    """One daemon; documents that are never written to NVMe."""

    def __init__(self, stage: Stage, sizes: Sizes) -> None:
        self.stage, self.sizes = stage, sizes
        self.samples = Samples()
        self.source = Source(LLAMA, sizes.document_bytes, CHUNK_TOKENS)
        self.target = self.source.buffers()

    # Put ---------------------------------------------------------------------------------------

    def put(self, number: int, key: str) -> None:
        """Write one document and, into the same slots, the same copies without the store.

        Beside it, as many bytes with one memcpy for each slot: what it costs that engines keep KV in another order.
        """
        samples, tokens = self.samples, self.source.renew()
        opened = samples.timed(f"{key}_begin", lambda: self.stage.open("put", self.source, WritePolicy.MEMORY, tokens))
        slots = [np.frombuffer(view, np.uint16) for view in opened.views]
        moves = opened.moves()
        samples.timed_cpu(f"{key}_flat", lambda: self.flat(slots))

        def ours() -> None:
            clear(slots)
            samples.timed_cpu(key, opened.write if key == "sealed" else opened.write_unsealed)
            assert all(np.array_equal(to, origin) for to, origin in moves), "other bytes were written"

        def bare() -> None:
            clear(slots)
            samples.timed_cpu(f"{key}_bare", lambda: copy(moves))

        alternate(number, ours, bare)
        samples.timed(f"{key}_commit", opened.commit)
        self.stage.check("put", self.source)
        self.stage.forget("put")
        samples.add(f"{key}_whole", sum(samples.times[f"{key}{part}"][-1] for part in ("_begin", "", "_commit")))

    def flat(self, slots: list[KV]) -> None:
        """The limit: whole slots, no geometry."""
        flat = self.source.engine.reshape(-1)
        for index, slot in enumerate(slots):
            np.copyto(slot, flat[index * slot.size : (index + 1) * slot.size])

    # Attach and copy out -----------------------------------------------------------------------

    def keep(self) -> None:
        """Two resident documents, of 1 and of 4 GiB."""
        source = self.source
        self.stage.ingest("document", source, WritePolicy.MEMORY, source.renew())
        tokens = source.rng.integers(0, 1 << 16, self.sizes.large_bytes // source.spec.bytes_per_token, dtype=np.uint32)
        self.stage.ingest("large", source, WritePolicy.MEMORY, tokens)

    def attach(self, name: str) -> int:
        """Until the document is mapped and its first byte read; returns the lease."""
        client = self.stage.client
        attached = client.attach(name)
        client.wait_layers(attached.lease, 1)
        views = client.views(attached.runs)
        assert views[0][0] == int(self.source.engine[0, 0, 0, 0, 0, 0]) & 0xFF
        return attached.lease

    def attach_both(self) -> None:
        with echo_peer() as peer:

            def echo() -> None:
                peer.sendall(b"x" * 64)
                peer.recv(4096)

            for _ in range(self.sizes.attaches):
                for name in ("document", "large"):
                    lease = self.samples.timed(f"attach_{name}", lambda name=name: self.attach(name))
                    self.stage.client.detach(lease)
                self.samples.timed("echo", echo)
        for name in ("document", "large"):
            command = [sys.executable, HELPER, "attach", self.stage.daemon.socket, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            self.samples.add(f"first_{name}", float(done.stdout))

    def copy_out(self, number: int) -> None:
        """Into an engine's buffers [layers, 2, heads, tokens, dim]; bare: the same copies between the same views."""
        with self.stage.store.attach("document") as attachment:
            moves = self.into_engine()

            def copy_layers() -> None:
                for layer in attachment.layers():
                    layer.copy_into(*self.target[layer.index])

            def ours() -> None:
                self.target.fill(0)
                self.samples.timed_cpu("copy_out", copy_layers)
                self.source.check_engine(self.target)

            def bare() -> None:
                self.target.fill(0)
                self.samples.timed_cpu("copy_out_bare", lambda: copy(moves))

            alternate(number, ours, bare)

    def into_engine(self) -> Copies:
        """The copies of all runs of the document, layer by layer."""
        attached = self.stage.client.attach("document")
        moves: Copies = []
        for run, view in zip(attached.runs, self.stage.client.views(attached.runs), strict=True):
            planes = Planes(run, LLAMA, view)
            for layer in range(self.source.layers):
                for cut in planes.cuts(run.start, run.stop):
                    for part in (0, 1):
                        into = self.target[layer, part, :, cut.start : cut.stop]
                        moves += [(theirs, ours) for ours, theirs in planes.beside(part, layer, cut, into)]
        self.stage.client.detach(attached.lease)
        return moves

    # Rows --------------------------------------------------------------------------------------

    def run(self) -> None:
        self.put(0, "put")
        self.samples.forget()
        for number in range(self.sizes.rounds):
            self.put(number, "put")
            self.put(number, "sealed")
        self.keep()
        self.attach_both()
        self.copy_out(0)
        for name in ("copy_out", "copy_out_bare"):
            del self.samples.times[name], self.samples.times[f"{name}_cpu"]
        for number in range(self.sizes.rounds):
            self.copy_out(number)
        self.stage.forget("document", "large")

    def rows(self) -> list[Row]:
        s = self.samples
        return [
            self.put_row(),
            self.sealed_row(),
            self.attach_row(),
            s.ratio("copy_out_vs_memcpy", 0.9, "copy_out", "copy_out_bare"),
        ]

    def put_row(self) -> Row:
        s = self.samples
        made = s.ratio("put_vs_memcpy", 0.9, "put", "put_bare", "put_flat", "put_begin", "put_commit", "put_whole")
        made.raw["ratio_to_flat"] = s.relation("put_flat", "put")
        return made

    def sealed_row(self) -> Row:
        """From the first question to the acknowledgement: begin, write and seal, commit."""
        s = self.samples
        beside = ("sealed_flat", "sealed_begin", "sealed", "sealed_commit")
        made = s.ratio("put_checksummed_vs_memcpy", 0.7, "sealed_whole", "sealed_bare", *beside)
        made.raw["ratio_to_flat"] = s.relation("sealed_flat", "sealed_whole")
        made.raw["cpu_ratio_of_writing"] = s.relation("sealed_bare_cpu", "sealed_cpu")
        return made

    def attach_row(self) -> Row:
        times = self.samples.times
        small, large = (1e3 * percentile(times[f"attach_{name}"], 50) for name in ("document", "large"))
        raw = {
            "ours_ms": small,
            "p99_ms": 1e3 * percentile(times["attach_document"], 99),
            "large_ms": large,
            "growth": large / small,
            "growth_goal": GROWTH_GOAL,
            "first_of_process_ms": self.samples.ms("first_document"),
            "first_of_process_large_ms": self.samples.ms("first_large"),
            "bare_ms": 1e3 * percentile(times["echo"], 50),
            "document_gib": self.sizes.document_bytes / GIB,
            "large_gib": self.sizes.large_bytes / GIB,
            "rounds": float(len(times["attach_document"])),
        }
        return row("attach_resident_1gib_ms", small, ATTACH_GOAL_MS, "lower", raw, also=large / small <= GROWTH_GOAL)


def clear(slots: list[KV]) -> None:
    for slot in slots:
        slot.fill(0)


def alternate(number: int, ours: Callable[[], object], bare: Callable[[], object]) -> None:
    """Both sides of a round take turns at going first."""
    first, second = (ours, bare) if number % 2 == 0 else (bare, ours)
    first()
    second()
