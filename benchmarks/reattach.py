"""What a reattach costs, as ratios to the bare operation on the same bytes, measured interleaved in the same run.

The document is 256 MiB (268.4 MB) in extents of 8 MiB, shaped like Llama-3.1-8B's KV (32 layers, 8 kv heads of 128,
bfloat16: 128 KiB a token). What each hop must move, and the time that takes at this machine's limits (LOG.md,
2026-11-21: memcpy 14.6 GB/s, xxh3 30.6 GB/s a core, first touch of shared pages 0.11-0.16 s/GiB, O_DIRECT read
2.9-3.9 and write 4.8-7.7 GB/s, socket round trip 9 us):

    hop                          bytes               at the limit
    ingest, client to DDR        268.4 MB copied     18 ms + 28-40 ms page faults
    commit (seal)                268.4 MB hashed     8.8 ms on one core, 4.4 on two
    attach, resident             none                2 round trips, 18 us
    NVMe to DDR                  268.4 MB read       70-93 ms, + 9 ms of hashing that overlaps
    DDR to NVMe                  268.4 MB written    35-56 ms
    DDR to HBM, cp=1             268.4 MB copied     18 ms
    DDR to HBM, one of cp=3      89.5 MB copied      6.1 ms
    8,192 tokens of the demo model, NVMe to HBM: 67.1 MB, 25 ms overlapped

The daemon is a real process with 1 GiB of DDR. Every byte that arrives is compared. Both sides of a ratio
take turns at going first. The bare side uses warm memory, touched before through its mapping: the store keeps its
slabs, and that is their limit. What fresh memory takes stands beside it in the JSON.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import mmap
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import torch
from bare import (
    Bytes,
    copy_rows,
    echo_peer,
    fresh_shared,
    hash_planes,
    in_turn,
    let_go,
    located,
    open_direct,
    read_all,
    timed,
    timed_cpu,
    write_all,
)
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.layout import Layout, contiguous, copies, extent_holding, shard_holding, zigzag
from holdfast.kvstore.spec import EXTENT_TARGET_BYTES, KVSpec, LayerGroup, sized
from holdfast.kvstore.wire import Attached
from holdfast.ring_attention.arena import HBMArena
from prefill import recompute
from rows import Row, machine, percentile, ratio_row, report, row, show

from holdfast.demo_stage import DaemonProcess

MIB: Final = 1 << 20
THREADS: Final = 4  # nvme.threads of the default configuration
RAW_CHUNK_BYTES: Final = 4 * MIB  # where bare direct I/O is fastest here
ATTACHES: Final = 100  # resident attaches and echoes a round
PREFILL_ROUNDS: Final = 3
LOADS: Final = 3  # copies to HBM a round
PING_SECONDS: Final = 0.001
HERE: Final = Path(__file__).resolve().parent


def rows_of(times: dict[str, list[float]]) -> list[Row]:
    """All rows from the samples in seconds. Goals: research limits where there are any, else as said here."""
    t = times
    echo_ms, hash_ms = 1e3 * percentile(t["echo"], 50), 1e3 * statistics.median(t["hash"])
    both = [put + commit for put, commit in zip(t["put"], t["commit"], strict=True)]
    rows = [
        ratio_row("put_vs_memcpy", 0.9, t, "put", "put_bare", "put_fresh", "begin", "make_pages"),
        ratio_row("put_commit_vs_memcpy", 0.7, t | {"both": both}, "both", "put_bare"),
        # Seal is one pass of xxh3 with as many threads as we may use; half of that again for 32 orders and publishing.
        row("commit_ms", 1e3 * statistics.median(t["commit"]), 1.5 * hash_ms, "lower", {"bare_hash_ms": hash_ms}),
    ]
    for percent in (50, 99):
        value = 1e3 * percentile(t["attach"], percent)
        bare = 1e3 * percentile(t["echo"], percent)
        raw = {"echo_ms": bare, "times_echo": value / bare, "samples": float(len(t["attach"]))}
        rows.append(row(f"attach_resident_p{percent}_ms", value, 4 * echo_ms, "lower", raw))
    rows += [
        ratio_row("nvme_read_vs_raw", 0.9, t, "read", "read_bare", "read_fresh", "read_first", "make_pages"),
        ratio_row("nvme_write_vs_raw", 0.85, t, "write", "write_bare"),
        ratio_row("ddr_to_hbm_vs_memcpy", 0.85, t, "load", "load_bare"),
        # A share has short runs at chunk edges, and its source is cut in the middle of extents.
        ratio_row("reshard_ddr_to_hbm_vs_memcpy", 0.75, t, "reshard", "reshard_bare"),
        # Below ten, a drive busy with somebody else could make reattaching no better than computing again.
        ratio_row("recompute_vs_reattach_nvme", 10.0, t, "reattach", "prefill"),
        # A client that copies without holding the interpreter's lock left 4 ms in an earlier study of loops.
        row("loop_lag_ms", 1e3 * percentile(t["ping"], 99), 4.0, "lower",
            {"idle_p99_ms": 1e3 * percentile(t["ping_idle"], 99), "p50_ms": 1e3 * percentile(t["ping"], 50),
             "max_ms": 1e3 * max(t["ping"]), "samples": float(len(t["ping"]))}),
    ]  # fmt: skip
    return rows


def noise(times: dict[str, list[float]]) -> float:
    """Spread of the bare copies, (slowest - fastest) / median: a quiet machine shows a few percent."""
    samples = times["load_bare"]
    return (max(samples) - min(samples)) / statistics.median(samples)


def spec_for(size_bytes: int) -> KVSpec:
    """Llama-3.1-8B's shape; blocks of 16 tokens, so that small documents have several extents too."""
    group = LayerGroup(layers=tuple(range(32)), kv_heads=8, key_dim=128, value_dim=128)
    spec = KVSpec(groups=(group,), dtype="bfloat16", model="benchmark", vocabulary_size=256, block_tokens=16,
                  extent_blocks=1)  # fmt: skip
    return sized(spec, min(EXTENT_TARGET_BYTES, size_bytes // 2))


# The store -----------------------------------------------------------------------------------------


class Bench:
    """One daemon, one document; `times` are samples in seconds by name."""

    def __init__(self, daemon: DaemonProcess, directory: Path, size_bytes: int, pool: ThreadPoolExecutor) -> None:
        self.client, self.other = Client(daemon.socket), Client(daemon.socket)
        self.directory, self.pool = directory, pool
        self.spec = spec_for(size_bytes)
        self.geometry = extent_geometry(self.spec)
        self.slot = self.geometry.size_bytes
        self.tokens = size_bytes // self.slot * self.spec.extent_tokens
        self.rng = np.random.default_rng(0)
        self.base = self.rng.integers(0, 2**63, (size_bytes // self.slot, self.slot // 8), dtype=np.uint64)
        self.source: Bytes = self.base.view(np.uint8)
        self.times: dict[str, list[float]] = {}
        self.fingerprint = self.client.register_spec(self.spec)
        self.raw_file = open_direct(directory / "raw", os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(self.raw_file, 0, size_bytes)
        self.arena = HBMArena(self.spec, self.tokens)
        self.warm = fresh_shared(self.source.nbytes)
        self.copied = np.ones(self.source.nbytes, np.uint8)  # what bare copies fill; its pages are there

    def add(self, name: str, seconds: float) -> None:
        self.times.setdefault(name, []).append(seconds)

    def add_cpu(self, name: str, seconds: tuple[float, float]) -> None:
        self.add(name, seconds[0])
        self.add(f"{name}_cpu", seconds[1])

    def round(self, number: int) -> None:
        ours_first = number % 2 == 0
        # Other bytes and other tokens every round, so that nothing left over can pass for what was asked for.
        self.source = np.bitwise_xor(self.base, self.rng.integers(0, 2**63, dtype=np.uint64)).view(np.uint8)
        bare = self.put(ours_first)
        self.attach_resident()
        self.load(ours_first)
        self.write(ours_first, bare)
        self.read(ours_first)
        self.loop_lag()
        self.client.delete("doc")
        while any(tier.used_bytes for tier in self.client.tiers()):
            time.sleep(0.01)

    def put(self, ours_first: bool) -> mmap.mmap:
        tokens = self.rng.integers(0, 256, self.tokens)
        seconds, opened = timed(
            lambda: self.client.begin_ingest("doc", self.fingerprint, tokens, write_policy=WritePolicy.BACK)
        )
        self.add("begin", seconds)

        made, memory = timed(lambda: fresh_shared(self.source.nbytes))
        self.add("make_pages", made)
        target = np.frombuffer(memory, np.uint8).reshape(self.source.shape)

        def fill() -> None:
            for part in opened.parts:
                np.copyto(np.frombuffer(self.client.view(part), np.uint8), self.of(part.start))

        warm = np.frombuffer(self.warm, np.uint8).reshape(self.source.shape)
        put, bare = in_turn(
            ours_first, lambda: timed_cpu(fill), lambda: timed_cpu(lambda: copy_rows(warm, self.source))
        )
        self.add("put_fresh", timed(lambda: copy_rows(target, self.source))[0])
        self.add_cpu("put", put)
        self.add_cpu("put_bare", bare)
        cuts = self.geometry.planes(0, self.geometry.layers)
        planes = [extent[at : at + size] for extent in self.source for _, at, size in cuts]
        self.add("hash", timed(lambda: hash_planes(self.pool, planes, THREADS))[0])
        self.add("commit", timed(lambda: self.client.commit_ingest(opened.ingest))[0])
        return memory

    def of(self, start: int) -> Bytes:
        """The source bytes of the extent that begins at token `start`."""
        extent: Bytes = self.source[start // self.spec.extent_tokens]
        return extent

    def attached(self) -> Attached:
        """Attached until the first layer is readable, and its first byte read."""
        attached = self.client.attach("doc")
        self.client.wait_layers(attached.lease, 1)
        assert self.client.view(attached.parts[0])[0] == self.of(attached.parts[0].start)[0]
        return attached

    def attach_resident(self) -> None:
        with echo_peer() as peer:

            def echo() -> None:
                peer.sendall(b"x" * 64)
                peer.recv(4096)

            for _ in range(ATTACHES):
                seconds, attached = timed(self.attached)
                self.add("attach", seconds)
                self.client.detach(attached.lease)
                self.add("echo", timed(echo)[0])

    def load(self, ours_first: bool) -> None:
        attached = self.attached()
        views = {index: self.client.view(part) for index, part in enumerate(attached.parts)}
        for name, layout in (("load", contiguous(self.tokens, 1)), ("reshard", zigzag(self.tokens, 3))):
            self.load_one(name, layout, attached, views, ours_first)
        self.client.detach(attached.lease)

    def load_one(
        self, name: str, layout: Layout, attached: Attached, views: dict[int, memoryview], ours_first: bool
    ) -> None:
        heads = self.spec.groups[0].kv_heads
        held = [extent_holding(i, p.start, p.valid_tokens, heads) for i, p in enumerate(attached.parts)]
        size = layout.length(0) * self.spec.bytes_per_token

        moves = list(copies(held, [shard_holding(layout, 0, heads)]))

        def load() -> None:
            self.arena.load(moves, views, self.geometry, 0, self.geometry.layers)

        def memcpy() -> None:
            for index, start in enumerate(range(0, size, self.slot)):
                count = min(self.slot, size - start)
                np.copyto(self.copied[start : start + count], np.frombuffer(views[index], np.uint8, count))

        for turn in range(LOADS):
            loaded, bare = in_turn(ours_first == bool(turn % 2), lambda: timed_cpu(load), lambda: timed_cpu(memcpy))
            self.add_cpu(name, loaded)
            self.add_cpu(f"{name}_bare", bare)
        self.check_arena(layout)

    def check_arena(self, layout: Layout) -> None:
        """Every byte of rank 0's share, against the source."""
        g = self.geometry
        shape = (len(self.source), g.layers, 2, g.heads, g.rows, g.key_bytes)
        by_token = self.source.reshape(shape).transpose(1, 2, 3, 0, 4, 5).reshape(g.layers, 2, g.heads, -1, g.key_bytes)
        for which, tensor in enumerate((self.arena.key, self.arena.value)):
            held = tensor.view(torch.uint8).numpy()
            for span in layout.spans(0):
                rows = slice(span.row, span.row + span.stop - span.start)
                assert np.array_equal(held[:, :, rows], by_token[:, which, :, span.start : span.stop]), span

    def write(self, ours_first: bool, memory: mmap.mmap) -> None:
        chunk = min(RAW_CHUNK_BYTES, self.slot)
        written, bare = in_turn(
            ours_first,
            lambda: timed(lambda: self.client.free("doc", "nvme"))[0],
            lambda: timed(lambda: write_all(self.pool, self.raw_file, memoryview(memory), chunk))[0],
        )
        self.add("write", written)
        self.add("write_bare", bare)

    def read(self, ours_first: bool) -> None:
        descriptors = [open_direct(path, os.O_RDONLY) for path in (self.directory / "nvme").glob("segment-*")]
        pieces = located(descriptors, self.source, min(RAW_CHUNK_BYTES, self.slot))

        def ours() -> float:
            started = time.perf_counter()
            attached = self.client.attach("doc")
            self.client.wait_layers(attached.lease, 1)
            self.add("read_first", time.perf_counter() - started)
            self.client.wait_layers(attached.lease, self.geometry.layers)
            seconds = time.perf_counter() - started
            for part in attached.parts:
                assert np.array_equal(np.frombuffer(self.client.view(part), np.uint8), self.of(part.start)), part
            self.client.detach(attached.lease)
            return seconds

        def bare(memory: mmap.mmap) -> float:
            seconds, _ = timed(lambda: read_all(self.pool, pieces, memoryview(memory)))
            assert np.array_equal(np.frombuffer(memory, np.uint8), self.source.reshape(-1))
            return seconds

        np.frombuffer(self.warm, np.uint8).fill(0)
        self.add("read_fresh", bare(fresh_shared(self.source.nbytes)))
        taken, raw = in_turn(ours_first, ours, lambda: bare(self.warm))
        self.add("read", taken)
        self.add("read_bare", raw)
        for descriptor in descriptors:
            os.close(descriptor)

    def loop_lag(self) -> None:
        """Round trips of a tiny request on another connection, idle and while the document is read from NVMe."""
        self.client.free("doc", "nvme")
        stop = threading.Event()
        self.ping("ping_idle", lambda count: count == 200)

        def ping() -> None:
            self.ping("ping", lambda _: stop.is_set())

        thread = threading.Thread(target=ping)
        thread.start()
        attached = self.client.attach("doc")
        self.client.wait_layers(attached.lease, self.geometry.layers)
        stop.set()
        thread.join()
        self.client.detach(attached.lease)

    def ping(self, name: str, ended: Callable[[int], bool]) -> None:
        """A request is due every millisecond, answered or not: a stalled loop delays all that fall due meanwhile."""
        started, count = time.perf_counter(), 0
        while not ended(count):
            due = started + count * PING_SECONDS
            time.sleep(max(0.0, due - time.perf_counter()))
            self.other.tiers()
            self.add(name, time.perf_counter() - due)
            count += 1

    def close(self) -> None:
        self.client.close()
        self.other.close()
        os.close(self.raw_file)


def run(directory: Path, size_bytes: int, rounds: int, prefill_tokens: int) -> dict[str, list[float]]:
    """Samples in seconds, by name."""
    daemon = DaemonProcess(directory, {"daemon.rest_port": "0"})
    client = daemon.start()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            bench = Bench(daemon, directory, size_bytes, pool)
            bench.round(0)  # touches every buffer; not counted
            bench.times.clear()
            for number in range(rounds):
                bench.round(number)
                print(f"round {number + 1} of {rounds}", flush=True)
            bench.close()
        return bench.times | recompute(client, directory, daemon.socket, prefill_tokens, min(rounds, PREFILL_ROUNDS))
    finally:
        client.close()
        daemon.stop()
        let_go(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Reattach, as ratios to the bare operations.")
    parser.add_argument("--size-mib", type=int, default=256, help="size of the document")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prefill-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "reattach.json")
    options = parser.parse_args()
    here = machine()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as scratch:
        times = run(Path(scratch), options.size_mib * MIB, options.rounds, options.prefill_tokens)
    here |= {"load_after": round(os.getloadavg()[0], 2), "noise": round(noise(times), 3)}
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    rows = rows_of(times)
    result = report(rows, commit, dt.datetime.now(dt.UTC).date().isoformat(), here)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(rows, f"Reattach of {options.size_mib} MiB, {options.rounds} rounds; bare copies vary by {here['noise']:.0%}")


if __name__ == "__main__":
    main()
