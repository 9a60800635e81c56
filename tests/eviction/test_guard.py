"""The guard: what a hostile policy, or traffic that it cannot read, may cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from holdfast.eviction.cache import Cache
from holdfast.eviction.candidate import Candidate
from holdfast.eviction.guard import CREDIT, SETTLED_USES, TOLERANCE, Guard, Shadow
from holdfast.eviction.lfu import Lfu
from holdfast.eviction.lru import Lru
from holdfast.eviction.policy import Policy
from holdfast.eviction.replay import Request, replay
from holdfast.eviction.use import Use
from hypothesis import given
from hypothesis import strategies as st

from contracts.policy import NOW_NS, PolicyContract, candidate, chains, use, worth

SECOND_NS = 10**9
UNIT_TOKENS = 512
CAPACITY = 60


class Hostile:
    """Parts first with what was used last: the worst there is for sessions that go on.

    After `converted` uses it turns into LRU.
    """

    name = "hostile"

    def __init__(self, converted: int = 10**9) -> None:
        self._lru = Lru()
        self._converted = converted
        self._uses = 0

    def used(self, use: Use) -> None:
        self._uses += 1
        self._lru.used(use)

    def released(self, chain, now_ns):
        self._lru.released(chain, now_ns)

    def ranking(self, capacity_bytes, worth):
        return HostileRanking(self, self._lru.ranking(capacity_bytes, worth))

    @property
    def sign(self) -> int:
        return 1 if self._uses > self._converted else -1


class HostileRanking:
    def __init__(self, policy: Hostile, ranking) -> None:
        self._policy = policy
        self._ranking = ranking
        self.came = ranking.came
        self.left = ranking.left

    def scores(self, candidates: Sequence[Candidate], now_ns: int) -> Sequence[float]:
        return [self._policy.sign * score for score in self._ranking.scores(candidates, now_ns)]

    def explain(self, candidate, now_ns):
        return {"sign": float(self._policy.sign), "score": self.scores([candidate], now_ns)[0]}


def sessions(requests: int, at_once: int = 8) -> list[tuple[int, ...]]:
    """Conversations that grow by a unit at each turn, eight at once, each of twelve turns: LRU serves them well."""
    found = []
    for number in range(requests):
        turn, seat = number // at_once % 12, number % at_once
        base = (number // (12 * at_once) * at_once + seat) * 100
        found.append(tuple(range(base, base + turn + 1)))
    return found


def loops(requests: int) -> list[tuple[int, ...]]:
    """More single units in turn than fit: LRU finds none of them, parting with the last finds most."""
    return [(number % (CAPACITY * 5 // 4),) for number in range(requests)]


def saved(policy: Policy, to_come: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """What was saved, and what was asked for."""
    cache = Cache(policy, capacity_units=CAPACITY, unit_tokens=UNIT_TOKENS, unit_bytes=1 << 20, worth=worth)
    requests = [
        Request(
            use=Use(
                chain=chain,
                token_count=len(chain) * UNIT_TOKENS,
                unit_tokens=UNIT_TOKENS,
                now_ns=NOW_NS + number * SECOND_NS,
            )
        )
        for number, chain in enumerate(to_come)
    ]
    found = sum(worth(step.hit_units * UNIT_TOKENS) for step in replay(requests, policy, cache))
    return found, sum(worth(request.use.token_count) for request in requests)


class TestGuardedLfu(PolicyContract):
    make = staticmethod(lambda: Guard(Lfu()))


def test_a_hostile_policy_costs_a_hundredth():
    to_come = sessions(2000)
    lru, asked = saved(Lru(), to_come)
    hostile, _ = saved(Hostile(), to_come)
    guarded, _ = saved(Guard(Hostile()), to_come)
    assert hostile < lru - 0.1 * asked, "without a guard it is a disaster"
    assert guarded >= lru - (TOLERANCE * max(1.0, SETTLED_USES / len(to_come)) + 0.002) * asked


def test_good_times_do_not_pay_for_long_bad_ones():
    good, bad = loops(3000), sessions(2000)
    before, asked_before = saved(Guard(Hostile()), good)
    assert before > saved(Lru(), good)[0] + 0.2 * asked_before, "it really is ahead"
    both, asked = saved(Guard(Hostile()), [*good, *[tuple(unit + 1000 for unit in chain) for chain in bad]])
    lost = saved(Lru(), bad)[0] - (both - before)
    assert lost <= (CREDIT + 2 * TOLERANCE) * asked


def test_a_policy_that_has_failed_is_tried_again():
    to_come = [*sessions(400), *[(unit + 10**6,) for (unit,) in loops(4000)]]
    lru, asked = saved(Lru(), to_come)
    assert saved(Guard(Hostile()), to_come)[0] > lru + 0.02 * asked


@pytest.mark.parametrize("make", [Lfu, lambda: Hostile(converted=0)])
def test_a_policy_that_is_no_worse_is_left_alone(make):
    to_come = loops(2000) if make is Lfu else sessions(2000)
    assert saved(Guard(make()), to_come) == saved(make(), to_come)


def test_it_says_whom_it_follows():
    policy = Guard(Lfu())
    ranking = policy.ranking(2 << 20, worth)
    for unit in "aab":
        policy.used(use(unit))
        if not ranking._shadow.is_here(unit):
            ranking.came(unit, 1 << 20)
    one = candidate("b")
    assert ranking.explain(one, NOW_NS)["follows_lru"] == 0.0
    ranking.left("a")  # lost: what LRU would still have
    for _ in range(12):
        policy.used(use("a"))
    parts = ranking.explain(one, NOW_NS)
    assert (parts["follows_lru"], parts["ahead_of_lru"] < 0) == (1.0, True)
    assert ranking.scores([one], NOW_NS) == [parts["score"]]


@given(to_come=chains(), capacity=st.integers(1, 12))
def test_the_shadow_holds_what_lru_would(to_come, capacity):
    shadow = Shadow(capacity << 20)
    shadow.came("somebody", 1 << 20)
    policy = Lru()
    cache = Cache(policy, capacity_units=capacity, unit_tokens=UNIT_TOKENS, unit_bytes=1 << 20, worth=worth)
    for number, chain in enumerate(to_come):
        request = Use(
            chain=chain, token_count=len(chain) * UNIT_TOKENS, unit_tokens=UNIT_TOKENS, now_ns=number * SECOND_NS
        )
        list(replay([Request(use=request)], policy, cache))
        shadow.used(chain)
        for unit in chain:
            shadow.came(unit, 1 << 20)
        shadow.trim()
        assert len(shadow.order) <= capacity
        assert not shadow.absent
        assert set(shadow.order) == {unit for one in to_come for unit in one if unit in cache}


def test_what_is_used_elsewhere_is_no_loss_here():
    """Two groups serve a document each, a third cache never gets any: nothing is lost, so no policy has failed."""
    policy = Guard(Lfu())
    ranking, other, empty = (policy.ranking(4 << 20, worth) for _ in range(3))
    for unit, cache in (("a", ranking), ("b", other)):
        policy.used(use(unit))
        cache.came(unit, 1 << 20)
    for _ in range(50):
        policy.used(use("a"))
        policy.used(use("b"))
    assert not any(one.follows_lru for one in (ranking, other, empty))
    assert ranking.explain(candidate("a"), NOW_NS)["ahead_of_lru"] == 0.0
    for number in range(20):
        policy.used(use(f"once {number}"))
    assert len(ranking._shadow.absent) <= 4
    assert "a" in ranking._shadow, "what never came took no room"
