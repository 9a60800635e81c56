"""Claimed: who keeps bytes from leaving, beyond the moves that are under way; and so whether waiting could help at all.

Leases and open ingests hold copies until their holders let go, hard pins until they are ended. A move ends by itself. A
demand that cannot be met while the claims of now stand is refused at once, with the holders; any other one is worth its
wait. This judges for waiting: it never says "hopeless" of what could still be met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .attach import Attach
from .claims import Pin, PinKind
from .clock import Clock
from .demand import Demand
from .document import DocumentId
from .errors import NoCapacity
from .extent import ExtentId
from .holders import HOLDERS_MAX, Holder, Kind
from .ingesting import Ingest
from .loading import Loading, Phase
from .owners import asked
from .residency import Placement, Tier
from .room import Reservation
from .rows import place_rows
from .slots import SlotClass
from .state import ExtentRecord, State


class Claimed:
    """Reads the state, the open leases and the open ingests."""

    def __init__(
        self, state: State, clock: Clock, attaches: Mapping[int, Attach], ingests: Mapping[int, Ingest]
    ) -> None:
        self.state = state
        self.clock = clock
        self.attaches = attaches
        self.ingests = ingests

    # Who holds what ----------------------------------------------------------------------------

    def holders(self, tier: Tier, group: str | None = None, asking: Reservation | None = None) -> tuple[Holder, ...]:
        """Who but the asking keeps bytes of a tier (of HBM: of a group): overdue leases first, then the largest."""
        found = [*self._leases(tier, group, asking), *self._ingests(tier, group, asking), *self._pins(tier, group)]
        found.sort(key=lambda h: (not _is_overdue(h), -h.size_bytes, h.tenant, h.document, h.owner))
        return tuple(found[:HOLDERS_MAX])

    def of(self, document: DocumentId, asking: Reservation) -> tuple[Holder, ...]:
        """Who else leases or writes one document, in any tier."""
        found = [h for tier in Tier for h in (*self._leases(tier, None, asking), *self._ingests(tier, None, asking))]
        return tuple(holder for holder in found if (holder.tenant, holder.document) == document)[:HOLDERS_MAX]

    def _leases(self, tier: Tier, group: str | None, asking: Reservation | None) -> Iterator[Holder]:
        now_ns = self.clock.monotonic_ns()
        for attach in self.attaches.values():
            if asking is not None and attach.loading.reservation is asking:
                continue
            size_bytes = self._size(_kept(attach.loading), tier, group)
            if size_bytes:
                lease = attach.lease
                yield Holder(
                    kind=Kind.LEASE,
                    owner=self.state.client_name(lease.owner),
                    tenant=lease.document.tenant,
                    document=lease.document.name,
                    tier=tier.label,
                    size_bytes=size_bytes,
                    remaining_seconds=(lease.deadline_ns - now_ns) / 1e9,
                )

    def _ingests(self, tier: Tier, group: str | None, asking: Reservation | None) -> Iterator[Holder]:
        for ingest in self.ingests.values():
            waiting = (ingest.reservation, ingest.loading.reservation if ingest.loading is not None else None)
            if asking is not None and asking in waiting:
                continue
            size_bytes = self._size(self._of_ingest(ingest), tier, group)
            if size_bytes:
                yield Holder(
                    kind=Kind.INGEST,
                    owner=self.state.client_name(ingest.client),
                    tenant=ingest.document.id.tenant,
                    document=ingest.document.id.name,
                    tier=tier.label,
                    size_bytes=size_bytes,
                )

    def _pins(self, tier: Tier, group: str | None) -> Iterator[Holder]:
        wall_ns = self.clock.wall_ns()
        for pin in self._hard():
            size_bytes = sum(copy.size_bytes for copy in self._pinned(pin.document, tier, group))
            if size_bytes:
                yield pin.holder(wall_ns, tier, size_bytes)

    def _hard(self) -> list[Pin]:
        return [pin for pin in self.state.pins.all() if pin.kind is PinKind.HARD]

    def _pinned(self, document: DocumentId, tier: Tier, group: str | None) -> Iterator[Placement]:
        """The copies that a hard pin keeps in a tier."""
        if tier is Tier.HBM:
            shards = self.state.groups[group].shards.values() if group in self.state.groups else ()
            for shard in shards:
                if shard.document == document and not self.state.may_leave_hbm(shard):
                    yield from shard.copies.values()
            return
        for extent in self.state.documents[document].document.extents:
            record = self.state.extents[extent]
            copy = record.ddr if tier is Tier.DDR else record.nvme
            if copy is not None and not self.state.may_leave(record, copy):
                yield copy

    def _of_ingest(self, ingest: Ingest) -> Iterator[Placement]:
        yield from ingest.held
        yield from self.state.private.get(ingest.id, ())
        if ingest.loading is not None:
            yield from _kept(ingest.loading)

    def _size(self, copies: Iterable[Placement], tier: Tier, group: str | None) -> int:
        distinct = {id(copy): copy for copy in copies if copy.tier is tier}
        if group is not None:
            device = f"hbm:{group}"
            return sum(copy.size_bytes for copy in distinct.values() if copy.device == device)
        return sum(copy.size_bytes for copy in distinct.values())

    # Whether waiting could help ----------------------------------------------------------------

    def refusal(self, demand: Demand, asking: Reservation) -> NoCapacity:
        """What to tell whoever cannot have this; what it holds itself is no reason."""
        ddr, nvme = self.state.ddr, self.state.nvme
        rows = f" and {max(demand.rows)} rows per rank in group {demand.group!r}" if demand.rows else ""
        lacks_rows = demand.group is not None and not self._rows_could_fit(demand)
        holders = self.holders(Tier.HBM, demand.group, asking) if lacks_rows else ()
        if not lacks_rows or not self._slots_could_fit(Tier.DDR, demand.slots):
            holders = (*holders, *self.holders(Tier.DDR, None, asking))
        fenced = f"; {ddr.fenced_bytes} B are kept for clients of an earlier daemon" if ddr.fenced_bytes else ""
        said = ", ".join(map(str, holders)) or f"nobody, so it is moves, or what NVMe ({nvme.used_bytes} B) cannot take"
        return NoCapacity(
            f"{demand.size_bytes} B of DDR{rows} are needed and cannot be freed "
            f"(DDR {ddr.used_bytes} of {ddr.capacity_bytes} B used{fenced}); held by: {said}",
            holders,
        )

    def looks_hopeless(self, demand: Demand) -> bool:
        """A quick guess by the sizes of claims on DDR, which may share bytes: worth asking `is_hopeless` first."""
        sizes = {lease.document: lease.size_bytes for lease in self.state.leases.values() if lease.tier is Tier.DDR}
        sizes |= {pin.document: pin.size_bytes for pin in self._hard() if pin.counts_in(Tier.DDR)}
        private_bytes = sum(
            c.size_bytes for copies in self.state.private.values() for c in copies if c.tier is Tier.DDR
        )
        return sum(sizes.values()) + private_bytes + demand.size_bytes > self.state.ddr.capacity_bytes

    def is_hopeless(self, demand: Demand) -> bool:
        """Whether the demand cannot be met before somebody lets go, whatever the moves under way bring."""
        could = self._slots_could_fit(Tier.DDR, demand.slots)
        return not could or (demand.group is not None and not self._rows_could_fit(demand))

    def is_hopeless_on_nvme(self, wanted: Mapping[SlotClass, int]) -> bool:
        """The same of slots on NVMe."""
        return not self._slots_could_fit(Tier.NVME, wanted)

    def _slots_could_fit(self, tier: Tier, wanted: Mapping[SlotClass, int]) -> bool:
        """Whether they would fit if all that nobody claims had left."""
        pool = self.state.ddr if tier is Tier.DDR else self.state.nvme
        if pool.fits(wanted):
            return True
        stays = {id(copy) for copy in self._claimed(tier)}
        copies = (copy for copy in self.state.all_placements() if copy.tier is tier and id(copy) not in stays)
        return pool.fits(wanted, [copy.slot for copy in copies if copy.slot is not None])

    def _claimed(self, tier: Tier) -> list[Placement]:
        found = [copy for attach in self.attaches.values() for copy in _kept(attach.loading) if copy.tier is tier]
        found += [c for ingest in self.ingests.values() for c in self._of_ingest(ingest) if c.tier is tier]
        for pin in self._hard():
            if tier is Tier.DDR and pin.counts_in(tier):  # the rule, and quick: it may have thousands
                records = (self.state.extents[e] for e in self.state.documents[pin.document].document.extents)
                found += (record.ddr for record in records if record.ddr is not None)
            else:
                found += (c for c in self._pinned(pin.document, tier, None) if tier is Tier.NVME or self._stays(c))
        return found + list(self._in_front(found)) if tier is Tier.DDR else found

    def _stays(self, copy: Placement) -> bool:
        """Whether a pinned DDR copy stays for good, and not only until NVMe has it too."""
        record = self.state.extents[copy.extent]
        floor = self.state.floor(record)
        return (floor is not None and floor <= Tier.DDR) or not self._is_or_goes_below(record)

    def _in_front(self, claimed: Iterable[Placement]) -> Iterator[Placement]:
        """What cannot leave DDR before what is claimed behind it: fronts that NVMe has not, and will not have."""
        seen: set[ExtentId] = set()
        for copy in claimed:
            record = self.state.extents.get(copy.extent)
            while record is not None and record.extent.previous is not None and record.extent.previous not in seen:
                seen.add(record.extent.previous)
                record = self.state.extents.get(record.extent.previous)
                if record is None or record.ddr is None or self._is_or_goes_below(record):
                    break
                yield record.ddr

    def _is_or_goes_below(self, record: ExtentRecord) -> bool:
        """Whether NVMe has it, or a write policy lets it: such a front may leave before what is behind it."""
        owners = (self.state.documents[document].document for document in asked(record.documents))
        return record.nvme is not None or any(owner.write_policy != "memory-only" for owner in owners)

    def _rows_could_fit(self, demand: Demand) -> bool:
        assert demand.group is not None
        group = self.state.groups.get(demand.group)
        if group is None:
            return False
        stays = {id(copy) for attach in self.attaches.values() for copy in _kept(attach.loading)}
        stays |= {id(copy) for ingest in self.ingests.values() for copy in self._of_ingest(ingest)}
        gone = {
            shard.id: set(shard.copies)
            for shard in group.shards.values()
            if self.state.may_leave_hbm(shard) and not any(id(copy) in stays for copy in shard.copies.values())
        }
        return place_rows(group, demand, gone) is not None


def _is_overdue(holder: Holder) -> bool:
    return holder.kind is Kind.LEASE and holder.remaining_seconds is not None and holder.remaining_seconds < 0


def _kept(loading: Loading) -> Iterator[Placement]:
    """The copies that a loading keeps, and will keep, until its holder lets go.

    On the way into a group DDR copies are held only as long as that takes.
    """
    yield from loading.held
    if loading.group is None or loading.phase is not Phase.MOVING:
        yield from loading.sources.values()
    if loading.group is None and loading.phase is Phase.MOVING:
        yield from (record.ddr for record in loading.records if record.ddr is not None)
