"""Stand-ins that several tests share: effects which end when told to, and a service small enough to fill.

service, effects, clock = tiny_service()
ingest(service, effects, "report", token_count=100)      # committed and durable
service.evict(...); effects.complete_all(service)        # every order ends well
effects.fail(service, order, StorageFailed("..."))       # or this one does not
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
from holdfast.kvstore.calibration import RingRate, RingSetting, RingSpeed
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.config import Config, load_config
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import HoldfastError
from holdfast.kvstore.opaque import object_id
from holdfast.kvstore.orders import (
    CloseShard,
    Hasten,
    Note,
    OpenShard,
    Order,
    Outcome,
    ReadIn,
    Record,
    RetireSlab,
    Seal,
    Verify,
    WriteOut,
)
from holdfast.kvstore.putting import Incoming, Put
from holdfast.kvstore.service import Service
from holdfast.kvstore.spec import KVSpec, LayerGroup

FAR_NS = 10**15
CLIENT = 7
MOVE_NS = 1_000_000
EXTENT_TOKENS = 32
EXTENT_BYTES = 16 << 10  # 2 layers x (key, value), each plane padded to 4 KiB
_seed = count(1)


class ManualEffects:
    """Keeps the orders it is given, oldest first, until a test says how they end.

    `submitted` is called after each order, for tests whose service runs in a loop of its own.
    """

    def __init__(self, submitted: Callable[[], None] = lambda: None) -> None:
        self.orders: list[Order] = []
        self.notes: list[Record] = []
        self.hastened: set[int] = set()
        self.submitted = submitted

    def submit(self, order: Order) -> None:
        if isinstance(order, Note):
            self.notes += order.records  # never answered, and never in the way
            return
        if isinstance(order, Hasten):
            self.hastened |= order.reads  # the same
            return
        self.orders.append(order)
        self.submitted()

    def complete(self, service: Service, order: Order) -> None:
        """This order ends well, after MOVE_NS of work."""
        self.orders.remove(order)
        if isinstance(order, OpenShard | CloseShard | RetireSlab):
            return  # never answered
        size = order.geometry.size_bytes if isinstance(order, ReadIn) else 0
        size = order.size_bytes if isinstance(order, WriteOut) else size
        sums = bytes(range(8 * order.geometry.plane_count)) if isinstance(order, Seal | ReadIn | Verify) else b""
        service.finished(order.id, Outcome(elapsed_ns=MOVE_NS, busy_ns=MOVE_NS, size_bytes=size, checksums=sums))

    def fail(self, service: Service, order: Order, error: HoldfastError) -> None:
        """This order ends badly."""
        self.orders.remove(order)
        service.finished(order.id, Outcome(error=error))

    def complete_all(self, service: Service) -> None:
        """Every order ends well, those that follow from them too."""
        while self.orders:
            self.complete(service, self.orders[0])


def tiny_config(**overrides: str) -> Config:
    """DDR 1 MiB in slabs of 64 KiB, NVMe 4 MiB in segments of 256 KiB. `limits__documents="3"` and so on override.

    There are no watermarks unless named.
    """
    values = {
        "daemon.data_dir": "data",
        "ddr.capacity_bytes": "1 MiB",
        "ddr.slab_bytes": "64 KiB",
        "nvme.capacity_bytes": "4 MiB",
        "nvme.segment_bytes": "256 KiB",
        "ddr.high_watermark": "1",  # full is full; test_watermarks says otherwise
        "nvme.high_watermark": "1",
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(None, {}, values)


RING_SETTING = RingSetting(
    machine="a box",
    device="cpu",
    communicator="gloo",
    kernel="cpu_flash",
    cp=2,
    tp=1,
    dtype="float32",
    heads=8,
    kv_heads=2,
    head_dim=64,
    value_dim=64,
)
RING_SPEED = RingSpeed(
    flops_per_second=80e9,
    key_bytes_per_second=8e9,
    bytes_per_second=1.3e9,
    latency_ns=90_000,
    exchange_bytes_per_second=1.3e9,
    exchange_latency_ns=150_000,
    copy_bytes_per_second=10e9,
    overlap=0.1,
    spread=0.05,
)


def ring(wall_ns=1, **differs):
    """What a group was measured to do, in a setting that differs in these."""
    return RingRate(
        setting=replace(RING_SETTING, **differs),
        speed=RING_SPEED,
        measured_wall_ns=wall_ns,
        pass_kv_from=((32_768, 4000), (131_072, None)),
    )


def tiny_spec(model: str = "tiny@1") -> KVSpec:
    """Extents of 32 tokens and 16 KiB: 64 of them fill DDR."""
    group = LayerGroup(layers=(0, 1), kv_heads=1, key_dim=8, value_dim=8)
    return KVSpec(
        groups=(group,),
        dtype="float32",
        model=model,
        vocabulary_size=1000,
        block_tokens=16,
        extent_blocks=2,
    )


def tiny_service(
    config: Config | None = None, effects: ManualEffects | None = None
) -> tuple[Service, ManualEffects, ManualClock]:
    """A service with one model registered."""
    effects = effects if effects is not None else ManualEffects()
    clock = ManualClock()
    service = Service(config or tiny_config(), clock, effects, lambda tenant: tenant.encode().ljust(32))
    service.register_spec(tiny_spec())
    effects.complete_all(service)
    return service, effects, clock


def ingest(
    service: Service,
    effects: ManualEffects,
    name: str,
    *,
    token_count: int = 100,
    tenant: str = "default",
    write_policy: WritePolicy = WritePolicy.THROUGH,
) -> DocumentId:
    """Commit a document of random tokens, and let all that follows end well."""
    document = DocumentId(tenant, name)
    tokens = np.random.default_rng(next(_seed)).integers(0, 1000, token_count, dtype=np.uint32)
    results: list[object] = []
    opened = service.begin_ingest(
        CLIENT, document, tiny_spec().fingerprint(), tokens, write_policy, None, 64, FAR_NS, results.append
    )
    service.commit_ingest(CLIENT, opened.id, results.append)
    effects.complete_all(service)
    assert not [result for result in results if isinstance(result, HoldfastError)], results
    service.state.check()
    return document


def put_objects(
    service: Service,
    effects: ManualEffects,
    namespace: str,
    keys: Sequence[bytes],
    *,
    size_bytes: int = 5000,
    tenant: str = "default",
    write_policy: WritePolicy = WritePolicy.THROUGH,
    tokens_each: int = 0,
) -> list[DocumentId]:
    """Store opaque objects with one message, and let all that follows end well."""
    incoming = Incoming(tenant, namespace, write_policy, tokens_each)
    puts: list[Put] = []
    service.objects.begin_put(CLIENT, incoming, [(key, size_bytes) for key in keys], FAR_NS, puts.append)
    effects.complete_all(service)
    (put,) = puts
    if put.ingests:
        service.objects.commit_put(CLIENT, put.id, [bytes(range(8))] * len(put.ingests), FAR_NS, puts.append)
    effects.complete_all(service)
    assert not put.refused, put.refused
    service.state.check()
    return [object_id(tenant, namespace, key) for key in keys]
