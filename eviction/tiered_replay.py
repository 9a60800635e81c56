"""Replay over tiers, kept as the daemon keeps them: inclusive, a copy read up stays below.

A request uses what any tier has of its chain's front. All of the chain comes into every memory tier, unless a nearer
one had it already. What leaves a tier, or is refused there, drops where a tier below has a copy; otherwise it is
offered to the next. The store below takes only what falls to it so, and what it refuses or evicts is gone from there.
Each tier has a ranking of its own, of one policy that learns once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .cache import Cache, Unit
from .policy import Policy
from .replay import Holds, Request, units_of
from .use import UnitId


class TieredStep(NamedTuple):
    """What one request moved, in units. Tiers are numbered from the nearest.

    `found[i]` units were found in tier i and in none nearer: for i > 0 they are loaded into tier 0. `written[i]` units
    came into tier i from above; `found` of a lower tier leaves copies in those between, which are not counted there.
    """

    found: tuple[int, ...]
    written: tuple[int, ...]

    @property
    def hit_units(self) -> int:
        """The length of the front that was found."""
        return sum(self.found)


class Tiers:
    """Memories from the nearest on, and perhaps a store below them."""

    def __init__(self, memories: Sequence[Cache], store: Cache | None) -> None:
        self.caches = [*memories, *([store] if store is not None else [])]
        self._memories = len(memories)

    def find(self, chain: Sequence[UnitId]) -> list[int]:
        """The nearest tier of each unit in front of the chain that is anywhere, without a gap."""
        places = []
        for unit_id in chain:
            place = next((number for number, cache in enumerate(self.caches) if unit_id in cache), None)
            if place is None:
                break
            places.append(place)
        return places

    def admit(self, request: Request, places: Sequence[int]) -> tuple[int, ...]:
        """The chain comes into the memories; returns how many units came into each tier from above."""
        use = request.use
        in_use = use.chain if request.hold_ns else ()
        units = units_of(use, 0)
        falling: list[Unit] = []  # without a copy below the tier that they leave
        plans = []
        written = []
        for number, cache in enumerate(self.caches):
            arriving = [unit for unit in falling if unit.id not in cache]
            from_below = set()
            if number < self._memories:
                names = {unit.id for unit in arriving}
                for position, unit in enumerate(units):
                    deeper = position >= len(places) or places[position] > number
                    if deeper and unit.id not in names and unit.id not in cache:
                        arriving.append(unit)
                    if position < len(places) and deeper:
                        from_below.add(unit.id)
            arriving.sort(key=lambda unit: unit.stop_tokens)  # parents first
            admitted = cache.plan(arriving, use.now_ns, in_use)
            plans.append(admitted)
            written.append(sum(unit.id not in from_below for unit in admitted.inserted) if number else 0)
            below = self.caches[number + 1 :]
            falling = [
                unit
                for unit in reversed((*admitted.evicted, *admitted.refused))
                if not any(unit.id in cache for cache in below)
            ]
        for cache, plan in zip(self.caches, plans, strict=True):  # now that what fell is kept below
            cache.dismiss(plan)
        return tuple(written)


def replay_tiered(requests: Iterable[Request], policy: Policy, tiers: Tiers) -> Iterator[TieredStep]:
    """One step for each request, which come in order of time. The tiers' caches were made with the same policy."""
    holds = Holds(policy, tiers.caches)
    for request in requests:
        holds.expire(request.use.now_ns)
        places = tiers.find(request.use.chain)
        if request.use.chain:
            policy.used(request.use)
        written = tiers.admit(request, places)
        holds.begin(request)
        yield TieredStep(tuple(places.count(number) for number in range(len(tiers.caches))), written)
