"""Claims: leases (a holder uses bytes now) and pins (an operator wants them near).

Leases end by detach, or when their holder is gone; past the deadline they are overdue and shown, but the bytes stay
until the holder lets go. Pins have a byte budget, and an end unless told otherwise, so neither can wedge the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .document import DocumentId
from .errors import ClaimNotFound, PinsOvercommitted
from .residency import Tier


@dataclass(slots=True, kw_only=True)
class Lease:
    """Client `owner` uses the document's bytes until it says otherwise. Times are monotonic nanoseconds."""

    id: int
    owner: int
    document: DocumentId
    granted_ns: int
    deadline_ns: int

    def overdue(self, now_ns: int) -> bool:
        """Past its deadline; it keeps its bytes but is reported."""
        return now_ns > self.deadline_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """The document never sinks below `floor` until `expires_wall_ns` (None: until unpinned)."""

    document: DocumentId
    floor: Tier
    size_bytes: int
    owner: str
    reason: str
    created_wall_ns: int
    expires_wall_ns: int | None


class Pins:
    """At most one pin per document, all together within `budget_bytes`."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._pins: dict[DocumentId, Pin] = {}

    @property
    def pinned_bytes(self) -> int:
        """Bytes counted against the budget."""
        return sum(pin.size_bytes for pin in self._pins.values())

    def all(self) -> list[Pin]:
        """Every pin, by document."""
        return [self._pins[key] for key in sorted(self._pins)]

    def get(self, document: DocumentId) -> Pin | None:
        """The document's pin."""
        return self._pins.get(document)

    def add(self, pin: Pin) -> None:
        """Pin, or replace the document's pin. Raises PinsOvercommitted and changes nothing when over budget."""
        self._refuse_overcommitted(pin.document, pin.size_bytes)
        self._pins[pin.document] = pin

    def check(self, document: DocumentId, size_bytes: int) -> None:
        """Raises PinsOvercommitted if the document is pinned and, that large, would be over budget."""
        if document in self._pins:
            self._refuse_overcommitted(document, size_bytes)

    def resize(self, document: DocumentId, size_bytes: int) -> Pin | None:
        """The pin of a document that has grown; None when it has none."""
        pin = self._pins.get(document)
        if pin is not None:
            pin = self._pins[document] = replace(pin, size_bytes=size_bytes)
        return pin

    def _refuse_overcommitted(self, document: DocumentId, size_bytes: int) -> None:
        old = self._pins.get(document)
        others = self.pinned_bytes - (old.size_bytes if old else 0)
        if others + size_bytes > self.budget_bytes:
            biggest = sorted(self._pins.values(), key=lambda p: (-p.size_bytes, p.document))[:3]
            held = ", ".join(f"{p.document} {p.size_bytes} B" for p in biggest) or "nothing"
            raise PinsOvercommitted(
                f"pinning {document} ({size_bytes} B) exceeds the pin budget: "
                f"{others} of {self.budget_bytes} B are taken ({held}); unpin something or raise limits.pin_bytes"
            )

    def remove(self, document: DocumentId) -> Pin:
        """Unpin. Raises ClaimNotFound."""
        pin = self._pins.pop(document, None)
        if pin is None:
            raise ClaimNotFound(f"{document} is not pinned")
        return pin

    def expired(self, wall_ns: int) -> list[Pin]:
        """The pins whose time is up."""
        return [pin for pin in self.all() if pin.expires_wall_ns is not None and pin.expires_wall_ns <= wall_ns]
