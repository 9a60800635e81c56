"""A daemon to measure, and documents to put into it: other bytes every round, compared when they return."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from bare import Bytes, let_go
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.attachment import Attachment
from holdfast.engine_adapter.planes import Planes
from holdfast.engine_adapter.writer import IngestWriter
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.spec import KVSpec, LayerGroup

from holdfast.demo_stage import DaemonProcess

MIB: Final = 1 << 20
GIB: Final = 1 << 30
HEADS: Final = 8
DIM: Final = 128
ROW_BYTES: Final = 2 * DIM
POLL_SECONDS: Final = 0.002
WAIT_SECONDS: Final = 120.0

KV = npt.NDArray[np.uint16]  # bfloat16 as its bits
Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Sizes:
    """How much to move, and how often."""

    document_bytes: int
    large_bytes: int
    rounds: int
    peer_rounds: int
    attaches: int
    extents: int
    lookup_tokens: int
    lookups: int
    small_bytes: int

    @property
    def ddr_bytes(self) -> int:
        return self.large_bytes + 2 * self.document_bytes


FULL: Final = Sizes(GIB, 4 * GIB, 5, 3, 100, 100_000, 1 << 20, 200, 64 * MIB)
QUICK: Final = Sizes(64 * MIB, 128 * MIB, 2, 1, 5, 2_000, 1 << 16, 10, 32 * MIB)


def shape(layers: int, extent_tokens: int) -> KVSpec:
    """GQA with 8 kv heads of 128, bfloat16: a plane of `extent_tokens` x 2 KiB. Blocks of 64 tokens."""
    group = LayerGroup(layers=tuple(range(layers)), kv_heads=HEADS, key_dim=DIM, value_dim=DIM)
    return KVSpec(groups=(group,), dtype="bfloat16", model="benchmark", vocabulary_size=1 << 16,
                  extent_blocks=extent_tokens // 64)  # fmt: skip


LLAMA: Final = shape(32, 64)  # Llama-3-8B: 128 KiB a token, extents of 8 MiB, planes of 128 KiB
PLANES_4MIB: Final = shape(4, 2048)  # extents of 32 MiB
PLANES_256KIB: Final = shape(16, 128)  # extents of 8 MiB


Copies = list[tuple[KV, KV]]  # (target, source)


def copy(moves: Copies) -> None:
    for to, origin in moves:
        np.copyto(to, origin)


class Source:
    """A document's KV as an engine has it: per chunk of its prefill and layer, key and value [heads, tokens, dim].

    `engine` is [chunks, layers, 2, heads, chunk tokens, dim]. With chunks of one extent it is the canonical bytes.
    """

    def __init__(self, spec: KVSpec, size_bytes: int, chunk_tokens: int, seed: int = 0) -> None:
        self.spec = spec
        self.layers = len(spec.groups[0].layers)
        self.tokens = size_bytes // spec.bytes_per_token
        self.chunk_tokens = min(max(chunk_tokens, spec.extent_tokens), self.tokens)
        assert self.tokens % self.chunk_tokens == 0, "a source is made of whole chunks"
        dims = (self.tokens // self.chunk_tokens, self.layers, 2, HEADS, self.chunk_tokens, DIM)
        self.rng = np.random.default_rng(seed)
        self._words = self.rng.integers(0, 2**63, size_bytes // 8, dtype=np.uint64)
        self.engine: KV = self._words.view(np.uint16).reshape(dims)

    @property
    def size_bytes(self) -> int:
        return self._words.nbytes

    def renew(self) -> Tokens:
        """Other bytes, and token ids for them: nothing left over can pass for what is asked for."""
        np.bitwise_xor(self._words, self.rng.integers(1, 2**63, dtype=np.uint64), out=self._words)
        return self.rng.integers(0, 1 << 16, self.tokens, dtype=np.uint32)

    @property
    def extents(self) -> Bytes:
        """Canonical extents [count, slot bytes]."""
        assert self.chunk_tokens == self.spec.extent_tokens
        return self._words.view(np.uint8).reshape(self.tokens // self.chunk_tokens, -1)

    def slices(self, start: int, stop: int, layer: int) -> Iterator[tuple[int, KV, KV]]:
        """(first token, key, value) of tokens [start, stop) of a layer, cut at chunks."""
        step = self.chunk_tokens
        for first in range(start - start % step, stop, step):
            low, high = max(start, first), min(stop, first + step)
            key, value = self.engine[first // step % len(self.engine), layer, :, :, low - first : high - first]
            yield low, key, value

    def write(self, write: Callable[[int, int, KV, KV], None], tokens: int | None = None) -> None:
        """All of it, chunk by chunk and layer by layer, as prefills come. A longer document repeats it.

        `write` takes the layer, the first token, its key and value.
        """
        for start in range(0, tokens or self.tokens, self.chunk_tokens):
            for layer in range(self.layers):
                for first, key, value in self.slices(start, start + self.chunk_tokens, layer):
                    write(layer, first, key, value)

    def buffers(self) -> KV:
        """An engine's buffers for the whole document, touched: [layers, 2, heads, tokens, dim]."""
        return np.ones((self.layers, 2, HEADS, self.tokens, DIM), np.uint16)

    def check_engine(self, buffers: KV) -> None:
        """Every byte, as copied out into `buffers`."""
        for layer in range(self.layers):
            for first, *both in self.slices(0, self.tokens, layer):
                for found, wanted in zip(buffers[layer], both, strict=True):
                    rows = slice(first, first + wanted.shape[1])
                    assert np.array_equal(found[:, rows], wanted), f"layer {layer}, token {first}"

    def check(self, attachment: Attachment) -> None:
        """Every byte, as attached."""
        for layer in attachment.layers():
            for piece in layer.pieces:
                for first, key, value in self.slices(piece.start, piece.start + piece.key.shape[1], layer.index):
                    rows = slice(first - piece.start, first - piece.start + key.shape[1])
                    for found, wanted in ((piece.key, key), (piece.value, value)):
                        assert np.array_equal(found[:, rows], wanted), f"layer {layer.index}, token {first}"


class Opened:
    """An ingest under way: its slots are ours to write until it is committed."""

    def __init__(self, client: Client, source: Source, name: str, policy: WritePolicy, tokens: Tokens) -> None:
        self.client, self.source = client, source
        fingerprint = client.register_spec(source.spec)
        self._opened = client.begin_ingest(name, fingerprint, tokens, write_policy=policy)
        self._seals: list[bytes] = []
        self.parts = self._opened.parts
        self.views = client.views(self.parts)

    def write(self) -> None:
        """As the Python API writes: sealing what is written while it is in a cache.

        But nothing is handed over, so that no byte is on its way to NVMe before the commit, which rows measure from.
        """
        opened = msgspec.structs.replace(self._opened, early=False)
        writer = IngestWriter(self.client, self.source.spec, opened, self.source.tokens)
        self.source.write(writer.write)
        writer.check_complete()
        self._seals = writer.seals()
        writer.release()

    def moves(self) -> Copies:
        """All copies that a write makes, as few and as large as the geometries allow."""
        runs = self._opened.runs
        views = zip(runs, self.client.views(runs), strict=True)
        targets = [Planes(run, self.source.spec, view) for run, view in views]
        moves: Copies = []

        def write(layer: int, start: int, key: KV, value: KV) -> None:
            for planes in targets:
                for cut in planes.cuts(start, start + key.shape[1]):
                    for part, array in enumerate((key, value)):
                        some = array[:, cut.start - start : cut.stop - start]
                        moves.extend(planes.beside(part, layer, cut, some))

        self.source.write(write)
        return moves

    def write_unsealed(self) -> None:
        """In place, too, and the daemon makes the seals when it is committed."""
        copy(self.moves())

    def commit(self) -> None:
        self.client.commit_ingest(self._opened.ingest, self._seals)

    def abort(self) -> None:
        self.client.abort_ingest(self._opened.ingest)


class Stage:
    """One daemon on a directory of its own."""

    def __init__(self, directory: Path, settings: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.daemon = DaemonProcess(directory, {"daemon.rest_port": "0"} | settings)
        self.client = self.daemon.start()
        self.store = Store(self.client)

    def another(self) -> Client:
        """One more connection."""
        return Client(self.daemon.socket)

    @cached_property
    def facts(self) -> dict[str, object]:
        """What the daemon says of its arena and its disk."""
        for line in self.daemon.log().splitlines():
            if line.startswith("{") and (event := json.loads(line)).get("event") == "opened":
                backing = re.sub(r",? at .*", "", str(event["arena"]))
                return {"arena": backing, "direct_io": event["direct_io"]}
        raise AssertionError("the daemon's log says nothing of its arena")

    @property
    def segments(self) -> Path:
        """Where the NVMe tier's files are."""
        return self.directory / "nvme"

    @property
    def pid(self) -> int:
        return int(json.loads((self.directory / "rest.json").read_text())["pid"])

    def open(self, name: str, source: Source, policy: WritePolicy, tokens: Tokens) -> Opened:
        """Begin to ingest the source's bytes."""
        return Opened(self.client, source, name, policy, tokens)

    def ingest(self, name: str, source: Source, policy: WritePolicy, tokens: Tokens) -> None:
        """Put a document, the source repeated to as many tokens."""
        with self.store.ingest(name, source.spec, tokens, write_policy=policy) as writer:
            source.write(writer.write, len(tokens))

    def check(self, name: str, source: Source) -> None:
        with self.store.attach(name) as attachment:
            source.check(attachment)

    def is_durable(self, name: str) -> bool:
        return self.store.document(name).durable

    def until_durable(self, name: str) -> None:
        until(lambda: self.is_durable(name))

    def forget(self, *names: str) -> None:
        """Delete them, and wait until their room is free."""
        for name in names:
            self.store.delete(name)
        kept = sum(document.size_bytes for document in self.store.documents())
        until(lambda: all(tier.used_bytes <= kept for tier in self.store.tiers()))

    def close(self) -> None:
        self.store.close()
        self.daemon.stop()
        let_go(self.directory)


@contextmanager
def stage(directory: Path, sizes: Sizes, **settings: str) -> Iterator[Stage]:
    """A daemon with room for the large document and two others, and files for a round's writes."""
    capacities = {
        "ddr.capacity_bytes": f"{sizes.ddr_bytes // MIB}MiB",
        "nvme.capacity_bytes": f"{16 * sizes.document_bytes // MIB}MiB",
    }
    opened = Stage(directory, capacities | {key.replace("__", "."): value for key, value in settings.items()})
    try:
        yield opened
    finally:
        opened.close()
        shutil.rmtree(directory)  # a run takes as much disk as its largest section


def until(is_done: Callable[[], bool], poll_seconds: float = POLL_SECONDS) -> None:
    limit = time.monotonic() + WAIT_SECONDS
    while not is_done():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(poll_seconds)
