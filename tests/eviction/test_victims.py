"""choose_victims against a naive model and its own promises."""

from __future__ import annotations

import itertools

from holdfast.eviction.lru import Lru
from holdfast.eviction.policy import POLICIES
from holdfast.eviction.victims import choose_victims
from hypothesis import given
from hypothesis import strategies as st

from contracts.policy import NOW_NS, candidate

policies = st.sampled_from(list(POLICIES.values()))


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
                age_seconds=draw(st.sampled_from([1, 2, 3, 100])),
                frequency=draw(st.sampled_from([0.5, 1.0, 4.0])),
            )
        )
    return draw(st.permutations(residents))


def frees(size_bytes):
    return lambda victims: sum(one.size_bytes for one in victims) >= size_bytes


def naive(residents, policy, satisfied):
    """The definition, at any price: lowest movable leaf, again and again; then spare."""
    chosen, left = [], list(residents)
    while not satisfied(chosen):
        leaves = [one for one in left if one.movable and not any(other.previous == one.id for other in left)]
        if not leaves:
            return None
        lowest = min(leaves, key=lambda one: (policy.score(one, NOW_NS), one.id))
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


@given(forests(), policies, st.integers(0, 60))
def test_it_agrees_with_the_naive_model(residents, policy, wanted):
    found = choose_victims(residents, policy, NOW_NS, frees(wanted))
    assert found == naive(residents, policy, frees(wanted))


@given(forests(), policies, st.integers(1, 60))
def test_victims_are_movable_leaf_first_and_enough(residents, policy, wanted):
    victims = choose_victims(residents, policy, NOW_NS, frees(wanted))
    if victims is None:
        return
    assert all(one.movable for one in victims)
    assert is_leaf_first(victims, residents)
    assert frees(wanted)(victims)


@given(forests(max_size=9), policies, st.integers(1, 40))
def test_nobody_leaves_only_when_no_set_would_do(residents, policy, wanted):
    victims = choose_victims(residents, policy, NOW_NS, frees(wanted))
    by_id = {one.id: one for one in residents}

    def stays(one):
        behind = [other for other in residents if other.previous == one.id]
        return not one.movable or any(stays(other) for other in behind)

    most = sum(one.size_bytes for one in by_id.values() if not stays(one))
    assert (victims is None) == (most < wanted)


@given(forests(max_size=9), policies, st.integers(1, 40))
def test_no_leaf_first_part_of_the_victims_would_do(residents, policy, wanted):
    victims = choose_victims(residents, policy, NOW_NS, frees(wanted)) or ()
    for count in range(len(victims)):
        for part in itertools.combinations(victims, count):
            assert not (is_leaf_first(part, residents) and frees(wanted)(part))


@given(forests(), policies, st.integers(1, 60), st.data())
def test_the_order_of_the_residents_does_not_matter(residents, policy, wanted, data):
    shuffled = data.draw(st.permutations(residents))
    one = choose_victims(residents, policy, NOW_NS, frees(wanted))
    assert one == choose_victims(iter(shuffled), policy, NOW_NS, frees(wanted))


@given(forests(), st.sets(st.integers(0, 11)))
def test_any_monotone_predicate_will_do(residents, wanted):
    """Not only sums: here particular extents must be gone."""
    names = {f"{number:03}" for number in wanted} & {one.id for one in residents}

    def satisfied(victims):
        return names <= {one.id for one in victims}

    assert choose_victims(residents, Lru(), NOW_NS, satisfied) == naive(residents, Lru(), satisfied)


def test_nothing_wanted_takes_nothing():
    assert choose_victims([candidate()], Lru(), NOW_NS, lambda _: True) == ()
    assert choose_victims([], Lru(), NOW_NS, lambda _: False) is None


def test_a_lease_at_the_tail_keeps_the_whole_chain():
    chain = [
        candidate("a", age_seconds=900),
        candidate("b", previous="a", age_seconds=900),
        candidate("c", previous="b", age_seconds=900, movable=False),
    ]
    assert choose_victims(chain, Lru(), NOW_NS, frees(1)) is None
    other = candidate("z", age_seconds=1)
    assert choose_victims([*chain, other], Lru(), NOW_NS, frees(1)) == (other,)


def test_a_shared_front_leaves_after_both_of_its_tails():
    front = candidate("front", age_seconds=900)
    tails = [candidate(name, previous="front", age_seconds=1) for name in ("t1", "t2")]
    victims = choose_victims([front, *tails], Lru(), NOW_NS, frees(24 << 20))
    assert victims == (*tails, front)


def test_a_hole_lets_the_front_go_while_the_back_stays():
    front = candidate("a", age_seconds=900)
    back = candidate("c", previous="b", age_seconds=1)  # "b" is not resident
    assert choose_victims([front, back], Lru(), NOW_NS, frees(1)) == (front,)


def test_ties_go_by_id():
    twins = [candidate(name) for name in ("b", "a", "c")]
    victims = choose_victims(twins, Lru(), NOW_NS, lambda chosen: len(chosen) >= 2)
    assert [one.id for one in victims] == ["a", "b"]


def test_small_victims_are_spared_when_a_large_one_is_enough():
    small = [candidate(name, size_bytes=1, age_seconds=900) for name in ("s1", "s2")]
    large = candidate("large", size_bytes=100, age_seconds=1)
    assert choose_victims([*small, large], Lru(), NOW_NS, frees(100)) == (large,)


def test_a_predecessor_that_must_go_takes_its_spareable_tail_with_it():
    front = candidate("front", size_bytes=100, age_seconds=900)
    tail = candidate("tail", previous="front", size_bytes=1, age_seconds=900)
    assert choose_victims([front, tail], Lru(), NOW_NS, frees(100)) == (tail, front)


def test_the_predicate_is_asked_about_once_per_victim():
    residents = [candidate(f"{number:05}", size_bytes=1) for number in range(4000)]
    asked = 0

    def satisfied(victims):
        nonlocal asked
        asked += 1
        return len(victims) >= 500

    assert len(choose_victims(residents, Lru(), NOW_NS, satisfied)) == 500
    assert asked < 550
