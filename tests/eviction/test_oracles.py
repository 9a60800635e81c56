"""The classical policies against other people's: cachetools, libcachesim, and brute force.

Chains of one unit of one size have no prefixes, so nothing but the policy decides. As in its paper, room is made
before a unit comes, and a newcomer is never refused.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from functools import cache as memoized
from itertools import combinations

import pytest
from holdfast.eviction.belady import Belady
from holdfast.eviction.candidate import Candidate
from holdfast.eviction.mq import MqRanking
from holdfast.eviction.policy import POLICIES
from holdfast.eviction.sketch import Sketch
from holdfast.eviction.use import Use
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.policy import Cache, chains

streams = st.lists(st.integers(0, 12), max_size=120)


def zipf(seed, requests=6000, units=600, power=0.9, drift=0.1):
    """Popularity that drifts: the ranks move on by so many units each request."""
    rng = random.Random(seed)
    weights = [1 / rank**power for rank in range(1, units + 1)]
    drawn = rng.choices(range(units), weights, k=requests)
    return [rank + int(number * drift) for number, rank in enumerate(drawn)]


def hits_of(policy, stream, capacity_units, ranking=None):
    """Which requests found their unit."""
    ranking = ranking or policy.ranking(capacity_units, float)
    here = OrderedDict()  # the one used longest ago first: it leaves first of those with equal scores
    found = []
    for number, unit in enumerate(stream):
        policy.used(Use(chain=(unit,), token_count=1, unit_tokens=1, now_ns=number))
        found.append(unit in here)
        if not found[-1]:
            if len(here) == capacity_units:
                scores = ranking.scores(list(here.values()), number)
                victim = min(zip(scores, here, strict=True), key=lambda pair: pair[0])[1]
                del here[victim]
                ranking.left(victim)
            here[unit] = Candidate(id=unit, unit=unit, previous=None, size_bytes=1, movable=True, restore_ns=1)
            ranking.came(unit, 1)
        here.move_to_end(unit)
    return found


class Naive:
    """The papers' algorithms, as they are told there: lists, and one unit at a time."""

    @staticmethod
    def belady(to_come, capacity_units):
        """The most units that can be found, trying everything; only leaves go."""
        to_come = tuple(to_come)
        previous = {unit: front for chain in to_come for front, unit in zip((None, *chain), chain, strict=False)}

        def closed(units):
            return all(previous[unit] is None or previous[unit] in units for unit in units)

        def kept(units):
            for size in range(min(capacity_units, len(units)) + 1):
                yield from (frozenset(some) for some in combinations(sorted(units), size) if closed(set(some)))

        @memoized
        def best(number, here):
            if number == len(to_come):
                return 0
            chain = to_come[number]
            found = sum(unit in here for unit in chain)
            return found + max(best(number + 1, some) for some in kept(here | set(chain)))

        return best(0, frozenset())

    @staticmethod
    def gdsf(stream, capacity_units):
        floor, uses, priority, last = 0, {}, {}, {}
        for number, unit in enumerate(stream):
            yield unit in priority
            if unit not in priority and len(priority) == capacity_units:
                victim = min(priority, key=lambda one: (priority[one], last[one]))
                floor = priority.pop(victim)
                del uses[victim]
            uses[unit] = uses.get(unit, 0) + 1
            priority[unit] = floor + uses[unit]
            last[unit] = number

    @staticmethod
    def tinylfu(stream, capacity_units):
        window_max = max(1, 0.01 * capacity_units)
        protected_max = 0.8 * (capacity_units - 0.01 * capacity_units)
        window, probation, protected = [], [], []
        sketch = Sketch()
        for unit in stream:
            sketch.widen(len(window) + len(probation) + len(protected))
            sketch.add(unit)
            yield unit in [*window, *probation, *protected]
            if unit in window:
                window.remove(unit)
                window.append(unit)
                continue
            if unit in probation or unit in protected:
                (probation if unit in probation else protected).remove(unit)
                protected.append(unit)
                if len(protected) > protected_max:
                    probation.append(protected.pop(0))
                continue
            if len(window) + len(probation) + len(protected) == capacity_units:
                if window and len(window) + 1 > window_max:
                    challenger = window.pop(0)
                    if probation and sketch.count(challenger) > sketch.count(probation[0]):
                        probation.pop(0)
                        probation.append(challenger)
                else:
                    (probation or protected or window).pop(0)
            window.append(unit)
            if len(window) > window_max:
                probation.append(window.pop(0))

    @staticmethod
    def s3fifo(stream, capacity_units):
        small, main, ghosts, uses = [], [], [], {}
        for unit in stream:
            yield unit in uses
            if unit in uses:
                uses[unit] = min(3, uses[unit] + 1)
                continue
            is_ghost = unit in ghosts
            if is_ghost:
                ghosts.remove(unit)
            while len(small) + len(main) == capacity_units:
                queue = small if len(small) >= max(1, 0.1 * capacity_units) else main
                first = queue.pop(0)
                if queue is small and uses[first] > 1:
                    uses[first] = 0
                    main.append(first)
                elif queue is main and uses[first]:
                    uses[first] -= 1
                    main.append(first)
                else:
                    del uses[first]
                    if queue is small:
                        ghosts = [*ghosts, first][-int(0.9 * capacity_units) :]
            uses[unit] = 0
            (main if is_ghost else small).append(unit)


streams_and_capacities = st.tuples(streams, st.integers(1, 8))


@pytest.mark.parametrize("name", ["gdsf", "tinylfu"])
@settings(max_examples=60)
@given(given_=streams_and_capacities)
def test_it_is_the_papers_on_any_stream(name, given_):
    stream, capacity_units = given_
    assert hits_of(POLICIES[name](), stream, capacity_units) == list(getattr(Naive, name)(stream, capacity_units))


@pytest.mark.parametrize("name", ["gdsf", "tinylfu"])
def test_it_is_the_papers_on_a_zipf_stream(name):
    stream = zipf(1, requests=3000)
    assert hits_of(POLICIES[name](), stream, 120) == list(getattr(Naive, name)(stream, 120))


def found_by(policy, to_come, capacity_units):
    """How many units its cache finds; newcomers compete and only leaves go."""
    cache = Cache(policy, capacity_units)
    found = 0
    for number, chain in enumerate(to_come):
        found += sum(unit in cache.here for unit in chain)
        assert cache.request(chain, number)
    return found


tiny = st.lists(st.sampled_from([(1,), (1, 2), (1, 2, 3), (1, 4), (5,), (5, 6)]), max_size=7)


@settings(max_examples=60)
@given(to_come=tiny, capacity_units=st.integers(1, 4))
def test_nobody_finds_more_than_belady(to_come, capacity_units):
    assert found_by(Belady(to_come), to_come, capacity_units) == Naive.belady(to_come, capacity_units)


@settings(max_examples=40)
@given(to_come=chains(), capacity_units=st.integers(1, 10), name=st.sampled_from(sorted(POLICIES)))
def test_no_policy_finds_more_than_belady(to_come, capacity_units, name):
    most = found_by(Belady(to_come), to_come, capacity_units)
    assert found_by(POLICIES[name](), to_come, capacity_units) <= most


@pytest.mark.parametrize("name", ["lru", "lfu"])
@settings(max_examples=60)
@given(given_=streams_and_capacities)
def test_it_is_that_of_cachetools(name, given_):
    cachetools = pytest.importorskip("cachetools", reason="the oracle is not installed")
    stream, capacity_units = given_
    theirs = {"lru": cachetools.LRUCache, "lfu": cachetools.LFUCache}[name](capacity_units)
    found = []
    for unit in stream:
        found.append(unit in theirs and theirs[unit] == unit)  # looking it up is what counts as a use
        if not found[-1]:
            theirs[unit] = unit
    assert hits_of(POLICIES[name](), stream, capacity_units) == found


def libcachesim_hits(make, stream, capacity_units, **parameters):
    libcachesim = pytest.importorskip("libcachesim", reason="the oracle is not installed")
    theirs = getattr(libcachesim, make)(capacity_units, hashpower=12, **parameters)
    return [theirs.get(libcachesim.Request(obj_id=unit + 1, obj_size=1)) for unit in stream]


@pytest.mark.parametrize(("name", "make"), [("lru", "LRU"), ("lfu", "LFU"), ("arc", "ARC")])
@settings(max_examples=60, deadline=None)
@given(given_=streams_and_capacities)
def test_it_is_that_of_libcachesim(name, make, given_):
    stream, capacity_units = given_
    assert hits_of(POLICIES[name](), stream, capacity_units) == libcachesim_hits(make, stream, capacity_units)


@pytest.mark.parametrize("capacity_units", [20, 100])
@pytest.mark.parametrize(("name", "make"), [("lru", "LRU"), ("lfu", "LFU"), ("arc", "ARC")])
def test_it_is_that_of_libcachesim_on_a_zipf_stream(name, make, capacity_units):
    stream = zipf(2)
    assert hits_of(POLICIES[name](), stream, capacity_units) == libcachesim_hits(make, stream, capacity_units)


@pytest.mark.parametrize("capacity_units", [100, 300])
@pytest.mark.parametrize(
    ("name", "make", "apart", "drift"),
    [("s3fifo", "S3FIFO", 0.01, 0.1), ("gdsf", "GDSF", 0.005, 0.1), ("tinylfu", "WTinyLFU", 0.015, 0)],
)
def test_it_is_near_that_of_libcachesim(name, make, apart, drift, capacity_units):
    """Not the same: its WTinyLFU goes on with the next of the window until one loses, and its sketch ages more slowly.

    So they part company where popularity drifts. Ours is compared with the paper above.
    """
    stream = zipf(3, drift=drift)
    ours = hits_of(POLICIES[name](), stream, capacity_units)
    theirs = libcachesim_hits(make, stream, capacity_units)
    assert sum(ours) / len(stream) == pytest.approx(sum(theirs) / len(stream), abs=apart)


@pytest.mark.parametrize("capacity_units", [30, 100, 300])
def test_mq_is_near_that_of_libcachesim(capacity_units):
    stream = zipf(3)
    mq = POLICIES["mq"]()
    ours = hits_of(mq, stream, capacity_units, mq.follow(MqRanking(capacity_units, life_time=300)))
    theirs = libcachesim_hits("MQ", stream, capacity_units, lifetime=300)
    assert sum(ours) / len(stream) == pytest.approx(sum(theirs) / len(stream), abs=0.003)


@pytest.mark.parametrize("capacity_units", [30, 100, 300])
def test_s3fifo_is_near_the_papers(capacity_units):
    """Not the same: when all that is over the small queue's share is promoted, ours turns to the main queue."""
    stream = zipf(4)
    ours = hits_of(POLICIES["s3fifo"](), stream, capacity_units)
    theirs = list(Naive.s3fifo(stream, capacity_units))
    assert sum(ours) / len(stream) == pytest.approx(sum(theirs) / len(stream), abs=0.01)
