"""How long the daemon takes to decide who leaves, with 100,000 extents under pressure, and what it remembers of each.

The service is driven as tests drive it: orders are kept and end well between the attaches, so what is timed is the
answer to an attach, with all planning and bookkeeping, and no I/O.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.config import load_config
from holdfast.kvstore.document import Document, DocumentId, WritePolicy
from holdfast.kvstore.extent import Extent, cut
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.keys import KEY_BYTES
from holdfast.kvstore.orders import CloseShard, Note, OpenShard, Order, Outcome, ReadIn, RetireSlab
from holdfast.kvstore.pauses import shorten_pauses
from holdfast.kvstore.service import Service
from holdfast.kvstore.slots import Slot
from holdfast.kvstore.spec import KVSpec, LayerGroup

TENANT: Final = "bench"
CLIENT: Final = 1
FAR_NS: Final = 10**17
THINK_NS: Final = 10**9
SPEC: Final = KVSpec(
    groups=(LayerGroup(layers=tuple(range(32)), kv_heads=8, key_dim=128, value_dim=128),),
    dtype="bfloat16",
    model="llama-3.1-8b@bench",
    vocabulary_size=128_256,
    extent_blocks=1,
)  # 8 MiB and 64 tokens an extent


class Orders:
    """Effects that keep what they are asked for."""

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def submit(self, order: Order) -> None:
        """Keep it, if it is ever answered."""
        if not isinstance(order, Note | OpenShard | CloseShard | RetireSlab):
            self.orders.append(order)

    def end(self, service: Service) -> None:
        """All end well."""
        while self.orders:
            orders, self.orders = self.orders, []
            for order in orders:
                seal = bytes(8 * order.geometry.plane_count) if isinstance(order, ReadIn) else b""
                service.finished(order.id, Outcome(busy_ns=10**6, checksums=seal))


class Daemon:
    """A service whose documents all lie on NVMe, a share of them in DDR too."""

    def __init__(self, documents: int, extents: int, ddr_share: float, policy: str) -> None:
        self.clock = ManualClock()
        self.orders = Orders()
        self.random = random.Random(7)
        size_bytes = extent_geometry(SPEC, 0).size_bytes
        segment_bytes = 64 * size_bytes
        ddr_slabs = int(documents * extents * ddr_share) // 8
        values = {
            "daemon.data_dir": "unused",
            "eviction.policy": policy,
            "ddr.capacity_bytes": str(ddr_slabs * 8 * size_bytes),
            "ddr.slab_bytes": str(8 * size_bytes),
            "nvme.capacity_bytes": str((documents * extents // 64 + 2) * segment_bytes),
            "nvme.segment_bytes": str(segment_bytes),
        }
        config = load_config(None, {}, values)
        config = replace(config, ddr=replace(config.ddr, window_bytes=config.ddr.capacity_bytes))
        self.service = Service(config, self.clock, self.orders, lambda _: bytes(32))
        made = list(self._documents(documents, extents))
        rows: dict[str, Extent] = {extent.id: extent for _, chain in made for extent in chain}
        placed = [
            (extent, Slot(number // 64, number % 64 * size_bytes, size_bytes))
            for number, extent in enumerate(rows.values())
        ]
        self.tracked = len(placed)
        self.service.restore([SPEC], placed, [document for document, _ in made], ())
        self.names = [document.id for document, _ in made]
        self.orders.end(self.service)

    def _documents(self, documents: int, extents: int) -> Iterator[tuple[Document, tuple[Extent, ...]]]:
        """Ten at a time share a fifth of their length."""
        chance = np.random.default_rng(11)
        front: list[bytes] = []
        for number in range(documents):
            if number % 10 == 0:
                front = [chance.bytes(KEY_BYTES) for _ in range(extents // 5)]
            keys = front + [chance.bytes(KEY_BYTES) for _ in range(extents - len(front))]
            chain = cut(keys, extents * SPEC.extent_tokens, SPEC, TENANT)
            yield (
                Document(
                    id=DocumentId(TENANT, f"d{number:05}"),
                    fingerprint=SPEC.fingerprint(),
                    token_count=extents * SPEC.extent_tokens,
                    extents=tuple(extent.id for extent in chain),
                    write_policy=WritePolicy.THROUGH,
                    created_wall_ns=1,
                ),
                chain,
            )

    def attach(self, document: DocumentId, tokens: tuple[int, int] | None = None) -> tuple[float, int]:
        """Seconds to the answer, and how many copies left for it; everything has ended afterwards."""
        before = len(self.service.state.ledger.verdicts), self.service.state.ledger.counts["evictions_ddr"]
        started = time.thread_time()
        lease = self.service.attach(CLIENT, document, None, None, None, FAR_NS, lambda _: None, tokens).lease.id
        seconds = time.thread_time() - started
        left = self.service.state.ledger.counts["evictions_ddr"] - before[1]
        self.orders.end(self.service)
        self.clock.advance(THINK_NS)
        self.service.detach(CLIENT, lease)
        self.clock.advance(THINK_NS)
        return seconds, left

    def popular(self) -> DocumentId:
        """Zipf: the first are asked for most."""
        rank = int(len(self.names) ** self.random.random())
        return self.names[min(rank, len(self.names) - 1)]


def percentile(values: list[float], share: float) -> float:
    """The value that so many are at or below."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def attach_decisions(
    *,
    documents: int = 500,
    extents: int = 250,
    ddr_share: float = 0.5,
    attaches: int = 400,
    missing: int = 8,
    policy: str = "popularity",
) -> dict[str, float]:
    """Milliseconds that attaches take to be answered which need `missing` extents, and whole documents."""
    daemon = Daemon(documents, extents, ddr_share, policy)
    for name in daemon.names:
        daemon.attach(name)
    for _ in range(documents):
        daemon.attach(daemon.popular())
    thresholds = gc.get_threshold()
    shorten_pauses()
    whole: list[tuple[float, int]] = []
    while len(whole) < attaches:
        seconds, left = daemon.attach(daemon.popular())
        if left:
            whole.append((seconds, left))
    part: list[tuple[float, int]] = []
    span = missing * SPEC.extent_tokens
    while len(part) < attaches:
        start = daemon.random.randrange(extents // missing) * span
        seconds, left = daemon.attach(daemon.names[daemon.random.randrange(documents)], (start, start + span))
        if left:
            part.append((seconds, left))
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    found = {"tracked": float(daemon.tracked), "in_ddr": float(len(daemon.service.state.forests.ddr))}
    for kind, samples in (("whole", whole), ("part", part)):
        times = [1e3 * seconds for seconds, _ in samples]
        found[f"{kind}_ms_p50"] = percentile(times, 0.5)
        found[f"{kind}_ms_p99"] = percentile(times, 0.99)
        found[f"{kind}_victims_mean"] = sum(left for _, left in samples) / len(samples)
    return found


if __name__ == "__main__":
    for key, value in attach_decisions().items():
        print(f"{key:28} {value:12.3f}")
