"""Ingest: new KV comes in, private until it is committed, and then complete and visible at once.

begin -> the writer fills DDR slots (or a group's rows, which the ranks then save into the slots) -> commit: seal,
adopt, publish. An abort, a dead writer or a failed rank leaves no trace. Two ingests of one prefix do not wait for
each other: the second to commit gives its duplicate copies back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .demand import Demand
from .document import Document, WritePolicy, dated
from .enrol import Enrolled, Enrolment, Enrolments
from .errors import (
    ClaimNotFound,
    DocumentExists,
    DocumentIncomplete,
    HoldfastError,
    InUse,
    InvalidRequest,
    NoCapacity,
)
from .extent import Extent
from .growth import replaced
from .ingesting import Done, Ingest, Stage
from .ledger import SwapRecord
from .loader import Loader
from .loading import Loading, Phase
from .orders import PutDocument, PutSpec, Urgency
from .passage import Given, Passage
from .pinning import check_growth
from .residency import Event, State, Tier
from .reuse import Decision
from .room import Reservation, Room
from .rows import check_rows
from .slots import slots_of
from .spill import Spill
from .state import DocumentRecord, ExtentRecord
from .store import Store
from .writing import Turn


def position(extent: Extent) -> tuple[int, int]:
    """In the order of tokens, all layer groups of a range together."""
    return extent.start, extent.group


class Ingests:
    """Begins, commits and aborts ingests."""

    def __init__(self, store: Store, room: Room, loader: Loader) -> None:
        self.store = store
        self.room = room
        self.loader = loader
        self.spill = Spill(store, room)
        self.enrolments = Enrolments(store)
        self.open: dict[int, Ingest] = {}
        self.grew: Callable[[Document], None] = lambda _: None  # a longer version is there

    # Begin -------------------------------------------------------------------------------------

    def begin(self, ingest: Ingest, deadline_ns: int, granted: Done) -> None:
        """Take room for what is missing, and bring the cached front into the group. `granted` hears the result.

        Raises DocumentExists, DocumentTooLarge, InUse or NoCapacity and leaves nothing behind.
        """
        self._refuse(ingest)
        ingest.granted = granted
        # From a group the last come first, so that the front is what stays in DDR; a writer goes forward.
        queue = ingest.missing[::-1] if ingest.group is not None else sorted(ingest.missing, key=position)
        ingest.passage = Passage(
            self.store,
            self.spill,
            ingest.id,
            ingest.missing,
            queue,
            deadline_ns - self.store.clock.monotonic_ns(),
            complete=lambda: self._sealed(ingest),
            failed=lambda error: self._stuck(ingest, error),
            idle=lambda: self._sweep(ingest),
        )
        if not self.store.planner.tenancy.could_hold(Tier.DDR, ingest.missing):
            ingest.passage.narrow(self.loader.window.most_bytes(ingest.document.id.tenant))
        self._reserve(ingest, ingest.passage, deadline_ns)
        self.open[ingest.id] = ingest
        self.store.records.private[ingest.id] = []
        wanted = {extent.id for extent in ingest.extents} - {extent.id for extent in ingest.missing}
        for extent in wanted:
            record = self.store.records.extents[extent]
            # Not DDR's where NVMe has it: the front would keep out what is behind it.
            source = record.nvme if record.nvme is not None and record.nvme.readable else record.source()
            assert source is not None
            ingest.held.append(self.store.hold(source))

    def _reserve(self, ingest: Ingest, passage: Passage, deadline_ns: int) -> None:
        """Queue for all that is missing; where that is too much, for a window of it."""

        def refused(error: HoldfastError) -> None:
            ingest.reservation = None
            may_stream = isinstance(error, NoCapacity) and not passage.streams and self._may_stream(ingest)
            if may_stream and passage.narrow(self.loader.window.most_bytes(ingest.document.id.tenant)):
                self._reserve(ingest, passage, deadline_ns)
            else:
                self._end(ingest, error)

        ingest.reservation = Reservation(
            document=ingest.document.id,
            demand=lambda: Demand(slots=slots_of(passage.window)),
            granted=lambda: self._granted(ingest, deadline_ns),
            refused=refused,
            deadline_ns=deadline_ns,
        )
        self.room.request(ingest.reservation)

    def _may_stream(self, ingest: Ingest) -> bool:
        """Whether NVMe could take the document, so that DDR needs only a window of it."""
        if ingest.document.write_policy is WritePolicy.MEMORY:
            return False
        return self.store.planner.tenancy.could_hold(Tier.NVME, ingest.extents)

    def _refuse(self, ingest: Ingest) -> None:
        records = self.store.records
        document = ingest.document
        known = records.documents.get(document.id)
        if known is not None and known.document.extents != document.extents and not ingest.grows:
            raise DocumentExists(f"{document.id} exists with other tokens, model or page format; delete it or rename")
        check_growth(records, document, ingest.extents, self.store.clock.wall_ns())
        if any(other.document.id == document.id for other in self.open.values()):
            raise InUse(f"{document.id} is being ingested already")
        tenancy = self.store.planner.tenancy
        if not tenancy.could_hold(Tier.DDR, ingest.extents) and not self._may_stream(ingest):
            raise tenancy.too_large(document, ingest.extents)
        if ingest.group is None:
            return
        group = records.group(ingest.group)
        shard = group.shards.get(ingest.key)
        if shard is not None and any(copy.holds for copy in shard.copies.values()):
            raise InUse(f"{document.id} is in use in group {ingest.group!r}")
        assert ingest.layout is not None
        check_rows(group, document.id, ingest.layout)

    def _granted(self, ingest: Ingest, deadline_ns: int) -> None:
        ingest.reservation = None
        passage = self._passage(ingest)
        passage.begin()
        if ingest.group is None:
            if self._is_early(ingest, passage):
                passage.early = lambda extent: self.room.writes.begin_early(ingest.id, extent, ingest.filled[extent.id])
            self._ready(ingest, None)
            return
        shard = self.store.records.groups[ingest.group].shards.get(ingest.key)
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

    def _is_early(self, ingest: Ingest, passage: Passage) -> bool:
        """Whether what a client hands over is to be on NVMe soon: as it looks now, its document will be."""
        if passage.streams or not ingest.missing:
            return False
        return self.room.writes.decide(ingest.document, ingest.missing).policy is WritePolicy.THROUGH

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

    def commit(
        self, ingest: Ingest, committed: Done, seals: Sequence[bytes] = (), deadline_ns: int | None = None
    ) -> None:
        """Everything is filled: save it out of the group's rows if there is one, seal, publish.

        `seals` are the writer's own, one per missing extent, empty for those to be sealed here. Raises InvalidRequest
        for seals of another number or size. A wrong one harms the writer's document alone: reads will not verify.
        """
        ingest.deadline_ns = deadline_ns
        if ingest.stage is Stage.FAILED:
            assert ingest.error is not None
            ingest.committed = committed
            self._end(ingest, ingest.error)
            return
        if seals:
            if ingest.group is not None:
                raise InvalidRequest("what ranks save is sealed by the daemon; commit without seals")
            self._passage(ingest).check_seals(self._passage(ingest).unsealed, seals)
        if ingest.stage is not Stage.FILLING:
            raise InUse(f"ingest {ingest.id} is {ingest.stage}, so it cannot be committed now")
        if ingest.group is None and self._passage(ingest).todo:
            waiting = self._passage(ingest).todo[0]
            raise InvalidRequest(
                f"tokens [{waiting.start}, {waiting.stop}) have no slot yet: hand over what is filled, and fill them"
            )
        ingest.committed = committed
        if ingest.loading is not None and ingest.loading.phase is Phase.MOVING:
            ingest.stage = Stage.LOADING
        else:
            self._proceed(ingest, seals)

    def next_slots(
        self, ingest: Ingest, filled: Sequence[tuple[int, int]], seals: Sequence[bytes], given: Given
    ) -> None:
        """A writer without a group hands filled extents over and gets slots for those that wait; see Passage."""
        if ingest.stage is Stage.FAILED and ingest.error is not None:
            raise ingest.error
        if ingest.stage is not Stage.FILLING or ingest.group is not None:
            raise InvalidRequest(f"ingest {ingest.id} is {ingest.stage}: nothing is handed over now")
        self._passage(ingest).next_slots(filled, seals, given)

    def _passage(self, ingest: Ingest) -> Passage:
        assert ingest.passage is not None
        return ingest.passage

    def _proceed(self, ingest: Ingest, seals: Sequence[bytes] = ()) -> None:
        if not ingest.missing:
            self._complete(ingest)
        elif ingest.shard is not None:
            ingest.stage = Stage.SAVING
            self._passage(ingest).save(ingest.shard)
        else:
            ingest.stage = Stage.SEALING
            self._passage(ingest).finish(seals)

    def _sealed(self, ingest: Ingest) -> None:
        """All is complete; what lies on NVMe only needs its rows before anybody may read it."""
        passage = self._passage(ingest)
        if not passage.written:
            self._complete(ingest)
            return
        ingest.stage = Stage.CATALOGING

        def enrolled(claimed: list[Enrolled], error: HoldfastError | None) -> None:
            passage.in_flight -= 1
            if ingest.stage is Stage.ENDED or error is not None:
                self.enrolments.withdraw(claimed)
                self._end(ingest, error or InUse("aborted"))
                self._sweep(ingest)
                return
            self.enrolments.accept(claimed)
            self._publish(ingest, self.room.writes.decide(ingest.document, ingest.extents))
            for item in claimed:
                self.store.reap(item.record)  # a document that lost other extents meanwhile is not published

        passage.in_flight += 1
        self.enrolments.request(
            Enrolment(
                ingest=ingest.id,
                extents=ingest.missing,
                written=passage.written,
                held=ingest.held,
                is_open=lambda: ingest.stage is not Stage.ENDED,
                done=enrolled,
            )
        )

    def _complete(self, ingest: Ingest) -> None:
        """All is complete: publish it, after its turn if commits have to wait for the disk."""
        ingest.stage = Stage.BEHIND
        ingest.turn = Turn(
            ingest=ingest.id,
            deadline_ns=ingest.deadline_ns,
            granted=lambda decision: self._publish(ingest, decision),
            refused=lambda error: self._end(ingest, error),
        )
        self.room.writes.admit(ingest.turn, ingest.document, ingest.extents)

    def _publish(self, ingest: Ingest, decision: Decision) -> None:
        """Adopt the copies and make the document visible: the point of acknowledgement."""
        records = self.store.records
        for extent in ingest.extents:
            if extent.id not in ingest.filled and not self.present(extent):
                gone = f"tokens [{extent.start}, {extent.stop}) were lost meanwhile"
                self._end(ingest, DocumentIncomplete(f"{ingest.document.id}: {gone}; ingest it again"))
                return
        ingest.stage = Stage.ENDED
        published = records.documents.get(ingest.document.id)
        known = published.document if published is not None else None
        document = ingest.document = dated(ingest.document, known, ingest.ttl_ns, self.store.clock.wall_ns())
        owner = frozenset((document.id,))
        self.store.planner.uses.published(document)
        for extent in ingest.extents:
            record = records.extents.setdefault(extent.id, ExtentRecord(extent=extent))
            record.extent = extent  # a restart may have left it without block keys
            records.fronts.add(extent)
            record.join(owner)
            placement = ingest.filled.get(extent.id)
            if placement is not None and self.store.offer(record, placement):
                records.private[ingest.id].remove(placement)  # `_release` gives back what was a duplicate
        self.room.writes.publish_early(ingest.id)
        if published is None:
            published = records.publish(DocumentRecord(document=document))
        elif ingest.grows:
            published = replaced(self.store, published, document)
        elif published.document.expires_wall_ns != document.expires_wall_ns:
            published.document = replace(published.document, expires_wall_ns=document.expires_wall_ns)
            published.durable = False  # its row has to be written again
        if ingest.tokens is not None:
            records.changes.published(ingest.extents, ingest.tokens)
        published.volatile = {e.id for e in ingest.extents if not records.extents[e.id].cataloged}
        published.durable = published.durable and not published.volatile
        self.store.notes.add(PutSpec(records.specs[document.fingerprint]))
        self.store.notes.add(PutDocument(published.document))
        self._release(ingest)
        self.room.writes.committed(published, decision)
        if ingest.grows:
            self.grew(document)
        committed, ingest.committed = ingest.committed, None
        if committed is not None:
            committed(None)

    def present(self, extent: Extent) -> bool:
        """Whether a copy of it is there, or on its way."""
        record = self.store.records.extents.get(extent.id)
        return record is not None and record.source() is not None

    # Ends --------------------------------------------------------------------------------------

    def abort(self, ingest: Ingest) -> None:
        """The writer gives up, or is gone."""
        self._end(ingest, InUse(f"ingest {ingest.id} was aborted"))

    def fail_group(self, name: str, error: HoldfastError) -> None:
        """The group is gone: so are the ingests that it fills."""
        for ingest in [ingest for ingest in self.open.values() if ingest.group == name]:
            self._end(ingest, error)

    def _stuck(self, ingest: Ingest, error: HoldfastError) -> None:
        """Something cannot be sealed or written out. A writer may be filling slots: they stay its own until it ends."""
        if ingest.stage is Stage.FILLING:
            ingest.stage, ingest.error = Stage.FAILED, error
            self._passage(ingest).stop(error)
        else:
            self._end(ingest, error)

    def _end(self, ingest: Ingest, error: HoldfastError) -> None:
        if ingest.stage is Stage.ENDED:
            return
        ingest.stage = Stage.ENDED
        ingest.error = error
        if ingest.reservation is not None:
            self.room.cancel(ingest.reservation)
            ingest.reservation = None
        if ingest.passage is not None:
            ingest.passage.stop(error)
        if ingest.turn is not None:
            self.room.writes.cancel(ingest.turn)
        self._ready(ingest, error)
        committed, ingest.committed = ingest.committed, None
        if committed is not None:
            committed(error)
        self._sweep(ingest)

    def _sweep(self, ingest: Ingest) -> None:
        """Give everything back once no move is under way."""
        is_moving = ingest.passage is not None and ingest.passage.in_flight > 0
        if ingest.id not in self.open or ingest.stage is not Stage.ENDED or is_moving:
            return
        shard = ingest.shard
        arrived = ingest.loading is not None and ingest.loading.phase is Phase.READY
        self._release(ingest)
        known = self.store.records.documents.get(ingest.document.id)
        is_there = known is not None and known.document.token_count == ingest.document.token_count
        is_kept = shard is not None and (not shard.copies or (is_there and shard.complete))  # as good as before
        if arrived and shard is not None and not is_kept and shard.group in self.store.records.groups:
            self.store.close_shard(shard)

    def _release(self, ingest: Ingest) -> None:
        """Free private copies and every hold; a published shard's copies become readable."""
        del self.open[ingest.id]
        self.room.writes.end_early(ingest.id)
        for placement in self.store.records.private.pop(ingest.id):
            placement.holds -= 1
            self.store.records.leaving.append(placement)  # until an early write that is under way has ended
            self.store.fail(placement)
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
                    self.store.records.changes.note(copy.extent)
        self.loader.release(ingest.loading)
