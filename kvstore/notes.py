"""Notes: what a command changes of that which a successor may find in DDR, told to the warm index at its end."""

from __future__ import annotations

from .orders import DropExtent, Effects, Note, PutExtent, Record
from .state import ExtentRecord


class Notes:
    """Collects records until `flush`."""

    def __init__(self, effects: Effects) -> None:
        self._effects = effects
        self._records: list[Record] = []

    def add(self, record: Record) -> None:
        """Tell this."""
        self._records.append(record)

    def add_ddr(self, record: ExtentRecord) -> None:
        """Tell where the extent lies, complete and sealed, or that it does not."""
        copy = record.ddr
        if copy is not None and copy.readable:
            assert copy.slot is not None
            self.add(PutExtent(record.extent, copy.checksums, copy.slot))
        else:
            self.add(DropExtent(record.extent.id))

    def flush(self) -> None:
        """Send what was collected."""
        if self._records:
            records, self._records = self._records, []
            self._effects.submit(Note(records=tuple(records)))
