"""Band: which keys a query sees, by the distance of their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Band:
    """A query at position p sees the keys at positions [p + first, p + last]; None leaves that side open."""

    first: int | None = None
    last: int | None = None

    def moved(self, distance: int) -> Band:
        """The same band when every key's position is `distance` larger."""
        first = None if self.first is None else self.first + distance
        return Band(first, None if self.last is None else self.last + distance)


FULL: Final = Band()
DIAGONAL: Final = Band(last=0)


def causal(window: int | None) -> Band:
    """Keys up to the query's own position, of which a sliding window sees the last `window`."""
    assert window is None or window >= 1, "a window holds at least the token itself"
    return DIAGONAL if window is None else Band(1 - window, 0)
