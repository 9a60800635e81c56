"""Planner: what would have to move or leave, as frozen values. Computing a plan changes nothing.

A dry run is a plan that nobody carries out. The planner reads the state, asks the eviction room who should leave, and
prices returns with the cost model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..eviction.candidate import Candidate
from ..eviction.policy import Policy
from ..eviction.residents import Forest
from ..eviction.use import UnitId
from ..eviction.victims import Describe, Satisfied
from .admission import Admission
from .clearing import Occupant, rather_slabs
from .clock import Clock
from .contest import Contest
from .demand import Demand
from .document import Document
from .extent import Extent
from .forests import Unchained
from .ledger import Hop
from .lines import Line, Standing
from .owners import asked, names
from .precedence import Precedence
from .prices import Prices
from .residency import Placement, Tier
from .reuse import PATIENCE_NS, Comebacks
from .rows import draining, place_rows
from .shard_forest import ShardForest
from .shared_ranking import SharedRanking
from .slots import Slot, SlotClass, slots_of
from .state import DDR, NVME, ExtentRecord, Group, Shard, hbm_device
from .state import State as Store
from .tenancy import Tenancy
from .uses import Uses


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A copy that would leave. `action` is "demote" (a copy goes, or stays, one tier down) or "drop" (the last).

    `unwritten` says why the last one is not written to NVMe, where that would not pay.
    """

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
    unwritten: str = ""


class Planner(Prices):
    """Reads state; knows the policy, and the prices."""

    def __init__(self, state: Store, policy: Policy, clock: Clock) -> None:
        super().__init__(state.specs)
        self.state = state
        self.policy = policy
        self.clock = clock
        self.uses = Uses(state, policy, clock)
        self.precedence = Precedence(state, clock)
        self.tenancy = Tenancy(state)
        self.comebacks = Comebacks(PATIENCE_NS)
        self.admission = Admission(state, self, self.comebacks, clock)
        self._is_short = False  # of DDR: the last plan failed
        is_over_nvme = state.nvme.capacity_bytes > 0
        ddr_worth = self.reload_worth(Hop(Tier.NVME, Tier.DDR)) if is_over_nvme else self.recompute_worth
        state.rankings[DDR] = policy.ranking(state.ddr.capacity_bytes, ddr_worth)
        state.rankings[NVME] = policy.ranking(state.nvme.capacity_bytes, self.recompute_worth)

    def open_group(self, group: Group) -> None:
        """All of its ranks are there: rank what its HBM will hold."""
        worth = self.reload_worth(Hop(Tier.DDR, Tier.HBM), group.row_bytes * group.tp)
        ranking = self.policy.ranking(group.capacity_bytes, worth)
        self.state.rankings[hbm_device(group.name)] = SharedRanking(ranking)

    def restore_ns(self, record: ExtentRecord, placement: Placement) -> int:
        """What losing this copy would cost on the next use: reload from below, or recompute."""
        for copy in (record.ddr, record.nvme):
            if copy is not None and copy.tier > placement.tier and copy.readable:
                return self.reload_ns(record, copy.tier, placement.tier)
        if placement.tier is Tier.DDR and self.is_written(record):
            return self.reload_ns(record, Tier.NVME, Tier.DDR)
        return self.recompute_ns(record)

    # Room --------------------------------------------------------------------------------------

    def fits(self, demand: Demand) -> bool:
        """Whether the demand could be granted right now."""
        if not self._slots_fit(demand, ()):
            return False
        return demand.group is None or place_rows(self.state.groups[demand.group], demand) is not None

    def draining(self, demand: Demand) -> bool:
        """Whether it will fit once everything on its way out has left."""
        if not self._slots_fit(demand, self.tenancy.leaving(Tier.DDR)):
            return False
        if demand.group is None:
            return True
        group = self.state.groups[demand.group]
        return place_rows(group, demand, draining(group)) is not None

    def _slots_fit(self, demand: Demand, leaving: Sequence[Placement]) -> bool:
        most = self.tenancy.slabs_most(demand.tenant)
        return self.tenancy.fits(Tier.DDR, demand.tenant, demand.size_bytes, leaving) and self.state.ddr.fits(
            demand.slots, _slots(leaving), most
        )

    def make_room(self, demand: Demand) -> tuple[Victim, ...] | None:
        """Who should leave so that the demand fits (what drains already is counted as gone); None: impossible."""
        chosen: list[Victim] = []
        leaving = _slots(self.tenancy.leaving(Tier.DDR))
        contest = self.tenancy.contest(Tier.DDR, demand.tenant, demand.size_bytes)
        most = self.tenancy.slabs_most(demand.tenant)
        if self._is_short and not self._could_fit(demand, leaving, most):
            return None
        slots_fit = self._freed_by(Tier.DDR, demand.slots, leaving, most)
        one_by_one = self._choose(Tier.DDR, slots_fit, contest)
        victims = rather_slabs(self.state.ddr, demand.slots, leaving, one_by_one, self._occupants, contest, most)
        if victims is None:
            victims = self._choose_unchained(slots_fit, contest)
        self._is_short = victims is None
        if victims is None:
            return None
        chosen += self._victims(DDR, [(self._record(victim), self._record(victim).ddr, victim) for victim in victims])
        if demand.group is not None:
            more = self._make_rows(demand)
            if more is None:
                return None
            chosen += more
        return tuple(map(self._admitted, chosen))

    def _could_fit(self, demand: Demand, leaving: Sequence[Slot], most: int | None) -> bool:
        """Whether the slots fit without all that may move, which no plan can beat.

        Who waits asks for a plan at every move; to find out that there is none takes forty times as long as this.
        """
        extents = self.state.extents
        copies = (extents[str(extent)].ddr for extent in self.state.forests.ddr)
        movable = _slots(copy for copy in copies if copy is not None and copy.movable)
        return self.state.ddr.fits(demand.slots, [*leaving, *movable], most)

    def _admitted(self, victim: Victim) -> Victim:
        """A copy that is not worth writing is dropped."""
        if victim.tier is not Tier.DDR or victim.action != "demote":
            return victim
        record = self.state.extents[victim.extent]
        why = self.admission.refusal(record) if record.nvme is None else ""
        return replace(victim, action="drop", unwritten=why) if why else victim

    def make_nvme_room(self, extents: Sequence[Extent]) -> tuple[Victim, ...] | None:
        """Who should leave NVMe so that these extents of one tenant fit; None: not enough may."""
        leaving = _slots(self.tenancy.leaving(Tier.NVME))
        size_bytes = sum(extent.slot_bytes for extent in extents)
        contest = self.tenancy.contest(Tier.NVME, extents[0].tenant, size_bytes)
        slots_fit = self._freed_by(Tier.NVME, slots_of(extents, owner=""), leaving)
        victims = self._choose(Tier.NVME, slots_fit, contest)
        if victims is None:
            return None
        return tuple(
            self._victims(NVME, [(self._record(victim), self._record(victim).nvme, victim) for victim in victims])
        )

    def _freed_by(
        self, tier: Tier, wanted: Mapping[SlotClass, int], leaving: Sequence[Slot], slabs_most: int | None = None
    ) -> Satisfied:
        """Whether these slots fit once what leaves anyway and the victims have left."""
        pool = self.state.ddr if tier is Tier.DDR else self.state.nvme
        anyway = Counter(slot.slab for slot in leaving)
        slabs: dict[UnitId, int] = {}  # of victims: asked about again and again

        def fit(victims: Sequence[Candidate]) -> bool:
            freed = anyway.copy()
            for victim in victims:
                slab = slabs.get(victim.unit)
                if slab is None:
                    record = self._record(victim)
                    copy = record.ddr if tier is Tier.DDR else record.nvme
                    assert copy is not None
                    assert copy.slot is not None
                    slab = slabs[victim.unit] = copy.slot.slab
                freed[slab] += 1
            return pool.fits_without(wanted, freed, slabs_most)

        return fit

    def free_bytes(self, tier: Tier, size_bytes: int) -> tuple[Victim, ...] | None:
        """Who should leave DDR or NVMe to free at least that many bytes; None: not that much may leave.

        What tenants are guaranteed leaves when the rest is not enough.
        """
        describe = partial(self._of, tier)
        victims = self._freed(tier, size_bytes, describe, self.tenancy.relief(tier, size_bytes))
        if victims is None and self.state.quotas:
            victims = self._freed(tier, size_bytes, describe, None)
        return victims

    def relieve(self, tier: Tier, size_bytes: int, may: Callable[[ExtentRecord], bool]) -> tuple[Victim, ...] | None:
        """The same where nobody asks for it: of extents that `may` leave, and nobody has announced or pinned.

        What tenants are guaranteed stays.
        """

        def describe(extent: UnitId) -> Candidate:
            candidate = self._of(tier, extent)
            is_free = candidate.rank <= 0 and may(self._record(candidate))
            return candidate if is_free else candidate._replace(movable=False)

        return self._freed(tier, size_bytes, describe, self.tenancy.relief(tier, size_bytes))

    def _freed(
        self, tier: Tier, size_bytes: int, describe: Describe, contest: Contest | None
    ) -> tuple[Victim, ...] | None:
        def enough(victims: Sequence[Candidate]) -> bool:
            return sum(victim.size_bytes for victim in victims) >= size_bytes

        victims = self._choose(tier, enough, contest, describe)
        if victims is None:
            return None
        records = [self._record(victim) for victim in victims]
        copies = [record.ddr if tier is Tier.DDR else record.nvme for record in records]
        return tuple(self._victims(DDR if tier is Tier.DDR else NVME, list(zip(records, copies, victims, strict=True))))

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
            if target is None and record.documents != frozenset((document.id,)):
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
        return self._victims(placement.device, [(record, placement, self._candidate(record, placement))])[0]

    def explain(self, record: ExtentRecord, placement: Placement, line: Line | None = None) -> Standing:
        """Why a copy in DDR or on NVMe is where it is in line, now. `line`: of its tier, where many are explained."""
        line = line if line is not None else self.line(placement.tier)
        return line.standing(self._of(placement.tier, record.extent.id))

    def line(self, tier: Tier) -> Line:
        """DDR's or NVMe's, as it is now."""
        forest = self.state.forests.ddr if tier is Tier.DDR else self.state.forests.nvme
        ranking = self.state.rankings[DDR if tier is Tier.DDR else NVME]
        return Line(ranking, [self._of(tier, leaf) for leaf in forest.leaves], self.clock.monotonic_ns())

    def explain_shard(self, shard: Shard) -> Standing | None:
        """Why the last copy of a shard is where it is in its group's line, now; None where nothing of it is in line."""
        group = self.state.groups[shard.group]
        forest = ShardForest(group, self.state.extents)
        leaves = [self._of_shard(forest, None, name) for name in forest.leaves]
        mine = next((leaf for leaf in leaves if forest.owner(leaf.id)[0] is shard), None)
        line = Line(self.state.rankings[hbm_device(group.name)], leaves, self.clock.monotonic_ns())
        return line.standing(mine) if mine is not None else None

    # HBM rows ----------------------------------------------------------------------------------

    def _make_rows(self, demand: Demand) -> list[Victim] | None:
        """HBM victims of the demanded group; [] when the rows fit anyway."""
        assert demand.group is not None
        group = self.state.groups[demand.group]
        gone = draining(group)
        forest = ShardForest(group, self.state.extents)

        def rows_fit(victims: Sequence[Candidate]) -> bool:
            leaving = {shard: set(extents) for shard, extents in gone.items()}
            for victim in victims:
                shard, extent = forest.owner(victim.id)
                leaving.setdefault(shard.id, set()).add(extent)
            return place_rows(group, demand, leaving) is not None

        described = partial(self._of_shard, forest, demand.replaces)
        victims = self._chosen(forest, hbm_device(group.name), described, rows_fit)
        if victims is None:
            return None
        leaving = [(*forest.owner(victim.id), victim) for victim in victims]
        found = [(self.state.extents[extent], shard.copies[extent], victim) for shard, extent, victim in leaving]
        return self._victims(hbm_device(group.name), found)

    # Candidates --------------------------------------------------------------------------------

    def _record(self, candidate: Candidate) -> ExtentRecord:
        return self.state.extents[str(candidate.unit)]

    def _of(self, tier: Tier, extent: UnitId) -> Candidate:
        """One of DDR or NVMe, described."""
        record = self.state.extents[str(extent)]
        copy = record.ddr if tier is Tier.DDR else record.nvme or record.ddr
        assert copy is not None
        return self._candidate(record, copy, stays=copy.tier is not tier)

    def _of_shard(self, forest: ShardForest, replaces: int | None, name: UnitId) -> Candidate:
        """One of a group's HBM, described; the shard that is to be replaced stays."""
        shard, extent = forest.owner(name)
        stays = shard.id == replaces or not self.state.may_leave_hbm(shard)
        candidate = self._candidate(self.state.extents[extent], shard.copies[extent], stays=stays)
        return candidate._replace(id=name, previous=forest.previous(name))

    def _occupants(self) -> Iterator[Occupant]:
        """DDR copies that break no chain when they leave: NVMe has them, or will, or nothing is behind them."""
        forest = self.state.forests.ddr
        candidates = [self._of(Tier.DDR, extent) for extent in forest]
        scores = self.state.rankings[DDR].scores(candidates, self.clock.monotonic_ns())
        for candidate, score in zip(candidates, scores, strict=True):
            record = self._record(candidate)
            stays = self.is_written(record) or (record.nvme is not None and record.nvme.readable)
            if candidate.movable and (stays or not forest.followers(candidate.id)):
                loss = score * candidate.size_bytes
                yield from (Occupant(candidate, slot, loss) for slot in _slots([record.ddr]))

    def _candidate(self, record: ExtentRecord, placement: Placement, *, stays: bool = False) -> Candidate:
        """One copy, as eviction sees it; in HBM its id and the one before are the group's to say."""
        extent = record.extent
        return Candidate(
            id=extent.id,
            unit=extent.id,
            previous=extent.previous,
            size_bytes=placement.size_bytes,
            movable=placement.movable and not stays and self._unpinned(record, placement),
            restore_ns=self.restore_ns(record, placement),
            rank=self.precedence.rank_of(record, placement),
        )

    def _unpinned(self, record: ExtentRecord, placement: Placement) -> bool:
        is_free = not self.state.pins or placement.tier is Tier.HBM
        return is_free or self.state.may_leave(record, placement)

    def _choose(
        self, tier: Tier, satisfied: Satisfied, contest: Contest | None = None, describe: Describe | None = None
    ) -> tuple[Candidate, ...] | None:
        forests, described = self.state.forests, describe or partial(self._of, tier)
        forest = forests.ddr if tier is Tier.DDR else forests.nvme
        return self._chosen(forest, DDR if tier is Tier.DDR else NVME, described, satisfied, contest)

    def _choose_unchained(self, satisfied: Satisfied, contest: Contest | None) -> tuple[Candidate, ...] | None:
        """In need, what NVMe has too may leave DDR before what lies behind it: nothing becomes useless by that.

        A window that moves along a document needs it: its front is over while the rest is leased.
        """

        def is_clean(extent: UnitId) -> bool:
            record = self.state.extents.get(str(extent))
            return record is not None and record.nvme is not None and record.nvme.readable

        forest = Unchained(self.state.forests.ddr, is_clean)
        return self._chosen(forest, DDR, partial(self._of, Tier.DDR), satisfied, contest)

    def _chosen(
        self, forest: Forest, device: str, describe: Describe, satisfied: Satisfied, contest: Contest | None = None
    ) -> tuple[Candidate, ...] | None:
        ranking, now_ns = self.state.rankings[device], self.clock.monotonic_ns()
        return self.precedence.choose(forest, ranking, describe, now_ns, satisfied, contest)

    def _victims(self, device: str, found: Sequence[tuple[ExtentRecord, Placement | None, Candidate]]) -> list[Victim]:
        """Of each run of a chain the first to leave is explained in full, the others by score: there are many."""
        ranking, now_ns = self.state.rankings[device], self.clock.monotonic_ns()
        scores = ranking.scores([candidate for *_, candidate in found], now_ns) if found else ()
        inner = {candidate.previous for *_, candidate in found}
        victims = []
        for (record, copy, candidate), score in zip(found, scores, strict=True):
            parts = {"score": score} if candidate.id in inner else ranking.explain(candidate, now_ns)
            assert copy is not None
            victims.append(self._victim(record, copy, candidate.restore_ns, parts))
        return victims

    def _victim(self, record: ExtentRecord, placement: Placement, restore_ns: int, scores: dict[str, float]) -> Victim:
        extent = record.extent
        others = [copy for copy in record.placements() if copy is not placement and copy.readable]
        stays = bool(others)
        if not stays and placement.tier is Tier.DDR:
            stays = self.goes_to_nvme(record)
        elif not stays and placement.tier is Tier.HBM:
            stays = self.fits(Demand(slots=slots_of([extent])))
        return Victim(
            extent=extent.id,
            start=extent.start,
            stop=extent.stop,
            documents=names(record.documents),
            tier=placement.tier,
            shard=placement.shard,
            action="demote" if stays else "drop",
            size_bytes=placement.size_bytes,
            restore_ns=restore_ns,
            scores=scores,
        )

    def goes_to_nvme(self, record: ExtentRecord) -> bool:
        """Whether DDR eviction may write it out: some document wants it kept, and NVMe could take it at all."""
        owners = map(self.state.documents.__getitem__, asked(record.documents))
        kept = any(owner.document.write_policy != "memory-only" for owner in owners)
        return kept and self.tenancy.could_hold(Tier.NVME, [record.extent])

    def is_written(self, record: ExtentRecord) -> bool:
        """Whether it is written out where no operator says so, but somebody's demand: that has to pay, too."""
        return self.goes_to_nvme(record) and not self.admission.refusal(record)


def _slots(copies: Iterable[Placement | None]) -> list[Slot]:
    """Where these copies lie; HBM copies have rows and no slot."""
    return [copy.slot for copy in copies if copy is not None and copy.slot is not None]
