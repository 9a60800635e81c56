"""Residents: what one cache holds, as a forest that is kept up to date."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from .use import UnitId


class Forest(Protocol):
    """What victims are chosen from. See Residents."""

    @property
    def leaves(self) -> Sequence[UnitId]: ...

    def previous(self, unit_id: UnitId) -> UnitId | None: ...

    def followers(self, unit_id: UnitId) -> int: ...

    def __contains__(self, unit_id: UnitId) -> bool: ...


class Residents:
    """Every change is O(1). A leaf is resident and nothing resident follows it.

    Ids need not come in the order of their chain: what follows one that is not here, or not yet, behaves like a front.
    """

    def __init__(self) -> None:
        self._previous: dict[UnitId, UnitId | None] = {}
        self._followers: dict[UnitId, int] = {}  # of what residents name as previous, here or not
        self._leaves: list[UnitId] = []
        self._places: dict[UnitId, int] = {}  # of leaves in that list

    def came(self, unit_id: UnitId, previous: UnitId | None) -> None:
        """It is here from now on; it must not have been."""
        assert unit_id not in self._previous, f"{unit_id} came twice"
        self._previous[unit_id] = previous
        if unit_id not in self._followers:
            self._grow(unit_id)
        if previous is None:
            return
        self._followers[previous] = self._followers.get(previous, 0) + 1
        if previous in self._places:
            self._cover(previous)

    def left(self, unit_id: UnitId) -> None:
        """It is not here any more; it must have been."""
        previous = self._previous.pop(unit_id)
        if unit_id in self._places:
            self._cover(unit_id)
        if previous is None:
            return
        followers = self._followers[previous] - 1
        if followers:
            self._followers[previous] = followers
            return
        del self._followers[previous]
        if previous in self._previous:
            self._grow(previous)

    def _grow(self, unit_id: UnitId) -> None:
        self._places[unit_id] = len(self._leaves)
        self._leaves.append(unit_id)

    def _cover(self, unit_id: UnitId) -> None:
        """No leaf any more: the last one of the list takes its place."""
        place, last = self._places.pop(unit_id), self._leaves.pop()
        if last != unit_id:
            self._leaves[place] = last
            self._places[last] = place

    def __contains__(self, unit_id: UnitId) -> bool:
        return unit_id in self._previous

    def __len__(self) -> int:
        return len(self._previous)

    def __iter__(self) -> Iterator[UnitId]:
        return iter(self._previous)

    def previous(self, unit_id: UnitId) -> UnitId | None:
        """The one before a resident, here or not; None at the front of a chain."""
        return self._previous[unit_id]

    def followers(self, unit_id: UnitId) -> int:
        """How many residents name it as the one before them."""
        return self._followers.get(unit_id, 0)

    @property
    def leaves(self) -> Sequence[UnitId]:
        """In an order that depends on nothing but what came and left, and when."""
        return self._leaves
