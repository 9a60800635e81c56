"""History: decay, bounds, ghosts."""

from __future__ import annotations

import pytest
from holdfast.eviction.popularity import UNCOUNTED_MAX, History
from hypothesis import given
from hypothesis import strategies as st

HALF_LIFE_NS = 1000


@pytest.fixture
def history():
    return History(capacity=3, half_life_ns=HALF_LIFE_NS)


def test_a_use_halves_every_half_life(history):
    history.touch("a", 0)
    assert [history.frequency("a", t * HALF_LIFE_NS) for t in (0, 1, 2)] == [1.0, 0.5, 0.25]
    history.touch("a", HALF_LIFE_NS)
    assert history.frequency("a", HALF_LIFE_NS) == 1.5
    assert history.last_access_ns("a") == HALF_LIFE_NS


def test_it_knows_nothing_of_strangers(history):
    assert history.frequency("a", 5) == 0.0
    assert history.last_access_ns("a") is None
    history.rest("a", 9)
    assert len(history) == 0


def test_a_rest_is_no_use_but_starts_the_age(history):
    history.touch("a", 0)
    history.rest("a", HALF_LIFE_NS)
    assert history.last_access_ns("a") == HALF_LIFE_NS
    assert history.frequency("a", HALF_LIFE_NS) == 0.5


def test_when_full_the_oldest_access_goes(history):
    for name in "abc":
        history.touch(name, 0)  # all at once: the order of the calls decides
    history.touch("a", 1)
    history.touch("d", 2)
    assert [name for name in "abcd" if history.last_access_ns(name) is not None] == ["a", "c", "d"]


def test_looking_does_not_count_as_use(history):
    for name in "abc":
        history.touch(name, 0)
    history.frequency("a", 9)
    history.last_access_ns("a")
    history.touch("d", 1)
    assert history.last_access_ns("a") is None


def test_a_clock_that_goes_back_and_one_that_leaps(history):
    history.touch("a", 5000)
    history.touch("a", 4000)
    assert history.frequency("a", 3000) == 2.0
    assert history.last_access_ns("a") == 5000
    assert history.frequency("a", 10**30) == 0.0


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 5000)), max_size=60))
def test_it_equals_the_sum_over_all_uses(uses):
    history = History(capacity=100, half_life_ns=HALF_LIFE_NS)
    now_ns, times = 0, {}
    for name, wait_ns in uses:
        now_ns += wait_ns
        history.touch(name, now_ns)
        times.setdefault(name, []).append(now_ns)
    for name in "abcde":
        expected = sum(2 ** -((now_ns - t) / HALF_LIFE_NS) for t in times.get(name, []))
        assert history.frequency(name, now_ns) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abcdefgh"), max_size=60), st.integers(1, 5))
def test_it_never_outgrows_its_capacity_and_keeps_the_latest(uses, capacity):
    history = History(capacity=capacity, half_life_ns=HALF_LIFE_NS)
    for now_ns, name in enumerate(uses):
        history.touch(name, now_ns)
    latest = list(dict.fromkeys(reversed(uses)))[:capacity]
    assert [n for n in "abcdefgh" if history.last_access_ns(n) is not None] == sorted(latest)
    assert len(history) == len(latest)


@given(
    st.lists(
        st.tuples(st.sampled_from(["ab", "bcd", "e", "a"]), st.integers(0, HALF_LIFE_NS // 4), st.booleans()),
        max_size=40,
    )
)
def test_uses_of_many_together_count_as_single_uses_in_turn(uses):
    """However many are not counted yet when somebody looks."""
    together, single = History(capacity=100, half_life_ns=HALF_LIFE_NS), History(100, HALF_LIFE_NS)
    now_ns = 0
    for ids, later_ns, looks in uses:
        now_ns += later_ns
        together.touch_all(ids, now_ns)
        for name in ids:
            single.touch(name, now_ns)
        if looks:
            assert len(together) == len(single)
    for name in "abcde":
        assert together.last_access_ns(name) == single.last_access_ns(name)
        assert together.frequency(name, now_ns) == pytest.approx(single.frequency(name, now_ns))
    assert list(together._traces) == list(single._traces), "the order of what goes first"


def test_uses_that_nobody_looks_at_are_bounded():
    history = History(capacity=10_000, half_life_ns=HALF_LIFE_NS)
    kept = [(f"x{number}",) for number in range(1000)]
    for ids in kept:
        history.touch_all(ids, 0)
    assert len(history._uncounted) == UNCOUNTED_MAX
    assert len(history) == 1000
