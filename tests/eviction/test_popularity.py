"""Popularity under the contract, and what it learns of traffic whose laws are known."""

from __future__ import annotations

from random import Random

import pytest
from holdfast.eviction.ages import STOPS_NS, age_bin
from holdfast.eviction.features import FEATURES
from holdfast.eviction.learner import Learner
from holdfast.eviction.popularity import Popularity
from holdfast.eviction.strands import Strands
from holdfast.eviction.use import Use
from hypothesis import given
from hypothesis import strategies as st

from contracts.policy import NOW_NS, SECOND_NS, Cache, PolicyContract, candidate, ranking_of, shared

UNIT_TOKENS = 512


def use(chain, seconds, session=None):
    """All of it, so many seconds after the beginning."""
    return Use(
        chain=chain,
        token_count=len(chain) * UNIT_TOKENS,
        unit_tokens=UNIT_TOKENS,
        now_ns=round(seconds * SECOND_NS),
        session=session,
    )


def score(policy, unit, seconds):
    (found,) = policy.ranking(1, float).scores([candidate(unit)], round(seconds * SECOND_NS))
    return found


class TestPopularity(PolicyContract):
    make = Popularity

    @shared
    @given(
        uses=st.lists(st.sampled_from(["a", "ab", "c", "d"]), min_size=1, max_size=8), released=st.sampled_from("acx")
    )
    def test_a_release_never_makes_anything_leave_sooner(self, uses, released):
        """After an hour. What returns every second is worth more just before that than as its lease ends."""
        policy, ranking = self.taught([*uses, "z"])
        one, later_ns = candidate(released), NOW_NS + 3600 * SECOND_NS
        (before,) = ranking.scores([one], later_ns)
        policy.released((released, "nobody"), later_ns)
        assert ranking.scores([one], later_ns)[0] >= before

    def test_the_dearer_and_the_smaller_stay_longer_in_proportion(self):
        policy = Popularity()
        policy.used(use("a", 0))
        ranking = ranking_of(policy, "a")
        plain, dear, large = ranking.scores(
            [candidate("a"), candidate("a", restore_ns=3 * SECOND_NS), candidate("a", size_bytes=16 << 20)], SECOND_NS
        )
        assert (dear, large) == (pytest.approx(3 * plain), pytest.approx(plain / 2))

    def test_the_score_is_explained_by_its_parts(self):
        policy = Popularity()
        for seconds in (0, 3, 9):
            policy.used(use("ab", seconds))
        parts = ranking_of(policy, "a").explain(candidate("a"), 11 * SECOND_NS)
        assert (parts["age_seconds"], parts["uses"], parts["gap_seconds"]) == (2.0, 3.0, 6.0)
        rate = parts["index_per_second"] * parts["restore_seconds"] * 1e9
        assert parts["score"] == pytest.approx(rate / parts["size_bytes"])
        assert 0 < parts["reuse_probability_10_min"] < 1
        assert {f"logit_{feature.name}" for feature in FEATURES} <= parts.keys()

    def test_all_units_of_a_strand_have_one_index_and_strangers_that_of_a_first_use(self):
        policy = Popularity()
        policy.used(use("abcd", 0))
        assert score(policy, "a", 5) == score(policy, "d", 5) == policy.indices("b", 5 * SECOND_NS)[0] * 1e9 / (8 << 20)
        policy.ranking(1, float).came("x", 1)
        assert score(policy, "x", 1) > score(policy, "x", 60), "its age counts from when it came"

    def test_a_use_shows_at_once_whoever_looked_before(self):
        """At one time: what was computed for it must not outlive a use or a release."""
        found = []
        for looks in (0, 1):
            policy = Popularity()
            policy.used(use("a", 0))
            for _ in range(looks):
                score(policy, "a", 9)
            policy.used(use("ab", 9))
            for _ in range(looks):
                score(policy, "a", 9)
            policy.released("ab", 9 * SECOND_NS)
            found.append(score(policy, "a", 9))
        assert found[0] == found[1] != score(policy, "a", 10)

    def test_a_release_starts_the_age(self):
        policy = Popularity()
        for unit in "ab":
            policy.used(use(unit, 0))
        policy.released(("a",), 3600 * SECOND_NS)
        assert score(policy, "a", 3601) > score(policy, "b", 3601)

    def test_it_learns_who_comes_back_and_when(self):
        """Conversations of 2 units return after 10 s, for 20 turns; documents of 40 units are read once."""
        policy, random = Popularity(), Random(1)
        talks = {number: [10.0 * number / 5, 0] for number in range(5)}
        for step in range(1200):
            number, (seconds, turns) = min(talks.items(), key=lambda item: item[1])
            policy.used(use([f"talk {number}", f"more of {number}"], seconds))
            talks[number] = [seconds + random.uniform(9, 11), turns + 1]
            if step % 2:
                policy.used(use([f"read {step} {page}" for page in range(40)], seconds))
            if turns == 20:
                del talks[number]
                talks[step + 100] = [seconds + 2, 0]
        seconds += 1
        number = next(number for number, (_, turns) in talks.items() if turns > 2)
        policy.used(use([f"talk {number}", f"more of {number}"], seconds))
        policy.used(use([f"read {page}" for page in range(40)], seconds))
        assert score(policy, f"talk {number}", seconds + 1) > 5 * score(policy, "read 0", seconds + 1)
        assert score(policy, f"talk {number}", seconds + 60) < score(policy, f"talk {number}", seconds + 1) / 3

    def test_a_scan_does_not_push_out_what_is_used_again(self):
        """Ten hot chains in a cache of 30 units, among which three strangers pass at every step."""
        cache, hits = Cache(Popularity(), 30), 0
        for step in range(600):
            hot = f"hot {step % 10}"
            hits += step >= 100 and hot in cache.here
            assert cache.request((hot,), step * SECOND_NS)
            assert cache.request(tuple(f"scan {step} {page}" for page in range(3)), step * SECOND_NS + 1)
        assert hits > 0.95 * 500, hits


class TestLearner:
    """What is recorded, and that it does not give the answer away."""

    @pytest.fixture
    def strands(self):
        return Strands()

    @pytest.fixture
    def learner(self, strands, monkeypatch):
        monkeypatch.setattr("holdfast.eviction.learner.USES_PER_STEP", 10**9)
        return Learner(strands)

    def tell(self, strands, learner, one):
        pieces = strands.find(one.chain)
        learner.saw_use([piece.strand for piece in pieces if piece.strand], one.now_ns)
        learner.idle(strands.use(one, pieces))

    def records(self, learner):
        found = learner._records
        return list(zip(found.levels, found.first, found.last, found.used, strict=True))

    def test_features_that_move_are_those_at_the_entry_of_a_bin(self, strands, learner):
        since = [feature.name for feature in FEATURES].index("session_since")
        self.tell(strands, learner, use("a", 0, session="s"))
        for number in range(9):
            self.tell(strands, learner, use([f"b{number}"], 0.1, session="s"))
        learner._look(SECOND_NS)
        levels, first, last, used = self.records(learner)[0]
        assert (first, last, used) == (0, age_bin(SECOND_NS) - 1, 0)
        assert levels[since] == 1, "none since, when it became idle"
        self.tell(strands, learner, use("a", 1.1, session="s"))
        levels, first, last, used = self.records(learner)[-1]
        assert (first, last, used) == (age_bin(SECOND_NS), age_bin(11 * SECOND_NS // 10), 1)
        assert levels[since] == 1 + 4, "nine when it entered this bin"

    def test_a_use_is_recorded_once_and_as_it_was_before_it_splits_the_strand(self, strands, learner):
        self.tell(strands, learner, use("abcdef", 0))
        whole = strands.of("a").levels
        self.tell(strands, learner, use("ab", 5))
        assert self.records(learner) == [(whole, 0, age_bin(5 * SECOND_NS), 1)]
        back = strands.of("c")
        learner._look(20 * SECOND_NS)
        (survived,) = [one for one in self.records(learner)[1:] if one[1]]
        assert survived == (whole, age_bin(5 * SECOND_NS), age_bin(20 * SECOND_NS) - 1, 0), "the other half goes on"
        assert back.age_bin == age_bin(20 * SECOND_NS)

    def test_every_bin_is_recorded_once_whenever_somebody_looks(self, strands, learner):
        self.tell(strands, learner, use("a", 0))
        for now_ns in (1, STOPS_NS[0], STOPS_NS[4] - 1, STOPS_NS[4], STOPS_NS[9] + 5):
            learner._look(now_ns)
        self.tell(strands, learner, use("a", 1000))
        seen = [index for _, first, last, _ in self.records(learner) for index in range(first, last + 1)]
        assert seen == list(range(age_bin(1000 * SECOND_NS) + 1))

    def test_time_in_use_is_not_time_idle(self, strands, learner):
        self.tell(strands, learner, use("a", 0))
        learner.idle(strands.release("a", 100 * SECOND_NS))
        self.tell(strands, learner, use("a", 101))
        assert [(first, last) for _, first, last, _ in self.records(learner)] == [(0, age_bin(SECOND_NS))]

    def test_who_takes_the_slot_of_a_forgotten_strand_is_looked_at(self, strands, learner, monkeypatch):
        monkeypatch.setattr("holdfast.eviction.strands.GHOST_UNITS_MIN", 0)
        self.tell(strands, learner, use("abc", 0))
        learner._look(10**18)
        strands.forget()
        assert not len(strands)
        self.tell(strands, learner, use("xyz", 10**9))
        self.tell(strands, learner, use("x", 10**9 + 1))
        learner._look((10**9 + 60) * SECOND_NS)
        assert {strands.of(unit).age_bin for unit in "xz"} == {age_bin(59 * SECOND_NS), age_bin(60 * SECOND_NS)}


def test_it_is_deterministic():
    def scores():
        policy, random = Popularity(), Random(2)
        for step in range(300):
            name = random.randrange(40)
            policy.used(use([f"{name}", f"{name} {random.randrange(3)}"], step, session=name % 7))
        return [score(policy, f"{name}", 300) for name in range(40)]

    assert scores() == scores()


def test_what_a_restart_found_is_as_young_as_the_first_use_after_it():
    """A scan right after the restart is worth no more than what was there."""
    policy = Popularity()
    ranking = ranking_of(policy, "a")
    policy.used(use("s", 10**6))
    assert score(policy, "a", 10**6 + 60) == score(policy, "s", 10**6 + 60)
    assert ranking.explain(candidate("a"), (10**6 + 60) * SECOND_NS)["age_seconds"] == 60.0
