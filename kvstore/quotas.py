"""Quotas: how much of a tier each tenant may have, what it has, and who loses first when there is not enough.

Up to its guarantee a tenant loses nothing to others. Beyond its maximum its new bytes come out of its own. What lies
between is shared: fair is the max-min allocation, in which nobody can have more unless somebody with less, beyond its
guarantee, has less still (Bertsekas and Gallager, Data Networks, 6.5.2). What is guaranteed and not used is lent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from .residency import Tier
from .sections import OTHERS, TenantConfig


@dataclass(frozen=True, slots=True)
class Quota:
    """Bytes of one tier. `maximum_bytes` None is no limit."""

    guaranteed_bytes: int = 0
    maximum_bytes: int | None = None

    def most(self, capacity_bytes: int) -> int:
        """What a tier of that capacity could ever hold of it."""
        return capacity_bytes if self.maximum_bytes is None else min(self.maximum_bytes, capacity_bytes)


FREE: Final = Quota()


class Quotas:
    """What was configured. With no table at all tenants are alike to eviction: it looks at worth alone."""

    def __init__(self, tables: Mapping[str, TenantConfig]) -> None:
        self.tables = dict(tables)

    def __bool__(self) -> bool:
        """Whether anything was configured."""
        return bool(self.tables)

    def of(self, tenant: str, tier: Tier) -> Quota:
        """The tenant's, else everybody's. HBM has none: a group's memory belongs to its engine."""
        table = self.tables.get(tenant) or self.tables.get(OTHERS)
        if table is None or tier is Tier.HBM:
            return FREE
        if tier is Tier.DDR:
            return Quota(table.ddr_guaranteed_bytes, table.ddr_maximum_bytes)
        return Quota(table.nvme_guaranteed_bytes, table.nvme_maximum_bytes)


class Usage:
    """Bytes of copies by tier and tenant, kept with every copy that comes and goes. Who has nothing has no entry."""

    def __init__(self) -> None:
        self._used: dict[Tier, Counter[str]] = {tier: Counter() for tier in Tier}

    def came(self, tier: Tier, tenant: str, size_bytes: int) -> None:
        """A copy took its room."""
        self._used[tier][tenant] += size_bytes

    def left(self, tier: Tier, tenant: str, size_bytes: int) -> None:
        """A copy gave it back."""
        used = self._used[tier]
        used[tenant] -= size_bytes
        assert used[tenant] >= 0, f"{tenant} has less than nothing of {tier.label}"
        if not used[tenant]:
            del used[tenant]

    def of(self, tier: Tier) -> Mapping[str, int]:
        """Used bytes by tenant."""
        return self._used[tier]

    def used(self, tier: Tier, tenant: str) -> int:
        """One tenant's bytes."""
        return self._used[tier][tenant]


def fair_shares(capacity_bytes: int, wants: Mapping[str, int], quotas: Mapping[str, Quota]) -> dict[str, int]:
    """The max-min fair part of the capacity for each tenant, given what each wants; `quotas` has them all.

    Nobody gets more than it wants or its maximum. All parts together are the capacity, or all that is wanted where
    that is less (below it by less than one byte per tenant, from rounding down).
    """
    wanted = {tenant: min(want, quotas[tenant].most(capacity_bytes)) for tenant, want in wants.items()}
    ensured = {tenant: min(want, quotas[tenant].guaranteed_bytes) for tenant, want in wanted.items()}
    rest_bytes = max(0, capacity_bytes - sum(ensured.values()))
    level = water_level(rest_bytes, [wanted[tenant] - ensured[tenant] for tenant in wanted])
    return {tenant: min(wanted[tenant], ensured[tenant] + level) for tenant in wanted}


def water_level(rest_bytes: int, wants: Iterable[int]) -> int:
    """How much each may have at most, so that all together have no more than there is; what all want if it suffices."""
    level, ordered = 0, sorted(wants)
    for index, want in enumerate(ordered):
        equal = rest_bytes // (len(ordered) - index)
        if want > equal:
            return equal
        level = want
        rest_bytes -= want
    return level
