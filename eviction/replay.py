"""Replay: what a policy would have kept of a sequence of requests, in one cache.

A request finds the units that lie in front of its chain without a gap. Then all of its chain comes in; units that are
worth less than what is there do not (bypass). Who leaves does so before anybody comes, so the capacity holds after
every single event, and only leaves go.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .cache import Cache, Unit
from .policy import Policy
from .use import UnitId, Use


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A use, and for how long its units stay in use: they cannot leave until then, and their age counts from there."""

    use: Use
    hold_ns: int = 0


class Step(NamedTuple):
    """What one request did: the units that it found, who left, who came; in this order."""

    hit_units: int
    evicted: tuple[Unit, ...]
    inserted: tuple[Unit, ...]


class Holds:
    """Who is in use until when. A request's units are held where they are after it, in every cache."""

    def __init__(self, policy: Policy, caches: Sequence[Cache]) -> None:
        self._policy = policy
        self._caches = caches
        self._ends: list[tuple[int, int, Sequence[UnitId], list[list[UnitId]]]] = []  # a heap; the number breaks ties
        self._begun = 0

    def begin(self, request: Request) -> None:
        """The request has been admitted."""
        if not request.hold_ns:
            return
        chain = request.use.chain
        held = [cache.hold(chain) for cache in self._caches]
        self._begun += 1
        heapq.heappush(self._ends, (request.use.now_ns + request.hold_ns, self._begun, chain, held))

    def expire(self, now_ns: int) -> None:
        """Let go of what is over by now, and tell the policy."""
        while self._ends and self._ends[0][0] <= now_ns:
            end_ns, _, chain, held = heapq.heappop(self._ends)
            for cache, unit_ids in zip(self._caches, held, strict=True):
                cache.release(unit_ids)
            self._policy.released(chain, end_ns)


def replay(requests: Iterable[Request], policy: Policy, cache: Cache) -> Iterator[Step]:
    """One step for each request, which come in order of time. `cache` was made with the same policy, and is empty."""
    holds = Holds(policy, [cache])
    for request in requests:
        use = request.use
        holds.expire(use.now_ns)
        if not use.chain:
            yield Step(0, (), ())
            continue
        hit_units = cache.front(use.chain)
        policy.used(use)
        in_use = use.chain if request.hold_ns else ()
        admitted = cache.admit(units_of(use, hit_units), use.now_ns, in_use)
        holds.begin(request)
        yield Step(hit_units, admitted.evicted, admitted.inserted)


def units_of(use: Use, start: int) -> list[Unit]:
    """The units of a chain from number `start` on."""
    chain, unit_tokens = use.chain, use.unit_tokens
    return [
        Unit(chain[i], chain[i - 1] if i else None, min((i + 1) * unit_tokens, use.token_count))
        for i in range(start, len(chain))
    ]
