"""Tenancy: what quotas have to say of a demand, by what each tenant has now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .contest import Contest
from .document import Document
from .errors import DocumentTooLarge, QuotaExceeded
from .extent import Extent
from .holders import Holder, Kind
from .quotas import Quota
from .residency import Placement, Tier
from .residency import State as Phase
from .sections import OTHERS
from .sizes import format_size
from .slots import SlabPool, SlotClass, slots_of
from .state import State


class Tenancy:
    """Reads state. Without quotas every answer is yes, at no cost."""

    def __init__(self, state: State) -> None:
        self.state = state

    def _pool(self, tier: Tier) -> SlabPool:
        return self.state.ddr if tier is Tier.DDR else self.state.nvme

    def capacity_bytes(self, tier: Tier) -> int:
        """Of DDR or NVMe."""
        return self._pool(tier).capacity_bytes

    def quota(self, tier: Tier, tenant: str) -> Quota:
        """The tenant's."""
        return self.state.quotas.of(tenant, tier)

    def most_bytes(self, tier: Tier, tenant: str) -> int:
        """What it could have there at best."""
        return self.quota(tier, tenant).most(self._pool(tier).capacity_bytes)

    def could_hold(self, tier: Tier, extents: Sequence[Extent]) -> bool:
        """Whether the tier would take all of these extents of one tenant if it were empty."""
        wanted = slots_of(extents, owner=None if tier is Tier.DDR else "")
        if not extents or not self._pool(tier).could_hold(wanted):
            return not extents
        return sum(extent.slot_bytes for extent in extents) <= self.most_bytes(tier, extents[0].tenant)

    def too_large(self, document: Document, extents: Iterable[Extent]) -> DocumentTooLarge:
        """What to say of a document that neither tier could hold."""
        tenant = document.id.tenant
        return DocumentTooLarge(
            f"{document.id} takes {sum(extent.slot_bytes for extent in extents)} B and is {document.write_policy}; its "
            f"tenant may have {self.most_bytes(Tier.DDR, tenant)} B of DDR and {self.most_bytes(Tier.NVME, tenant)} B "
            "of NVMe, and what DDR cannot hold whole must fit into NVMe, and may be written there; raise "
            "nvme.capacity_bytes or ddr.capacity_bytes, or the tenant's maxima"
        )

    def may_take(self, extent: Extent, tier: Tier) -> bool:
        """Whether one more slot for this extent stays within its tenant's maximum, and in DDR a slab that it opens."""
        maximum_bytes = self.quota(tier, extent.tenant).maximum_bytes
        if maximum_bytes is None:
            return True
        if self.state.usage.used(tier, extent.tenant) + extent.slot_bytes > maximum_bytes:
            return False
        most = self.slabs_most(extent.tenant)
        kind = SlotClass(extent.tenant, extent.slot_bytes)
        pool = self.state.ddr
        return tier is not Tier.DDR or most is None or pool.is_open(kind) or pool.slabs_of(extent.tenant) < most

    def slabs_most(self, tenant: str | None) -> int | None:
        """Slabs of DDR that the tenant may own: its maximum in whole slabs, because nobody else can use the rest."""
        maximum_bytes = None if tenant is None else self.quota(Tier.DDR, tenant).maximum_bytes
        return None if maximum_bytes is None else -(-maximum_bytes // self.state.ddr.slab_bytes)

    # One demand ----------------------------------------------------------------------------------

    def fits(self, tier: Tier, tenant: str | None, wanted_bytes: int, leaving: Iterable[Placement] = ()) -> bool:
        """Whether the tenant may have so much more, when what is leaving has left."""
        maximum_bytes = None if tenant is None else self.quota(tier, tenant).maximum_bytes
        if tenant is None or maximum_bytes is None:
            return True
        left_bytes = sum(copy.size_bytes for copy in leaving if copy.tenant == tenant)
        return self.state.usage.used(tier, tenant) - left_bytes + wanted_bytes <= maximum_bytes

    def leaving(self, tier: Tier) -> list[Placement]:
        """Copies that give their room back without anybody's doing; not what is lost and held: a lease may hold it."""
        leaving = [c for c in self.state.leaving if c.tier is tier and not (c.holds and c.state is Phase.LOST)]
        if tier is Tier.DDR:
            leaving += [copy for copy in self.state.draining.values() if copy.state is Phase.DRAINING]
        return leaving

    def contest(self, tier: Tier, tenant: str | None, wanted_bytes: int) -> Contest | None:
        """Who may lose to whom for this demand; None where no quotas are, or nothing is demanded."""
        if not self.state.quotas or tenant is None:
            return None
        held = Counter(self.state.usage.of(tier))
        for copy in self.leaving(tier):
            held[copy.tenant] -= copy.size_bytes
        return Contest(self.state.quotas, tier, self._pool(tier).capacity_bytes, held, tenant, wanted_bytes)

    def relief(self, tier: Tier, size_bytes: int) -> Contest | None:
        """The same where the tier is to have so much less, and nobody asked for it."""
        if not self.state.quotas:
            return None
        held = Counter(self.state.usage.of(tier))
        for copy in self.leaving(tier):
            held[copy.tenant] -= copy.size_bytes
        return Contest(self.state.quotas, tier, max(0, held.total() - size_bytes), held)

    def bound(self, tier: Tier, tenant: str) -> str:
        """The setting that keeps the tier from holding more of the tenant's: its maximum if less is left of that."""
        maximum_bytes, used = self.quota(tier, tenant).maximum_bytes, self.state.usage.of(tier)
        free_bytes = self._pool(tier).capacity_bytes - sum(used.values())
        if maximum_bytes is None or maximum_bytes - used.get(tenant, 0) > free_bytes:
            return f"{tier.label}.capacity_bytes"
        table = tenant if tenant in self.state.quotas.tables else OTHERS
        return f"tenants.{table}.{tier.label}_maximum_bytes"

    def is_too_much(self, tier: Tier, tenant: str | None, wanted_bytes: int) -> bool:
        """Whether the tenant could not have it even if it had nothing else there."""
        return tenant is not None and wanted_bytes > self.most_bytes(tier, tenant)

    def refusal(self, tier: Tier, tenant: str | None, wanted_bytes: int) -> QuotaExceeded | None:
        """Why the tenant's quota is what keeps it from having so much more; None where it is not."""
        if tenant is None or self.fits(tier, tenant, wanted_bytes, self.leaving(tier)):
            return None
        used_bytes, most_bytes = self.state.usage.used(tier, tenant), self.most_bytes(tier, tenant)
        name = f"{tier.label}_maximum_bytes"
        if wanted_bytes > most_bytes:
            why = "which is more than that"
        else:
            why = (
                f"and of its {format_size(used_bytes)} there not enough may leave: the rest is leased, pinned or moving"
            )
        holder = Holder(kind=Kind.TENANT, owner="", tenant=tenant, document="", tier=tier.label, size_bytes=used_bytes)
        return QuotaExceeded(
            f"tenant {tenant!r} may have {format_size(most_bytes)} of {tier.label} ({name}); it needs "
            f"{format_size(wanted_bytes)} more, {why}",
            (holder,) if used_bytes else (),
        )
