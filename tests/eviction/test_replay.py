"""Replays: every event is possible, a naive replay agrees, and what is in use stays."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from holdfast.eviction.cache import Cache
from holdfast.eviction.policy import POLICIES
from holdfast.eviction.replay import Request, replay
from holdfast.eviction.tiered_replay import Tiers, replay_tiered
from holdfast.eviction.use import Use
from hypothesis import given, settings
from hypothesis import strategies as st

UNIT_TOKENS = 4
SECOND_NS = 10**9


@st.composite
def chains(draw, requests_max=40):
    """Chains over a forest that grows: each goes on from a front of an earlier one, or begins a new tree."""
    made, fresh = [], iter(range(10**6))
    for _ in range(draw(st.integers(1, requests_max))):
        front = ()
        if made and draw(st.integers(0, 3)):
            front = draw(st.sampled_from(made))
            front = front[: draw(st.integers(0, len(front)))]
        grown = draw(st.integers(0 if front else 1, 5))
        made.append((*front, *(next(fresh) for _ in range(grown))))
    return made


def requests_of(chains, hold_ns=0, gap_ns=SECOND_NS):
    """The last unit of every third chain is half full."""
    return [
        Request(
            use=Use(
                chain=chain,
                token_count=len(chain) * UNIT_TOKENS - (2 if number % 3 == 0 else 0),
                unit_tokens=UNIT_TOKENS,
                now_ns=number * gap_ns,
            ),
            hold_ns=hold_ns,
        )
        for number, chain in enumerate(chains)
    ]


def cache_of(policy, capacity_units):
    return Cache(policy, capacity_units=capacity_units, unit_tokens=UNIT_TOKENS, unit_bytes=1 << 20, worth=float)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(chains=chains(), capacity=st.integers(1, 12))
@settings(max_examples=15)
def test_capacity_holds_after_every_event_and_only_leaves_go(name, chains, capacity):
    policy = POLICIES[name]()
    previous = {unit: chain[at - 1] if at else None for chain in chains for at, unit in enumerate(chain)}
    resident = set()
    steps = replay(requests_of(chains), policy, cache_of(policy, capacity))
    for chain, step in zip(chains, steps, strict=True):
        front = next((at for at, unit in enumerate(chain) if unit not in resident), len(chain))
        assert step.hit_units == front
        for unit in step.evicted:
            resident.remove(unit.id)
            assert all(previous[other] != unit.id for other in resident)
        for unit in step.inserted:
            assert unit.id in chain[front:]
            assert unit.previous is None or unit.previous in resident
            assert unit.id not in resident
            resident.add(unit.id)
            assert len(resident) <= capacity


def naive_lru(chains, capacity):
    """Hits of tail-first LRU over units, with an ordered dictionary."""
    order, hits = OrderedDict(), []
    for chain in chains:
        hits.append(next((at for at, unit in enumerate(chain) if unit not in order), len(chain)))
        for unit in reversed(chain):
            order[unit] = None
            order.move_to_end(unit)
        while len(order) > capacity:
            order.popitem(last=False)
    return hits


@given(chains=chains(), capacity=st.integers(1, 12))
def test_lru_is_tail_first_lru(chains, capacity):
    policy = POLICIES["lru"]()
    steps = replay(requests_of(chains), policy, cache_of(policy, capacity))
    assert [step.hit_units for step in steps] == naive_lru(chains, capacity)


class Watched:
    """LRU that notes what it is told."""

    def __init__(self):
        self.inner = POLICIES["lru"]()
        self.told = []

    name = "watched"

    def used(self, use):
        self.told.append(("used", use.chain))
        self.inner.used(use)

    def released(self, chain, now_ns):
        self.told.append(("released", chain, now_ns))
        self.inner.released(chain, now_ns)

    def ranking(self, capacity_bytes, worth):
        assert capacity_bytes == 4 << 20
        return self.inner.ranking(capacity_bytes, worth)


def test_what_is_in_use_stays_until_its_hold_is_over():
    policy = Watched()
    held, *others = requests_of([(1, 2), (3, 4, 5), (6, 7, 8), (1, 2)], gap_ns=SECOND_NS)
    held = Request(use=held.use, hold_ns=5 * SECOND_NS // 2)
    steps = list(replay([held, *others], policy, cache_of(policy, 4)))
    assert [unit.id for unit in steps[1].inserted] == [3, 4]  # two places are taken, so the tail did not come
    assert [unit.id for unit in steps[2].evicted] == [4, 3]
    assert policy.told[3] == ("released", (1, 2), 5 * SECOND_NS // 2)
    assert steps[3].hit_units == 2


def test_a_ranking_is_asked_about_units_as_they_are():
    described = {}

    class Asked(Watched):
        def ranking(self, capacity_bytes, worth):
            ranking = self.inner.ranking(capacity_bytes, worth)
            scores = ranking.scores
            ranking.scores = lambda found, now_ns: (
                described.update((one.id, one) for one in found),
                scores(found, now_ns),
            )[1]
            return ranking

    policy = Asked()
    cache = Cache(policy, capacity_units=4, unit_tokens=4, unit_bytes=1 << 20, worth=lambda tokens: 10.0 * tokens**2)
    requests = requests_of([(1, 2, 3), (4, 5)])  # 3 is half full
    list(replay(requests, policy, cache))
    assert {unit: one.previous for unit, one in described.items()} == {3: 2, 5: 4}
    assert described[3].restore_ns == 10 * (10**2 - 8**2)
    assert described[5].restore_ns == 10 * (8**2 - 4**2)
    assert described[5].size_bytes == 1 << 20


def test_a_hold_is_of_what_came_and_ends_once_for_each_request():
    policy = POLICIES["lru"]()
    chains = [(1, 2, 3), (1, 2, 3), (4,), (5,), (6,), (1, 2)]
    requests = requests_of(chains, hold_ns=3 * SECOND_NS // 2)
    hits = [step.hit_units for step in replay(requests, policy, cache_of(policy, 2))]
    assert hits == [0, 2, 0, 0, 0, 0]


@given(chains=chains(requests_max=25), capacities=st.tuples(*[st.integers(1, 8)] * 3))
@settings(max_examples=40)
def test_tiers_find_what_one_of_them_holds_and_lose_only_what_the_last_refuses(chains, capacities):
    policy = POLICIES["lru"]()
    *memories, store = [cache_of(policy, capacity) for capacity in capacities]
    steps = replay_tiered(requests_of(chains), policy, Tiers(memories, store))
    for chain in chains:
        holders = [next((n for n, c in enumerate((*memories, store)) if unit in c), None) for unit in chain]
        front = holders.index(None) if None in holders else len(chain)
        step = next(steps)
        assert step.hit_units == front
        assert step.found == tuple(holders[:front].count(number) for number in range(3))
        for cache, capacity in zip((*memories, store), capacities, strict=True):
            assert len(cache) <= capacity


def test_a_copy_that_is_read_up_stays_below_and_what_has_none_is_written_down():
    policy = POLICIES["lru"]()
    hbm, ddr, nvme = (cache_of(policy, capacity) for capacity in (2, 4, 8))
    chains = [(1, 2), (3, 4), (5, 6), (1, 2), (1, 2)]
    steps = list(replay_tiered(requests_of(chains), policy, Tiers([hbm, ddr], nvme)))
    assert [step.written for step in steps] == [(0, 2, 0), (0, 2, 0), (0, 2, 2), (0, 0, 2), (0, 0, 0)]
    assert [step.found for step in steps] == [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 2), (2, 0, 0)]
    assert all(unit in cache for unit in (1, 2) for cache in (hbm, ddr, nvme))
    assert all(unit in ddr for unit in (5, 6))
    assert all(unit in nvme for unit in (3, 4))
