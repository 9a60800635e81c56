"""Demand: room that somebody needs, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field

from .document import DocumentId
from .slots import SlotClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Room that is needed at once: DDR slots by class, and rows per rank for a document's shard in a group.

    `replaces` is a shard that gives up its rows for this.
    """

    slots: dict[SlotClass, int] = field(default_factory=dict)
    group: str | None = None
    document: DocumentId | None = None
    rows: tuple[int, ...] = ()
    replaces: int | None = None

    @property
    def tenant(self) -> str | None:
        """Whose slots they are: one tenant's; None where none are needed."""
        owners = {kind.owner for kind in self.slots}
        assert len(owners) < 2, f"one demand for {owners}"
        return next(iter(owners), None)

    @property
    def size_bytes(self) -> int:
        """Of DDR."""
        return sum(kind.slot_bytes * count for kind, count in self.slots.items())
