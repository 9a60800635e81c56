"""Reuse: whether a document is expected back, and so whether writing it out at once pays.

Pure; memory is bounded and the time is an argument. What the daemon learned before a restart is forgotten, and a
tenant that it knows nothing of is expected back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .costs import LinkSpeed
from .document import DocumentId, WritePolicy
from .extent import ExtentId

TENANTS_KEPT: Final = 256
DOCUMENTS_KEPT: Final = 128  # per tenant, whose return is awaited
PRIOR_DOCUMENTS: Final = 4.0  # that came back, as it were, before the first was seen
WINDOW_DOCUMENTS: Final = 64.0  # older ones fade
NS: Final = 1e9
PATIENCE_NS: Final = 900 * 10**9  # who has not come back by then is not expected any more
# A drive of 1 TB takes some 1.8 PB before it is worn (one drive write a day for five years) and costs about $100, so
# that 10 GB written cost what a GPU at $2 an hour costs in a second: as much as writing at 10 GB/s takes, half of what
# writing at the 5 GB/s of one such drive does.
WEAR: Final = 1.5


class Decision(NamedTuple):
    """What becomes of a document's KV, and why in a few words."""

    policy: WritePolicy
    reason: str


class Stake(NamedTuple):
    """One extent that would be written: what having it on NVMe saves on a return, and what writing it takes.

    `known`: it was here before, so being here again is its return. `saved_ns` is recompute less reload, and may be
    negative; `price_ns` see write_price_ns.
    """

    known: bool
    saved_ns: int
    price_ns: int


def write_price_ns(size_bytes: int, link: LinkSpeed) -> int:
    """What writing so much takes: the time at the measured speed, and WEAR times that."""
    return round(WEAR * size_bytes * NS / link.bytes_per_second)


class Ghosts:
    """Extents that were here and are forgotten, at most `limit` of them: the ones that left last."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._ids: OrderedDict[ExtentId, None] = OrderedDict()

    def add(self, extent: ExtentId) -> None:
        """It is gone now."""
        self._ids[extent] = None
        self._ids.move_to_end(extent)
        if len(self._ids) > self.limit:
            self._ids.popitem(last=False)

    def __contains__(self, extent: ExtentId) -> bool:
        return extent in self._ids

    def __len__(self) -> int:
        return len(self._ids)


def decide(stakes: Iterable[Stake], rate: float) -> Decision:
    """Write-through if sum(p x max(0, saved)) >= sum(price), else write-back; nothing to write is write-through.

    p is 1 for what is known, else `rate`, the tenant's rate of comebacks.
    """
    saved_ns = price_ns = 0.0
    for stake in stakes:
        saved_ns += (1.0 if stake.known else rate) * max(0, stake.saved_ns)
        price_ns += stake.price_ns
    policy = WritePolicy.THROUGH if saved_ns >= price_ns else WritePolicy.BACK
    reason = f"saves {saved_ns / NS:.3g} s expected at {rate:.0%} comebacks, costs {price_ns / NS:.3g} s to write"
    return Decision(policy, reason)


@dataclass(slots=True)
class _Tenant:
    """Documents that may come back yet, oldest first, with the time of their commit; fading counts of the others."""

    awaited: OrderedDict[DocumentId, int] = field(default_factory=OrderedDict)
    back: float = 0.0
    settled: float = 0.0

    def settle(self, back: float) -> None:
        """One more document is known to have come back (1) or not (0)."""
        fade = 1.0 - 1.0 / WINDOW_DOCUMENTS
        self.back = self.back * fade + back
        self.settled = self.settled * fade + 1.0


class Comebacks:
    """The share of a tenant's recent documents that was attached, pinned or ingested again; of a namespace's apart.

    A document settles as "back" at its first return, as "gone" when `patience_ns` have passed without one or when
    newer ones push it out of memory. The rate is (back + prior) / (settled + prior), both fading.
    """

    def __init__(self, patience_ns: int) -> None:
        self._patience_ns = patience_ns
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # the one that committed longest ago first

    def committed(self, document: DocumentId, now_ns: int) -> None:
        """A document is complete; of one that was awaited this is the return."""
        tenant = self._tenants.setdefault(document.family, _Tenant())
        self._tenants.move_to_end(document.family)
        if len(self._tenants) > TENANTS_KEPT:
            self._tenants.popitem(last=False)
        self.returned(document, now_ns)
        tenant.awaited[document] = now_ns
        if len(tenant.awaited) > DOCUMENTS_KEPT:
            tenant.awaited.popitem(last=False)
            tenant.settle(0.0)

    def returned(self, document: DocumentId, now_ns: int) -> None:
        """It is used again; only the first time counts."""
        tenant = self._aged(document.family, now_ns)
        if tenant is not None and tenant.awaited.pop(document, None) is not None:
            tenant.settle(1.0)

    def rate(self, family: str, now_ns: int) -> float:
        """From 0 to 1: the share of such documents to expect back."""
        known = self._aged(family, now_ns) or _Tenant()
        return (known.back + PRIOR_DOCUMENTS) / (known.settled + PRIOR_DOCUMENTS)

    def _aged(self, name: str, now_ns: int) -> _Tenant | None:
        tenant = self._tenants.get(name)
        while tenant is not None and tenant.awaited:
            document, committed_ns = next(iter(tenant.awaited.items()))
            if now_ns - committed_ns <= self._patience_ns:
                break
            del tenant.awaited[document]
            tenant.settle(0.0)
        return tenant
