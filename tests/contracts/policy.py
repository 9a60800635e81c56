"""What every eviction policy must do. Inherit, set `make`, and add what is your own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from holdfast.eviction.candidate import Candidate
from holdfast.eviction.policy import POLICIES, Policy
from holdfast.eviction.use import Use
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
shared = settings(suppress_health_check=[HealthCheck.differing_executors])


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


class PolicyContract:
    """Deterministic, finite, explained, and true to its name in the registry."""

    make: ClassVar[Callable[[], Policy]]

    def taught(self, uses):
        """A policy that was told of these uses, and its ranking."""
        policy = type(self).make()
        ranking = policy.ranking(1 << 30, worth)
        here = set()
        for number, chain in enumerate(uses):
            policy.used(use(*chain, age_seconds=float(len(uses) - number)))
            for unit in chain:
                if unit not in here:
                    ranking.came(unit, UNIT_BYTES)
                    here.add(unit)
        return policy, ranking

    def test_it_is_registered_under_its_name(self):
        policy = type(self).make()
        assert type(POLICIES[policy.name]()) is type(policy)

    @shared
    @given(uses=st.lists(st.sampled_from(["a", "ab", "abc", "d"]), max_size=8), one=candidates)
    def test_scores_are_finite_explained_and_repeatable(self, uses, one):
        _, ranking = self.taught(uses)
        (first,) = ranking.scores([one], NOW_NS)
        assert math.isfinite(first)
        assert list(ranking.scores([one, one], NOW_NS)) == [first, first], "looking changes nothing"
        parts = ranking.explain(one, NOW_NS)
        assert parts["score"] == first
        assert all(math.isfinite(part) for part in parts.values())
        _, again = self.taught(uses)
        assert list(again.scores([one], NOW_NS)) == [first]

    def test_at_equal_use_and_cost_the_longer_idle_leaves_first(self):
        policy = type(self).make()
        policy.used(use("older", age_seconds=600))
        policy.used(use("newer", age_seconds=5))
        ranking = ranking_of(policy, "older", "newer")
        older, newer = ranking.scores([candidate("older"), candidate("newer")], NOW_NS)
        assert older < newer
