"""Writing: what waits for the disk, an extent or a commit. See writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from .errors import HoldfastError
from .extent import Extent
from .orders import Urgency
from .residency import Placement
from .reuse import Decision
from .slots import SlotClass
from .state import ExtentRecord


@dataclass(eq=False, slots=True, kw_only=True)
class Turn:
    """An ingest's commit that waits until the backlog has room for its bytes; `granted` hears what was decided."""

    ingest: int
    deadline_ns: int | None
    granted: Callable[[Decision], None]
    refused: Callable[[HoldfastError], None]
    size_bytes: int = 0


class Life(StrEnum):
    """Whose the extent is that is written: a published document's, or still an ingest's."""

    QUEUED = "queued"  # an open ingest's
    BEGUN = "begun"  # its target is private
    LANDED = "landed"  # the same, and all bytes are on NVMe
    ENDED = "ended"  # its ingest is no more, and nobody wants what is being written
    PUBLISHED = "published"


@dataclass(eq=False, slots=True, kw_only=True)
class Item:
    """An extent that is to be written from `source`, which is held until the write has ended.

    `record` is nobody's until the item is published, and so are `ingest` and `target`, which others do not need.
    """

    record: ExtentRecord
    source: Placement
    urgency: Urgency
    life: Life
    ingest: int | None = None
    target: Placement | None = None

    @property
    def extent(self) -> Extent:
        return self.record.extent

    @property
    def size_bytes(self) -> int:
        return self.record.extent.slot_bytes

    @property
    def kind(self) -> SlotClass:
        return SlotClass("", self.record.extent.slot_bytes)
