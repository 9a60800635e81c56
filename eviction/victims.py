"""Victims: which residents leave so that something else fits.

Leaf-first: one goes only when nothing resident names it as `previous`, or all that do go too, so what stays of a
document is always a usable front. All-or-nothing: either the request is met, or nobody leaves. Deterministic and pure.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import gcd
from typing import Final

from .candidate import Candidate
from .policy import Ranking
from .residents import Forest
from .use import UnitId

ALL_SCORED: Final = 256  # so many leaves are all looked at
SAMPLE: Final = 64  # of more leaves, so many at a time
POOL: Final = 2  # lowest of what was looked at, that leave before more is
AHEAD_MIN: Final = 8  # of a chain, scored together as its leaves go; then twice as many each time
AHEAD_MAX: Final = 64

Satisfied = Callable[[Sequence[Candidate]], bool]
Describe = Callable[[UnitId], Candidate]
_Entry = tuple[int, float, str, Candidate]  # rank, score, id: the order in which they leave


def anybody(candidate: Candidate) -> bool:  # noqa: ARG001 - whoever it is
    """Permits every victim."""
    return True


def choose(
    residents: Forest,
    ranking: Ranking,
    describe: Describe,
    now_ns: int,
    satisfied: Satisfied,
    permit: Callable[[Candidate], bool] = anybody,
    all_scored: int = ALL_SCORED,
) -> tuple[Candidate, ...] | None:
    """The victims in the order to evict them, or None when no set of victims is enough.

    The lowest (rank, score) of the movable leaves leaves first, at equal ones by id; whatever becomes a leaf by that is
    one from then on. `satisfied(victims)` says whether evicting these is enough. It must be monotone: more victims
    never turn True into False. `permit` is asked of each as it is about to be chosen; who is refused stays.

    Up to `all_scored` leaves are all looked at. Of more, a pseudo-random sample at a time (it follows from their number
    and `now_ns`), until the lowest that is left is no better than what a sample's lowest POOL were. So a victim may
    score a little higher than the lowest of all. But of a rank above 0 nobody leaves, and the answer is not None,
    before every leaf was looked at.

    The result is minimal: those that were not needed are spared, from the last chosen on.
    """
    if satisfied(()):
        return ()
    chosen: list[Candidate] = []
    too_few, asked_next = 0, 1
    for candidate in _Line(residents, ranking, describe, now_ns, all_scored).leaf_first(permit):
        chosen.append(candidate)
        if len(chosen) < asked_next:
            continue  # asked when they are a quarter more, then by bisection: a predicate that sums is itself O(n)
        if satisfied(chosen):
            break
        too_few, asked_next = len(chosen), len(chosen) + max(1, len(chosen) // 4)
    else:
        if not satisfied(chosen):
            return None
    lengths = range(too_few + 1, len(chosen))
    shortest = too_few + 1 + bisect_left(lengths, 1, key=lambda length: int(satisfied(chosen[:length])))
    return _spare(chosen[:shortest], satisfied)


class _Line:
    """Who leaves next, in one decision."""

    def __init__(self, residents: Forest, ranking: Ranking, describe: Describe, now_ns: int, all_scored: int) -> None:
        self._residents = residents
        self._ranking = ranking
        self._describe = describe
        self._now_ns = now_ns
        self._all_scored = all_scored
        self._unseen = _scattered(residents.leaves, now_ns, all_scored)
        self._heap: list[_Entry] = []
        self._gone: dict[UnitId, int] = {}  # followers of a resident that were chosen
        self._ahead: dict[UnitId, _Entry] = {}  # described and scored before it is a leaf
        self._steps: dict[UnitId, int] = {}  # by the one that ends a run of those: its length

    def leaf_first(self, permit: Callable[[Candidate], bool]) -> Iterator[Candidate]:
        """Every candidate that may leave, each as soon as it is a leaf."""
        is_all_seen = False
        threshold: tuple[int, float] | None = None
        while True:
            while not is_all_seen and (not self._heap or threshold is None or self._heap[0][:2] > threshold):
                is_all_seen = not self._look()
                threshold = self._threshold()
            if not self._heap:
                return
            *_, candidate = heapq.heappop(self._heap)
            if permit(candidate):
                yield candidate
                self._grow(candidate)

    def _look(self) -> bool:
        """Describe and score the next leaves; False when there are none."""
        leaves = len(self._residents.leaves)
        count = SAMPLE if self._heap or leaves > self._all_scored else leaves
        found = list(islice(self._unseen, count))
        self._add([one for one in map(self._describe, found) if one.movable])
        return bool(found)

    def _threshold(self) -> tuple[int, float] | None:
        """Up to which rank and score the next may leave without another look."""
        if len(self._heap) <= POOL:
            return None
        rank, score, *_ = heapq.nsmallest(POOL, self._heap)[-1]
        return (rank, score) if rank <= 0 else (0, float("inf"))

    def _scored(self, candidates: Sequence[Candidate]) -> list[_Entry]:
        scores = self._ranking.scores(candidates, self._now_ns)
        return [(one.rank, score, str(one.id), one) for one, score in zip(candidates, scores, strict=True)]

    def _add(self, candidates: Sequence[Candidate]) -> None:
        if candidates:
            for entry in self._scored(candidates):
                heapq.heappush(self._heap, entry)

    def _grow(self, gone: Candidate) -> None:
        """Its predecessor may be a leaf now."""
        previous = self._residents.previous(gone.id)
        if previous is None or previous not in self._residents:
            return
        chosen = self._gone[previous] = self._gone.get(previous, 0) + 1
        if chosen < self._residents.followers(previous):
            return
        if previous not in self._ahead:
            self._look_ahead(previous, 2 * self._steps.pop(gone.id, 0) or AHEAD_MIN)
        entry = self._ahead.pop(previous)
        if entry[-1].movable:
            heapq.heappush(self._heap, entry)

    def _look_ahead(self, unit_id: UnitId, count: int) -> None:
        """Score a run of a chain at once."""
        run: list[Candidate] = []
        following: UnitId | None = unit_id
        while following is not None and following in self._residents and len(run) < min(count, AHEAD_MAX):
            if run and (not run[-1].movable or self._residents.followers(following) != 1):
                break  # it is no leaf before all of its followers have left
            run.append(self._describe(following))
            following = self._residents.previous(following)
        self._steps[run[-1].id] = len(run)
        self._ahead |= {entry[-1].id: entry for entry in self._scored(run)}


def _scattered(leaves: Sequence[UnitId], now_ns: int, all_scored: int) -> Iterator[UnitId]:
    """Every leaf once, in an order that goes all over them: by a step that shares no factor with their number."""
    count = len(leaves)
    if count <= all_scored:
        return iter(leaves)
    step = max(1, count * 618 // 1000 + now_ns % (count // 8))
    while gcd(step, count) > 1:
        step += 1
    return (leaves[(now_ns + index * step) % count] for index in range(count))


def _spare(chosen: Sequence[Candidate], satisfied: Satisfied) -> tuple[Candidate, ...]:
    """Let go of victims that are not needed, in reverse order of choice.

    A spared one must not lose what is in front of it, so its predecessor must not be a victim. Predecessors are chosen
    later, hence met first here: one pass is enough, as a victim that was needed stays needed when there are fewer.
    """
    victims = {candidate.id: candidate for candidate in chosen}
    for candidate in reversed(chosen):
        if candidate.previous in victims:
            continue
        del victims[candidate.id]
        if not satisfied(tuple(victims.values())):
            victims[candidate.id] = candidate
    return tuple(candidate for candidate in chosen if candidate.id in victims)
