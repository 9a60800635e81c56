"""Loader: bring extents into DDR, or on into the rows of a group's shard, layer by layer.

An attach, the cached front of an ingest, and a prefetch are all loadings. A loading holds every copy it needs from the
moment it is asked for, so that nothing leaves while it waits for room; several loadings share one read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from .arrivals import Arrivals
from .demand import Demand
from .errors import HoldfastError, InUse, NoCapacity
from .ledger import Hop, HopTime
from .loading import Loading, Phase, incomplete
from .opening import open_shard
from .orders import CloseShard, LoadShard, Outcome, Part
from .planner import Victim
from .reads import Reads
from .residency import Event, Placement, State, Tier
from .room import Cleared, Reservation, Room
from .rows import check_rows, grow_rows
from .slots import slots_of
from .state import ExtentRecord, Shard
from .store import Store
from .window import Window


class Loader:
    """Starts loadings, follows their moves, ends them."""

    def __init__(self, store: Store, room: Room, window_bytes: int) -> None:
        self.store = store
        self.room = room
        self.window = Window(store, room, window_bytes)
        self.reads = Reads(store, self._ddr_has, self.fail)
        self._active: list[Loading] = []  # waiting or moving

    # Start -------------------------------------------------------------------------------------

    def start(self, loading: Loading, deadline_ns: int) -> None:
        """Hold what is there and queue for room. Raises DocumentIncomplete or NoCapacity, holding nothing."""
        self._refuse(loading)
        loading.reservation = Reservation(
            document=loading.document,
            demand=lambda: self._demand(loading),
            granted=lambda: self._waited(loading),
            refused=lambda error: self._refused(loading, error),
            deadline_ns=deadline_ns,
        )
        self.room.request(loading.reservation)
        loading.patience_ns = deadline_ns - self.store.clock.monotonic_ns()
        self._active.append(loading)
        self.store.records.awaited[loading.document] += 1
        self._hold(loading)

    def start_now(
        self, loading: Loading, approves: Callable[[Sequence[Victim]], bool], patience_seconds: float
    ) -> Cleared:
        """Start at once, or hold nothing: see Room.clear_now. Raises DocumentIncomplete or DocumentTooLarge."""
        self._refuse(loading)
        self._hold(loading)
        try:
            demand = self._demand(loading)
            cleared = Cleared.REFUSED if demand is None else self.room.clear_now(demand, approves)
        except HoldfastError:
            self._let_go(loading)
            raise
        if cleared is not Cleared.NOW:
            self._let_go(loading)
            return cleared
        loading.patience_ns = int(patience_seconds * 1e9)
        self._active.append(loading)
        self._granted(loading)
        return cleared

    def under_way(self, wanted: Loading) -> Loading | None:
        """A load of the same into the same group that has begun, and that nobody waits for: it can be taken over."""
        return next((loading for loading in self._active if loading.may_pass_to(wanted)), None)

    def predicted_ns(self, loading: Loading) -> int:
        """Time to move what is not at the target yet."""
        sizes, move_bytes = loading.missing_bytes(self._shard(loading))
        return self.store.planner.predicted_ns(sizes, move_bytes)

    def _refuse(self, loading: Loading) -> None:
        """Raises DocumentIncomplete, or DocumentTooLarge for DDR or the group."""
        shard = self._shard(loading)
        here = shard.copies if shard is not None else {}
        gone = [record for record in loading.records if record.source() is None and record.extent.id not in here]
        if gone:
            raise incomplete(loading, *gone)
        if loading.group is None:
            self.window.refuse_too_large(loading)
        elif loading.layout is not None:
            check_rows(self.store.records.group(loading.group), loading.document, loading.layout)

    def _hold(self, loading: Loading) -> None:
        for record in loading.records:
            source = record.source()
            if source is not None:
                loading.sources[record.extent.id] = self.store.hold(source)

    def _shard(self, loading: Loading) -> Shard | None:
        if loading.group is None:
            return None
        return self.store.records.group(loading.group).shards.get(loading.key)

    def _demand(self, loading: Loading) -> Demand | None:
        """What the loading needs now; None while others fill what it waits for, or fill, save or trim its shard."""
        shard = self._shard(loading)
        replaces = None
        if shard is not None and not shard.complete:
            if any(not copy.readable or copy.holds for copy in shard.copies.values()):
                return None
            if grow_rows(self.store.records.group(shard.group), shard) is None:
                replaces, shard = shard.id, None
        lacking = []
        for record in loading.records:
            if shard is not None and record.extent.id in shard.copies:
                continue
            source = self._source(loading, record)
            if self._filled_by_others(record):
                return None
            if source.tier is Tier.NVME and (record.ddr is None or loading.gives_way):
                lacking.append(record)
        kinds = slots_of(record.extent for record in lacking[self.window.outside(loading, lacking) :])
        if loading.group is None or shard is not None:
            return Demand(slots=kinds)
        assert loading.layout is not None
        tp = loading.layout.tp
        rows = tuple(loading.layout.length(rank // tp) for rank in range(loading.layout.ranks))
        return Demand(slots=kinds, group=loading.group, document=loading.document, rows=rows, replaces=replaces)

    def _filled_by_others(self, record: ExtentRecord) -> bool:
        """Whether its DDR copy is being saved out of HBM: no slot is needed, but nothing can be read either."""
        is_filling = record.ddr is not None and record.ddr.state is State.FILLING
        return is_filling and record.extent.id not in self.reads.waiting

    def _source(self, loading: Loading, record: ExtentRecord) -> Placement:
        """The held copy to load from; another one where that was lost meanwhile. Raises DocumentIncomplete."""
        extent = record.extent.id
        source = loading.sources.get(extent)
        if source is not None and source.state is State.LOST:
            self.store.unhold(loading.sources.pop(extent))
            source = None
        if source is None:
            source = record.source()
            if source is None:
                raise incomplete(loading, record)
            loading.sources[extent] = self.store.hold(source)
        near = record.ddr
        if source.tier is Tier.NVME and near is not None and near.state is State.RESIDENT and not loading.gives_way:
            loading.sources[extent] = self.store.hold(near)  # another loading has brought it: it is not to leave for us
            self.store.unhold(source)
            return near
        return source

    def _refused(self, loading: Loading, error: HoldfastError) -> None:
        refused, loading.reservation = loading.reservation, None
        if isinstance(error, NoCapacity) and refused is not None and self._give_way(loading):
            loading.reservation = replace(refused)
            self.room.request(loading.reservation)
        else:
            self.fail(loading, error)

    def _give_way(self, loading: Loading) -> bool:
        """Let what it holds in DDR leave before its first move, where NVMe has it too; False where that is nothing.

        Else a document that is larger than DDR would keep itself out: its own front may be all that is there.
        """
        if loading.phase is not Phase.WAITING or loading.group is None or loading.gives_way:
            return False
        for record in loading.records:
            source, below = loading.sources.get(record.extent.id), record.nvme
            if source is not None and source is record.ddr and below is not None and below.readable:
                loading.sources[record.extent.id] = self.store.hold(below)
                self.store.unhold(source)
                loading.gives_way = True
        return loading.gives_way

    # Granted -----------------------------------------------------------------------------------

    def _waited(self, loading: Loading) -> None:
        self.store.records.awaited -= Counter([loading.document])
        self._granted(loading)

    def _granted(self, loading: Loading) -> None:
        loading.reservation = None
        loading.phase = Phase.MOVING
        loading.swap.wait_ns = self.store.clock.monotonic_ns() - loading.started_ns
        if loading.group is not None:
            demand = self._demand(loading)
            assert demand is not None
            open_shard(self.store, loading, demand)
        lacking = [record for record in loading.records if self._is_lacking(loading, record)]
        loading.queued = lacking[: self.window.outside(loading, lacking)]
        loading.arrivals = Arrivals({record.extent.id: self.reads.depth(record) for record in loading.records})
        loading.inside = {record.extent.id for record in lacking[len(loading.queued) :]}
        queued = {record.extent.id for record in loading.queued}
        here = [r for r in loading.records if r.extent.id not in queued and self._depart(loading, r)]
        loading.granted()
        if loading.shard is not None and here:
            self._load(loading, here, 0, self.reads.depth(here[0]))
        self._advance(loading)

    def _is_lacking(self, loading: Loading, record: ExtentRecord) -> bool:
        """Whether it has to be read into a DDR slot of its own."""
        source = loading.sources.get(record.extent.id)
        return source is not None and source.tier is Tier.NVME and record.ddr is None

    def _depart(self, loading: Loading, record: ExtentRecord) -> bool:
        """Set one extent on its way. True when it lies complete in DDR and can be loaded from there at once."""
        extent = record.extent.id
        source = loading.sources.get(extent)
        if source is None:
            loading.arrivals.reach(extent, self.reads.depth(record))
            loading.came_from(Tier.HBM, record)
            return False
        if source.tier is Tier.NVME and (record.ddr is None or not record.ddr.readable):
            if record.ddr is None:
                self.reads.start(record, source, loading.urgency)
            self.reads.join(loading, record)
            return False
        assert record.ddr is not None
        if source is not record.ddr:  # another loading has brought it meanwhile
            loading.sources[extent] = self.store.hold(record.ddr)
            self.store.unhold(source)
        if record.ddr.state is State.FILLING:
            self.reads.join(loading, record)
            return False
        loading.came_from(Tier.DDR, record)
        if loading.shard is None:
            loading.arrivals.reach(extent, self.reads.depth(record))
        return True

    # Windows -----------------------------------------------------------------------------------

    def _pass(self, loading: Loading, record: ExtentRecord) -> None:
        """An extent has arrived in HBM; its DDR copy makes place for the next ones."""
        if record.extent.id in loading.inside:
            loading.inside.remove(record.extent.id)
            loading.passed.append(record)
        if loading.queued and loading.reservation is None:
            self._enter(loading)

    def _enter(self, loading: Loading) -> None:
        """Set the next extents on their way, as many as the window takes.

        What a loading was granted once is enough: every arrival gives back the slot that the next extent needs. Only
        when others have come to use all of those does it wait in the queue again, holding no slot that is idle.
        """
        try:
            while loading.queued:
                record = loading.queued[-1]
                if len(loading.inside) >= self.window.extents(record.extent):
                    return
                self._source(loading, record)
                if self._filled_by_others(record) or (record.ddr is None and not self.window.slide(loading, record)):
                    if not loading.inside:
                        self._wait(loading)
                    return
                self._enter_one(loading, record)
        except HoldfastError as error:
            self.fail(loading, error)

    def _enter_one(self, loading: Loading, record: ExtentRecord) -> None:
        loading.queued.pop()
        loading.inside.add(record.extent.id)
        if self._depart(loading, record):
            self._load(loading, [record], 0, self.reads.depth(record))

    def _wait(self, loading: Loading) -> None:
        """Queue for the next extent's slot."""
        record = loading.queued[-1]

        def demand() -> Demand | None:
            self._source(loading, record)
            if self._filled_by_others(record):
                return None
            return Demand(slots=slots_of([record.extent] if record.ddr is None else []))

        def granted() -> None:
            loading.reservation = None
            self._enter_one(loading, record)
            self._enter(loading)

        loading.reservation = Reservation(
            document=loading.document,
            demand=demand,
            granted=granted,
            refused=lambda error: self._refused(loading, error),
            deadline_ns=self.store.clock.monotonic_ns() + loading.patience_ns,
        )
        self.room.request(loading.reservation)

    def _ddr_has(self, loading: Loading, record: ExtentRecord, layers: int) -> None:
        """Leading layers of an extent are in DDR: pass them on, or count them as arrived."""
        if loading.phase is not Phase.MOVING:
            return
        extent = record.extent.id
        if loading.shard is None:
            loading.arrivals.reach(extent, layers)
            self._advance(loading)
            return
        copy = loading.shard.copies[extent]
        if layers > copy.layers_ready:  # here: the layers ordered into HBM
            first = copy.layers_ready
            copy.layers_ready = layers
            self._load(loading, [record], first, layers)

    # DDR to HBM --------------------------------------------------------------------------------

    def _load(self, loading: Loading, records: Sequence[ExtentRecord], first: int, stop: int) -> None:
        assert loading.shard is not None
        holds = []
        parts = []
        for record in records:
            assert record.ddr is not None
            assert record.ddr.slot is not None
            copy = loading.shard.copies[record.extent.id]
            copy.layers_ready = max(copy.layers_ready, stop)
            for placement in (record.ddr, copy):
                placement.holds += 1
                holds.append(placement)
            parts.append(Part(record.ddr.slot, record.extent.start, record.extent.valid_tokens))
        order = LoadShard(
            id=self.store.new_id(),
            group=loading.shard.group,
            shard=loading.shard.id,
            parts=tuple(parts),
            layer_start=first,
            layer_stop=stop,
        )
        loading.in_flight += 1
        started_ns = self.store.clock.monotonic_ns()

        def loaded(outcome: Outcome) -> None:
            loading.in_flight -= 1
            for placement in holds:
                self.store.unhold(placement)
            if outcome.error is not None:
                self.fail(loading, outcome.error)
            elif loading.phase is Phase.MOVING:
                self._hbm_has(loading, records, stop, outcome, started_ns)
            self._abandon(loading)

        self.store.submit(order, loaded)

    def _hbm_has(
        self, loading: Loading, records: Sequence[ExtentRecord], stop: int, outcome: Outcome, started_ns: int
    ) -> None:
        hop = Hop(Tier.DDR, Tier.HBM)
        now_ns = self.store.clock.monotonic_ns()
        self.store.records.ledger.moved(hop, outcome.size_bytes, outcome.busy_ns, started_ns, now_ns)
        loading.swap.hops.setdefault(hop, HopTime()).add(outcome.size_bytes, outcome.busy_ns, started_ns, now_ns)
        assert loading.shard is not None
        for record in records:
            extent = record.extent.id
            loading.arrivals.reach(extent, stop)
            if stop == self.reads.depth(record):
                loading.shard.copies[extent].apply(Event.COMPLETE)
                self.store.records.changes.note(extent)
                self.store.unhold(loading.sources.pop(extent))
                self._pass(loading, record)
        self._advance(loading)

    # Ends --------------------------------------------------------------------------------------

    def _advance(self, loading: Loading) -> None:
        """Report newly complete leading layers, and the end."""
        if loading.phase is not Phase.MOVING or loading.queued:
            return
        if loading.arrivals.layers > loading.layers:
            loading.layers = loading.arrivals.layers
            loading.layer_ready(loading.layers)
        if loading.arrivals.complete and loading.phase is Phase.MOVING:
            loading.phase = Phase.READY
            self._active.remove(loading)
            loading.swap.reattach_ns = self.store.clock.monotonic_ns() - loading.started_ns
            loading.swap.outcome = "ready"
            for hop, taken in loading.swap.hops.items():
                self.store.planner.learn(hop, taken.size_bytes, taken.elapsed_ns)
            loading.held += loading.sources.values()
            loading.sources.clear()
            loading.ended(None)
            if loading.released:
                self._let_go(loading)

    def fail(self, loading: Loading, error: HoldfastError) -> None:
        """End a loading with an error; what it holds is released once its moves have stopped."""
        if loading.phase in (Phase.READY, Phase.FAILED):
            return
        self._active.remove(loading)
        if loading.phase is Phase.WAITING:
            self.store.records.awaited -= Counter([loading.document])
        loading.kept = loading.phase is Phase.MOVING and loading.group is None and not loading.released
        if loading.kept:  # what other reads still bring stays too
            loading.held += [self.store.hold(r.ddr) for r in loading.records if r.ddr is not None]
        loading.phase = Phase.FAILED
        loading.error = error
        loading.queued.clear()
        loading.swap.outcome = error.code
        if loading.reservation is not None:
            self.room.cancel(loading.reservation)
            loading.reservation = None
        for waiting in self.reads.waiting.values():
            if loading in waiting:
                waiting.remove(loading)
        shard = loading.shard
        if shard is not None and shard.group in self.store.records.groups:
            # At once, because a rank may be waiting for a layer that will never come.
            self.store.submit(CloseShard(group=shard.group, shard=shard.id, reason=error.message))
        loading.ended(error)
        self._abandon(loading)

    def fail_group(self, name: str, error: HoldfastError) -> None:
        """The group is going: so are the loadings into it."""
        for loading in [loading for loading in self._active if loading.group == name]:
            self.fail(loading, error)

    def _abandon(self, loading: Loading) -> None:
        """A failed loading whose last move has ended lets go of everything, its shard included."""
        if loading.phase is not Phase.FAILED or loading.in_flight or loading.kept:
            return
        self._let_go(loading)
        shard = loading.shard
        loading.shard = None
        if shard is not None and shard.copies and shard.group in self.store.records.groups:
            self.store.close_shard(shard, loading.error.message if loading.error else "")

    def release(self, loading: Loading) -> None:
        """The holder is done. A loading still under way goes on for the cache's sake and lets go at its end."""
        if loading.phase is Phase.WAITING:
            self.fail(loading, InUse("released before it was granted"))
        elif loading.kept:
            loading.kept = False
            self._abandon(loading)
        elif loading.phase is Phase.READY and not loading.released:
            self._let_go(loading)
        loading.released = True

    def _let_go(self, loading: Loading) -> None:
        self.store.unhold_all(loading.held)
        self.store.unhold_all(loading.sources.values())
        loading.held.clear()
        loading.sources.clear()
