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
