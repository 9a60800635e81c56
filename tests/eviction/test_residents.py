"""Residents against a naive model."""

from __future__ import annotations

from holdfast.eviction.residents import Residents
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

PREVIOUS = {number: (number - 1) // 2 if number else None for number in range(15)}  # a tree of four levels


class Machine(RuleBasedStateMachine):
    """Units of a tree come and go in any order."""

    def __init__(self):
        super().__init__()
        self.residents = Residents()
        self.here = set()

    @rule(unit=st.sampled_from(sorted(PREVIOUS)))
    def comes_or_leaves(self, unit):
        if unit in self.here:
            self.here.remove(unit)
            self.residents.left(unit)
        else:
            self.here.add(unit)
            self.residents.came(unit, PREVIOUS[unit])

    @precondition(lambda self: self.residents.leaves)
    @rule(data=st.data())
    def a_leaf_leaves(self, data):
        unit = data.draw(st.sampled_from(self.residents.leaves))
        self.here.remove(unit)
        self.residents.left(unit)

    @invariant()
    def it_is_what_is_here(self):
        assert set(self.residents) == self.here
        assert len(self.residents) == len(self.here)
        for unit, previous in PREVIOUS.items():
            followers = [other for other in self.here if PREVIOUS[other] == unit]
            assert (unit in self.residents) == (unit in self.here)
            assert self.residents.followers(unit) == len(followers)
            assert unit not in self.here or self.residents.previous(unit) == previous
        followed = {PREVIOUS[unit] for unit in self.here}
        assert sorted(self.residents.leaves) == sorted(self.here - followed)


TestResidents = Machine.TestCase


def test_the_order_of_the_leaves_follows_from_what_happened():
    one, other = Residents(), Residents()
    for residents in (one, other):
        for unit in range(9):
            residents.came(unit, None)
        for unit in (3, 0, 7):
            residents.left(unit)
    assert list(one.leaves) == list(other.leaves)
