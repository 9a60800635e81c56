"""Simulations over tiers: which bytes a policy would have moved, how long swaps would have taken, what is saved net.

Bandwidths into HBM are assumptions that the caller may replace, not measurements: DDR 200 GB/s, NVMe 25 GB/s.
A swap is a request that found blocks below HBM; it lasts for bytes over bandwidth of each tier, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .eviction.cache import Cache
from .eviction.policy import Policy, Worth
from .eviction.tiered_replay import Tiers, replay_tiered
from .kvstore.errors import InvalidRequest
from .simulation import (
    FLOPS_PER_SECOND,
    KV_BYTES_PER_TOKEN,
    NS_PER_SECOND,
    PROGRESS_REQUESTS,
    Capacity,
    Progress,
    Tally,
    Timer,
    make_policy,
    recompute_ns,
    summary,
)
from .traces import Trace

TIERS: Final[tuple[str, ...]] = ("hbm", "ddr", "nvme")
BYTES_PER_SECOND: Final = {"ddr": 200e9, "nvme": 25e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """What is simulated: capacities from HBM down, and bytes per second from each lower tier into HBM."""

    capacities: Mapping[str, Capacity]
    bytes_per_second: Mapping[str, float]

    @property
    def text(self) -> str:
        """As the command line has it."""
        return ",".join(f"{name}={capacity.text}" for name, capacity in self.capacities.items())

    @classmethod
    def parse(cls, text: str, bytes_per_second: Mapping[str, float] = BYTES_PER_SECOND) -> TierPlan:
        """Such as hbm=1%,ddr=5%,nvme=500GB. Raises InvalidRequest."""
        found: dict[str, Capacity] = {}
        for part in text.split(","):
            name, _, size = part.strip().partition("=")
            if name not in TIERS or name in found:
                raise InvalidRequest(f"--tiers {text}: {part!r}; say hbm=1%,ddr=5%,nvme=20%, each at most once")
            found[name] = Capacity.parse(size)
        ordered = {name: found[name] for name in TIERS if name in found}
        if "hbm" not in ordered or len(ordered) < 2:
            raise InvalidRequest(f"--tiers {text}: name hbm and what lies below it; for one tier use --capacity")
        return cls(capacities=ordered, bytes_per_second=bytes_per_second)

    def worth(self, name: str) -> Worth:
        """What a hit in this tier saves: reloading from the next one, or below the last computing again."""
        names = list(self.capacities)
        below = names[names.index(name) + 1 :]
        if not below:
            return recompute_ns
        ns_per_token = KV_BYTES_PER_TOKEN / self.bytes_per_second[below[0]] * NS_PER_SECOND
        return lambda token_count: token_count * ns_per_token

    def caches(self, trace: Trace, policy: Policy) -> dict[str, Cache]:
        """Empty ones. Raises InvalidRequest when one holds nothing."""
        return {
            name: Cache(
                policy,
                capacity_units=capacity.units(trace),
                unit_tokens=trace.block_tokens,
                unit_bytes=trace.block_tokens * KV_BYTES_PER_TOKEN,
                worth=self.worth(name),
            )
            for name, capacity in self.capacities.items()
        }


class Moves:
    """Units moved, by hop, and the seconds of each swap."""

    def __init__(self, plan: TierPlan, unit_bytes: int) -> None:
        self._names = list(plan.capacities)
        self._seconds_per_unit = [0.0, *(unit_bytes / plan.bytes_per_second[name] for name in self._names[1:])]
        self._unit_bytes = unit_bytes
        self._found = [0] * len(self._names)
        self._written = [0] * len(self._names)
        self._swaps: list[float] = []

    def add(self, found: Sequence[int], written: Sequence[int]) -> None:
        """One request."""
        for number, (loaded, come) in enumerate(zip(found, written, strict=True)):
            self._found[number] += loaded
            self._written[number] += come
        swap_seconds = math.fsum(n * each for n, each in zip(found, self._seconds_per_unit, strict=True))
        if swap_seconds:
            self._swaps.append(swap_seconds)

    @property
    def swap_seconds(self) -> float:
        """Of all swaps together."""
        return math.fsum(self._swaps)

    def shown(self) -> dict[str, Any]:
        """For the report."""
        ordered, hits = sorted(self._swaps), max(sum(self._found), 1)
        names = self._names
        up = {f"{name}>hbm": count for name, count in zip(names[1:], self._found[1:], strict=True)}
        down = {f"{names[i]}>{names[i + 1]}": self._written[i + 1] for i in range(len(names) - 1)}
        return {
            "hit_shares": {name: count / hits for name, count in zip(names, self._found, strict=True)},
            "moved_bytes": {hop: count * self._unit_bytes for hop, count in (up | down).items()},
            "swaps": len(ordered),
            "swap_seconds_mean": self.swap_seconds / max(len(ordered), 1),
            "swap_seconds_p95": ordered[math.ceil(len(ordered) * 0.95) - 1] if ordered else 0.0,
        }


def simulate_tiers(trace: Trace, name: str, plan: TierPlan, progress: Progress | None = None) -> dict[str, Any]:
    """One line of `holdfast policy simulate --tiers --json`. Raises InvalidRequest, as simulate does."""
    policy = make_policy(name, trace)
    caches = plan.caches(trace, policy)
    memories = [cache for tier, cache in caches.items() if tier != "nvme"]
    tiers = Tiers(memories, caches.get("nvme"))
    tally, timer, moves = Tally(), Timer(), Moves(plan, trace.block_tokens * KV_BYTES_PER_TOKEN)
    steps = timer.timed(replay_tiered((one.request for one in trace.requests), policy, tiers))
    for number, (one, step) in enumerate(zip(trace.requests, steps, strict=True)):
        tally.add(min(step.hit_units * trace.block_tokens, one.input_tokens), one.input_tokens)
        moves.add(step.found, step.written)
        if progress is not None and number % PROGRESS_REQUESTS == PROGRESS_REQUESTS - 1:
            progress(PROGRESS_REQUESTS)
    loading_share = moves.swap_seconds * FLOPS_PER_SECOND / max(tally.asked_flops, 1.0)
    found = summary(trace, tally, timer)
    heading = {
        "trace": str(trace.path),
        "policy": name,
        "tiers": plan.text,
        "tier_blocks": {tier: cache.capacity_units for tier, cache in caches.items()},
        "block_tokens": trace.block_tokens,
        "unique_blocks": trace.unit_count,
    }
    assumed = {f"{tier}_bytes_per_second": plan.bytes_per_second[tier] for tier in caches if tier != "hbm"}
    return (
        heading
        | found
        | {"net_seconds_saved": found["prefill_seconds_saved"] - loading_share}
        | moves.shown()
        | {"assumed": assumed | {"kv_bytes_per_token": KV_BYTES_PER_TOKEN, "flops_per_second": FLOPS_PER_SECOND}}
    )
