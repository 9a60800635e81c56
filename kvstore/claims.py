"""Claims: leases (a holder uses bytes now) and pins (an operator wants them near).

Leases end by detach, or when their holder is gone. Every message that names a lease (wait, report, renew) renews it;
one without such a message for `limits.lease_seconds` is overdue: it is shown, counted, and named first where room is
lacking, but its bytes stay until the holder lets go or is proven gone, because it may still be reading them.

A hard pin forbids leaving. A soft pin only puts its document behind all that is not pinned, and decays: it has four
quarters of its life, and of two the one with fewer left leaves first. Pins have byte budgets, and an end unless told
otherwise, so neither can wedge the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, NamedTuple

from .config import Config
from .document import DocumentId
from .errors import ClaimNotFound, LeasesOvercommitted, PinsOvercommitted
from .holders import Holder, Kind, largest
from .owners import Owners, common
from .residency import Tier
from .sizes import format_size

NS: Final = 1_000_000_000
QUARTERS: Final = 4  # a soft pin's strength when it is new, or has no end
TOLD_PART: Final = 8  # a refreshed end goes to the catalog when it is an eighth of the life later than what that has


@dataclass(slots=True, kw_only=True)
class Lease:
    """Client `owner` uses the document's bytes until it says otherwise. Times are monotonic nanoseconds.

    `size_bytes` of `tier` cannot leave meanwhile.
    """

    id: int
    owner: int
    document: DocumentId
    granted_ns: int
    deadline_ns: int
    tier: Tier = Tier.DDR
    size_bytes: int = 0

    def overdue(self, now_ns: int) -> bool:
        """Past its deadline; it keeps its bytes but is reported."""
        return now_ns > self.deadline_ns

    def holder(self, now_ns: int, owner: str) -> Holder:
        """Who would have to let go."""
        return Holder(
            kind=Kind.LEASE,
            owner=owner,
            tenant=self.document.tenant,
            document=self.document.name,
            tier=self.tier.label,
            size_bytes=self.size_bytes,
            remaining_seconds=(self.deadline_ns - now_ns) / NS,
        )


def check_leases(
    lease: Lease, others: Iterable[Lease], limit_bytes: int, now_ns: int, name: Callable[[int], str]
) -> None:
    """Raises LeasesOvercommitted, with the holders, if the tenant's leases in DDR would exceed its limit.

    Leases of one document count once, at the largest: they keep the same bytes.
    """
    mine: dict[DocumentId, Lease] = {}
    for other in others:
        if other.tier is lease.tier and other.document.tenant == lease.document.tenant:
            largest_one = mine.get(other.document)
            if largest_one is None or other.size_bytes > largest_one.size_bytes:
                mine[other.document] = other
    same = mine.pop(lease.document, None)
    taken_bytes = sum(other.size_bytes for other in mine.values())
    over_bytes = taken_bytes + max(lease.size_bytes, same.size_bytes if same is not None else 0) - limit_bytes
    if over_bytes > 0:
        told = f"leasing {lease.document} ({lease.size_bytes} B) exceeds its tenant's ddr_lease_bytes = {limit_bytes}"
        holders = largest((other.holder(now_ns, name(other.owner)) for other in mine.values()), over_bytes)
        raise LeasesOvercommitted(
            f"{told}, of which {taken_bytes} B are leased: {', '.join(map(str, holders)) or 'nothing'}; "
            "detach first, attach a range of tokens, or attach to a group",
            holders,
        )


class PinKind(StrEnum):
    """What a pin does to those who want its room."""

    HARD = "hard"  # forbids
    SOFT = "soft"  # makes them take all that is not pinned first


class Refresh(StrEnum):
    """What restarts a pin's life."""

    NEVER = "never"
    HIT = "hit"  # an attach, or a publication under its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """The document stays at or above `floor` until `expires_wall_ns` (None: until unpinned).

    `ttl_ns` is its whole life, which a refresh starts again; None where it has no end.
    """

    document: DocumentId
    floor: Tier
    size_bytes: int
    owner: str
    reason: str
    created_wall_ns: int
    expires_wall_ns: int | None
    kind: PinKind = PinKind.HARD
    ttl_ns: int | None = None
    refresh: Refresh = Refresh.NEVER

    def quarters(self, wall_ns: int) -> int:
        """Its strength, 4 to 1: the quarters of its life that are left, one that has begun counted whole."""
        if self.expires_wall_ns is None or not self.ttl_ns:
            return QUARTERS
        left_ns = self.expires_wall_ns - wall_ns
        return max(1, min(QUARTERS, -(-QUARTERS * left_ns // self.ttl_ns)))

    def remaining_seconds(self, wall_ns: int) -> float | None:
        """Until it ends; None: until unpinned."""
        return None if self.expires_wall_ns is None else (self.expires_wall_ns - wall_ns) / NS

    def refreshed(self, wall_ns: int) -> Pin:
        """With its whole life before it again, if a hit does that."""
        if self.refresh is Refresh.NEVER or self.ttl_ns is None:
            return self
        return replace(self, expires_wall_ns=wall_ns + self.ttl_ns)

    def counts_in(self, tier: Tier) -> bool:
        """Whether its bytes count in a tier's budget: its floor, and those below, where it keeps copies."""
        return self.floor <= tier

    def holder(self, wall_ns: int, tier: Tier, size_bytes: int | None = None) -> Holder:
        """Who would have to let go: of all bytes of the document, or of so many."""
        return Holder(
            kind=Kind.PIN,
            owner=self.owner,
            tenant=self.document.tenant,
            document=self.document.name,
            tier=tier.label,
            size_bytes=self.size_bytes if size_bytes is None else size_bytes,
            remaining_seconds=self.remaining_seconds(wall_ns),
        )


class PinBudget(NamedTuple):
    """What pins may hold: bytes counted in DDR (floors DDR and HBM) and on NVMe (every pin); None: no limit."""

    ddr_bytes: int | None = None
    nvme_bytes: int | None = None


def unlimited(_: str) -> PinBudget:
    """No tenant has a limit of its own."""
    return PinBudget()


class PinSelection(NamedTuple):
    """Which pins: those that all of these are true of; None is true of all."""

    tenant: str | None = None
    owner: str | None = None
    reason_prefix: str | None = None
    documents: Collection[DocumentId] | None = None

    def has(self, pin: Pin) -> bool:
        """Whether it is one of them."""
        return (
            (self.tenant is None or pin.document.tenant == self.tenant)
            and (self.owner is None or pin.owner == self.owner)
            and (self.reason_prefix is None or pin.reason.startswith(self.reason_prefix))
            and (self.documents is None or pin.document in self.documents)
        )


class Pins:
    """At most one pin per document; together, and each tenant's, within a budget per tier. Soft ones count too."""

    def __init__(self, budget: PinBudget, of_tenant: Callable[[str], PinBudget] = unlimited) -> None:
        self.budget = budget
        self.of_tenant = of_tenant
        self._pins: dict[DocumentId, Pin] = {}
        self._soft: set[DocumentId] = set()

    @classmethod
    def configured(cls, config: Config) -> Pins:
        """None yet, with the budgets of [limits] and [tenants]."""

        def of_tenant(name: str) -> PinBudget:
            table = config.tenant(name)
            return PinBudget(table.ddr_pin_bytes, table.nvme_pin_bytes)

        return cls(PinBudget(config.limits.ddr_pin_bytes, config.limits.pin_bytes), of_tenant)

    def bytes_in(self, tier: Tier) -> int:
        """Bytes counted against a tier's budget."""
        return sum(pin.size_bytes for pin in self._pins.values() if pin.counts_in(tier))

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def documents(self) -> AbstractSet[DocumentId]:
        """Those that are pinned."""
        return self._pins.keys()

    def all(self) -> list[Pin]:
        """Every pin, by document."""
        return [self._pins[key] for key in sorted(self._pins)]

    def select(self, wanted: PinSelection) -> list[Pin]:
        """These pins, by document."""
        return [pin for pin in self.all() if wanted.has(pin)]

    def get(self, document: DocumentId) -> Pin | None:
        """The document's pin."""
        return self._pins.get(document)

    def hard(self, document: DocumentId) -> Pin | None:
        """The document's pin, if it forbids anything."""
        pin = self._pins.get(document)
        return pin if pin is not None and pin.kind is PinKind.HARD else None

    def quarters(self, documents: Owners, tier: Tier, wall_ns: int) -> int:
        """The strength of the strongest soft pin that wants a copy kept in that tier for one of them; 0 for none."""
        if not self._soft:
            return 0
        found = map(self._pins.__getitem__, common(documents, self._soft))
        return max((pin.quarters(wall_ns) for pin in found if pin.counts_in(tier)), default=0)

    def put(self, pin: Pin) -> None:
        """Pin, or replace the document's pin. Budgets are the caller's to check."""
        self._pins[pin.document] = pin
        (self._soft.add if pin.kind is PinKind.SOFT else self._soft.discard)(pin.document)

    def check(self, pin: Pin, wall_ns: int, replaced: Collection[DocumentId] = ()) -> None:
        """Raises PinsOvercommitted, with the pins that would have to go, if this one is over a budget.

        It takes the place of its document's, and of those of `replaced`.
        """
        gone = {pin.document, *replaced}
        others = [other for other in self._pins.values() if other.document not in gone]
        for name, tier, limit_bytes, sharing in self._budgets(pin, others):
            taken_bytes = sum(other.size_bytes for other in sharing)
            over_bytes = taken_bytes + pin.size_bytes - limit_bytes
            if over_bytes > 0:
                size, limit = format_size(pin.size_bytes), format_size(limit_bytes)
                told = f"pinning {pin.document} ({size}) exceeds {name} = {limit}"
                if pin.size_bytes > limit_bytes:
                    raise PinsOvercommitted(f"{told} by itself; pin it at a lower tier, or raise {name}")
                holders = largest((other.holder(wall_ns, tier) for other in sharing), over_bytes)
                names = ", ".join(f"{one.tenant}/{one.document} ({format_size(one.size_bytes)})" for one in holders)
                raise PinsOvercommitted(
                    f"{told}, of which {format_size(taken_bytes)} are taken; unpin {names}, or raise {name}", holders
                )

    def _budgets(self, pin: Pin, others: list[Pin]) -> Iterator[tuple[str, Tier, int, list[Pin]]]:
        """The budgets that a pin takes part in: name, tier, limit and who shares it."""
        tenant = pin.document.tenant
        mine = [other for other in others if other.document.tenant == tenant]
        own = self.of_tenant(tenant)
        for name, tier, limit_bytes, sharing in (
            (f"tenants.{tenant}.ddr_pin_bytes", Tier.DDR, own.ddr_bytes, mine),
            (f"tenants.{tenant}.nvme_pin_bytes", Tier.NVME, own.nvme_bytes, mine),
            ("limits.ddr_pin_bytes", Tier.DDR, self.budget.ddr_bytes, others),
            ("limits.pin_bytes", Tier.NVME, self.budget.nvme_bytes, others),
        ):
            if limit_bytes is not None and pin.counts_in(tier):
                yield name, tier, limit_bytes, [other for other in sharing if other.counts_in(tier)]

    def remove(self, document: DocumentId) -> Pin:
        """Unpin. Raises ClaimNotFound."""
        pin = self._pins.pop(document, None)
        if pin is None:
            raise ClaimNotFound(f"{document} is not pinned")
        self._soft.discard(document)
        return pin

    def expired(self, wall_ns: int) -> list[Pin]:
        """The pins whose time is up."""
        return [pin for pin in self.all() if pin.expires_wall_ns is not None and pin.expires_wall_ns <= wall_ns]
