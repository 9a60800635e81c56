"""Repairs: what an audit of the running daemon asks of the service: to read a copy again, to mend what is wrong."""

from __future__ import annotations

from collections.abc import Callable

from .errors import HoldfastError
from .extent import ExtentId
from .findings import Commit, EndClaims, Forget, Remove, Repair
from .geometry import extent_geometry
from .orders import DropExtent, DropPin, Outcome, Record, Scrub, Write
from .service import Service

Done = Callable[[HoldfastError | None], None]


class Repairs:
    """On the service's thread. `done` hears, once, how each ended."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.store = service.store
        self.state = service.state

    def scrub(self, extent: ExtentId, done: Done) -> None:
        """Read an extent's NVMe copy and compare it with its seal; `done` at once where there is none (any more)."""
        record = self.state.extents.get(extent)
        copy = record.nvme if record is not None else None
        if record is None or copy is None or not copy.readable or copy.slot is None:
            done(None)
            return
        copy.holds += 1  # not `hold`: looking is no hit, and cancels no drain
        geometry = extent_geometry(self.state.specs[record.extent.fingerprint], record.extent.group)
        order = Scrub(id=self.store.new_id(), extent=extent, slot=copy.slot, geometry=geometry)

        def ended(outcome: Outcome) -> None:
            self.store.unhold(copy)
            done(outcome.error)

        self.store.submit(order, ended)

    def carry_out(self, repair: Repair, done: Done) -> None:
        """Mend; `done` when the catalog has it too."""
        match repair:
            case Forget(extent=extent):
                self._forget(extent, done)
            case EndClaims(client=client):
                self.service.disconnect(client)
                done(None)
            case Commit(record=record):
                if isinstance(record, DropPin) and any(pin.document == record[:2] for pin in self.state.pins.all()):
                    done(None)  # pinned meanwhile
                else:
                    self._commit(record, done)
            case Remove():
                raise AssertionError("files are not the service's")

    def _forget(self, extent: ExtentId, done: Done) -> None:
        record = self.state.extents.get(extent)
        if record is not None and record.nvme is not None:
            if not record.nvme.readable:  # being written: its row will be right
                done(None)
                return
            self.state.ledger.counts["quarantined"] += 1
            self.store.fail_nvme(record, record.nvme)
        self._commit(DropExtent(extent), done)
        if record is not None and record.documents:
            self.service.writes.write_again(record)  # from DDR, if it is there too

    def _commit(self, record: Record, done: Done) -> None:
        self.store.submit(Write(id=self.store.new_id(), records=(record,)), lambda outcome: done(outcome.error))
