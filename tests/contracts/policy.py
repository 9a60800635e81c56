"""What every eviction policy must do. Inherit, set `policy`, and add what is your own."""

from __future__ import annotations

import math
from typing import ClassVar

from holdfast.eviction.candidate import Candidate
from holdfast.eviction.policy import POLICIES, Policy
from holdfast.eviction.victims import choose_victims
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECOND_NS = 10**9
NOW_NS = 1_700_000_000 * SECOND_NS

candidates = st.builds(
    Candidate,
    id=st.text("abcdef", min_size=1, max_size=6),
    previous=st.none(),
    size_bytes=st.sampled_from([0, 1, 4096, 8 << 20, 1 << 50]),
    movable=st.just(value=True),
    last_access_ns=st.one_of(
        st.sampled_from([0, NOW_NS, NOW_NS - 1, NOW_NS + 1, NOW_NS + 10**15, 1 << 63]),
        st.integers(0, 2 * NOW_NS),
    ),
    frequency=st.one_of(st.sampled_from([0.0, 1e-300, 1.0, 1e9, 1e300]), st.floats(0, 100)),
    restore_ns=st.one_of(st.sampled_from([0, 1, 10**18]), st.integers(0, 10**12)),
)

# One test runs in many subclasses: that is the point, and each example depends on `policy` alone.
shared = settings(suppress_health_check=[HealthCheck.differing_executors])


def candidate(name="x", *, age_seconds=60.0, **changes):
    """An 8 MiB leaf, used once a minute ago, a second away."""
    values = {
        "previous": None,
        "size_bytes": 8 << 20,
        "movable": True,
        "last_access_ns": NOW_NS - round(age_seconds * SECOND_NS),
        "frequency": 1.0,
        "restore_ns": SECOND_NS,
    }
    return Candidate(id=name, **(values | changes))


class PolicyContract:
    """Deterministic, finite, explained, and true to its name in the registry."""

    policy: ClassVar[Policy]

    def test_it_is_registered_under_its_name(self):
        assert POLICIES[self.policy.name].name == self.policy.name

    @shared
    @given(one=candidates)
    def test_scores_are_finite_and_repeatable(self, one):
        first = self.policy.score(one, NOW_NS)
        assert isinstance(first, float)
        assert math.isfinite(first)
        assert self.policy.score(one, NOW_NS) == first

    @shared
    @given(one=candidates)
    def test_the_explanation_holds_the_score_and_only_finite_parts(self, one):
        parts = self.policy.explain(one, NOW_NS)
        assert parts["score"] == self.policy.score(one, NOW_NS)
        assert len(parts) > 1
        assert all(math.isfinite(part) for part in parts.values())

    @shared
    @given(several=st.lists(candidates, max_size=8, unique_by=lambda one: one.id), data=st.data())
    def test_the_order_is_total_and_not_that_of_the_question(self, several, data):
        def everybody(victims):
            return len(victims) >= len(several)

        shuffled = data.draw(st.permutations(several))
        order = choose_victims(several, self.policy, NOW_NS, everybody)
        assert order == choose_victims(shuffled, self.policy, NOW_NS, everybody)
        assert order is not None
        ranks = [(self.policy.score(one, NOW_NS), one.id) for one in order]
        assert ranks == sorted(ranks)

    def test_at_equal_use_and_cost_the_longer_idle_leaves_first(self):
        older, newer = candidate(age_seconds=600), candidate(age_seconds=5)
        assert self.policy.score(older, NOW_NS) < self.policy.score(newer, NOW_NS)
