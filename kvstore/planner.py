"""Planner: what would have to move or leave, as frozen values. Computing a plan changes nothing.

A dry run is a plan that nobody carries out. The planner reads the state, asks the eviction room who should leave, and
prices returns with the cost model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from ..eviction.candidate import Candidate
from ..eviction.history import History
from ..eviction.policy import Policy
from ..eviction.victims import choose_leaf_first, choose_victims
from .calibration import Calibration
from .clearing import Occupant, rather_slabs
from .clock import Clock
from .costs import DEFAULT_LINKS
from .demand import Demand
from .document import Document
from .ledger import Hop
from .prefills import Prefills
from .residency import Placement, State, Tier
from .slots import RowPool, Slot, SlotClass
from .state import ExtentRecord, Group, Shard
from .state import State as Store

HOPS: Final = (
    Hop(Tier.NVME, Tier.DDR),
    Hop(Tier.DDR, Tier.NVME),
    Hop(Tier.DDR, Tier.HBM),
    Hop(Tier.HBM, Tier.DDR),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A copy that would leave. `action` is "demote" (a copy goes, or stays, one tier down) or "drop" (the last)."""

    extent: str
    start: int
    stop: int
    documents: tuple[str, ...]
    tier: Tier
    shard: int | None
    action: str
    size_bytes: int
    restore_ns: int
    scores: dict[str, float]


class Planner:
    """Reads state; knows the policy, the memory of past uses and the prices."""

    def __init__(self, state: Store, policy: Policy, history: History, clock: Clock) -> None:
        self.state = state
        self.policy = policy
        self.history = history
        self.clock = clock
        self._since_ns = clock.monotonic_ns()  # of earlier uses nothing is known
        self.prefills = Prefills()
        self.links = {hop: DEFAULT_LINKS[str(hop)] for hop in HOPS}
        self.calibration: Calibration | None = None

    # Prices ------------------------------------------------------------------------------------

    def recompute_ns(self, record: ExtentRecord) -> int:
        """Marginal prefill time of the extent's tokens behind what precedes them."""
        extent = record.extent
        return self.prefills.curve(extent.fingerprint).marginal_prefill_ns(extent.start, extent.stop)

    def reload_ns(self, record: ExtentRecord, source: Tier, target: Tier) -> int:
        """Predicted time to bring one extent from a tier to a nearer one, hop after hop."""
        size = record.extent.slot_bytes
        total = 0
        for hop, link in self.links.items():
            if hop.source > hop.target and source >= hop.source and target <= hop.target:
                total += link.move_ns(size)
        return total

    def restore_ns(self, record: ExtentRecord, placement: Placement) -> int:
        """What losing this copy would cost on the next use: reload from below, or recompute."""
        below = [
            copy
            for copy in (record.ddr, record.nvme)
            if copy is not None and copy.tier > placement.tier and copy.readable
        ]
        if below:
            return self.reload_ns(record, below[0].tier, placement.tier)
        if placement.tier is Tier.DDR and self._goes_to_nvme(record):
            return self.reload_ns(record, Tier.NVME, Tier.DDR)
        return self.recompute_ns(record)

    def calibrate(self, calibration: Calibration) -> None:
        """Predict by these measurements; hops that they do not name keep what was learned."""
        self.calibration = calibration
        measured = calibration.links()
        self.links = {hop: measured.get(str(hop), link) for hop, link in self.links.items()}

    def learn(self, hop: Hop, size_bytes: int, elapsed_ns: int) -> None:
        """A hop of a whole load, or a single move, corrects the hop's predicted speed."""
        self.links[hop] = self.links[hop].observed(size_bytes, elapsed_ns)

    def predicted_ns(self, sizes: Mapping[Hop, int], move_bytes: int) -> int:
        """Predicted time of a load that moves these bytes over these hops, in moves of `move_bytes`.

        Hops overlap, so the slowest counts whole, and of each other hop one move: the first on its way in, or the last.
        """
        whole = {hop: self.links[hop].move_ns(size) for hop, size in sizes.items() if size}
        if not whole:
            return 0
        slowest = max(whole, key=lambda hop: whole[hop])
        others = sum(self.links[hop].move_ns(min(sizes[hop], move_bytes)) for hop in whole if hop is not slowest)
        return whole[slowest] + others

    # Room --------------------------------------------------------------------------------------

    def fits(self, demand: Demand) -> bool:
        """Whether the demand could be granted right now."""
        if not self.state.ddr.fits(demand.slots):
            return False
        return self._rows_fit(demand, {})

    def draining(self, demand: Demand) -> bool:
        """Whether it will fit once everything on its way out has left."""
        leaving = self._leaving_slots(Tier.DDR)
        if not self.state.ddr.fits(demand.slots, leaving):
            return False
        return self._rows_fit(demand, self._draining_extents(demand))

    def make_room(self, demand: Demand) -> tuple[Victim, ...] | None:
        """Who should leave so that the demand fits (what drains already is counted as gone); None: impossible."""
        chosen: list[Victim] = []
        leaving = self._leaving_slots(Tier.DDR)
        records = self.state.extents

        def slots_fit(victims: Sequence[Candidate]) -> bool:
            freed = _slots(records[victim.id].ddr for victim in victims)
            return self.state.ddr.fits(demand.slots, [*leaving, *freed])

        one_by_one = self._choose(Tier.DDR, slots_fit)
        victims = rather_slabs(self.state.ddr, demand.slots, leaving, one_by_one, self._occupants)
        if victims is None:
            victims = self._choose_unchained(slots_fit)
        if victims is None:
            return None
        chosen += [self._victim(records[v.id], records[v.id].ddr, v) for v in victims]
        if demand.group is not None:
            more = self._make_rows(demand)
            if more is None:
                return None
            chosen += more
        return tuple(chosen)

    def make_nvme_room(self, wanted: Mapping[SlotClass, int]) -> tuple[Victim, ...] | None:
        """Who should leave NVMe so that these slots fit; None: not enough may."""
        leaving = self._leaving_slots(Tier.NVME)
        records = self.state.extents

        def slot_fits(victims: Sequence[Candidate]) -> bool:
            freed = _slots(records[victim.id].nvme for victim in victims)
            return self.state.nvme.fits(wanted, [*leaving, *freed])

        victims = self._choose(Tier.NVME, slot_fits)
        if victims is None:
            return None
        return tuple(self._victim(records[v.id], records[v.id].nvme, v) for v in victims)

    def free_bytes(self, tier: Tier, size_bytes: int) -> tuple[Victim, ...] | None:
        """Who should leave DDR or NVMe to free at least that many bytes; None: not that much may leave."""

        def enough(victims: Sequence[Candidate]) -> bool:
            return sum(victim.size_bytes for victim in victims) >= size_bytes

        victims = self._choose(tier, enough)
        if victims is None:
            return None
        records = [self.state.extents[victim.id] for victim in victims]
        copies = [record.ddr if tier is Tier.DDR else record.nvme for record in records]
        return tuple(map(self._victim, records, copies, victims))

    def evict_document(self, document: Document, target: Tier | None) -> tuple[Victim, ...]:
        """Every copy that leaves when a document goes down to `target` (None: out of the cache), nearest tier first.

        What other documents need stays in the cache, and above their pins' floors.
        """
        found = []
        for shard in self.state.shards():
            if shard.key == (document.id, document.token_count) and self.state.may_leave_hbm(shard):
                for extent, copy in reversed(shard.copies.items()):
                    found.append((self.state.extents[extent], copy))
        for extent in reversed(document.extents):
            record = self.state.extents[extent]
            if target is None and record.documents != {document.id}:
                continue
            found += [
                (record, placement)
                for placement in record.placements()
                if (target is None or placement.tier < target) and self.state.may_leave(record, placement)
            ]
        victims = [self._leaving(record, placement, target) for record, placement in found]
        return tuple(sorted(victims, key=lambda victim: victim.tier))

    def _leaving(self, record: ExtentRecord, placement: Placement, target: Tier | None) -> Victim:
        """A verdict of `evict_document`: "drop" when nothing of the extent will stay."""
        if target is None and len(record.documents) == 1:
            return self.last_copy(record, placement)
        return self._as_victim(record, placement)

    def last_copy(self, record: ExtentRecord, placement: Placement) -> Victim:
        """The verdict on a copy that leaves although nothing of it stays."""
        return replace(self._as_victim(record, placement), action="drop")

    def _as_victim(self, record: ExtentRecord, placement: Placement) -> Victim:
        return self._victim(record, placement, self._candidate(record, placement, None))

    def explain(self, record: ExtentRecord, placement: Placement) -> dict[str, float]:
        """The policy's score parts for one copy, now."""
        candidate = self._candidate(record, placement, None)
        return self.policy.explain(candidate, self.clock.monotonic_ns())

    # HBM rows ----------------------------------------------------------------------------------

    def place_rows(self, demand: Demand, gone: dict[int, set[str]] | None = None) -> list[tuple[int, int]] | None:
        """(first row, count) per rank for a new shard, or None when some rank has no room.

        `gone` names extents per shard whose rows are counted as free already.
        """
        assert demand.group is not None
        group = self.state.groups[demand.group]
        leaving = dict(gone or {})
        for shard in group.shards.values():
            if shard.id == demand.replaces:
                leaving[shard.id] = set(shard.copies)
        pools = self._pools_after(group, leaving)
        rows = []
        for rank, count in enumerate(demand.rows):
            start = pools[rank].allocate(count)
            if start is None:
                return None
            rows.append((start, count))
        return rows

    def grow_rows(self, shard: Shard) -> list[tuple[int, int]] | None:
        """Rows for all of a shard's tokens without moving what it has, or None."""
        group = self.state.groups[shard.group]
        rows = []
        for rank, (start, count) in enumerate(shard.rows):
            wanted = shard.layout.length(rank // group.tp)
            if not group.pools[rank].copy().claim(start + count, wanted - count):
                return None
            rows.append((start, wanted))
        return rows

    def _pools_after(self, group: Group, gone: dict[int, set[str]]) -> dict[int, RowPool]:
        pools = {rank: pool.copy() for rank, pool in group.pools.items()}
        for shard in group.shards.values():
            leaving = gone.get(shard.id, set())
            kept = [extent for extent in shard.copies if extent not in leaving]
            if len(kept) == len(shard.copies):
                continue
            lengths = shard.lengths(shard.spans[kept[-1]][1] if kept else 0)
            for rank, (start, count) in enumerate(shard.rows):
                pools[rank].free(start + lengths[rank], count - lengths[rank])
        return pools

    def _rows_fit(self, demand: Demand, gone: dict[int, set[str]]) -> bool:
        return demand.group is None or self.place_rows(demand, gone) is not None

    def _draining_extents(self, demand: Demand) -> dict[int, set[str]]:
        gone: dict[int, set[str]] = {}
        if demand.group is not None:
            for shard in self.state.groups[demand.group].shards.values():
                for extent, copy in shard.copies.items():
                    if copy.state is State.DRAINING:
                        gone.setdefault(shard.id, set()).add(extent)
        return gone

    def _make_rows(self, demand: Demand) -> list[Victim] | None:
        """HBM victims of the demanded group; [] when the rows fit anyway."""
        assert demand.group is not None
        group = self.state.groups[demand.group]
        gone = self._draining_extents(demand)
        candidates = []
        owners: dict[str, tuple[Shard, str]] = {}
        for shard in group.shards.values():
            previous = None
            stays = shard.id == demand.replaces or not self.state.may_leave_hbm(shard)
            for extent, copy in shard.copies.items():
                record = self.state.extents.get(extent)
                if record is None or copy.state is State.DRAINING:
                    continue  # an open ingest's, or on its way out
                name = f"{extent}@{shard.id}"
                candidate = self._candidate(record, copy, previous, name=name, stays=stays)
                owners[name] = (shard, extent)
                candidates.append(candidate)
                previous = name

        def rows_fit(victims: Sequence[Candidate]) -> bool:
            leaving = {shard: set(extents) for shard, extents in gone.items()}
            for victim in victims:
                shard, extent = owners[victim.id]
                leaving.setdefault(shard.id, set()).add(extent)
            return self.place_rows(demand, leaving) is not None

        victims = choose_victims(candidates, self.policy, self.clock.monotonic_ns(), rows_fit)
        if victims is None:
            return None
        leaving = [(*owners[victim.id], victim) for victim in victims]
        return [self._victim(self.state.extents[e], shard.copies[e], victim) for shard, e, victim in leaving]

    # Candidates --------------------------------------------------------------------------------

    def _leaving_slots(self, tier: Tier) -> list[Slot]:
        """Slots that will be free without anybody's doing."""
        leaving = _slots(copy for copy in self.state.leaving if copy.tier is tier)
        if tier is Tier.NVME:
            return leaving  # a copy on its way out of NVMe is in no record any more
        return leaving + _slots(copy for copy in self.state.draining.values() if copy.state is State.DRAINING)

    def _chain(self, tier: Tier) -> dict[str, str | None]:
        """What may be asked to leave DDR or NVMe, and the extent before each.

        Of NVMe everything resident anywhere: what only DDR holds cannot leave NVMe, but keeps its front there.
        """
        drains = State.DRAINING
        if tier is Tier.DDR:
            return {
                extent: record.extent.previous
                for extent, record in self.state.extents.items()
                if record.ddr is not None and record.ddr.state is not drains
            }
        return {
            extent: record.extent.previous
            for extent, record in self.state.extents.items()
            if (copy := record.nvme or record.ddr) is not None and copy.state is not drains
        }

    def _of(self, tier: Tier, extent: str) -> Candidate:
        """One of a chain, described."""
        record = self.state.extents[extent]
        copy = record.ddr if tier is Tier.DDR else record.nvme or record.ddr
        assert copy is not None
        return self._candidate(record, copy, record.extent.previous, stays=copy.tier is not tier)

    def _occupants(self) -> Iterator[Occupant]:
        """DDR copies that break no chain when they leave: NVMe has them, or will, or nothing is behind them."""
        candidates = [self._of(Tier.DDR, extent) for extent in self._chain(Tier.DDR)]
        now_ns = self.clock.monotonic_ns()
        inner = {candidate.previous for candidate in candidates}
        for candidate in candidates:
            record = self.state.extents[candidate.id]
            stays = self._goes_to_nvme(record) or (record.nvme is not None and record.nvme.readable)
            if candidate.movable and (stays or candidate.id not in inner):
                assert record.ddr is not None
                loss = self.policy.score(candidate, now_ns) * candidate.size_bytes
                yield from (Occupant(candidate, slot, loss) for slot in _slots([record.ddr]))

    def _candidate(
        self,
        record: ExtentRecord,
        placement: Placement,
        previous: str | None,
        *,
        name: str | None = None,
        stays: bool = False,
    ) -> Candidate:
        now_ns = self.clock.monotonic_ns()
        extent = record.extent.id
        last = self.history.last_access_ns(extent)
        return Candidate(
            id=name or extent,
            previous=previous,
            size_bytes=placement.size_bytes,
            movable=placement.movable and not stays and self._unpinned(record, placement),
            last_access_ns=last if last is not None else self._since_ns,
            frequency=self.history.frequency(extent, now_ns),
            restore_ns=self.restore_ns(record, placement),
        )

    def _unpinned(self, record: ExtentRecord, placement: Placement) -> bool:
        return placement.tier is Tier.HBM or self.state.may_leave(record, placement)

    def _choose(self, tier: Tier, satisfied: Callable[[Sequence[Candidate]], bool]) -> tuple[Candidate, ...] | None:
        describe = partial(self._of, tier)
        return choose_leaf_first(self._chain(tier), describe, self.policy, self.clock.monotonic_ns(), satisfied)

    def _choose_unchained(self, satisfied: Callable[[Sequence[Candidate]], bool]) -> tuple[Candidate, ...] | None:
        """In need, what NVMe has too may leave DDR before what lies behind it: nothing becomes useless by that.

        A window that moves along a document needs it: its front is over while the rest is leased.
        """
        chain: dict[str, str | None] = {}
        for extent, previous in self._chain(Tier.DDR).items():
            record = self.state.extents.get(previous) if previous is not None else None
            is_clean = record is not None and record.nvme is not None and record.nvme.readable
            chain[extent] = None if is_clean else previous
        return choose_leaf_first(chain, partial(self._of, Tier.DDR), self.policy, self.clock.monotonic_ns(), satisfied)

    def _victim(self, record: ExtentRecord, placement: Placement | None, candidate: Candidate) -> Victim:
        assert placement is not None
        extent = record.extent
        others = [copy for copy in record.placements() if copy is not placement and copy.readable]
        stays = bool(others)
        if not stays and placement.tier is Tier.DDR:
            stays = self._goes_to_nvme(record)
        elif not stays and placement.tier is Tier.HBM:
            stays = self.state.ddr.fits({SlotClass(extent.tenant, extent.slot_bytes): 1})
        return Victim(
            extent=extent.id,
            start=extent.start,
            stop=extent.stop,
            documents=tuple(sorted(str(document) for document in record.documents)),
            tier=placement.tier,
            shard=placement.shard,
            action="demote" if stays else "drop",
            size_bytes=placement.size_bytes,
            restore_ns=candidate.restore_ns,
            scores=self.policy.explain(candidate, self.clock.monotonic_ns()),
        )

    def _goes_to_nvme(self, record: ExtentRecord) -> bool:
        """Whether DDR eviction writes it out: some document wants it kept, and NVMe could take its size at all."""
        kind = SlotClass("", record.extent.slot_bytes)
        kept = any(
            self.state.documents[document].document.write_policy != "memory-only" for document in record.documents
        )
        return kept and self.state.nvme.largest(kind) > 0


def _slots(copies: Iterable[Placement | None]) -> list[Slot]:
    """Where these copies lie; HBM copies have rows and no slot."""
    return [copy.slot for copy in copies if copy is not None and copy.slot is not None]
