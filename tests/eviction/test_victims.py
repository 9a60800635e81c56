"""choose against a naive model and its own promises."""

from __future__ import annotations

import itertools
import random

import pytest
from holdfast.eviction import victims as victims_module
from holdfast.eviction.residents import Residents
from holdfast.eviction.victims import choose
from hypothesis import given
from hypothesis import strategies as st

from contracts.policy import NOW_NS, candidate

MANY = 1000


class ByRestore:
    """What is cheapest to restore leaves first. Counts what it was asked."""

    def __init__(self):
        self.asked = []

    def came(self, unit, size_bytes):
        raise AssertionError("choosing tells nobody anything")

    def left(self, unit):
        raise AssertionError("choosing tells nobody anything")

    def scores(self, candidates, now_ns):
        self.asked += [one.id for one in candidates]
        return [float(one.restore_ns) for one in candidates]

    def explain(self, candidate, now_ns):
        return {"score": float(candidate.restore_ns)}


def forest(residents):
    made = Residents()
    for one in residents:
        made.came(one.id, one.previous)
    return made


def chosen(residents, satisfied, permit=victims_module.anybody, ranking=None, now_ns=NOW_NS):
    by_id = {one.id: one for one in residents}
    return choose(forest(residents), ranking or ByRestore(), by_id.__getitem__, now_ns, satisfied, permit)


@st.composite
def forests(draw, max_size=12):
    """Residents: each one's predecessor is an earlier one, nobody, or something that has left."""
    residents = []
    for number in range(draw(st.integers(0, max_size))):
        earlier = [one.id for one in residents]
        residents.append(
            candidate(
                f"{number:03}",
                previous=draw(st.sampled_from([None, "gone", *earlier])),
                movable=draw(st.integers(0, 4)) > 0,
                size_bytes=draw(st.sampled_from([1, 2, 3, 5, 8])),
                restore_ns=draw(st.sampled_from([1, 2, 3, 100])),
                rank=draw(st.sampled_from([0, 0, 0, 1, -1])),
            )
        )
    return draw(st.permutations(residents))


def wide(seed=1, count=MANY):
    """More leaves than are all looked at: chains of one to four, some of them leased at the end."""
    chance = random.Random(seed)
    residents = []
    for number in range(count):
        previous = None
        for place in range(chance.randint(1, 4)):
            name = f"{number:04}-{place}"
            residents.append(candidate(name, previous=previous, size_bytes=1, restore_ns=chance.randint(1, 10**6)))
            previous = name
        if chance.random() < 0.2:
            residents[-1] = residents[-1]._replace(movable=False)
    return residents


def frees(size_bytes):
    return lambda victims: sum(one.size_bytes for one in victims) >= size_bytes


def naive(residents, satisfied, permit=victims_module.anybody):
    """The definition, at any price: lowest movable leaf, again and again; then spare."""
    chosen, left, refused = [], list(residents), set()
    while not satisfied(chosen):
        leaves = [one for one in left if one.movable and not any(other.previous == one.id for other in left)]
        leaves = [one for one in leaves if one.id not in refused]
        if not leaves:
            return None
        lowest = min(leaves, key=lambda one: (one.rank, one.restore_ns, one.id))
        if not permit(lowest):
            refused.add(lowest.id)
            continue
        chosen.append(lowest)
        left.remove(lowest)
    for one in reversed(list(chosen)):
        fewer = [other for other in chosen if other is not one]
        if satisfied(fewer) and not any(other.id == one.previous for other in fewer):
            chosen = fewer
    return tuple(chosen)


def is_leaf_first(victims, residents):
    """In this order nobody is evicted before what is behind it."""
    gone = set()
    for victim in victims:
        if any(one.previous == victim.id and one.id not in gone for one in residents):
            return False
        gone.add(victim.id)
    return True


@given(forests(max_size=40), st.integers(0, 120), st.sets(st.integers(0, 39)))
def test_it_agrees_with_the_naive_model(residents, wanted, kept):
    def permit(one):
        return int(one.id) not in kept

    assert chosen(residents, frees(wanted), permit) == naive(residents, frees(wanted), permit)


@given(forests(max_size=9), st.integers(1, 40))
def test_nobody_leaves_only_when_no_set_would_do(residents, wanted):
    victims = chosen(residents, frees(wanted))

    def stays(one):
        behind = [other for other in residents if other.previous == one.id]
        return not one.movable or any(stays(other) for other in behind)

    assert (victims is None) == (sum(one.size_bytes for one in residents if not stays(one)) < wanted)


@given(forests(max_size=9), st.integers(1, 40))
def test_no_leaf_first_part_of_the_victims_would_do(residents, wanted):
    victims = chosen(residents, frees(wanted)) or ()
    for count in range(len(victims)):
        for part in itertools.combinations(victims, count):
            assert not (is_leaf_first(part, residents) and frees(wanted)(part))


@given(forests(), st.integers(1, 60), st.data())
def test_the_order_of_the_residents_does_not_matter(residents, wanted, data):
    shuffled = data.draw(st.permutations(residents))
    assert chosen(residents, frees(wanted)) == chosen(shuffled, frees(wanted))


@given(forests(), st.sets(st.integers(0, 11)))
def test_any_monotone_predicate_will_do(residents, wanted):
    """Not only sums: here particular extents must be gone."""
    names = {f"{number:03}" for number in wanted} & {one.id for one in residents}

    def satisfied(victims):
        return names <= {one.id for one in victims}

    assert chosen(residents, satisfied) == naive(residents, satisfied)


def test_nothing_wanted_takes_nothing():
    assert chosen([candidate()], lambda _: True) == ()
    assert chosen([], lambda _: False) is None


def test_a_lease_at_the_tail_keeps_the_whole_chain():
    chain = [
        candidate("a", restore_ns=1),
        candidate("b", previous="a", restore_ns=1),
        candidate("c", previous="b", restore_ns=1, movable=False),
    ]
    assert chosen(chain, frees(1)) is None
    other = candidate("z")
    assert chosen([*chain, other], frees(1)) == (other,)


def test_a_shared_front_leaves_after_both_of_its_tails():
    front = candidate("front", restore_ns=1)
    tails = [candidate(name, previous="front") for name in ("t1", "t2")]
    assert chosen([front, *tails], frees(24 << 20)) == (*tails, front)


def test_a_hole_lets_the_front_go_while_the_back_stays():
    front = candidate("a", restore_ns=1)
    back = candidate("c", previous="b")  # "b" is not resident
    assert chosen([front, back], frees(1)) == (front,)


def test_ties_go_by_id():
    twins = [candidate(name) for name in ("b", "a", "c")]
    victims = chosen(twins, lambda victims: len(victims) >= 2)
    assert [one.id for one in victims] == ["a", "b"]


def test_small_victims_are_spared_when_a_large_one_is_enough():
    small = [candidate(name, size_bytes=1, restore_ns=1) for name in ("s1", "s2")]
    large = candidate("large", size_bytes=100)
    assert chosen([*small, large], frees(100)) == (large,)


def test_a_predecessor_that_must_go_takes_its_spareable_tail_with_it():
    front = candidate("front", size_bytes=100, restore_ns=1)
    tail = candidate("tail", previous="front", size_bytes=1)
    assert chosen([front, tail], frees(100)) == (tail, front)


def test_the_predicate_is_asked_about_once_per_victim():
    residents = [candidate(f"{number:05}", size_bytes=1) for number in range(4000)]
    asked = 0

    def satisfied(victims):
        nonlocal asked
        asked += 1
        return len(victims) >= 500

    assert len(chosen(residents, satisfied)) == 500
    assert asked < 550


# Many leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wanted", [1, 20, 300])
def test_of_many_leaves_too_the_plan_is_leaf_first_minimal_and_the_same_again(seed, wanted):
    residents = wide(seed)
    victims = chosen(residents, frees(wanted))
    assert len(victims) == wanted
    assert is_leaf_first(victims, residents)
    assert all(one.movable for one in victims)
    assert victims == chosen(residents, frees(wanted))
    assert len({chosen(residents, frees(5), now_ns=now_ns) for now_ns in range(9)}) > 1, "samples differ"


@pytest.mark.parametrize("now_ns", [0, 7, NOW_NS])
def test_of_many_leaves_every_one_is_looked_at_before_the_answer_is_none(now_ns):
    residents = wide()
    ranking = ByRestore()
    assert chosen(residents, lambda _: False, ranking=ranking, now_ns=now_ns) is None
    leaves = set(forest(residents).leaves)
    movable = {one.id for one in residents if one.movable}
    assert leaves & movable <= set(ranking.asked)
    assert len(ranking.asked) == len(set(ranking.asked)), "nobody is scored twice"


def test_of_many_leaves_all_that_can_leave_does_when_it_must():
    residents = wide()
    behind = {one.previous: one for one in residents if one.previous is not None}

    def stays(one):
        return not one.movable or (one.id in behind and stays(behind[one.id]))

    movable = sum(not stays(one) for one in residents)
    assert len(chosen(residents, frees(movable))) == movable
    assert chosen(residents, frees(movable + 1)) is None


def test_of_many_leaves_few_are_scored_and_the_victims_are_among_the_lowest():
    residents = wide()
    scores = sorted(one.restore_ns for one in residents)
    ranking = ByRestore()
    victims = chosen(residents, frees(10), ranking=ranking)
    assert len(ranking.asked) < MANY // 2
    assert sum(one.restore_ns for one in victims) / 10 < scores[len(scores) // 3]


def test_of_many_leaves_nobody_of_a_higher_rank_leaves_before_all_were_looked_at():
    residents = [candidate(f"{number:04}", size_bytes=1, rank=1) for number in range(MANY)]
    residents[123] = residents[123]._replace(rank=0)
    for now_ns in range(20):
        assert [one.id for one in chosen(residents, frees(1), now_ns=now_ns)] == ["0123"]


def test_a_chain_is_scored_in_runs():
    """A policy that computes with arrays is asked seldom."""

    class Calls(ByRestore):
        calls = 0

        def scores(self, candidates, now_ns):
            self.calls += 1
            return super().scores(candidates, now_ns)

    chain = [candidate(f"{n:04}", previous=f"{n - 1:04}" if n else None, size_bytes=1) for n in range(1000)]
    ranking = Calls()
    assert len(chosen(chain, frees(300), ranking=ranking)) == 300
    assert ranking.calls < 15
    assert len(ranking.asked) < 450
