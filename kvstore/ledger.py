"""Ledger: what was moved, how long it took, who waited, who left and why.

Pure bookkeeping in memory, bounded. Occupancy is kept twice, as bytes in minus bytes out here and as the sum of
placements in the store; the invariant check compares them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .residency import Tier

QUANTILES: Final = (0.5, 0.9)


class Hop(NamedTuple):
    """A move from one tier to another."""

    source: Tier
    target: Tier

    def __str__(self) -> str:
        return f"{self.source.label}->{self.target.label}"


@dataclass(slots=True, kw_only=True)
class HopTime:
    """One hop's share of a swap. `elapsed_ns` runs from its first byte ordered to its last byte landed."""

    size_bytes: int = 0
    moves: int = 0
    busy_ns: int = 0
    first_ns: int | None = None
    last_ns: int = 0

    @property
    def elapsed_ns(self) -> int:
        """From the first order to the last landing."""
        return self.last_ns - self.first_ns if self.first_ns is not None else 0

    def add(self, size_bytes: int, busy_ns: int, started_ns: int, ended_ns: int) -> None:
        """Account one move."""
        self.size_bytes += size_bytes
        self.moves += 1
        self.busy_ns += busy_ns
        self.first_ns = started_ns if self.first_ns is None else min(self.first_ns, started_ns)
        self.last_ns = max(self.last_ns, ended_ns)


class Seen(NamedTuple):
    """What an engine saw of an attach: nanoseconds, tokens of the answers, how the ranks exchanged KV and why.

    `queries` is how many it has answered with it.
    """

    exposed_ns: int
    prefill_ns: int
    decode_ns: int
    answer_tokens: int
    strategy: str = ""
    strategy_reason: str = ""
    queries: int = 1


@dataclass(slots=True, kw_only=True)
class SwapRecord:
    """The receipt of an attach. Durations in nanoseconds, sizes in bytes.

    `wait_ns` is the time until room was made, `reattach_ns` from the request until everything had arrived,
    `exposed_ns` the part that the decoder really waited for (reported by the engine; None until then).
    `predicted_ns` and `recompute_ns` are the cost model's words at the time of the request. `strategy` and
    `strategy_reason` are how the ranks exchanged KV for the question, and why (reported; empty until then). `queries`
    were answered with it: the k over which its cost is amortised.
    """

    id: int
    document: str
    group: str | None
    client: int
    started_wall_ns: int
    token_count: int
    source_bytes: dict[str, int] = field(default_factory=dict)
    hops: dict[Hop, HopTime] = field(default_factory=dict)
    wait_ns: int = 0
    reattach_ns: int | None = None
    predicted_ns: int = 0
    recompute_ns: int = 0
    exposed_ns: int | None = None
    prefill_ns: int | None = None
    decode_ns: int | None = None
    answer_tokens: int | None = None
    strategy: str = ""
    strategy_reason: str = ""
    queries: int = 0
    outcome: str = "moving"

    def add(self, seen: Seen) -> None:
        """Times and tokens of several answers add up; of strategies the last one named stays."""
        self.exposed_ns = (self.exposed_ns or 0) + seen.exposed_ns
        self.prefill_ns = (self.prefill_ns or 0) + seen.prefill_ns
        self.decode_ns = (self.decode_ns or 0) + seen.decode_ns
        self.answer_tokens = (self.answer_tokens or 0) + seen.answer_tokens
        self.queries += seen.queries
        if seen.strategy:
            self.strategy, self.strategy_reason = seen.strategy, seen.strategy_reason

    @property
    def moved_bytes(self) -> int:
        """Bytes moved over all hops."""
        return sum(hop.size_bytes for hop in self.hops.values())

    @property
    def source_tier(self) -> str:
        """The farthest tier that bytes came from; "hbm" when nothing moved."""
        ranked = [tier.label for tier in sorted(Tier, reverse=True)]
        return next((label for label in ranked if self.source_bytes.get(label)), Tier.HBM.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a copy left: `action` is "demote" or "drop"; `scores` are the policy's parts at the time.

    `wanted_by` is the document that needed the room; empty where none did, or it is not known.
    """

    wall_ns: int
    extent: str
    documents: tuple[str, ...]
    start: int
    stop: int
    tier: str
    action: str
    reason: str
    size_bytes: int
    last_copy: bool
    restore_ns: int
    policy: str
    scores: dict[str, float]
    wanted_by: str = ""


class Wear(NamedTuple):
    """What NVMe had to take since the data directory was made, in bytes; metadata is not counted.

    `write_through_bytes` and `demotion_bytes` are whole slots that were written and synced, by cause. `kv_bytes` is the
    part of them that is KV which NVMe never had before: valid tokens only, and an extent counts again only after no
    document needed it any more.
    """

    write_through_bytes: int = 0
    demotion_bytes: int = 0
    kv_bytes: int = 0

    @property
    def amplification(self) -> float | None:
        """Bytes written / bytes of new KV: padding of part-filled extents and rewrites; None before the first write."""
        return (self.write_through_bytes + self.demotion_bytes) / self.kv_bytes if self.kv_bytes else None


class Ledger:
    """Occupancy per device, totals per hop, the last swap records and verdicts, named counts."""

    def __init__(self, swap_records: int) -> None:
        self.bytes_in: Counter[str] = Counter()
        self.bytes_out: Counter[str] = Counter()
        self.hops: dict[Hop, HopTime] = {}
        self.swaps: deque[SwapRecord] = deque(maxlen=swap_records)
        self.verdicts: deque[Verdict] = deque(maxlen=swap_records)
        self.counts: Counter[str] = Counter()
        self.wear = Wear()

    def came(self, device: str, size_bytes: int) -> None:
        """A placement took its slot on a device."""
        self.bytes_in[device] += size_bytes

    def left(self, device: str, size_bytes: int) -> None:
        """A placement gave its slot back."""
        self.bytes_out[device] += size_bytes

    def occupancy(self, device: str) -> int:
        """Bytes in minus bytes out."""
        return self.bytes_in[device] - self.bytes_out[device]

    def moved(self, hop: Hop, size_bytes: int, busy_ns: int, started_ns: int, ended_ns: int) -> None:
        """Account one move in the totals."""
        self.hops.setdefault(hop, HopTime()).add(size_bytes, busy_ns, started_ns, ended_ns)
        self.counts["moves"] += 1

    def reported(self, swap: SwapRecord, seen: Seen) -> None:
        """An engine tells of an attach that has ended: once, or once for each batch of queries that it served."""
        if not swap.queries and swap.moved_bytes:
            self.counts["reattaches"] += 1
        self.counts["queries_answered"] += seen.queries
        swap.add(seen)

    @property
    def amortisation(self) -> float | None:
        """Queries answered for each time that KV had to be brought near (by an attach or a hint); None before that."""
        loads = self.counts["reattaches"]
        return self.counts["queries_answered"] / loads if loads else None

    def prediction_errors(self) -> list[float]:
        """|predicted - taken| / taken of the remembered swaps that moved bytes, ascending; not their waits for room."""
        found = []
        for swap in self.swaps:
            if swap.outcome == "ready" and swap.reattach_ns is not None and swap.predicted_ns:
                taken_ns = max(1, swap.reattach_ns - swap.wait_ns)
                found.append(abs(swap.predicted_ns - taken_ns) / taken_ns)
        return sorted(found)

    def prediction_quantiles(self) -> dict[float, float]:
        """Median and 90th percentile (nearest rank) of the prediction errors; empty when there were none."""
        errors = self.prediction_errors()
        return {q: errors[math.ceil(q * len(errors)) - 1] for q in QUANTILES} if errors else {}

    def swap(self, record_id: int) -> SwapRecord | None:
        """The record of that attach, while it is remembered."""
        return next((record for record in self.swaps if record.id == record_id), None)
