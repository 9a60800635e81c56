"""Upcoming: which document is brought near next, of those whose queries are known to come. Pure.

Smith's rule (1956): by the seconds of loading that each query costs, the smallest first, makes the sum of all waits
smallest. Deadlines come before it while they can be kept: whatever goes first leaves every deadline that could be kept
still to be kept (Moore and Hodgson, 1968, say which those are). And nobody starves: a hint is overtaken by hints that
came later at most OVERTAKEN_MAX times, whatever they cost and whatever their deadlines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

OVERTAKEN_MAX: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Upcoming:
    """A document that waits to be brought near. Greater ids came later.

    `load_ns` is the predicted time of what is missing at the target, `queries` how many are expected to use it (less
    than one where that is in doubt). `able`: it may be tried now; one that found no room is not, but keeps its place.
    """

    id: int
    load_ns: int
    queries: float
    deadline_ns: int | None
    overtaken: int = 0
    able: bool = True

    @property
    def cost(self) -> tuple[float, int]:
        """Nanoseconds per query; of equal ones the oldest."""
        return (self.load_ns / self.queries, self.id)


def next_up(waiting: Sequence[Upcoming], now_ns: int) -> Upcoming | None:
    """Who is brought near next, one at a time; None when nobody may be tried now."""
    barrier = min((one.id for one in waiting if one.overtaken >= OVERTAKEN_MAX), default=None)
    able = [one for one in waiting if one.able and (barrier is None or one.id <= barrier)]
    spare_ns: int | None = None  # what may go before those that are due, without making one of them late
    spare_of: dict[int, int | None] = {}
    ends_ns = now_ns
    for due_ns, one in _kept(able, now_ns):
        spare_of[one.id] = spare_ns  # who is due itself delays only those that are due before it
        ends_ns += one.load_ns
        spare_ns = due_ns - ends_ns if spare_ns is None else min(spare_ns, due_ns - ends_ns)
    limits = [(one, spare_of.get(one.id, spare_ns)) for one in able]
    return min(
        (one for one, limit_ns in limits if limit_ns is None or one.load_ns <= limit_ns),
        key=lambda one: one.cost,
        default=None,
    )


def _kept(waiting: Sequence[Upcoming], now_ns: int) -> list[tuple[int, Upcoming]]:
    """The most deadlines that can be kept, the earliest first: where one would be missed, the longest load gives up."""
    kept: list[tuple[int, Upcoming]] = []
    ends_ns = now_ns
    due = ((one.deadline_ns, one.id, one) for one in waiting if one.deadline_ns is not None)
    for deadline_ns, _, one in sorted(due):
        kept.append((deadline_ns, one))
        ends_ns += one.load_ns
        if ends_ns > deadline_ns:
            longest = max(kept, key=lambda item: (item[1].load_ns, item[1].id))
            kept.remove(longest)
            ends_ns -= longest[1].load_ns
    return kept


def passed_over(waiting: Sequence[Upcoming], chosen: Upcoming) -> list[int]:
    """Ids of those that came before the chosen one, and wait on: each has been overtaken once more."""
    return [one.id for one in waiting if one.id < chosen.id]


def in_order(waiting: Sequence[Upcoming], now_ns: int) -> list[Upcoming]:
    """The order in which they will be brought near, if loads take what is predicted and nothing else comes."""
    left = {one.id: one for one in waiting}
    found: list[Upcoming] = []
    while (chosen := next_up(list(left.values()), now_ns)) is not None:
        found.append(left.pop(chosen.id))
        now_ns += chosen.load_ns
        for number in passed_over(list(left.values()), chosen):
            left[number] = replace(left[number], overtaken=left[number].overtaken + 1)
    return found
