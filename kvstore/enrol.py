"""Enrol: the extents of a document that were written to NVMe while it was private get their rows in the catalog.

They become their records' NVMe copies, still unreadable, then all rows are committed together, then the document is
published. Rows are by extent, so only one ingest at a time does this: the next finds what the one before has made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import HoldfastError
from .extent import Extent
from .orders import Outcome, PutExtent, PutWear, Record, Write
from .placing import place
from .residency import Event, Placement, Tier
from .state import ExtentRecord
from .store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """A record and the copy that it was given, which is held."""

    record: ExtentRecord
    copy: Placement


@dataclass(eq=False, slots=True, kw_only=True)
class Enrolment:
    """One ingest's wish. `held` takes what stands in for copies that are duplicates.

    `done` hears the copies that have, or may have, rows, and why the commit failed if it did: it calls `accept` or
    `withdraw`.
    """

    ingest: int
    extents: Sequence[Extent]
    written: dict[str, Placement]
    held: list[Placement]
    is_open: Callable[[], bool]
    done: Callable[[list[Enrolled], HoldfastError | None], None]


class Enrolments:
    """Carries them out, one after the other."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._is_busy = False
        self._waiting: deque[Enrolment] = deque()

    def request(self, enrolment: Enrolment) -> None:
        """Start it as soon as the one before has ended."""
        self._waiting.append(enrolment)
        self._next()

    def _next(self) -> None:
        while self._waiting and not self._is_busy:
            enrolment = self._waiting.popleft()
            claimed = self._claim(enrolment) if enrolment.is_open() else []
            if claimed:
                self._is_busy = True
                self._commit(enrolment, claimed)
            else:
                enrolment.done([], None)

    def _claim(self, enrolment: Enrolment) -> list[Enrolled]:
        """Make the copies those of their records; where NVMe has one already, give ours back and hold theirs."""
        records = self.store.records
        private = records.private[enrolment.ingest]
        claimed = []
        for extent in enrolment.extents:
            ours = enrolment.written.get(extent.id)
            if ours is None:
                continue
            record = records.extents.setdefault(extent.id, ExtentRecord(extent=extent))
            if record.ddr is not None and record.ddr.readable:
                enrolment.held.append(self.store.hold(record.ddr))  # it must not leave for a copy that has no row yet
            if record.nvme is None:
                private[:] = [copy for copy in private if copy is not ours]
                place(records, record, Tier.NVME, ours)
                claimed.append(Enrolled(record=record, copy=ours))
                continue
            if record.nvme.readable:
                enrolment.held.append(self.store.hold(record.nvme))
            else:
                assert record.ddr is not None, "it is being written from DDR"
                assert record.ddr.readable, record.ddr
            ours.holds -= 1
            self.store.fail(ours)
        return claimed

    def _commit(self, enrolment: Enrolment, claimed: list[Enrolled]) -> None:
        puts: list[Record] = []
        for item in claimed:
            assert item.copy.slot is not None
            puts.append(PutExtent(item.record.extent, item.copy.checksums, item.copy.slot))

        def committed(outcome: Outcome) -> None:
            self._is_busy = False
            enrolment.done(claimed, outcome.error)
            self._next()

        puts.append(PutWear(self.store.records.ledger.wear))
        self.store.submit(Write(id=self.store.new_id(), records=tuple(puts)), committed)

    def accept(self, claimed: Sequence[Enrolled]) -> None:
        """They may be read; whoever calls joins a document to them at once."""
        for item in claimed:
            item.copy.checksums = b""  # the row has them
            item.copy.apply(Event.COMPLETE)
            self.store.records.changes.note(item.record.extent.id)
            item.copy.holds -= 1
            item.record.cataloged = item.record.stored = True

    def withdraw(self, claimed: Sequence[Enrolled]) -> None:
        """Take them out of the catalog again: their rows may be there whether or not the commit failed."""
        for item in claimed:
            item.copy.holds -= 1
            self.store.fail_nvme(item.record, item.copy)
