"""What a policy is, and which there are.

A policy learns from uses, and makes a ranking for each cache that asks it who leaves first: each tier, the HBM of each
group, a replay. The same policy decides in the daemon and in a simulation. To add one: a class with these methods in a
file of its own, a line in POLICIES, and a subclass of the contract tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from .arc import Arc
from .candidate import Candidate
from .gdsf import Gdsf
from .lfu import Lfu
from .lru import Lru
from .mq import Mq
from .popularity import guarded
from .s3fifo import S3Fifo
from .tinylfu import TinyLfu
from .use import UnitId, Use

Worth = Callable[[int], float]
"""Nanoseconds saved by finding the first n tokens of a chain in a cache: monotone, and 0 for no tokens."""


class Ranking(Protocol):
    """What one cache parts with first."""

    def came(self, unit: UnitId, size_bytes: int) -> None:
        """It is resident from now on. Usually a use has named it before; after a restart none has."""
        ...

    def left(self, unit: UnitId) -> None:
        """It is not resident any more, whatever the reason."""
        ...

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        """How much each is worth keeping; finite. The lowest leaves first.

        Looking changes nothing that a later score could show.
        """
        ...

    def explain(self, candidate: Candidate, now_ns: int) -> dict[str, float]:
        """Parts of the score by name, with "score" among them."""
        ...


class Policy(Protocol):
    """Learns from uses, and makes rankings. Deterministic, bounded in memory, never raises."""

    @property
    def name(self) -> str:
        """What configuration calls it."""
        ...

    def used(self, use: Use) -> None:
        """A chain is used. Told before those of its units that are missing come."""
        ...

    def released(self, chain: Sequence[UnitId], now_ns: int) -> None:
        """Its user is done, because a lease ended: age counts from here."""
        ...

    def ranking(self, capacity_bytes: int, worth: Worth) -> Ranking:
        """For one more cache of that size. `worth` is what a hit saves there."""
        ...


POLICIES: Final[Mapping[str, Callable[[], Policy]]] = MappingProxyType(
    {
        "lru": Lru,
        "lfu": Lfu,
        "arc": Arc,
        "s3fifo": S3Fifo,
        "tinylfu": TinyLfu,
        "gdsf": Gdsf,
        "mq": Mq,
        "popularity": guarded,
    }
)
