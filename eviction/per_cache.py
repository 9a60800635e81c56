"""PerCache: a policy whose memory is in its rankings, one for each cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar
from weakref import WeakSet

from .use import UnitId, Use


class Follower(Protocol):
    """A ranking that learns from uses by itself."""

    def used(self, use: Use) -> None:
        """See Policy.used."""
        ...

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """See Policy.released."""
        ...


F = TypeVar("F", bound=Follower)


class PerCache(Generic[F]):
    """Hands every use on to its rankings, for as long as somebody keeps them."""

    def __init__(self) -> None:
        self._rankings: WeakSet[F] = WeakSet()

    def used(self, use: Use) -> None:
        """See Policy.used. Rankings know nothing of each other, so their order is of no account."""
        for ranking in self._rankings:
            ranking.used(use)

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """See Policy.released."""
        for ranking in self._rankings:
            ranking.released(chain, now_ns)

    def follow(self, ranking: F) -> F:
        """One ranking more."""
        self._rankings.add(ranking)
        return ranking
