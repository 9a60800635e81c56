"""Each policy under the contract, and what it promises beyond it."""

from __future__ import annotations

import pytest
from holdfast.eviction.history import History
from holdfast.eviction.lru import Lru
from holdfast.eviction.policy import POLICIES
from holdfast.eviction.popularity import Popularity
from holdfast.eviction.victims import choose_victims
from hypothesis import given
from hypothesis import strategies as st

from contracts.policy import NOW_NS, PolicyContract, candidate

SECOND_NS = 10**9


def test_these_policies_exist():
    assert set(POLICIES) == {"lru", "popularity"}


class TestLru(PolicyContract):
    policy = Lru()

    def test_it_looks_at_nothing_but_age(self):
        hot = candidate(age_seconds=61, frequency=100.0, restore_ns=10**15)
        assert self.policy.score(hot, NOW_NS) < self.policy.score(candidate(), NOW_NS)

    def test_it_tells_apart_accesses_a_nanosecond_apart(self):
        first, second = candidate(last_access_ns=NOW_NS - 2), candidate(last_access_ns=NOW_NS - 1)
        assert self.policy.score(first, NOW_NS) < self.policy.score(second, NOW_NS)


class TestPopularity(PolicyContract):
    policy = Popularity()

    def score(self, **changes):
        return self.policy.score(candidate(**changes), NOW_NS)

    @pytest.mark.parametrize("uses", [3.0, 5.0, 20.0])
    def test_a_scan_does_not_push_out_what_is_used_again(self, uses):
        horizon = self.policy.prior_ns / SECOND_NS * (uses - 1) / (1 + self.policy.prior_uses)
        fresh = self.score(age_seconds=0, frequency=1.0)
        assert fresh < self.score(age_seconds=horizon / 4, frequency=uses)
        assert fresh > self.score(age_seconds=horizon * 20, frequency=uses)  # but it forgets

    def test_at_equal_use_the_dearer_to_restore_stays_longer(self):
        cheap, dear = candidate("a", restore_ns=10**8), candidate("b", restore_ns=10**9)
        order = choose_victims([dear, cheap], self.policy, NOW_NS, lambda victims: len(victims) >= 1)
        assert order == (cheap,)

    def test_at_equal_everything_the_larger_leaves_first(self):
        assert self.score(size_bytes=16 << 20) < self.score(size_bytes=8 << 20)

    def test_cost_multiplies_and_never_replaces_probability(self):
        dear_and_dead = self.score(age_seconds=86_400, frequency=0.001, restore_ns=10 * SECOND_NS)
        cheap_and_alive = self.score(age_seconds=5, frequency=4.0, restore_ns=SECOND_NS)
        assert dear_and_dead < cheap_and_alive

    @given(
        age=st.floats(0, 1e6),
        uses=st.floats(0, 50),
        more=st.floats(0.01, 50),
        older=st.floats(1, 1e6),
    )
    def test_probability_rises_with_use_and_falls_with_age(self, age, uses, more, older):
        def chance(age_seconds, frequency):
            one = candidate(age_seconds=age_seconds, frequency=frequency)
            return self.policy.explain(one, NOW_NS)["reuse_probability"]

        assert 0 <= chance(age, uses) <= chance(age, uses + more) <= 1
        assert chance(age + older, uses) <= chance(age, uses)

    @given(age=st.floats(0, 1e6), uses=st.floats(0, 50))
    def test_the_score_is_the_product_of_its_parts(self, age, uses):
        parts = self.policy.explain(candidate(age_seconds=age, frequency=uses), NOW_NS)
        product = parts["restore_ns"] * parts["reuse_probability"] / parts["size_bytes"]
        assert parts["score"] == pytest.approx(product)

    def test_with_a_history_behind_it_a_scan_leaves_before_the_working_set(self):
        history = History(capacity=1000, half_life_ns=600 * SECOND_NS)
        now_ns = NOW_NS
        for _ in range(4):
            for name in ("hot-1", "hot-2"):
                history.touch(name, now_ns)
            now_ns += 10 * SECOND_NS
        for number in range(20):
            history.touch(f"scan-{number:02}", now_ns)
        residents = [
            candidate(
                name,
                frequency=history.frequency(name, now_ns),
                last_access_ns=history.last_access_ns(name),
            )
            for name in ["hot-1", "hot-2", *(f"scan-{number:02}" for number in range(20))]
        ]
        for policy, hot_leaves in [(self.policy, False), (Lru(), True)]:
            victims = choose_victims(residents, policy, now_ns, lambda chosen: len(chosen) >= 20)
            assert any(one.id.startswith("hot") for one in victims) is hot_leaves
