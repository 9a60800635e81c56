"""What is remembered of units that are not in a cache, with a limit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Generic, TypeVar

from .use import UnitId

GHOSTS_MAX: Final = 1_000_000

T = TypeVar("T")


class Bounded(Generic[T]):
    """Something about each of at most `count` units; those told about longest ago are forgotten."""

    def __init__(self, count: int) -> None:
        assert count > 0, count
        self._count = count
        self._notes: OrderedDict[UnitId, T] = OrderedDict()  # the oldest first

    def put(self, unit: UnitId, note: T) -> None:
        """Told about just now."""
        self._notes[unit] = note
        self._notes.move_to_end(unit)
        if len(self._notes) > self._count:
            self._notes.popitem(last=False)

    def get(self, unit: UnitId) -> T | None:
        """None where nothing is remembered."""
        return self._notes.get(unit)

    def pop(self, unit: UnitId) -> T | None:
        """The same, and forget it."""
        return self._notes.pop(unit, None)

    def __len__(self) -> int:
        return len(self._notes)


class Ghosts:
    """What has left: sizes and uses of as many as took so many bytes (and no more than GHOSTS_MAX)."""

    def __init__(self, limit_bytes: float) -> None:
        self._limit_bytes = limit_bytes
        self._ghosts: OrderedDict[UnitId, tuple[int, int]] = OrderedDict()  # bytes, uses; the oldest first
        self.size_bytes = 0

    def put(self, unit: UnitId, size_bytes: int, uses: int = 0) -> None:
        """It has left; it must not have been a ghost."""
        assert unit not in self._ghosts, f"{unit} left twice"
        self._ghosts[unit] = (size_bytes, uses)
        self.size_bytes += size_bytes
        self.trim(self._limit_bytes)

    def trim(self, limit_bytes: float) -> None:
        """Forget the oldest down to this."""
        while self._ghosts and (self.size_bytes > limit_bytes or len(self._ghosts) > GHOSTS_MAX):
            self.size_bytes -= self._ghosts.popitem(last=False)[1][0]

    def bytes_of(self, unit: UnitId) -> int:
        """What this ghost took."""
        return self._ghosts[unit][0]

    def uses(self, unit: UnitId) -> int:
        """Before it left; 0 for what is no ghost."""
        ghost = self._ghosts.get(unit)
        return ghost[1] if ghost else 0

    def discard(self, unit: UnitId) -> bool:
        """Forget it, and say whether it was there."""
        ghost = self._ghosts.pop(unit, None)
        if ghost is None:
            return False
        self.size_bytes -= ghost[0]
        return True

    def __contains__(self, unit: UnitId) -> bool:
        return unit in self._ghosts

    def __len__(self) -> int:
        return len(self._ghosts)
