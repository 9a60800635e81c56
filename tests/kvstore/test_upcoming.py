"""Which document is brought near next: the sum of waits, deadlines, fairness, each against the plainest reasoning."""

from itertools import permutations

from holdfast.kvstore.upcoming import OVERTAKEN_MAX, Upcoming, in_order, next_up, passed_over
from hypothesis import given
from hypothesis import strategies as st

LOADS = st.integers(0, 50)


def hints(*, deadlines, most=6):
    """Some that wait, with ids in the order in which they came."""
    one = st.tuples(LOADS, st.sampled_from([0.5, 1, 2, 7]), deadlines)
    return st.lists(one, min_size=1, max_size=most).map(
        lambda rows: [
            Upcoming(id=i, load_ns=load, queries=queries, deadline_ns=due)
            for i, (load, queries, due) in enumerate(rows)
        ]
    )


def waits(order):
    """What all queries wait together."""
    now, total = 0, 0
    for one in order:
        now += one.load_ns
        total += now * one.queries
    return total


def on_time(order):
    """How many deadlines are kept."""
    now, kept = 0, 0
    for one in order:
        now += one.load_ns
        kept += one.deadline_ns is not None and now <= one.deadline_ns
    return kept


@given(hints(deadlines=st.none(), most=5))
def test_without_deadlines_no_order_waits_less(waiting):
    found = in_order(waiting, 0)
    assert sorted(one.id for one in found) == [one.id for one in waiting]
    assert waits(found) <= min(map(waits, permutations(waiting))) + 1e-9


@given(hints(deadlines=st.none() | st.integers(0, 120), most=5))
def test_no_order_keeps_more_deadlines(waiting):
    assert on_time(in_order(waiting, 0)) == max(map(on_time, permutations(waiting)))


@given(hints(deadlines=st.integers(0, 200)))
def test_with_time_to_spare_the_cheapest_goes_first_all_the_same(waiting):
    relaxed = [Upcoming(id=w.id, load_ns=w.load_ns, queries=w.queries, deadline_ns=10**6) for w in waiting]
    assert next_up(relaxed, 0) == min(relaxed, key=lambda one: one.cost)


@given(st.lists(st.tuples(LOADS, st.none() | st.integers(0, 60), st.booleans()), min_size=30, max_size=60))
def test_nobody_is_overtaken_more_often_than_is_said(arrivals):
    """Whatever comes behind it: cheap ones, urgent ones, and some that found no room for a while."""
    waiting = {}
    now, counted = 0, {}
    for number, (load, due, able) in enumerate(arrivals):
        waiting[number] = (load, None if due is None else now + due, able)
        counted[number] = 0
        if number % 2 == 0:
            continue  # more come than go
        made = [
            Upcoming(id=i, load_ns=row[0], queries=1, deadline_ns=row[1], overtaken=counted[i], able=row[2])
            for i, row in waiting.items()
        ]
        chosen = next_up(made, now)
        if chosen is None:
            waiting = {i: (row[0], row[1], True) for i, row in waiting.items()}  # there is room again
            continue
        del waiting[chosen.id]
        now += chosen.load_ns
        for i in passed_over([one for one in made if one.id != chosen.id], chosen):
            counted[i] += 1
    assert max(counted.values()) <= OVERTAKEN_MAX


def test_one_that_found_no_room_lets_others_go_until_it_was_overtaken_too_often():
    stuck = Upcoming(id=1, load_ns=5, queries=1, deadline_ns=None, able=False)
    later = Upcoming(id=2, load_ns=9, queries=1, deadline_ns=None)
    assert next_up([stuck, later], 0) == later
    tired = Upcoming(id=1, load_ns=5, queries=1, deadline_ns=None, able=False, overtaken=OVERTAKEN_MAX)
    assert next_up([tired, later], 0) is None


def test_a_deadline_goes_first_only_when_it_gets_tight():
    dear = Upcoming(id=1, load_ns=40, queries=1, deadline_ns=100)
    cheap = Upcoming(id=2, load_ns=10, queries=5, deadline_ns=None)
    assert next_up([dear, cheap], 0) == cheap
    assert next_up([dear, cheap], 50) == cheap
    assert next_up([dear, cheap], 51) == dear
    assert next_up([dear, cheap], 61) == cheap  # it is late whatever happens, and nobody waits for that


def test_many_queries_on_one_document_come_before_one_on_a_smaller():
    many = Upcoming(id=2, load_ns=30, queries=4, deadline_ns=None)
    one = Upcoming(id=1, load_ns=10, queries=1, deadline_ns=None)
    assert next_up([one, many], 0) == many
