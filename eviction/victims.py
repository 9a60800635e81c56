"""Victims: which residents leave so that something else fits.

Leaf-first: an extent goes only when nothing resident names it as `previous`, or all that do go too,
so what stays of a document is always a usable front. All-or-nothing: either the request is met, or
nobody leaves. Deterministic: equal scores go by id.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from .candidate import Candidate
from .policy import Policy


def choose_victims(
    residents: Iterable[Candidate],
    policy: Policy,
    now_ns: int,
    satisfied: Callable[[Sequence[Candidate]], bool],
) -> tuple[Candidate, ...] | None:
    """`choose_leaf_first` among candidates that are described already."""
    by_id = {candidate.id: candidate for candidate in residents}
    chain = {candidate.id: candidate.previous for candidate in by_id.values()}
    return choose_leaf_first(chain, by_id.__getitem__, policy, now_ns, satisfied)


def choose_leaf_first(
    chain: Mapping[str, str | None],
    describe: Callable[[str], Candidate],
    policy: Policy,
    now_ns: int,
    satisfied: Callable[[Sequence[Candidate]], bool],
) -> tuple[Candidate, ...] | None:
    """The victims in the order to evict them, or None when no set of victims is enough.

    `chain` names every resident and its predecessor. Only those that are, or become, leaves are described: a cache has
    far fewer documents than extents.

    `satisfied(victims)` says whether evicting these is enough. It must be monotone: more victims
    never turn True into False. It is called O(log n + victims) times; all else is O(n + leaves log leaves).

    The lowest-scored leaves are taken until it holds; then, from the most valuable down, those
    that were not needed are spared. The result is minimal: no leaf-first part of it would do.
    """
    if satisfied(()):
        return ()
    chosen: list[Candidate] = []
    for candidate in _leaf_first(chain, describe, policy, now_ns):
        chosen.append(candidate)
        # Asked at powers of two only, then by bisection: a predicate that sums is itself O(n).
        if len(chosen).bit_count() == 1 and satisfied(chosen):
            break
    else:
        if not satisfied(chosen):
            return None
    lengths = range(1, len(chosen))
    shortest = 1 + bisect_left(lengths, 1, key=lambda length: int(satisfied(chosen[:length])))
    return _spare(chosen[:shortest], satisfied)


def _leaf_first(
    chain: Mapping[str, str | None], describe: Callable[[str], Candidate], policy: Policy, now_ns: int
) -> Iterator[Candidate]:
    """Every candidate that may leave, each as soon as it is a leaf, the lowest score first."""
    followers = Counter(previous for previous in chain.values() if previous in chain)
    found = map(describe, chain.keys() - followers.keys())
    leaves = [(policy.score(leaf, now_ns), leaf.id, leaf) for leaf in found if leaf.movable]
    heapq.heapify(leaves)
    while leaves:
        _, leaf_id, leaf = heapq.heappop(leaves)
        yield leaf
        previous = chain[leaf_id]
        if previous is None or previous not in followers:
            continue
        followers[previous] -= 1
        if followers[previous]:
            continue
        parent = describe(previous)
        if parent.movable:
            heapq.heappush(leaves, (policy.score(parent, now_ns), previous, parent))


def _spare(chosen: Sequence[Candidate], satisfied: Callable[[Sequence[Candidate]], bool]) -> tuple[Candidate, ...]:
    """Let go of victims that are not needed, in reverse order of choice.

    A spared extent must not lose what is in front of it, so its predecessor must not be a victim.
    Predecessors are chosen later, hence met first here: one pass is enough, as a victim that was
    needed stays needed when there are fewer of them.
    """
    victims = {candidate.id: candidate for candidate in chosen}
    for candidate in reversed(chosen):
        if candidate.previous in victims:
            continue
        del victims[candidate.id]
        if not satisfied(tuple(victims.values())):
            victims[candidate.id] = candidate
    return tuple(candidate for candidate in chosen if candidate.id in victims)
