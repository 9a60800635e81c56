"""Explain view: why a document is where it is, and why it is not where it was. Looking changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from .departures import Departure, Past
from .document import DocumentId
from .errors import DocumentNotFound
from .lines import Standing
from .planner import Planner
from .residency import Placement, Tier
from .state import DocumentRecord, ExtentRecord, Shard, State
from .views import StandingView, joined, standing_view

NS = 1e9


class CacheView(msgspec.Struct, frozen=True, kw_only=True):
    """What one device holds of a document, and the copy of it that would leave first: tokens [start, stop).

    `restore_seconds` is what losing that copy costs on the next use. `leases` use it; `pin` is "hard" or "soft" where
    one names this tier; `is_hinted`: queries on it wait or are announced; `is_guaranteed`: its tenant has no more here
    than is guaranteed to it. `follows_lru`: the guard lets the policy rest. `bound` is the setting that keeps the
    device from holding more for its tenant.
    """

    device: str
    tier: str
    extents: int
    size_bytes: int
    start: int
    stop: int
    standing: StandingView | None
    scores: dict[str, float]
    restore_seconds: float
    policy: str
    follows_lru: bool
    leases: int
    pin: str | None
    is_hinted: bool
    is_guaranteed: bool
    bound: str


class RestoreView(msgspec.Struct, frozen=True, kw_only=True):
    """What having all of a document in DDR takes now: bytes read from NVMe, and tokens computed again.

    `bound` is the setting that keeps NVMe from holding more for its tenant.
    """

    nvme_bytes: int
    reload_seconds: float
    missing_tokens: list[tuple[int, int]]
    recompute_seconds: float
    bound: str


class DepartureView(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of tokens [start, stop) that left a tier. See departures.

    `restore_seconds` was the price of bringing them back, as predicted then. `is_back`: that tier has them again.
    """

    tier: str
    start: int
    stop: int
    copies: int
    size_bytes: int
    first_wall_ns: int
    wall_ns: int
    reason: str
    action: str
    policy: str
    scores: dict[str, float]
    wanted_by: str
    restore_seconds: float
    is_back: bool


class ExplainView(msgspec.Struct, frozen=True, kw_only=True):
    """One document. `state`: "complete", "partly gone", "gone" (its name is left), or how it ended ("deleted", ...).

    It ends by itself at `expires_wall_ns`; `is_overdue`: that is over, and leases or pins on it are awaited.
    `departures` are the last that are remembered, the newest first. Of a document that has ended, `restore` is
    computing all of it: what others still have of its front would make that less.
    """

    tenant: str
    name: str
    state: str
    token_count: int
    ended_wall_ns: int | None
    expires_wall_ns: int | None
    is_overdue: bool
    caches: list[CacheView]
    restore: RestoreView
    departures: list[DepartureView]


def explain_view(state: State, planner: Planner, document: DocumentId) -> ExplainView:
    """Explain a document, also one that is no more. Raises DocumentNotFound where nothing is remembered of it."""
    owner, past = state.documents.get(document), state.departures.of(document) or Past()
    if owner is None:
        return _ended(planner, document, past)
    restore = _restore(state, planner, owner)
    expires_wall_ns = owner.document.expires_wall_ns
    lost = sum(stop - start for start, stop in restore.missing_tokens)
    return ExplainView(
        tenant=document.tenant,
        name=document.name,
        state="complete" if not lost else "gone" if lost == owner.document.token_count else "partly gone",
        token_count=owner.document.token_count,
        ended_wall_ns=None,
        expires_wall_ns=expires_wall_ns,
        is_overdue=expires_wall_ns is not None and expires_wall_ns <= planner.clock.wall_ns(),
        caches=[*_shards(state, planner, owner), *_tiers(state, planner, owner)],
        restore=restore,
        departures=[_departure(one, is_back=_is_back(state, owner, one)) for one in reversed(past.departures)],
    )


def _ended(planner: Planner, document: DocumentId, past: Past) -> ExplainView:
    known = past.document
    if known is None:
        raise DocumentNotFound(
            f"no document {document.name!r} in tenant {document.tenant!r}, and nothing is remembered of one"
        )
    return ExplainView(
        tenant=document.tenant,
        name=document.name,
        state=past.ended,
        token_count=known.token_count,
        ended_wall_ns=past.ended_wall_ns,
        expires_wall_ns=None,
        is_overdue=False,
        caches=[],
        restore=RestoreView(
            nvme_bytes=0,
            reload_seconds=0.0,
            missing_tokens=[(0, known.token_count)],
            recompute_seconds=planner.prefill_ns(known.fingerprint, 0, known.token_count) / NS,
            bound=planner.tenancy.bound(Tier.NVME, document.tenant),
        ),
        departures=[_departure(one, is_back=False) for one in reversed(past.departures)],
    )


def _restore(state: State, planner: Planner, owner: DocumentRecord) -> RestoreView:
    records = [state.extents[extent] for extent in owner.document.extents]
    missing = joined((r.extent.start, r.extent.stop) for r in records if r.source() is None)
    below = [r for r in records if (source := r.source()) is not None and source.tier is Tier.NVME]
    fingerprint = owner.document.fingerprint
    return RestoreView(
        nvme_bytes=sum(r.extent.slot_bytes for r in below),
        reload_seconds=sum(planner.reload_ns(r, Tier.NVME, Tier.DDR) for r in below) / NS,
        missing_tokens=missing,
        recompute_seconds=sum(planner.prefill_ns(fingerprint, *tokens) for tokens in missing) / NS,
        bound=planner.tenancy.bound(Tier.NVME, owner.document.id.tenant),
    )


# Caches ----------------------------------------------------------------------------------------


def _shards(state: State, planner: Planner, owner: DocumentRecord) -> Iterator[CacheView]:
    for shard in state.shards_of(owner.document):
        if shard.copies:
            yield _shard(state, planner, owner, shard)


def _shard(state: State, planner: Planner, owner: DocumentRecord, shard: Shard) -> CacheView:
    extent, copy = next(reversed(shard.copies.items()))
    standing = planner.explain_shard(shard)
    copies = {extent: copy for extent, copy in shard.copies.items() if copy.readable}
    return _cache(state, planner, owner, copies, (state.extents[extent], copy), standing)


def _tiers(state: State, planner: Planner, owner: DocumentRecord) -> Iterator[CacheView]:
    groups = len(state.specs[owner.document.fingerprint].groups)
    step = len(owner.document.extents) // groups
    for tier in (Tier.DDR, Tier.NVME):
        copies = {}
        lasts: dict[int, tuple[ExtentRecord, Placement]] = {}  # of each layer group's chain: what could leave first
        for number, extent in enumerate(owner.document.extents):
            record = state.extents[extent]
            copy = record.ddr if tier is Tier.DDR else record.nvme
            if copy is not None and copy.readable:
                copies[extent] = copy
                lasts[number // step] = record, copy
        if not copies:
            continue
        line = planner.line(tier)
        told = [(planner.explain(record, copy, line), (record, copy)) for record, copy in lasts.values()]
        standing, first = min(told, key=lambda one: (not one[0].is_movable, one[0].ahead))
        yield _cache(state, planner, owner, copies, first, standing)


def _cache(
    state: State,
    planner: Planner,
    owner: DocumentRecord,
    copies: Mapping[str, Placement],
    first: tuple[ExtentRecord, Placement],
    standing: Standing | None,
) -> CacheView:
    record, copy = first
    document, tier = owner.document.id, copy.tier
    pin = state.pins.get(document)
    guaranteed_bytes = 0 if tier is Tier.HBM else planner.tenancy.quota(tier, document.tenant).guaranteed_bytes
    return CacheView(
        device=copy.device,
        tier=tier.label,
        extents=len(copies),
        size_bytes=sum(one.size_bytes for one in copies.values()),
        start=record.extent.start,
        stop=record.extent.stop,
        standing=standing_view(copy, standing),
        scores=dict(standing.scores) if standing is not None else {},
        restore_seconds=planner.restore_ns(record, copy) / NS,
        policy=planner.policy.name,
        follows_lru=standing is not None and bool(standing.scores.get("follows_lru")),
        leases=len(state.leased(document)) if any(one.holds for one in copies.values()) else 0,
        pin=None if pin is None or not pin.counts_in(tier) else pin.kind.value,
        is_hinted=state.is_expected(frozenset((document,)), tier, copy.device),
        is_guaranteed=0 < guaranteed_bytes >= state.usage.used(tier, document.tenant),
        bound="the group's rows" if tier is Tier.HBM else planner.tenancy.bound(tier, document.tenant),
    )


# Departures ------------------------------------------------------------------------------------


def _departure(one: Departure, *, is_back: bool) -> DepartureView:
    return DepartureView(
        tier=one.tier,
        start=one.start,
        stop=one.stop,
        copies=one.copies,
        size_bytes=one.size_bytes,
        first_wall_ns=one.first_wall_ns,
        wall_ns=one.wall_ns,
        reason=one.reason,
        action=one.action,
        policy=one.policy,
        scores=dict(one.scores),
        wanted_by=one.wanted_by,
        restore_seconds=one.restore_ns / NS,
        is_back=is_back,
    )


def _is_back(state: State, owner: DocumentRecord, one: Departure) -> bool:
    """Whether the tier, whichever group's HBM that is, has all of those tokens that the document still has."""
    shards = state.shards_of(owner.document)
    inside = [
        extent
        for extent in owner.document.extents
        if one.start <= state.extents[extent].extent.start and state.extents[extent].extent.stop <= one.stop
    ]
    here = [{tier.label for tier, copy in state.copies(e, shards).items() if copy.readable} for e in inside]
    return bool(here) and all(one.tier in tiers for tiers in here)
