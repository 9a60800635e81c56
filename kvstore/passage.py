"""Passage: the private copies of one ingest, from the first slot that is filled to the last that is sealed.

A document that DDR takes whole has all of its slots at once. A larger one passes through a window: what is filled is
sealed and written to private NVMe slots as long as other extents need the room, and each slot that this frees goes to
the next extent at once, so that a passage which has begun never waits for room in DDR again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from .errors import HoldfastError, InUse, InvalidRequest
from .extent import Extent
from .geometry import Geometry, extent_geometry
from .ledger import Hop
from .orders import Outcome, Part, SaveShard, Seal
from .residency import Placement, Tier
from .seal import CHECKSUM_BYTES
from .spill import Spill, Spilling
from .state import Shard
from .store import Store

Given = Callable[[list[Extent] | HoldfastError], None]


class Passage:
    """`missing` in document order, `queue` in the order in which they pass through a window.

    `filled` are the copies in DDR, `written` those on NVMe.
    `complete` is called when all extents are sealed, `failed` when one cannot be, and `idle` when, after `stop`, no
    move is under way any more.
    """

    def __init__(
        self,
        store: Store,
        spill: Spill,
        ingest: int,
        missing: Sequence[Extent],
        queue: Sequence[Extent],
        patience_ns: int,
        *,
        complete: Callable[[], None],
        failed: Callable[[HoldfastError], None],
        idle: Callable[[], None],
    ) -> None:
        self.store = store
        self.spill = spill
        self.ingest = ingest
        self.patience_ns = patience_ns
        self.early: Callable[[Extent], None] | None = None  # takes what is handed over before everything is filled
        self.filled: dict[str, Placement] = {}
        self.written: dict[str, Placement] = {}
        self.in_flight = 0
        self.todo = list(queue)  # no slot yet
        self.window = list(missing)  # what gets slots at the beginning, in document order
        self._missing = missing
        self._numbers = {extent.id: number for number, extent in enumerate(missing)}
        self._unsealed = len(missing)
        self._needed: Counter[int] = Counter()  # slots of each size that nothing under way will free
        self._shard: Shard | None = None
        self._handed: set[str] = set()  # filled: nobody writes to them any more
        self._given: list[Extent] = []  # slots that the writer has not heard of
        self._asking: Given | None = None
        self._is_final = False  # its writer adds nothing any more
        self._is_over = False
        self._complete = complete
        self._failed = failed
        self._idle = idle

    @property
    def streams(self) -> bool:
        """Whether it takes DDR for a part of its extents only."""
        return len(self.window) < len(self._missing)

    def narrow(self, window_bytes: int) -> bool:
        """Begin with a window: the first of the queue, and one of each size. False when that is all there is."""
        first = set()
        kinds = set()
        for extent in self.todo:
            if extent.slot_bytes <= window_bytes or extent.slot_bytes not in kinds:
                first.add(extent.id)
                kinds.add(extent.slot_bytes)
                window_bytes -= extent.slot_bytes
        self.window = [extent for extent in self.window if extent.id in first]
        return self.streams

    def begin(self) -> None:
        """Take the slots that were granted."""
        for extent in self.window:
            self._take(extent)
        first = {extent.id for extent in self.window}
        self.todo = [extent for extent in self.todo if extent.id not in first]
        self._needed = Counter(extent.slot_bytes for extent in self.todo)

    def _take(self, extent: Extent) -> None:
        placement = self.store.take(extent, Tier.DDR)
        assert placement is not None, "granted without a slot"
        placement.holds += 1  # the writer's
        self.filled[extent.id] = placement
        self.store.records.private[self.ingest].append(placement)

    # Filling -----------------------------------------------------------------------------------

    def save(self, shard: Shard) -> None:
        """Let the ranks of a group fill the slots from its rows: these, and those that follow."""
        self._shard = shard
        self._is_final = True
        if self.streams:
            for extent in self.window:
                self._save([extent])
        elif self.window:
            self._save(self.window)

    def _save(self, extents: Sequence[Extent]) -> None:
        assert self._shard is not None
        parts = []
        for extent in extents:
            slot = self.filled[extent.id].slot
            assert slot is not None
            parts.append(Part(slot, extent.start, extent.valid_tokens))
        shard = self._shard
        order = SaveShard(id=self.store.new_id(), group=shard.group, shard=shard.id, parts=tuple(parts))
        started_ns = self.store.clock.monotonic_ns()

        def saved(outcome: Outcome) -> None:
            if self._goes_on(outcome.error):
                hop, now_ns = Hop(Tier.HBM, Tier.DDR), self.store.clock.monotonic_ns()
                self.store.records.ledger.moved(hop, outcome.size_bytes, outcome.busy_ns, started_ns, now_ns)
                self.store.planner.learn(hop, outcome.size_bytes, outcome.busy_ns)
                self._seal_all(extents)

        self.in_flight += 1
        self.store.submit(order, saved)

    def check_seals(self, extents: Sequence[Extent], seals: Sequence[bytes]) -> None:
        """Raises InvalidRequest unless there is one seal for each extent, of its size or empty."""
        if len(seals) != len(extents):
            raise InvalidRequest(f"{len(seals)} seals for {len(extents)} extents; send one each, or none")
        for extent, seal in zip(extents, seals, strict=True):
            wanted = self._geometry(extent).plane_count * CHECKSUM_BYTES
            if seal and len(seal) != wanted:
                raise InvalidRequest(
                    f"a seal of {len(seal)} B for tokens [{extent.start}, {extent.stop}), not {wanted}"
                )

    def _geometry(self, extent: Extent) -> Geometry:
        return extent_geometry(self.store.records.specs[extent.fingerprint], extent.group)

    @property
    def unsealed(self) -> list[Extent]:
        """What has a slot and was not handed over, in document order."""
        here = [extent for extent in self.filled if extent not in self._handed]
        return [self._missing[number] for number in sorted(self._numbers[extent] for extent in here)]

    def next_slots(self, filled: Sequence[tuple[int, int]], seals: Sequence[bytes], given: Given) -> None:
        """The writer hands these over, by (first token, layer group); `given` hears of the slots that they make free.

        It is called as soon as there is one, with none when no extent waits for a slot, or for one of this size: then
        nothing under way makes any free, and others have to be handed over. Raises InvalidRequest
        for what is not the writer's to hand over, and InUse while it is still waiting.
        """
        mine = {(extent.start, extent.group): extent for extent in self.unsealed}
        if self._asking is not None:
            raise InUse("this ingest is waiting for slots already")
        for key in filled:
            if key not in mine:
                raise InvalidRequest(f"no slot of this writer begins at token {key[0]} of layer group {key[1]}")
        extents = [mine[key] for key in dict.fromkeys(filled)]
        if not extents and not self._given and self.todo and not self.in_flight:
            raise InvalidRequest("hand over filled extents: only their slots can become free")
        if seals:
            self.check_seals(extents, seals)
        self._asking = given
        self.hand_over(extents, seals)
        self._give()

    def _give(self) -> None:
        if self._asking is not None and (self._given or not self.todo or not self.in_flight):
            given, self._asking = self._asking, None
            extents, self._given = self._given, []
            given(extents)

    def finish(self, seals: Sequence[bytes]) -> None:
        """Everything is filled. `seals` are those of `unsealed`, or none."""
        self._is_final = True
        self.hand_over(self.unsealed, seals)
        self._end_if_complete()

    def hand_over(self, extents: Sequence[Extent], seals: Sequence[bytes]) -> None:
        """Seal these, or take their writer's seals."""
        for extent, seal in zip(extents, seals, strict=False):
            self.filled[extent.id].checksums = seal
        self._seal_all(extents)

    def _seal_all(self, extents: Sequence[Extent]) -> None:
        """These are filled, and nobody writes to them any more. What its writer has not sealed is sealed here."""
        self._handed.update(extent.id for extent in extents)
        for extent in extents:
            if self.filled[extent.id].checksums:
                self._is_sealed(extent)
            else:
                self._seal(extent)

    def _seal(self, extent: Extent) -> None:
        placement = self.filled[extent.id]
        assert placement.slot is not None
        order = Seal(id=self.store.new_id(), slot=placement.slot, geometry=self._geometry(extent))

        def sealed(outcome: Outcome) -> None:
            if self._goes_on(outcome.error):
                placement.checksums = outcome.checksums
                self._is_sealed(extent)
                self._give()

        self.in_flight += 1
        self.store.submit(order, sealed)

    def _is_sealed(self, extent: Extent) -> None:
        self._unsealed -= 1
        if self._needed[extent.slot_bytes]:
            self._needed[extent.slot_bytes] -= 1
            self._spill(extent)
        elif self.early is not None and not self._is_final:
            self.early(extent)
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if self._is_final and not self._is_over and not self.in_flight and not self._unsealed:
            self._is_final = False  # once
            self._complete()

    # Moving on ---------------------------------------------------------------------------------

    def _spill(self, extent: Extent) -> None:
        """Write it out, because another needs its slot."""
        spilling = Spilling(
            ingest=self.ingest,
            extent=extent,
            source=self.filled[extent.id],
            deadline_ns=self.store.clock.monotonic_ns() + self.patience_ns,
            done=lambda result: self._spilled(extent, result),
        )
        self.in_flight += 1
        self.spill.request(spilling)

    def _spilled(self, extent: Extent, result: Placement | HoldfastError) -> None:
        if not self._goes_on(result if isinstance(result, HoldfastError) else None):
            return
        assert isinstance(result, Placement)
        self.written[extent.id] = result
        source = self.filled.pop(extent.id)
        source.holds -= 1
        self.store.fail(source)
        following = next(e for e in self.todo if e.slot_bytes == extent.slot_bytes)
        self.todo.remove(following)
        self._take(following)
        if self._shard is not None:
            self._save([following])
        else:
            self._given.append(following)
            self._give()
        self._end_if_complete()

    def _goes_on(self, error: HoldfastError | None) -> bool:
        """A move has ended: whether the passage goes on after that."""
        self.in_flight -= 1
        if self._is_over:
            if not self.in_flight:
                self._idle()
            return False
        if error is not None:
            self._failed(error)
            return False
        return True

    def stop(self, error: HoldfastError) -> None:
        """The ingest has ended: let nothing follow what is under way."""
        self._is_over = True
        given, self._asking = self._asking, None
        if given is not None:
            given(error)
        self.in_flight -= self.spill.cancel(self.ingest)
