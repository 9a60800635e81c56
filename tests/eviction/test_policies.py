"""Each policy under the contract, and what it promises beyond it."""

from __future__ import annotations

from holdfast.eviction import lru as lru_module
from holdfast.eviction.lru import Lru
from holdfast.eviction.policy import POLICIES

from contracts.policy import NOW_NS, PolicyContract, candidate, ranking_of, use


def test_these_policies_exist():
    assert {"lru", "popularity"} <= set(POLICIES)


def order(ranking, *units):
    """Who leaves first."""
    scores = ranking.scores([candidate(unit) for unit in units], NOW_NS)
    return [unit for _, unit in sorted(zip(scores, units, strict=True))]


class TestLru(PolicyContract):
    make = Lru

    def test_it_looks_at_nothing_but_the_order_of_uses(self):
        lru = Lru()
        for _ in range(9):
            lru.used(use("hot"))
        lru.used(use("b"))
        ranking = ranking_of(lru, "hot", "b")
        dear = candidate("hot", restore_ns=10**15)
        assert ranking.scores([dear], NOW_NS) < ranking.scores([candidate("b")], NOW_NS)

    def test_it_tells_apart_uses_of_one_moment(self):
        lru = Lru()
        for unit in "bca":
            lru.used(use(unit))
        assert order(ranking_of(lru, *"abc"), *"abc") == ["b", "c", "a"]

    def test_what_no_use_has_named_counts_as_oldest_when_it_comes(self):
        lru = Lru()
        lru.used(use("a"))
        ranking = ranking_of(lru, "a", "x", "y")
        assert order(ranking, *"axy") == ["y", "x", "a"]
        lru.used(use("y"))
        assert order(ranking, *"axy") == ["x", "a", "y"]

    def test_what_has_left_and_comes_again_without_a_use_is_old(self):
        lru = Lru()
        ranking = ranking_of(lru)
        for unit in "ab":
            lru.used(use(unit))
            ranking.came(unit, 1)
        ranking.left("b")
        ranking.came("b", 1)
        assert order(ranking, *"ab") == ["b", "a"]

    def test_its_memory_is_that_of_all_caches(self):
        lru = Lru()
        lru.used(use("a"))
        upper, lower = ranking_of(lru, "a", "b"), ranking_of(lru, "b", "a")
        lru.used(use("b"))
        upper.left("b")
        assert order(lower, *"ab") == order(upper, *"ab") == ["a", "b"]
        lower.left("b")
        upper.left("a")
        lower.left("a")
        assert not lru._resident
        assert not lru._caches

    def test_a_release_starts_the_age(self):
        lru = Lru()
        lru.used(use("a", age_seconds=60))
        lru.used(use("b", age_seconds=50))
        lru.released(("a",), NOW_NS - 10**9)
        ranking = ranking_of(lru, "a", "b")
        assert order(ranking, *"ab") == ["b", "a"]
        assert ranking.explain(candidate("a"), NOW_NS)["age_seconds"] == 1.0

    def test_what_never_comes_is_forgotten(self, monkeypatch):
        monkeypatch.setattr(lru_module, "AWAITED_MAX", 3)
        lru = Lru()
        lru.used(use(*"abcd"))
        lru.used(use("b"))
        lru.used(use("e"))
        assert list(lru._awaited) == ["d", "b", "e"]
