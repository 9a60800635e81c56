"""Passage: the private copies of one ingest, from the first slot that is filled to the last that is sealed.

A document that DDR takes whole has all of its slots at once. A larger one passes through a window: what is filled is
sealed and written to private NVMe slots as long as other extents need the room, and each slot that this frees goes to
the next extent at once, so that a passage which has begun never waits for room in DDR again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from .errors import HoldfastError, InvalidRequest
from .extent import Extent
from .geometry import Geometry, extent_geometry
from .ledger import Hop
from .orders import Outcome, Part, SaveShard, Seal
from .residency import Placement, Tier
from .seal import CHECKSUM_BYTES
from .spill import Spill, Spilling
from .state import Shard
from .store import Store


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
        self.filled: dict[str, Placement] = {}
        self.written: dict[str, Placement] = {}
        self.in_flight = 0
        self.todo = list(queue)  # no slot yet
        self.window = list(missing)  # what gets slots at the beginning, in document order
        self._count = len(missing)
        self._unsealed = len(missing)
        self._needed: Counter[int] = Counter()  # slots of each size that nothing under way will free
        self._shard: Shard | None = None
        self._is_over = False
        self._complete = complete
        self._failed = failed
        self._idle = idle

    @property
    def streams(self) -> bool:
        """Whether it takes DDR for a part of its extents only."""
        return len(self.window) < self._count

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
                self.seal(extents)

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

    def seal(self, extents: Sequence[Extent]) -> None:
        """These are filled, and nobody writes to them any more. What its writer has not sealed is sealed here."""
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

        self.in_flight += 1
        self.store.submit(order, sealed)

    def _is_sealed(self, extent: Extent) -> None:
        self._unsealed -= 1
        if self._needed[extent.slot_bytes]:
            self._needed[extent.slot_bytes] -= 1
            self._spill(extent)
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if not self.in_flight and not self._unsealed:
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

    def stop(self) -> None:
        """The ingest has ended: let nothing follow what is under way."""
        self._is_over = True
        self.in_flight -= self.spill.cancel(self.ingest)
