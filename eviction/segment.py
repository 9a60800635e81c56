"""Segment: a queue with a share of a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from .use import UnitId


class Segment:
    """Its newest units, up to `share_bytes`, are within the share; the older ones are over. O(1) amortised."""

    def __init__(self, share_bytes: float) -> None:
        self._share_bytes = share_bytes
        self._within: OrderedDict[UnitId, int] = OrderedDict()  # the oldest first, all newer than what is over
        self._over: OrderedDict[UnitId, int] = OrderedDict()
        self._within_bytes = 0
        self._over_bytes = 0

    def push(self, unit: UnitId, size_bytes: int) -> None:
        """At the back, as the newest."""
        self._within[unit] = size_bytes
        self._within_bytes += size_bytes
        self._balance()

    def take(self, unit: UnitId) -> int:
        """Out of the queue, wherever it stands; its bytes."""
        size_bytes = self._over.pop(unit, None)
        if size_bytes is not None:
            self._over_bytes -= size_bytes
        else:
            size_bytes = self._within.pop(unit)
            self._within_bytes -= size_bytes
        self._balance()
        return size_bytes

    def renew(self, unit: UnitId) -> None:
        """To the back, from wherever it stands."""
        if unit in self._within:
            self._within.move_to_end(unit)
        else:
            self.push(unit, self.take(unit))

    def resize(self, share_bytes: float) -> None:
        """Another share from now on."""
        self._share_bytes = share_bytes
        self._balance()

    @property
    def over(self) -> Collection[UnitId]:
        """What is over the share, the oldest first."""
        return self._over

    @property
    def size_bytes(self) -> int:
        """Of all its units."""
        return self._within_bytes + self._over_bytes

    @property
    def share_bytes(self) -> float:
        """As of the last resize."""
        return self._share_bytes

    def __contains__(self, unit: UnitId) -> bool:
        return unit in self._within or unit in self._over

    def _balance(self) -> None:
        while self._within and self._within_bytes > self._share_bytes:
            unit, size_bytes = self._within.popitem(last=False)
            self._within_bytes -= size_bytes
            self._over[unit] = size_bytes
            self._over_bytes += size_bytes
        while self._over:
            newest = next(reversed(self._over))
            if self._within_bytes + self._over[newest] > self._share_bytes:
                return
            size_bytes = self._within[newest] = self._over.pop(newest)
            self._within.move_to_end(newest, last=False)
            self._within_bytes += size_bytes
            self._over_bytes -= size_bytes
