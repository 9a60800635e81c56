"""What every eviction policy must do. Inherit, set `make`, and add what is your own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from holdfast.eviction.candidate import Candidate
from holdfast.eviction.policy import POLICIES, Policy
from holdfast.eviction.residents import Residents
from holdfast.eviction.use import Use
from holdfast.eviction.victims import choose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECOND_NS = 10**9
NOW_NS = 1_700_000_000 * SECOND_NS
UNIT_BYTES = 8 << 20
UNIT_TOKENS = 512

candidates = st.builds(
    Candidate,
    id=st.just("x"),
    unit=st.sampled_from("abcd"),
    previous=st.none(),
    size_bytes=st.sampled_from([0, 1, 4096, 8 << 20, 1 << 50]),
    movable=st.just(value=True),
    restore_ns=st.one_of(st.sampled_from([0, 1, 10**18]), st.integers(0, 10**12)),
)

# One test runs in many subclasses: that is the point, and each example depends on `make` alone.
shared = settings(suppress_health_check=[HealthCheck.differing_executors], max_examples=40, deadline=None)


def candidate(name="x", *, unit=None, **changes):
    """An 8 MiB leaf, a second away."""
    values = {"previous": None, "size_bytes": UNIT_BYTES, "movable": True, "restore_ns": SECOND_NS}
    return Candidate(id=name, unit=unit or name, **(values | changes))


def use(*chain, age_seconds=0.0, session=None):
    """All of it, so long ago."""
    return Use(
        chain=chain,
        token_count=UNIT_TOKENS * len(chain),
        unit_tokens=UNIT_TOKENS,
        now_ns=NOW_NS - round(age_seconds * SECOND_NS),
        session=session,
    )


def worth(token_count):
    """A millisecond a token."""
    return token_count * 1e6


def ranking_of(policy, *units):
    """Of a cache that is told of these."""
    ranking = policy.ranking(1 << 30, worth)
    for unit in units:
        ranking.came(unit, UNIT_BYTES)
    return ranking


@st.composite
def chains(draw, max_size=40):
    """Uses of a few documents that share fronts, each a path of a small tree, as tuples of ids of one type.

    A digit of a path says which branch is taken, so equal ids mean equal prefixes.
    """
    as_text = draw(st.booleans())
    paths = st.lists(st.integers(1, 3), min_size=1, max_size=6)
    found = []
    for path in draw(st.lists(paths, min_size=1, max_size=max_size)):
        numbers = ["".join(map(str, path[: depth + 1])) for depth in range(len(path))]
        found.append(tuple(numbers if as_text else map(int, numbers)))
    return found


class Cache:
    """As many equal units as it takes, leaf-first, around one ranking: the smallest honest user of a policy.

    Newcomers compete (bypass), and what is not movable stays. `look` asks for scores whenever something happened.
    """

    def __init__(self, policy, capacity_units, *, look=False, movable=lambda unit: True):
        self.policy = policy
        self.ranking = policy.ranking(capacity_units * UNIT_BYTES, worth)
        self.capacity_units = capacity_units
        self.residents = Residents()
        self.here = {}
        self.look = look
        self.movable = movable
        self.left = []  # everybody, in order

    def describe(self, unit):
        depth, previous = self.here[unit]
        return candidate(unit, previous=previous, movable=self.movable(unit), restore_ns=SECOND_NS * (depth + 1))

    def peek(self):
        if self.look:
            self.ranking.scores([self.describe(unit) for unit in self.here], NOW_NS)
            for unit in list(self.here)[-3:]:
                self.ranking.explain(self.describe(unit), NOW_NS)

    def come(self, unit, depth, previous):
        self.here[unit] = (depth, previous)
        self.residents.came(unit, previous)
        self.ranking.came(unit, UNIT_BYTES)
        self.peek()

    def go(self, unit):
        assert not self.residents.followers(unit), f"{unit} is no leaf"
        self.residents.left(unit)
        self.ranking.left(unit)
        del self.here[unit]
        self.left.append(unit)
        self.peek()

    def request(self, chain, now_ns):
        """One use, and what follows from it; False where nothing that may leave would do."""
        self.policy.used(Use(chain=chain, token_count=len(chain) * 512, unit_tokens=512, now_ns=now_ns))
        self.peek()
        for depth, unit in enumerate(chain):
            if unit not in self.here:
                self.come(unit, depth, chain[depth - 1] if depth else None)
        surplus = len(self.here) - self.capacity_units
        victims = choose(self.residents, self.ranking, self.describe, now_ns, lambda some: len(some) >= surplus)
        if victims is None:
            return False
        for victim in victims:
            assert victim.movable
            self.go(victim.unit)
        return True


def entries(thing, seen=None):
    """How many things the containers in it hold, all the way down."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type, type(len), type(entries))):
        return 0
    seen.add(id(thing))
    if hasattr(thing, "nbytes"):
        return thing.size
    if isinstance(thing, dict):
        return len(thing) + sum(entries(one, seen) for one in thing.values())
    if isinstance(thing, (list, tuple, set, frozenset, bytearray)):
        return len(thing) + (0 if isinstance(thing, bytearray) else sum(entries(one, seen) for one in thing))
    parts = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return sum(entries(one, seen) for one in [*parts, *getattr(thing, "__dict__", {}).values()])


class PolicyContract:
    """Deterministic, finite, explained, bounded, and true to its name in the registry."""

    make: ClassVar[Callable[[], Policy]]

    def policy_for(self, to_come):
        """One that will be told of these chains."""
        return type(self).make()

    def taught(self, uses):
        """A policy that was told of these uses, and its ranking."""
        policy = self.policy_for([tuple(chain) for chain in uses])
        ranking = policy.ranking(1 << 30, worth)
        here = set()
        for number, chain in enumerate(uses):
            policy.used(use(*chain, age_seconds=float(len(uses) - number)))
            for unit in chain:
                if unit not in here:
                    ranking.came(unit, UNIT_BYTES)
                    here.add(unit)
        return policy, ranking

    def replayed(self, to_come, capacity_units, **options):
        """A cache behind which all of them were requested, and what each answered."""
        cache = Cache(self.policy_for(to_come), capacity_units, **options)
        answers = []
        for number, chain in enumerate(to_come):
            answers.append(cache.request(chain, NOW_NS + number * SECOND_NS))
            assert len(cache.here) <= capacity_units or not answers[-1]
        return cache, answers

    def test_it_is_registered_under_its_name(self):
        name = type(self).make().name
        assert POLICIES[name]().name == name

    @shared
    @given(uses=st.lists(st.sampled_from(["a", "ab", "abc", "d"]), max_size=8), one=candidates)
    def test_scores_are_finite_explained_and_repeatable(self, uses, one):
        _, ranking = self.taught(uses)
        (first,) = ranking.scores([one], NOW_NS)
        assert math.isfinite(first)
        assert list(ranking.scores([one, one], NOW_NS)) == [first, first], "looking changes nothing"
        parts = ranking.explain(one, NOW_NS)
        assert parts["score"] == first
        if any(one.unit in chain for chain in uses):
            assert len(parts) > 1, "what the score is made of is named"
        assert all(math.isfinite(part) for part in parts.values())
        _, again = self.taught(uses)
        assert list(again.scores([one], NOW_NS)) == [first]

    def test_at_equal_use_and_cost_the_longer_idle_never_stays_longer(self):
        _, ranking = self.taught(["o", "n"])
        older, newer = ranking.scores([candidate("o"), candidate("n")], NOW_NS)
        assert older <= newer

    @shared
    @given(to_come=chains(), capacity_units=st.integers(1, 12))
    def test_only_leaves_go_and_looking_changes_nothing(self, to_come, capacity_units):
        plain, answers = self.replayed(to_come, capacity_units)
        looked_at, _ = self.replayed(to_come, capacity_units, look=True)
        assert all(answers), "newcomers may always be turned away"
        assert looked_at.left == plain.left, "deterministic, and who looks is of no account"

    @shared
    @given(to_come=chains(), capacity_units=st.integers(1, 6), pinned=st.sampled_from("123"))
    def test_what_is_not_movable_stays(self, to_come, capacity_units, pinned):
        def movable(unit):
            return not str(unit).startswith(pinned)

        cache, _ = self.replayed(to_come, capacity_units, movable=movable)
        assert all(map(movable, cache.left))

    @shared
    @given(to_come=chains(max_size=20), data=st.data())
    def test_whatever_leaves_for_whatever_reason(self, to_come, data):
        """Deleted, lost, freed to another tier: leaves that nobody chose, between uses, and back by the next."""
        cache = Cache(self.policy_for(to_come), 10)
        for number, chain in enumerate(to_come):
            assert cache.request(chain, NOW_NS + number * SECOND_NS)
            for place in data.draw(st.lists(st.integers(0, 9), max_size=4)):
                if cache.residents.leaves:
                    cache.go(cache.residents.leaves[place % len(cache.residents.leaves)])
        scores = cache.ranking.scores([cache.describe(unit) for unit in cache.here], NOW_NS)
        assert all(map(math.isfinite, scores))

    def test_what_no_use_has_named_comes_and_leaves(self):
        policy = self.policy_for([])
        ranking = ranking_of(policy, *"ab", 7, 8)
        ranking.left("a")
        ranking.came("a", 0)
        ranking.left(7)
        scores = ranking.scores([candidate(unit) for unit in ("a", "b", 7, 8, "stranger")], NOW_NS)
        assert all(map(math.isfinite, scores))

    @shared
    @given(
        uses=st.lists(st.sampled_from(["a", "ab", "c", "d"]), min_size=1, max_size=8), released=st.sampled_from("acx")
    )
    def test_a_release_never_makes_anything_leave_sooner(self, uses, released):
        policy, ranking = self.taught([*uses, "z"])
        one = candidate(released)
        (before,) = ranking.scores([one], NOW_NS)
        policy.released((released, "nobody"), NOW_NS)
        assert ranking.scores([one], NOW_NS)[0] >= before

    def test_caches_do_not_disturb_each_other(self):
        to_come = [tuple("ab"), tuple("ac"), tuple("d")] * 3
        policy, alone = self.policy_for(to_come), self.policy_for(to_come)
        caches = [Cache(policy, 3), Cache(alone, 3)]
        other = ranking_of(policy, *"abx")
        for number, chain in enumerate(to_come):
            for cache in caches:
                assert cache.request(chain, NOW_NS + number)
            other.left("x")
            other.came("x", UNIT_BYTES)
        assert caches[0].left == caches[1].left

    def test_memory_is_bounded(self):
        """Strangers come and go, seen once and never again: what is kept of them stops growing."""
        policy = type(self).make()
        cache = Cache(policy, 100)
        sizes = []
        for number in range(3600):
            start = 50 * number
            chain = tuple(range(start, start + 50))
            if number % 100:
                policy.used(Use(chain=chain, token_count=25_600, unit_tokens=512, now_ns=NOW_NS + number * SECOND_NS))
            else:
                cache.request(chain, NOW_NS + number * SECOND_NS)
            if number in {1799, 3599}:
                sizes.append(entries(policy) + entries(cache.ranking))
        assert sizes[1] <= 1.05 * sizes[0] + 1000
