"""Metrics: the golden list of names, and numbers that follow the service."""

from __future__ import annotations

from dataclasses import replace

from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.metrics import Metrics
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.sections import TenantConfig
from prometheus_client.parser import text_string_to_metric_families

from fakes import EXTENT_BYTES, FAR_NS, ingest, tiny_config, tiny_service

GOLDEN = {
    "holdfast_adopted_total": set(),
    "holdfast_adopted_verified_total": set(),
    "holdfast_ddr_fenced_bytes": set(),
    "holdfast_build_info": {"version"},
    "holdfast_bypassed_total": set(),
    "holdfast_catalog_failures_total": set(),
    "holdfast_ddr_fragmented_bytes": set(),
    "holdfast_documents": {"durable"},
    "holdfast_documents_expired_total": set(),
    "holdfast_unnamed_documents": set(),
    "holdfast_watermark_ddr_total": set(),
    "holdfast_watermark_nvme_total": set(),
    "holdfast_drains_cancelled_total": set(),
    "holdfast_evictions_total": {"tier"},
    "holdfast_evicted_unfetched_total": {"tier"},
    "holdfast_evict_idle_seconds_bucket": {"tier", "le"},
    "holdfast_evict_idle_seconds_count": {"tier"},
    "holdfast_evict_idle_seconds_sum": {"tier"},
    "holdfast_evict_reuse_gap_seconds_bucket": {"tier", "le"},
    "holdfast_evict_reuse_gap_seconds_count": {"tier"},
    "holdfast_evict_reuse_gap_seconds_sum": {"tier"},
    "holdfast_regret_seconds_total": {"tier"},
    "holdfast_not_worth_writing_total": set(),
    "holdfast_leases": set(),
    "holdfast_leases_overdue": set(),
    "holdfast_leases_overdue_bytes": set(),
    "holdfast_link_bandwidth_bytes_per_second": {"source", "target"},
    "holdfast_not_restored_total": set(),
    "holdfast_nvme_fragmented_bytes": set(),
    "holdfast_nvme_full_total": set(),
    "holdfast_nvme_kv_bytes_total": set(),
    "holdfast_nvme_withdrawn_bytes": set(),
    "holdfast_nvme_written_bytes_total": {"cause"},
    "holdfast_orders_in_flight": set(),
    "holdfast_pin_budget_bytes": set(),
    "holdfast_pin_budget_ddr_bytes": set(),
    "holdfast_pinned_bytes": set(),
    "holdfast_pinned_ddr_bytes": set(),
    "holdfast_pins": set(),
    "holdfast_pins_soft": set(),
    "holdfast_prefetches_refused_total": set(),
    "holdfast_hints_live": set(),
    "holdfast_hints_total": set(),
    "holdfast_hints_promoted_total": set(),
    "holdfast_hints_used_total": set(),
    "holdfast_hints_in_time_total": set(),
    "holdfast_hints_refused_total": set(),
    "holdfast_hints_expired_total": set(),
    "holdfast_hints_evicted_total": set(),
    "holdfast_hints_cancelled_total": set(),
    "holdfast_prefetched_bytes_total": set(),
    "holdfast_prefetched_unused_total": set(),
    "holdfast_queries_total": set(),
    "holdfast_reattaches_total": set(),
    "holdfast_quarantined_total": set(),
    "holdfast_reservations_waiting": set(),
    "holdfast_segments_withdrawn_total": set(),
    "holdfast_tier_capacity_bytes": {"tier", "device"},
    "holdfast_tenant_used_bytes": {"tenant", "tier"},
    "holdfast_tier_leased_bytes": {"tier", "device"},
    "holdfast_tier_pinned_bytes": {"tier", "device"},
    "holdfast_tier_used_bytes": {"tier", "device"},
    "holdfast_transfer_busy_seconds_total": {"source", "target"},
    "holdfast_transfer_bytes_total": {"source", "target"},
    "holdfast_swap_prediction_error_ratio": {"quantile"},
    "holdfast_transfers_total": {"source", "target"},
    "holdfast_write_backlog_bytes": set(),
    "holdfast_write_failures_total": set(),
    "holdfast_write_through_skipped_total": set(),
    "holdfast_writes_queued": set(),
}


def samples(service):
    """Every sample as {(name, label values): value}; the text is parsed by the library's own reader."""
    text = Metrics(service, "1.2.3").text().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sample.labels.values()))
            assert key not in found, "exposed twice"
            found[key] = sample.value
    return found


def test_golden_names_and_labels():
    service, effects, _ = tiny_service()
    ingest(service, effects, "a")
    found = {}
    for family in text_string_to_metric_families(Metrics(service, "1.2.3").text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set(sample.labels))
            assert found[sample.name] == set(sample.labels)
    assert found == GOLDEN


def test_every_name_follows_the_rules():
    service, _, _ = tiny_service()
    for family in text_string_to_metric_families(Metrics(service, "1").text().decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            assert sample.name.startswith("holdfast_")
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name


def test_a_document_is_never_a_label():
    service, effects, _ = tiny_service()
    ingest(service, effects, "secret-name", tenant="secret-tenant")
    service.pin(next(iter(service.state.documents)), Tier.DDR, 60, "secret-owner", "secret-reason")
    assert b"secret" not in Metrics(service, "1").text()


def test_of_tenants_only_those_that_are_configured_are_labels():
    service, effects, _ = tiny_service(replace(tiny_config(), tenants={"acme": TenantConfig(), "*": TenantConfig()}))
    for tenant in ("acme", "secret", "other"):
        ingest(service, effects, "a", tenant=tenant, token_count=20)
    found = {labels: n for (name, labels), n in samples(service).items() if name == "holdfast_tenant_used_bytes"}
    assert found.keys() == {(tenant, tier) for tenant in ("acme", "*") for tier in ("hbm", "ddr", "nvme")}
    assert found["acme", "ddr"] == EXTENT_BYTES
    assert found["*", "ddr"] == 2 * EXTENT_BYTES


def test_numbers_follow_the_service():
    service, effects, clock = tiny_service()
    before = samples(service)
    assert before["holdfast_tier_capacity_bytes", ("ddr", "ddr")] == 1 << 20
    assert before["holdfast_tier_used_bytes", ("ddr", "ddr")] == 0
    document = ingest(service, effects, "a", token_count=100)
    ingest(service, effects, "b", token_count=10, write_policy=WritePolicy.MEMORY)
    service.pin(document, Tier.DDR, None, "me", "")
    effects.complete_all(service)
    service.attach(7, document, None, None, None, FAR_NS, lambda _: None)
    after = samples(service)
    assert after["holdfast_tier_used_bytes", ("ddr", "ddr")] == 5 * EXTENT_BYTES
    assert after["holdfast_tier_used_bytes", ("nvme", "nvme")] == 4 * EXTENT_BYTES
    assert after["holdfast_tier_leased_bytes", ("ddr", "ddr")] == 4 * EXTENT_BYTES
    assert after["holdfast_tier_pinned_bytes", ("ddr", "ddr")] == 4 * EXTENT_BYTES
    assert after["holdfast_documents", ("true",)] == 1
    assert after["holdfast_documents", ("false",)] == 1
    assert after["holdfast_pins", ()] == 1
    assert after["holdfast_pinned_bytes", ()] == 4 * EXTENT_BYTES
    assert after["holdfast_transfer_bytes_total", ("ddr", "nvme")] == 4 * EXTENT_BYTES
    assert after["holdfast_leases", ()] == 1
    assert after["holdfast_leases_overdue", ()] == 0
    clock.advance(301 * 10**9)
    assert samples(service)["holdfast_leases_overdue", ()] == 1
    assert samples(service)["holdfast_leases_overdue_bytes", ()] == 4 * EXTENT_BYTES


def test_evictions_and_moves_are_counted():
    service, effects, _ = tiny_service()
    document = ingest(service, effects, "a", token_count=64)
    service.evict(document, Tier.DDR, 0, FAR_NS, lambda error: None)
    effects.complete_all(service)
    found = samples(service)
    assert found["holdfast_evictions_total", ("ddr",)] == 2
    assert found["holdfast_evictions_total", ("nvme",)] == 0
    assert found["holdfast_build_info", ("1.2.3",)] == 1


def test_a_scrape_changes_nothing():
    service, effects, _ = tiny_service()
    ingest(service, effects, "a")
    counts = dict(service.state.ledger.counts)
    first = Metrics(service, "1").text()
    assert Metrics(service, "1").text() == first
    assert dict(service.state.ledger.counts) == counts
    assert not effects.orders
