"""Quality view: how good evictions were, as people are shown it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from .quality import BOUNDS_SECONDS, NS, Durations, Quality


class QualityView(msgspec.Struct, frozen=True, kw_only=True):
    """Of one tier since the daemon's start: `unfetched` of the `evicted` copies came and were never used.

    `idle_seconds` is the mean time that they had not been used, `gap_seconds` from an eviction to the next use of what
    was `returned`; null where there were none. `regret_seconds` is what bringing those back costs, as it was predicted
    when they left. Only what the policy chose counts.
    """

    tier: str
    evicted: int
    unfetched: int
    returned: int
    idle_seconds: float | None
    gap_seconds: float | None
    regret_seconds: float


def quality_views(quality: Quality) -> list[QualityView]:
    """Show every tier."""
    return [
        QualityView(
            tier=tier.label,
            evicted=one.evicted,
            unfetched=one.unfetched,
            returned=one.returned,
            idle_seconds=one.idle.mean_seconds,
            gap_seconds=one.gap.mean_seconds,
            regret_seconds=one.regret_ns / NS,
        )
        for tier, one in quality.tiers.items()
    ]


def quality_metrics(quality: Quality) -> Iterator[Metric]:
    """The same for Prometheus."""
    labels = ["tier"]
    unfetched = CounterMetricFamily(
        "holdfast_evicted_unfetched", "Copies that the policy evicted and nobody had used.", labels=labels
    )
    regret = CounterMetricFamily(
        "holdfast_regret_seconds", "Predicted price of bringing back what was evicted and then used.", labels=labels
    )
    idle = HistogramMetricFamily(
        "holdfast_evict_idle_seconds", "How long evicted copies had not been used, or had been there.", labels=labels
    )
    gap = HistogramMetricFamily(
        "holdfast_evict_reuse_gap_seconds", "From an eviction to the next use of the same extent.", labels=labels
    )
    for tier, one in quality.tiers.items():
        unfetched.add_metric([tier.label], one.unfetched)
        regret.add_metric([tier.label], one.regret_ns / NS)
        idle.add_metric([tier.label], _buckets(one.idle), one.idle.sum_ns / NS)
        gap.add_metric([tier.label], _buckets(one.gap), one.gap.sum_ns / NS)
    yield from (unfetched, regret, idle, gap)


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    found, total = [], 0
    for bound, count in zip((*map(str, BOUNDS_SECONDS), "+Inf"), durations.counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found
