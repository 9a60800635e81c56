"""Views of tenants: what each has of each tier, and what it may have. Looking changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from heapq import nsmallest

import msgspec

from .quotas import fair_shares
from .residency import Placement, Tier
from .sections import OTHERS
from .state import State
from .tenancy import Tenancy
from .views import pinned_copies


class TenantTierView(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant in a tier: bytes. `maximum_bytes` null is no limit.

    `fair_bytes` is what it could have now before it is the first to lose, null where there are no quotas.
    """

    tier: str
    used_bytes: int
    guaranteed_bytes: int
    maximum_bytes: int | None
    fair_bytes: int | None
    pinned_bytes: int
    leased_bytes: int


class TenantView(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant. `quota`: whose table of the configuration is its own, null where there is none."""

    tenant: str
    documents: int
    quota: str | None
    tiers: list[TenantTierView]


class TenantsView(msgspec.Struct, frozen=True, kw_only=True):
    """Those with the most bytes first, and how many there are."""

    tenants: list[TenantView]
    count: int


def tenants_view(state: State, tenancy: Tenancy, limit: int) -> TenantsView:
    """Show the tenants that have bytes, documents or a table of their own."""
    documents = Counter(document.tenant for document in state.documents.named)
    known = {*documents, *state.quotas.tables.keys() - {OTHERS}}
    for tier in Tier:
        known |= state.usage.of(tier).keys()
    leased, pinned = _by_tenant(state.held()), _by_tenant(pinned_copies(state))

    def most_first(tenant: str) -> tuple[int, str]:
        return -sum(state.usage.used(tier, tenant) for tier in Tier), tenant

    return TenantsView(
        tenants=[
            TenantView(
                tenant=tenant,
                documents=documents[tenant],
                quota=next((name for name in (tenant, OTHERS) if name in state.quotas.tables), None),
                tiers=[_tier_view(state, tenancy, tenant, tier, pinned, leased) for tier in Tier],
            )
            for tenant in nsmallest(limit, known, key=most_first)
        ],
        count=len(known),
    )


def _by_tenant(copies: Iterable[Placement]) -> Counter[tuple[Tier, str]]:
    found: Counter[tuple[Tier, str]] = Counter()
    for copy in copies:
        found[copy.tier, copy.tenant] += copy.size_bytes
    return found


def _tier_view(
    state: State,
    tenancy: Tenancy,
    tenant: str,
    tier: Tier,
    pinned: Counter[tuple[Tier, str]],
    leased: Counter[tuple[Tier, str]],
) -> TenantTierView:
    quota = state.quotas.of(tenant, tier)
    fair_bytes = None
    if state.quotas and tier is not Tier.HBM:
        capacity_bytes = tenancy.capacity_bytes(tier)
        wants = {**state.usage.of(tier), tenant: capacity_bytes}
        fair_bytes = fair_shares(capacity_bytes, wants, {name: state.quotas.of(name, tier) for name in wants})[tenant]
    return TenantTierView(
        tier=tier.label,
        used_bytes=state.usage.used(tier, tenant),
        guaranteed_bytes=quota.guaranteed_bytes,
        maximum_bytes=quota.maximum_bytes,
        fair_bytes=fair_bytes,
        pinned_bytes=pinned[tier, tenant],
        leased_bytes=leased[tier, tenant],
    )
