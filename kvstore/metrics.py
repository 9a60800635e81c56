"""Metrics: the service's numbers as Prometheus text, read from the state at each scrape.

Nothing is counted here: the ledger counts, this shows. Base units; a document is never a label, and of tenants only
those that are configured, for labels have to stay few. Groups are labels, as there are never more of them than
connections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .claims import PinKind
from .ledger import QUANTILES, HopTime
from .prices import HOPS
from .quality_view import quality_metrics
from .residency import Tier
from .sections import OTHERS
from .service import Service
from .views import tier_views

NS: Final = 1_000_000_000
COUNTS: Final = {  # the ledger's name of a count -> the metric, and what it says
    "quarantined": ("holdfast_quarantined", "Extents on NVMe that differed from their checksum."),
    "write_failures": ("holdfast_write_failures", "Writes to NVMe that failed; the extent stayed in memory only."),
    "catalog_failures": ("holdfast_catalog_failures", "Catalog commits that failed; their slots stay closed."),
    "drains_cancelled": ("holdfast_drains_cancelled", "Copies on their way out that a hit kept."),
    "prefetches_refused": ("holdfast_prefetches_refused", "Prefetches of pinned documents that found no room."),
    "nvme_full": ("holdfast_nvme_full", "Writes given up because NVMe was full of leased or pinned extents."),
    "segments_withdrawn": ("holdfast_segments_withdrawn", "Writes that found the device without room for a segment."),
    "write_through_skipped": ("holdfast_write_through_skipped", "Documents left in memory as the disk was behind."),
    "queries_answered": ("holdfast_queries", "Queries that engines have reported as answered."),
    "reattaches": ("holdfast_reattaches", "Attaches and hints that had to move bytes: queries / these = k."),
    "hints": ("holdfast_hints", "Queries that were announced, by document."),
    "hints_promoted": ("holdfast_hints_promoted", "Those whose document was brought near."),
    "hints_used": ("holdfast_hints_used", "Those whose queries came."),
    "hints_in_time": ("holdfast_hints_in_time", "Those of them that found all of it there."),
    "hints_refused": ("holdfast_hints_refused", "Hints that were one too many, or whose document cannot be brought."),
    "hints_expired": ("holdfast_hints_expired", "Hints whose queries did not come in time."),
    "hints_evicted": ("holdfast_hints_evicted", "Hints whose document had to leave again before."),
    "hints_cancelled": ("holdfast_hints_cancelled", "Hints that were taken back, or whose client went."),
    "prefetched_bytes": ("holdfast_prefetched_bytes", "Bytes moved for hints."),
    "prefetched_unused": ("holdfast_prefetched_unused", "Documents that were brought near for nothing."),
    "bypassed": ("holdfast_bypassed", "Requests refused as the cache is bypassed."),
    "adopted": ("holdfast_adopted", "Extents that an earlier daemon left in DDR, and that were found there."),
    "adopted_verified": ("holdfast_adopted_verified", "Those of them that were as they had been sealed."),
    "watermark_ddr": ("holdfast_watermark_ddr", "Copies that left DDR in the background, for nobody's demand."),
    "watermark_nvme": ("holdfast_watermark_nvme", "Copies that left NVMe in the background, for nobody's demand."),
    "documents_expired": ("holdfast_documents_expired", "Documents deleted as their time was up."),
    "not_worth_writing": ("holdfast_not_worth_writing", "Copies dropped by DDR as writing them would not have paid."),
    "not_restored": ("holdfast_not_restored", "Extents given up at a restart, as the NVMe budget has shrunk."),
}


class ServiceCollector(Collector):
    """Reads the service when a scrape asks; on the service's thread."""

    def __init__(self, service: Service, version: str) -> None:
        self.service = service
        self.version = version

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        build = GaugeMetricFamily("holdfast_build_info", "What runs here; always 1.", labels=["version"])
        build.add_metric([self.version], 1)
        yield build
        yield from self._tiers()
        yield from self._claims()
        yield from self._queues()
        yield from self._transfers()
        yield from self._tenants()
        yield from self._counts()

    def describe(self) -> Iterator[Metric]:
        """The names, without reading the service."""
        return iter(())

    def _tiers(self) -> Iterator[Metric]:
        labels = ["tier", "device"]
        capacity = GaugeMetricFamily("holdfast_tier_capacity_bytes", "Bytes a device can hold.", labels=labels)
        used = GaugeMetricFamily("holdfast_tier_used_bytes", "Bytes of copies on a device.", labels=labels)
        leased = GaugeMetricFamily("holdfast_tier_leased_bytes", "Bytes in use by leases and moves.", labels=labels)
        pinned = GaugeMetricFamily("holdfast_tier_pinned_bytes", "Bytes kept here by pins.", labels=labels)
        for view in tier_views(self.service.state):
            device = [view.tier, view.device]
            capacity.add_metric(device, view.capacity_bytes)
            used.add_metric(device, view.used_bytes)
            leased.add_metric(device, view.leased_bytes)
            pinned.add_metric(device, view.pinned_bytes)
        yield from (capacity, used, leased, pinned)
        state = self.service.state
        stuck = "Free bytes of slabs in use, which only their own class of slots can take."
        yield gauge("holdfast_ddr_fragmented_bytes", stuck, state.ddr.fragmented_bytes)
        yield gauge("holdfast_nvme_fragmented_bytes", stuck, state.nvme.fragmented_bytes)
        withdrawn = "Bytes of NVMe capacity that the device, being full, does not have."
        yield gauge("holdfast_nvme_withdrawn_bytes", withdrawn, state.nvme.withdrawn_bytes)
        fenced_bytes = self.service.state.ddr.fenced_bytes
        yield gauge("holdfast_ddr_fenced_bytes", "Free bytes kept for clients of an earlier daemon.", fenced_bytes)

    def _tenants(self) -> Iterator[Metric]:
        """Of tenants with a table in the configuration, which are few; all others are one, "*"."""
        state = self.service.state
        labels = ["tenant", "tier"]
        used = GaugeMetricFamily("holdfast_tenant_used_bytes", "Bytes of a configured tenant's copies.", labels=labels)
        for tier in Tier:
            named = {tenant: state.usage.used(tier, tenant) for tenant in state.quotas.tables if tenant != OTHERS}
            named[OTHERS] = sum(state.usage.of(tier).values()) - sum(named.values())
            for tenant, size_bytes in named.items():
                used.add_metric([tenant, tier.label], size_bytes)
        yield used

    def _claims(self) -> Iterator[Metric]:
        state = self.service.state
        now_ns = self.service.clock.monotonic_ns()
        durable = sum(record.durable for record in state.documents.named.values())
        documents = GaugeMetricFamily(
            "holdfast_documents", "Documents, by whether the catalog has them.", labels=["durable"]
        )
        documents.add_metric(["true"], durable)
        documents.add_metric(["false"], len(state.documents.named) - durable)
        yield documents
        unnamed = len(state.documents.unnamed)
        yield GaugeMetricFamily("holdfast_unnamed_documents", "Documents that engines stored without a name.", unnamed)
        overdue = sum(lease.overdue(now_ns) for lease in state.leases.values())
        yield gauge("holdfast_leases", "Leases held.", len(state.leases))
        yield gauge("holdfast_leases_overdue", "Leases held past their deadline.", overdue)
        yield gauge("holdfast_hints_live", "Hints that have not ended.", len(state.hints.live))
        yield gauge("holdfast_pins", "Pins.", len(state.pins.all()))
        overdue_bytes = sum(lease.size_bytes for lease in state.leases.values() if lease.overdue(now_ns))
        yield gauge("holdfast_leases_overdue_bytes", "Bytes of leases held past their deadline.", overdue_bytes)
        soft = sum(pin.kind is PinKind.SOFT for pin in state.pins.all())
        yield gauge("holdfast_pins_soft", "Pins that forbid nothing: what they name leaves after the rest.", soft)
        budget = state.pins.budget
        for tier, limit_bytes, name in ((Tier.NVME, budget.nvme_bytes, ""), (Tier.DDR, budget.ddr_bytes, "_ddr")):
            most = math.inf if limit_bytes is None else limit_bytes
            taken = "Bytes that pins take of their budget."
            yield gauge(f"holdfast_pinned{name}_bytes", taken, state.pins.bytes_in(tier))
            yield gauge(f"holdfast_pin_budget{name}_bytes", "Bytes that pins may take.", most)

    def _queues(self) -> Iterator[Metric]:
        room, store = self.service.room, self.service.store
        yield gauge("holdfast_reservations_waiting", "Requests that wait for room.", room.waiting)
        yield gauge(
            "holdfast_writes_queued", "Extents waiting for, or on, their way to NVMe.", self.service.writes.queued
        )
        yield gauge(
            "holdfast_write_backlog_bytes", "Bytes waiting to be written through.", self.service.writes.backlog_bytes
        )
        yield gauge("holdfast_orders_in_flight", "Orders whose end is awaited.", store.orders_in_flight)

    def _transfers(self) -> Iterator[Metric]:
        labels = ["source", "target"]
        size = CounterMetricFamily("holdfast_transfer_bytes", "Bytes moved.", labels=labels)
        moves = CounterMetricFamily("holdfast_transfers", "Moves.", labels=labels)
        busy = CounterMetricFamily(
            "holdfast_transfer_busy_seconds", "Time spent moving, summed over workers.", labels=labels
        )
        speed = GaugeMetricFamily(
            "holdfast_link_bandwidth_bytes_per_second", "What the planner expects of a hop.", labels=labels
        )
        for hop in HOPS:
            ends = [hop.source.label, hop.target.label]
            done = self.service.state.ledger.hops.get(hop) or HopTime()
            size.add_metric(ends, done.size_bytes)
            moves.add_metric(ends, done.moves)
            busy.add_metric(ends, done.busy_ns / NS)
            speed.add_metric(ends, self.service.planner.links[hop].bytes_per_second)
        yield from (size, moves, busy, speed)
        off = GaugeMetricFamily(
            "holdfast_swap_prediction_error_ratio",
            "|predicted - taken| / taken of the remembered swaps that moved bytes; NaN when there were none.",
            labels=["quantile"],
        )
        errors = self.service.state.ledger.prediction_quantiles()
        for quantile in QUANTILES:
            off.add_metric([str(quantile)], errors.get(quantile, math.nan))
        yield off
        wear = self.service.state.ledger.wear
        written = CounterMetricFamily(
            "holdfast_nvme_written_bytes", "Bytes written to NVMe since the data directory was made.", labels=["cause"]
        )
        written.add_metric(["write-through"], wear.write_through_bytes)
        written.add_metric(["demotion"], wear.demotion_bytes)
        yield written
        yield CounterMetricFamily(
            "holdfast_nvme_kv_bytes",
            "Of these, KV that NVMe never had: the ratio is amplification.",
            value=wear.kv_bytes,
        )

    def _counts(self) -> Iterator[Metric]:
        counts = self.service.state.ledger.counts
        evictions = CounterMetricFamily("holdfast_evictions", "Copies that left by verdict.", labels=["tier"])
        for tier in Tier:
            evictions.add_metric([tier.label], counts[f"evictions_{tier.label}"])
        yield evictions
        yield from quality_metrics(self.service.state.quality)
        for name, (metric, help_text) in COUNTS.items():
            yield CounterMetricFamily(metric, help_text, value=counts[name])


def gauge(name: str, help_text: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(name, help_text, value=value)


class Metrics:
    """The exposition of one service, in a registry of its own."""

    content_type: Final = CONTENT_TYPE_LATEST

    def __init__(self, service: Service, version: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ServiceCollector(service, version))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)
