"""Ingest: new KV comes in, private until it is committed, and then complete and visible at once.

begin -> the writer fills DDR slots (or a group's rows, which the ranks then save into the slots) -> commit: seal,
adopt, publish. An abort, a dead writer or a failed rank leaves no trace. Two ingests of one prefix do not wait for
each other: the second to commit gives its duplicate copies back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .document import Document, WritePolicy
from .errors import (
    ClaimNotFound,
    DocumentExists,
    DocumentIncomplete,
    DocumentTooLarge,
    HoldfastError,
    InUse,
    InvalidRequest,
)
from .extent import Extent
from .geometry import Geometry, extent_geometry
from .layout import Layout
from .ledger import Hop, SwapRecord
from .loader import Loader
from .loading import Loading, Phase
from .orders import Outcome, Part, SaveShard, Seal, Urgency
from .planner import Demand
from .residency import Event, Placement, State, Tier
from .room import Reservation, Room
from .seal import CHECKSUM_BYTES
from .slots import SlotClass
from .state import DocumentRecord, ExtentRecord, Shard
from .store import Store

Done = Callable[[HoldfastError | None], None]


class Stage(StrEnum):
    """Where an ingest is."""

    WAITING = "waiting"
    FILLING = "filling"
    LOADING = "loading"  # to be committed as soon as the cached front has arrived
    FAILED = "failed"  # the cached front will not come, but the group may still be writing to its rows
    SAVING = "saving"
    SEALING = "sealing"
    ENDED = "ended"


@dataclass(eq=False, slots=True, kw_only=True)
class Ingest:
    """An open ingest. `missing` are the extents that its writer fills; `cached_tokens` lead and are there already."""

    id: int
    client: int
    document: Document
    extents: tuple[Extent, ...]
    missing: tuple[Extent, ...]
    cached_tokens: int
    group: str | None
    layout: Layout | None
    stage: Stage = Stage.WAITING
    filled: dict[str, Placement] = field(default_factory=dict)
    held: list[Placement] = field(default_factory=list)
    loading: Loading | None = None
    reservation: Reservation | None = None
    in_flight: int = 0
    error: HoldfastError | None = None
    granted: Done | None = None
    committed: Done | None = None

    @property
    def shard(self) -> Shard | None:
        """The shard in the group, once there is one."""
        return self.loading.shard if self.loading is not None else None


class Ingests:
    """Begins, commits and aborts ingests."""

    def __init__(self, store: Store, room: Room, loader: Loader) -> None:
        self.store = store
        self.room = room
        self.loader = loader
        self.open: dict[int, Ingest] = {}

    # Begin -------------------------------------------------------------------------------------

    def begin(self, ingest: Ingest, deadline_ns: int, granted: Done) -> None:
        """Take room for what is missing, and bring the cached front into the group. `granted` hears the result.

        Raises DocumentExists, DocumentTooLarge, InUse or NoCapacity and leaves nothing behind.
        """
        self._refuse(ingest)
        ingest.granted = granted
        ingest.reservation = Reservation(
            demand=lambda: Demand(slots=self._slots(ingest.missing)),
            granted=lambda: self._granted(ingest, deadline_ns),
            refused=lambda error: self._end(ingest, error),
            deadline_ns=deadline_ns,
        )
        self.room.request(ingest.reservation)
        self.open[ingest.id] = ingest
        self.store.records.private[ingest.id] = []
        wanted = {extent.id for extent in ingest.extents} - {extent.id for extent in ingest.missing}
        for extent in wanted:
            source = self.store.records.extents[extent].source()
            assert source is not None
            ingest.held.append(self.store.hold(source))

    def _refuse(self, ingest: Ingest) -> None:
        records = self.store.records
        document = ingest.document
        known = records.documents.get(document.id)
        if known is not None and known.document.extents != document.extents:
            raise DocumentExists(f"{document.id} exists with other tokens or another model; delete it or rename")
        for other in self.open.values():
            if other.document.id == document.id:
                raise InUse(f"{document.id} is being ingested already")
        for kind, count in self._slots(ingest.extents).items():
            if count > records.ddr.largest(kind):
                nvme = records.nvme.largest(SlotClass("", kind.slot_bytes))
                raise DocumentTooLarge(
                    f"{document.id} needs {count} extents of {kind.slot_bytes} B; DDR holds "
                    f"{records.ddr.largest(kind)} and NVMe {nvme} of that size, and a document passes through DDR "
                    "whole; raise ddr.capacity_bytes"
                )
        if ingest.group is None:
            return
        group = records.group(ingest.group)
        shard = group.shards.get(document.id)
        if shard is not None and any(copy.holds for copy in shard.copies.values()):
            raise InUse(f"{document.id} is in use in group {ingest.group!r}")
        assert ingest.layout is not None
        for rank, pool in group.pools.items():
            if ingest.layout.length(rank // group.tp) > pool.rows:
                raise DocumentTooLarge(
                    f"{document.id} needs {ingest.layout.length(rank // group.tp)} rows on rank {rank} of group "
                    f"{ingest.group!r}, whose arena has {pool.rows}; use more ranks or a larger arena"
                )

    def _slots(self, extents: Sequence[Extent]) -> dict[SlotClass, int]:
        kinds: dict[SlotClass, int] = {}
        for extent in extents:
            kind = SlotClass(extent.tenant, extent.slot_bytes)
            kinds[kind] = kinds.get(kind, 0) + 1
        return kinds

    def _granted(self, ingest: Ingest, deadline_ns: int) -> None:
        ingest.reservation = None
        for extent in ingest.missing:
            placement = self.store.take(extent, Tier.DDR)
            assert placement is not None, "granted without a slot"
            placement.holds += 1  # the writer's
            ingest.filled[extent.id] = placement
            self.store.records.private[ingest.id].append(placement)
        if ingest.group is None:
            self._ready(ingest, None)
            return
        shard = self.store.records.groups[ingest.group].shards.get(ingest.document.id)
        if shard is not None:
            if any(copy.holds for copy in shard.copies.values()):
                self._end(ingest, InUse(f"{ingest.document.id} is in use in group {ingest.group!r}"))
                return
            self.store.close_shard(shard)
        cached = [e.id for e in ingest.extents if e.stop <= ingest.cached_tokens]
        if any(extent not in self.store.records.extents for extent in cached):
            self._end(ingest, DocumentIncomplete("what it shares with another document was lost meanwhile; try again"))
            return
        loading = Loading(
            document=ingest.document.id,
            records=[self.store.records.extents[extent] for extent in cached],
            spans={extent.id: (extent.start, extent.stop) for extent in ingest.extents},
            group=ingest.group,
            layout=ingest.layout,
            urgency=Urgency.ATTACH,
            swap=self._swap(ingest),
            started_ns=self.store.clock.monotonic_ns(),
            granted=lambda: self._ready(ingest, None),
            layer_ready=lambda _: None,
            ended=lambda error: self._loaded(ingest, error),
        )
        ingest.loading = loading
        try:
            self.loader.start(loading, deadline_ns)
        except HoldfastError as error:
            ingest.loading = None
            self._end(ingest, error)

    def _swap(self, ingest: Ingest) -> SwapRecord:
        """The cached front's receipt; kept with the swaps only when something had to move."""
        swap = SwapRecord(
            id=ingest.id,
            document=str(ingest.document.id),
            group=ingest.group,
            client=ingest.client,
            started_wall_ns=self.store.clock.wall_ns(),
            token_count=ingest.cached_tokens,
        )
        if ingest.cached_tokens:
            self.store.records.ledger.swaps.append(swap)
        return swap

    def _ready(self, ingest: Ingest, error: HoldfastError | None) -> None:
        if error is None:
            ingest.stage = Stage.FILLING
        granted, ingest.granted = ingest.granted, None
        if granted is not None:
            granted(error)

    def _loaded(self, ingest: Ingest, error: HoldfastError | None) -> None:
        if error is not None and ingest.stage is Stage.FILLING:
            assert ingest.loading is not None
            ingest.loading.kept = True
            ingest.stage, ingest.error = Stage.FAILED, error
        elif error is not None:
            self._end(ingest, error)
        elif ingest.stage is Stage.LOADING:
            self._proceed(ingest)

    # Commit ------------------------------------------------------------------------------------

    def get(self, ingest_id: int, client: int) -> Ingest:
        """The client's open ingest. Raises ClaimNotFound."""
        ingest = self.open.get(ingest_id)
        if ingest is None or ingest.client != client:
            raise ClaimNotFound(f"no open ingest {ingest_id} of this client; it ended or was aborted")
        return ingest

    def commit(self, ingest: Ingest, committed: Done, seals: Sequence[bytes] = ()) -> None:
        """Everything is filled: save it out of the group's rows if there is one, seal, publish.

        `seals` are the writer's own, one per missing extent, empty for those to be sealed here. Raises InvalidRequest
        for seals of another number or size. A wrong one harms the writer's document alone: reads will not verify.
        """
        self._check_seals(ingest, seals)
        if ingest.stage is Stage.FAILED:
            assert ingest.error is not None
            ingest.committed = committed
            self._end(ingest, ingest.error)
            return
        if ingest.stage is not Stage.FILLING:
            raise InUse(f"ingest {ingest.id} is {ingest.stage}, so it cannot be committed now")
        ingest.committed = committed
        for extent, seal in zip(ingest.missing, seals, strict=False):
            ingest.filled[extent.id].checksums = seal
        if ingest.loading is not None and ingest.loading.phase is Phase.MOVING:
            ingest.stage = Stage.LOADING
        else:
            self._proceed(ingest)

    def _check_seals(self, ingest: Ingest, seals: Sequence[bytes]) -> None:
        if not seals:
            return
        if ingest.group is not None:
            raise InvalidRequest("what ranks save is sealed by the daemon; commit without seals")
        if len(seals) != len(ingest.missing):
            raise InvalidRequest(f"{len(seals)} seals for {len(ingest.missing)} extents; send one each, or none")
        for extent, seal in zip(ingest.missing, seals, strict=True):
            wanted = self._geometry(extent).plane_count * CHECKSUM_BYTES
            if seal and len(seal) != wanted:
                raise InvalidRequest(
                    f"a seal of {len(seal)} B for tokens [{extent.start}, {extent.stop}), not {wanted}"
                )

    def _geometry(self, extent: Extent) -> Geometry:
        return extent_geometry(self.store.records.specs[extent.fingerprint], extent.group)

    def _proceed(self, ingest: Ingest) -> None:
        if ingest.shard is not None and ingest.missing:
            self._save(ingest, ingest.shard)
        else:
            self._seal(ingest)

    def _save(self, ingest: Ingest, shard: Shard) -> None:
        ingest.stage = Stage.SAVING
        parts = []
        for extent in ingest.missing:
            slot = ingest.filled[extent.id].slot
            assert slot is not None
            parts.append(Part(slot, extent.start, extent.valid_tokens))
        order = SaveShard(id=self.store.new_id(), group=shard.group, shard=shard.id, parts=tuple(parts))
        started_ns = self.store.clock.monotonic_ns()
        ingest.in_flight += 1

        def saved(outcome: Outcome) -> None:
            ingest.in_flight -= 1
            if ingest.stage is Stage.ENDED:
                self._sweep(ingest)
            elif outcome.error is not None:
                self._end(ingest, outcome.error)
            else:
                now_ns = self.store.clock.monotonic_ns()
                hop = Hop(Tier.HBM, Tier.DDR)
                self.store.records.ledger.moved(hop, outcome.size_bytes, outcome.busy_ns, started_ns, now_ns)
                self.store.planner.learn(hop, outcome.size_bytes, outcome.busy_ns)
                self._seal(ingest)

        self.store.submit(order, saved)

    def _seal(self, ingest: Ingest) -> None:
        ingest.stage = Stage.SEALING
        for extent in ingest.missing:
            if not ingest.filled[extent.id].checksums:
                self._seal_one(ingest, extent)
        if not ingest.in_flight:
            self._publish(ingest)

    def _seal_one(self, ingest: Ingest, extent: Extent) -> None:
        placement = ingest.filled[extent.id]
        assert placement.slot is not None
        order = Seal(id=self.store.new_id(), slot=placement.slot, geometry=self._geometry(extent))
        ingest.in_flight += 1

        def sealed(outcome: Outcome) -> None:
            ingest.in_flight -= 1
            if ingest.stage is Stage.ENDED:
                self._sweep(ingest)
            elif outcome.error is not None:
                self._end(ingest, outcome.error)
            else:
                placement.checksums = outcome.checksums
                if not ingest.in_flight:
                    self._publish(ingest)

        self.store.submit(order, sealed)

    def _publish(self, ingest: Ingest) -> None:
        """Adopt the copies and make the document visible: the point of acknowledgement."""
        records = self.store.records
        for extent in ingest.extents:
            if extent.id not in ingest.filled and not self._present(extent):
                gone = f"tokens [{extent.start}, {extent.stop}) were lost meanwhile"
                self._end(ingest, DocumentIncomplete(f"{ingest.document.id}: {gone}; ingest it again"))
                return
        ingest.stage = Stage.ENDED
        document = ingest.document
        owner = frozenset((document.id,))
        for extent in ingest.extents:
            record = records.extents.setdefault(extent.id, ExtentRecord(extent=extent))
            record.extent = extent  # a restart may have left it without block keys
            records.fronts.add(extent)
            record.join(owner)
            placement = ingest.filled.get(extent.id)
            if placement is not None:
                self._adopt(ingest, record, placement)
        known = records.documents.get(document.id)
        published = known or DocumentRecord(document=document)
        published.volatile = {e.id for e in ingest.extents if not records.extents[e.id].cataloged}
        published.durable = published.durable and not published.volatile
        records.documents[document.id] = published
        self._release(ingest)
        if document.write_policy is WritePolicy.THROUGH:
            for extent in ingest.extents:
                self.room.write_through(records.extents[extent.id])
        self.room.make_durable(document.id)
        committed, ingest.committed = ingest.committed, None
        if committed is not None:
            committed(None)

    def _present(self, extent: Extent) -> bool:
        record = self.store.records.extents.get(extent.id)
        return record is not None and record.source() is not None

    def _adopt(self, ingest: Ingest, record: ExtentRecord, placement: Placement) -> None:
        if record.source() is not None:
            return  # another ingest was first; `_release` gives this duplicate back
        placement.apply(Event.COMPLETE)
        placement.holds -= 1
        record.ddr = placement
        self.store.records.private[ingest.id].remove(placement)

    # Ends --------------------------------------------------------------------------------------

    def abort(self, ingest: Ingest) -> None:
        """The writer gives up, or is gone."""
        self._end(ingest, InUse(f"ingest {ingest.id} was aborted"))

    def fail_group(self, name: str, error: HoldfastError) -> None:
        """The group is gone: so are the ingests that it fills."""
        for ingest in [ingest for ingest in self.open.values() if ingest.group == name]:
            self._end(ingest, error)

    def _end(self, ingest: Ingest, error: HoldfastError) -> None:
        if ingest.stage is Stage.ENDED:
            return
        ingest.stage = Stage.ENDED
        ingest.error = error
        if ingest.reservation is not None:
            self.room.cancel(ingest.reservation)
            ingest.reservation = None
        self._ready(ingest, error)
        committed, ingest.committed = ingest.committed, None
        if committed is not None:
            committed(error)
        self._sweep(ingest)

    def _sweep(self, ingest: Ingest) -> None:
        """Give everything back once no move is under way."""
        if ingest.in_flight or ingest.id not in self.open:
            return
        shard = ingest.shard
        arrived = ingest.loading is not None and ingest.loading.phase is Phase.READY
        self._release(ingest)
        if arrived and shard is not None and shard.copies and shard.group in self.store.records.groups:
            self.store.close_shard(shard)

    def _release(self, ingest: Ingest) -> None:
        """Free private copies and every hold; a published shard's copies become readable."""
        del self.open[ingest.id]
        for placement in list(self.store.records.private[ingest.id]):
            placement.holds -= 1
            self.store.fail(placement)
        assert not self.store.records.private.pop(ingest.id), "private copies left behind"
        for placement in ingest.held:
            if placement.state is not State.GONE:
                self.store.unhold(placement)
        ingest.held.clear()
        if ingest.loading is None:
            return
        if ingest.error is not None:
            self.loader.fail(ingest.loading, ingest.error)  # a front still under way stops; its shard goes with it
        elif ingest.shard is not None:
            ingest.shard.generation = 0  # the ranks have counted what was loaded, not what they computed
            for copy in ingest.shard.copies.values():
                if copy.state is State.FILLING:
                    copy.apply(Event.COMPLETE)
        self.loader.release(ingest.loading)
