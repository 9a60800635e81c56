"""What eviction remembers of an extent: bytes allocated by its room, as tracemalloc sees them."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Final

from eviction_daemon import Daemon
from holdfast.eviction.cache import Cache
from holdfast.eviction.replay import replay

from holdfast.simulation import KV_BYTES_PER_TOKEN, Capacity, make_policy, recompute_ns
from holdfast.traces import Trace

ROOM: Final = "*/eviction/*.py"
SIMULATOR: Final = ("*/eviction/cache.py", "*/eviction/replay.py")  # what a daemon does not have


def room_bytes() -> int:
    """Bytes that the eviction room holds now: policy, rankings, forests; not the ids, which others own."""
    gc.collect()
    kept = [tracemalloc.Filter(inclusive=True, filename_pattern=ROOM)]
    kept += [tracemalloc.Filter(inclusive=False, filename_pattern=pattern) for pattern in SIMULATOR]
    return sum(found.size for found in tracemalloc.take_snapshot().filter_traces(kept).statistics("filename"))


def daemon_bytes(*, documents: int, extents: int, policy: str) -> dict[str, float]:
    """Of a daemon whose documents all were used: all on NVMe, half of the bytes in DDR."""
    tracemalloc.start()
    try:
        daemon = Daemon(documents, extents, 0.5, policy)
        for name in daemon.names:
            daemon.attach(name)
        total = room_bytes()
    finally:
        tracemalloc.stop()
    return {"bytes_per_extent": total / daemon.tracked, "tracked": float(daemon.tracked), "mib": total / 2**20}


def replay_bytes(trace: Trace, policy_name: str, capacity: Capacity) -> dict[str, float]:
    """Of a replay at its end: what is remembered of the departed is in it."""
    tracemalloc.start()
    try:
        policy, units = make_policy(policy_name, trace), capacity.units(trace)
        unit_bytes = trace.block_tokens * KV_BYTES_PER_TOKEN
        cache = Cache(
            policy, capacity_units=units, unit_tokens=trace.block_tokens, unit_bytes=unit_bytes, worth=recompute_ns
        )
        for _ in replay((one.request for one in trace.requests), policy, cache):
            pass
        total = room_bytes()
    finally:
        tracemalloc.stop()
    return {
        "replay_mib": total / 2**20,
        "replay_resident": float(units),
        "replay_different": float(trace.unit_count),
        "replay_bytes_per_different": total / trace.unit_count,
    }
