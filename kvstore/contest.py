"""Contest: whose copies may leave a tier for one demand, by the quotas of those who have some there.

Who is above its fair share loses first, and no more than it is above. Only when that is not enough do others lose, down
to their guarantees. A tenant that would be beyond its maximum first loses of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from .quotas import Quotas, fair_shares
from .residency import Tier

Permit = Callable[[str, int], bool]  # tenant and bytes of a copy that is about to be chosen


class Contest:
    """One demand: `wanted_bytes` of a tier for a tenant; for None, room is made that nobody has asked for.

    `held` is what each tenant has there, without what is leaving already.
    """

    def __init__(
        self,
        quotas: Quotas,
        tier: Tier,
        capacity_bytes: int,
        held: Mapping[str, int],
        tenant: str | None = None,
        wanted_bytes: int = 0,
    ) -> None:
        self.tenant = tenant
        self._held = dict(held)
        if tenant is not None:
            self._held[tenant] = self._held.get(tenant, 0) + wanted_bytes
        self._quotas = {name: quotas.of(name, tier) for name in self._held}
        self._fair = fair_shares(capacity_bytes, self._held, self._quotas)
        most = None if tenant is None else self._quotas[tenant].maximum_bytes
        self.over_bytes = 0 if tenant is None or most is None else max(0, self._held[tenant] - most)

    def met(self, freed: Iterable[tuple[str, int]]) -> bool:
        """Whether these copies, as tenant and bytes, are enough of the demanding tenant's own."""
        return not self.over_bytes or sum(size for name, size in freed if name == self.tenant) >= self.over_bytes

    def permits(self) -> Iterator[Permit]:
        """What to ask of each copy as it is chosen, one attempt after the other. Each remembers what it has granted."""
        if self.over_bytes:
            yield lambda tenant, _: tenant == self.tenant
        yield self._down_to(self._fair)
        yield self._down_to(dict.fromkeys(self._held, 0))

    def _down_to(self, floors: Mapping[str, int]) -> Permit:
        """Nobody loses at or below that floor, nor others what they are guaranteed."""
        held = dict(self._held)

        def permit(tenant: str, size_bytes: int) -> bool:
            left_bytes = held[tenant] - size_bytes
            is_kept = tenant != self.tenant and left_bytes < self._quotas[tenant].guaranteed_bytes
            if is_kept or held[tenant] <= floors[tenant]:
                return False
            held[tenant] = left_bytes
            return True

        return permit
