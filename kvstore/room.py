"""Room: who waits for space, and who leaves for them.

Reservations are granted in order, all of a demand at once or not at all. A demand that no set of victims can meet is
refused at once, with the holders named, and so is one that only a lease, a pin or an open ingest could make possible
by its end, whatever else moves (see claimed); nothing waits without a deadline, and the queue has a limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final, Protocol

from .demand import Demand
from .document import DocumentId
from .errors import DeadlineExceeded, HoldfastError, InUse, NoCapacity
from .geometry import extent_geometry
from .holders import Holder
from .ledger import Hop
from .orders import Outcome, Part, SaveShard, Seal, Urgency
from .placing import drain, place
from .planner import Victim
from .residency import Event, Placement, State, Tier
from .slots import SlotClass
from .state import ExtentRecord, Shard
from .store import Store
from .writes import Writes

JUDGE_NS: Final = 1_000_000_000  # how late a wait that cannot help may be noticed, beside other moves


@dataclass(eq=False, slots=True, kw_only=True)
class Reservation:
    """Somebody waits for `demand()`, asked afresh at each try because the state moves on meanwhile.

    None says "not yet, and not for lack of room": others go first. `document` is what it is for.
    """

    document: DocumentId
    demand: Callable[[], Demand | None]
    granted: Callable[[], None]
    refused: Callable[[HoldfastError], None]
    deadline_ns: int
    judged_ns: int | None = None  # when it was last looked at whether waiting helps


class Cleared(Enum):
    """What became of room for something that nobody waits for. `LATER`: when what is on its way out has left."""

    NOW = auto()
    LATER = auto()
    REFUSED = auto()


class Judge(Protocol):
    """Knows who claims what, and so whether waiting could help (see claimed)."""

    def looks_hopeless(self, demand: Demand) -> bool:
        """A quick guess of it."""
        ...

    def is_hopeless(self, demand: Demand) -> bool:
        """Whether the demand cannot be met before somebody lets go."""
        ...

    def is_hopeless_on_nvme(self, wanted: Mapping[SlotClass, int]) -> bool:
        """The same of slots on NVMe."""
        ...

    def refusal(self, demand: Demand, asking: Reservation) -> NoCapacity:
        """What to tell whoever cannot have this; what it holds itself is no reason."""
        ...

    def holders(self, tier: Tier, group: str | None = None) -> tuple[Holder, ...]:
        """Who keeps bytes of a tier."""
        ...

    def of(self, document: DocumentId, asking: Reservation) -> tuple[Holder, ...]:
        """Who uses or writes a document."""
        ...


class Room:
    """Grants reservations and carries out verdicts through the store. `judge` is there before the first request."""

    judge: Judge

    def __init__(self, store: Store, writes: Writes, limit: int) -> None:
        self.store = store
        self.writes = writes
        self.limit = limit
        self._waiting: deque[Reservation] = deque()

    @property
    def waiting(self) -> int:
        """Reservations in the queue."""
        return len(self._waiting)

    # Reservations ------------------------------------------------------------------------------

    def request(self, reservation: Reservation) -> None:
        """Queue up; `pump` grants or refuses. Raises NoCapacity when the queue is full."""
        if len(self._waiting) >= self.limit:
            raise NoCapacity(f"{self.limit} requests wait for room already; try again later")
        self._waiting.append(reservation)

    def cancel(self, reservation: Reservation) -> None:
        """Forget a reservation that may still be queued."""
        if reservation in self._waiting:
            self._waiting.remove(reservation)

    def pump(self) -> None:
        """Grant what fits, start evictions for the first that does not, write out what is queued."""
        self.writes.pump()
        tried: set[Reservation] = set()
        # Afresh each time: a grant may queue the next request, and an answer may cancel one.
        while (reservation := next((r for r in self._waiting if r not in tried), None)) is not None:
            tried.add(reservation)
            if not self._try(reservation):
                break
        self.writes.pump()
        self._refuse_stuck()

    def _refuse_stuck(self) -> None:
        """While nothing moves, who still waits could only wait for somebody to let go: it is told who.

        Clients of an earlier daemon are waited for: they come back and say what they hold, or end.
        """
        if self.store.orders_in_flight or self.store.records.ddr.fenced_bytes:
            return
        for reservation in list(self._waiting):
            if reservation in self._waiting:
                self._waiting.remove(reservation)
                reservation.refused(self._why(reservation))

    def _why(self, reservation: Reservation) -> HoldfastError:
        try:
            demand = reservation.demand()
        except HoldfastError as error:
            return error
        if demand is not None:
            return self.judge.refusal(demand, reservation)
        holders = self.judge.of(reservation.document, reservation)
        by = ", ".join(map(str, holders)) or "a move that has ended"
        return InUse(f"{reservation.document} cannot be moved while others fill or use it: {by}; try again", holders)

    def _try(self, reservation: Reservation) -> bool:
        """Grant, refuse or pass over one reservation; False when those behind it have to wait for it."""
        planner = self.store.planner
        try:
            demand = reservation.demand()
        except HoldfastError as error:
            self._waiting.remove(reservation)
            reservation.refused(error)
            return True
        if demand is None:
            return True
        if not planner.fits(demand) and not planner.draining(demand):
            hopeless = self.judge.looks_hopeless(demand) and self.judge.is_hopeless(demand)
            victims = None if hopeless else planner.make_room(demand)
            if victims is None:
                over = planner.tenancy.refusal(Tier.DDR, demand.tenant, demand.size_bytes)
                if over is not None:
                    if (
                        planner.tenancy.is_too_much(Tier.DDR, demand.tenant, demand.size_bytes)
                        or not self.store.orders_in_flight
                    ):
                        self._waiting.remove(reservation)
                        reservation.refused(over)
                    return True  # it may wait for copies of its own, but nobody behind it does
                if self.store.orders_in_flight and not hopeless and not self._is_hopeless(reservation, demand):
                    return False  # what is being moved may leave when its move has ended
                if self.store.records.ddr.fenced_bytes:
                    return True  # clients of the last daemon may come back, or end; nobody waits behind this one
                self._waiting.remove(reservation)
                reservation.refused(self.judge.refusal(demand, reservation))
                return True
            self.execute(victims, "pressure", wanted_by=str(reservation.document))
        if not planner.fits(demand):
            self.writes.hasten()
            return False
        self._waiting.remove(reservation)
        reservation.granted()
        return True

    def _is_hopeless(self, reservation: Reservation, demand: Demand) -> bool:
        """Whether only somebody's letting go could help; asked now and then, because it looks at every copy."""
        now_ns = self.store.clock.monotonic_ns()
        if reservation.judged_ns is not None and now_ns - reservation.judged_ns < JUDGE_NS:
            return False
        reservation.judged_ns = now_ns
        return self.judge.is_hopeless(demand)

    def clear_now(self, demand: Demand, approves: Callable[[Sequence[Victim]], bool]) -> Cleared:
        """Room without a reservation, while nobody waits for any: what is free, or what those leave who are approved.

        Nothing is kept for it: who asks later finds that out.
        """
        assert not self._waiting, "those who wait go first"
        planner = self.store.planner
        if not planner.fits(demand) and not planner.draining(demand):
            victims = planner.make_room(demand)
            if victims is None or not approves(victims):
                return Cleared.REFUSED
            self.execute(victims, "prefetch")
            self.writes.pump()
        return Cleared.NOW if planner.fits(demand) else Cleared.LATER

    def expire(self, now_ns: int) -> None:
        """Refuse who has waited past the deadline."""
        while (reservation := next((r for r in self._waiting if r.deadline_ns <= now_ns), None)) is not None:
            self._waiting.remove(reservation)
            why = self._why(reservation)
            reservation.refused(DeadlineExceeded(f"no room was freed before the deadline: {why.message}", why.holders))

    # Verdicts ----------------------------------------------------------------------------------

    def execute(
        self, victims: Sequence[Victim], reason: str, urgency: Urgency = Urgency.DEMOTE, wanted_by: str = ""
    ) -> None:
        """Let these copies go: at once where another copy stays, after a write of that urgency where none does.

        `wanted_by` is the document that needs their room.
        """
        touched: dict[int, Shard] = {}
        for victim in victims:
            record = self.store.records.extents[victim.extent]
            if victim.tier is Tier.HBM:
                shard = next(s for s in self.store.records.shards() if s.id == victim.shard)
                touched[shard.id] = shard
                self._leave_hbm(shard, record, victim, reason, wanted_by)
                continue
            self.store.verdict(victim, reason, wanted_by)
            if victim.tier is Tier.NVME:
                self.store.drop_nvme(record)
            else:
                self._leave_ddr(record, victim, urgency)
        for shard in touched.values():
            self._trim(shard)

    def _leave_ddr(self, record: ExtentRecord, victim: Victim, urgency: Urgency) -> None:
        assert record.ddr is not None
        below = record.nvme is not None and record.nvme.readable
        if below or victim.action == "drop":
            self.store.drop(record.ddr)
            return
        for owner in self.store.records.owners_of(record):
            owner.admitted = True
        drain(self.store.records, record)
        self.writes.demote(record, urgency)

    def _leave_hbm(self, shard: Shard, record: ExtentRecord, victim: Victim, reason: str, wanted_by: str) -> None:
        """Out of HBM; into DDR first when there is no other copy, and a free slot."""
        placement = shard.copies[record.extent.id]
        placement.apply(Event.DRAIN)
        target = None
        if victim.action == "demote" and not record.placements():
            target = self.store.take(record.extent, Tier.DDR)
            victim = replace(victim, action="demote" if target is not None else "drop")
        self.store.verdict(victim, reason, wanted_by)
        if target is not None:
            self._save(shard, record, placement, target)

    def _save(self, shard: Shard, record: ExtentRecord, source: Placement, target: Placement) -> None:
        place(self.store.records, record, Tier.DDR, target)
        source.holds += 1  # not `hold`: saving does not cancel the drain
        target.holds += 1
        assert target.slot is not None
        part = Part(target.slot, record.extent.start, record.extent.valid_tokens)
        started_ns = self.store.clock.monotonic_ns()
        order = SaveShard(id=self.store.new_id(), group=shard.group, shard=shard.id, parts=(part,))

        def saved(outcome: Outcome) -> None:
            source.holds -= 1
            if outcome.error is None:
                hop, now_ns = Hop(Tier.HBM, Tier.DDR), self.store.clock.monotonic_ns()
                self.store.records.ledger.moved(hop, target.size_bytes, outcome.busy_ns, started_ns, now_ns)
                self.store.planner.learn(hop, target.size_bytes, outcome.busy_ns)
                self.seal(record, target)
            else:
                target.holds -= 1
                self.store.fail(target)
                if source.state is State.DRAINING and not record.placements():
                    victim = self.store.planner.last_copy(record, source)
                    self.store.verdict(victim, f"not saved: {outcome.error}")
            self._trim(shard)

        self.store.submit(order, saved)

    def seal(self, record: ExtentRecord, target: Placement) -> None:
        """Checksum a filled DDR copy that the caller holds, then let it be read."""
        assert target.slot is not None
        geometry = extent_geometry(self.store.records.specs[record.extent.fingerprint], record.extent.group)
        order = Seal(id=self.store.new_id(), slot=target.slot, geometry=geometry)

        def sealed(outcome: Outcome) -> None:
            target.holds -= 1
            if outcome.error is None:
                self.store.filled(record, target, outcome.checksums)
                self.store.settle(target)
            else:
                self.store.fail(target)

        self.store.submit(order, sealed)

    def _trim(self, shard: Shard) -> None:
        """Give back the shard's tail as far as it drains and nobody holds it."""
        while shard.copies:
            extent, placement = next(reversed(shard.copies.items()))
            if placement.state is not State.DRAINING or placement.holds:
                return
            self.store.shrink_shard(shard, extent)
