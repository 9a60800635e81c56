"""The classical policies under the contract, and what each does beyond it."""

from __future__ import annotations

from typing import ClassVar

import pytest
from holdfast.eviction.arc import Arc
from holdfast.eviction.belady import Belady
from holdfast.eviction.gdsf import Gdsf
from holdfast.eviction.lfu import Lfu
from holdfast.eviction.mq import Mq, MqRanking
from holdfast.eviction.policy import POLICIES
from holdfast.eviction.s3fifo import S3Fifo
from holdfast.eviction.tinylfu import TinyLfu

from contracts.policy import NOW_NS, SECOND_NS, UNIT_BYTES, Cache, PolicyContract, candidate, ranking_of, use


class Told:
    """A policy and one ranking, of a cache of `units` units, told of chains one after the other."""

    def __init__(self, policy, units=20):
        self.policy = policy
        self.ranking = policy.ranking(units * UNIT_BYTES, lambda tokens: tokens * 1e6)
        self.here = set()

    def use(self, *chains):
        for chain in chains:
            self.policy.used(use(*chain))
            for unit in chain:
                if unit not in self.here:
                    self.here.add(unit)
                    self.ranking.came(unit, UNIT_BYTES)
        return self

    def leave(self, *units):
        for unit in units:
            self.here.remove(unit)
            self.ranking.left(unit)
        return self

    def order(self, *units):
        """Who leaves first."""
        scores = self.ranking.scores([candidate(unit) for unit in units], NOW_NS)
        return "".join(unit for _, unit in sorted(zip(scores, units, strict=True)))

    def part(self, unit, name):
        return self.ranking.explain(candidate(unit), NOW_NS)[name]


@pytest.mark.parametrize("make", [Lfu, Arc, S3Fifo, TinyLfu, Mq])
@pytest.mark.parametrize("scan", [1, 30], ids=["one by one", "in long chains"])
def test_a_scan_does_not_push_out_what_is_used_again(make, scan):
    """As it does from an LRU cache: three times its size passes, and only newcomers and their kind leave."""
    cache = Cache(make(), 20)
    hot = ("h1", "h2", "h3")
    for number in range(12):
        cache.request(hot, NOW_NS + number * SECOND_NS)
        cache.request((f"once {number}",), NOW_NS + number * SECOND_NS)
    for number in range(60 // scan):
        cache.request(tuple(f"scan {number} {depth}" for depth in range(scan)), NOW_NS + (100 + number) * SECOND_NS)
    assert not set(hot) & set(cache.left)


@pytest.mark.parametrize("make", [Arc, S3Fifo, Mq])
def test_the_tail_of_a_chain_stands_nearer_to_the_exit(make):
    assert Told(make()).use("abc", "d").order(*"abc") == "cba"
    assert Told(make()).use("abc", "d", "abc", "d").order(*"abc") == "cba"


class TestLfu(PolicyContract):
    make = Lfu

    def test_uses_decide_and_then_recency(self):
        told = Told(Lfu()).use("a", "b", "c", "a", "b", "a")
        assert told.order(*"abc") == "cba"
        assert told.use("c", "c").order(*"abc") == "bac"
        assert told.part("c", "uses") == 3

    def test_a_release_moves_only_among_equals(self):
        told = Told(Lfu()).use("a", "a", "b", "c")
        told.policy.released(("b",), NOW_NS)
        assert told.order(*"abc") == "cba"

    def test_what_has_left_starts_anew(self):
        told = Told(Lfu()).use("a", "a", "a", "b").leave("a").use("a")
        assert told.order(*"ab") == "ba"
        assert told.use("b").order(*"ab") == "ab"


class TestArc(PolicyContract):
    make = Arc

    def test_what_was_used_once_leaves_first_until_its_ghosts_are_wanted(self):
        told = Told(Arc(), 4).use("a", "b", "a", "b", "c", "d", "e")
        assert told.order(*"abcde")[:2] == "cd"
        told.leave("c", "d").use("c", "d")
        assert told.part("e", "target_bytes") == 2 * UNIT_BYTES
        told.use("f", "g", "g")
        assert told.order(*"abf")[0] == "a", "one used once, and a target of two"

    def test_room_for_all_that_is_about_to_come_is_made_among_what_was_used_once(self):
        told = Told(Arc(), 6).use("a", "a", "b", "c").leave("b", "c").use("b", "c", "e", "f")
        assert told.order(*"aef") == "aef", "a target of two"
        told.policy.used(use(*"xyz"))
        assert told.order(*"aef") == "efa"

    def test_ghosts_of_the_other_list_lower_the_target(self):
        told = Told(Arc(), 4).use("a", "a", "b", "c", "d").leave("b", "c").use("b", "c")
        before = told.part("a", "target_bytes")
        told.leave("a").use("a")
        assert told.part("a", "target_bytes") == before - UNIT_BYTES
        assert told.part("a", "used_again")

    def test_ghosts_and_residents_are_no_more_than_two_caches(self):
        told = Told(Arc(), 4)
        for number in range(100):
            told.use([number])
            if len(told.here) == 4:
                told.leave(min(told.here) if number % 3 else max(told.here))
        told.use([1000])
        assert len(told.ranking._once_ghosts) + len(told.ranking._again_ghosts) + len(told.here) <= 8


class TestS3Fifo(PolicyContract):
    make = S3Fifo

    def test_what_is_used_twice_in_the_small_queue_is_promoted_when_another_leaves(self):
        told = Told(S3Fifo()).use("a", "b", "c", "d", "e", "a", "a")
        assert told.order(*"abcde").startswith("bc")
        told.use("f").leave("b")
        assert (told.part("a", "in_main_queue"), told.part("a", "uses")) == (1.0, 0.0)

    def test_a_ghost_comes_back_into_the_main_queue(self):
        told = Told(S3Fifo()).use("a", "b").leave("a").use("a", "c")
        assert (told.part("a", "in_main_queue"), told.part("b", "in_main_queue")) == (1.0, 0.0)

    def test_a_use_in_the_main_queue_is_another_round(self):
        told = Told(S3Fifo(), 10).use("a", "b", "c").leave("a", "b", "c").use("a", "b", "c", "a", "d")
        assert told.order(*"abc") == "bca"
        told.leave("b")
        assert told.order(*"ac") == "ca"
        assert told.part("a", "uses") == 0.0, "its round is paid for"

    def test_what_had_to_stay_when_it_was_passed_goes_next(self):
        told = Told(S3Fifo(), 10).use("a", "b", "c").leave("a", "b", "c").use("a", "b", "c", "d")
        told.leave("b")
        assert told.part("a", "was_passed")
        assert told.order(*"ac") == "ac"
        assert told.use("a").order(*"ac") == "ca"
        assert (told.part("a", "was_passed"), told.part("a", "uses")) == (0.0, 0.0)

    def test_nobody_is_passed_who_stands_behind_the_one_that_leaves(self):
        told = Told(S3Fifo(), 10).use("a", "b", "c", "d").leave("a")
        assert not told.part("b", "was_passed")
        assert Told(S3Fifo(), 10).use("a", "b", "c", "d").leave("b").part("a", "was_passed")


class TestTinyLfu(PolicyContract):
    make = TinyLfu

    def test_a_newcomer_that_was_used_no_more_loses(self):
        told = Told(TinyLfu()).use("a", "b", "c")
        told.policy.used(use("d"))
        assert told.order(*"abcd")[0] == "c", "the window's older one, against what is on probation"
        told.use("c", "c", "c")
        told.policy.used(use("d"))
        assert told.order(*"abcd")[0] == "a"
        assert told.part("a", "lost_its_trial")
        assert told.part("c", "uses") == 4

    def test_a_second_use_on_probation_protects(self):
        told = Told(TinyLfu()).use("a", "b", "c", "a", "d")
        assert told.part("a", "is_protected")
        assert told.order(*"ab") == "ba"


class TestGdsf(PolicyContract):
    make = Gdsf

    def test_the_score_is_the_formula(self):
        told = Told(Gdsf()).use("ab", "ab", "c").leave("c").use("a")
        parts = told.ranking.explain(candidate("a"), NOW_NS)
        each = 512e6
        assert parts["floor"] == each / UNIT_BYTES
        assert (parts["uses"], parts["restore_ns"], parts["size_bytes"]) == (3, each, UNIT_BYTES)
        assert parts["score"] == parts["floor"] + parts["uses"] * parts["restore_ns"] / parts["size_bytes"]
        assert told.part("b", "floor") == 0.0

    def test_what_no_use_has_named_costs_what_the_candidate_says(self):
        ranking = ranking_of(Gdsf(), "a")
        assert ranking.explain(candidate("a", restore_ns=5), NOW_NS)["restore_ns"] == 5.0

    def test_a_floor_never_falls(self):
        told = Told(Gdsf()).use("a", "a", "a", "b").leave("a")
        told.leave("b").use("c")
        assert told.part("c", "floor") == 3 * 512e6 / UNIT_BYTES


class TestMq(PolicyContract):
    make = Mq

    def test_uses_lift_and_a_life_time_without_any_lowers(self):
        told = Told(Mq()).use("a", "b", "b", "b", "b")
        assert told.order(*"ab") == "ab"
        assert told.part("b", "order_class") == 2
        told.use(*["a"] * 9)
        assert told.part("b", "order_class") == 1
        told.use(*["a"] * 9)
        assert told.part("b", "order_class") == 0

    def test_a_life_time_is_counted_in_uses_of_units(self):
        told = Told(Mq())
        told.ranking = told.policy.follow(MqRanking(20 * UNIT_BYTES, life_time=2))
        assert told.use("a", "a", "x", "x").part("a", "order_class") == 1
        assert told.use("x").part("a", "order_class") == 0

    def test_a_ghost_comes_back_with_its_uses(self):
        told = Told(Mq()).use("a", "a", "a", "b").leave("a").use("a")
        assert told.part("a", "uses") == 4


class TestBelady(PolicyContract):
    make: ClassVar = Belady

    def policy_for(self, to_come):
        return Belady(to_come)

    def test_it_is_registered_under_its_name(self):
        assert "belady" not in POLICIES, "it would need the future"

    def test_memory_is_bounded(self):
        pytest.skip("it holds the future")

    def test_what_is_used_again_last_leaves_first_and_who_never_is_before(self):
        told = Told(Belady(["a", "b", "c", "b", "a"])).use("a", "b", "c")
        assert told.order(*"abc") == "cab"
        assert told.part("a", "uses_until") == 1
        assert not told.part("c", "is_used_again")

    def test_it_is_told_what_it_was_made_with(self):
        belady = Belady(["ab"])
        with pytest.raises(AssertionError, match="not the use"):
            belady.used(use("a"))
