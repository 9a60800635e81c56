"""Strands against a naive model that keeps the same statistics of every unit by itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from holdfast.eviction import strands as strands_module
from holdfast.eviction.strands import Strands
from holdfast.eviction.use import Use
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

UNIT_TOKENS = 2048
SECOND_NS = 10**9


def use(chain, now_ns=0, *, part_tokens=0, session=None):
    """All of it; `part_tokens` are in its last unit, if that is part-filled."""
    token_count = len(chain) * UNIT_TOKENS - (UNIT_TOKENS - part_tokens if part_tokens else 0)
    return Use(chain=chain, token_count=token_count, unit_tokens=UNIT_TOKENS, now_ns=now_ns, session=session)


def count(strands, one):
    """Find and count a use."""
    return strands.use(one, strands.find(one.chain))


def units_of(strands):
    return sorted(strand.units for strand in strands.by_slot if strand is not None)


@dataclass(frozen=True)
class Unit:
    """What the naive model knows of one."""

    uses: int = 0
    used_ns: int = 0
    gap_ns: int | None = None
    behind_tokens: int = 0
    is_part_filled: bool = False


class NaiveComparison(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.strands = Strands()
        self.known = {}  # by unit
        self.followed = set()
        self.resident = Counter()
        self.now_ns = 0

    @rule(
        path=st.lists(st.integers(1, 3), min_size=1, max_size=7),
        start=st.sampled_from([0, 0, 0, 1, 2]),
        part_tokens=st.sampled_from([0, 0, 1000]),
        pause_seconds=st.integers(0, 9),
        session=st.sampled_from([None, "s", "t"]),
    )
    def use(self, path, start, part_tokens, pause_seconds, session):
        """Of a tree's path: a digit says which branch is taken, so equal ids mean equal prefixes."""
        self.now_ns += pause_seconds * SECOND_NS
        chain = ["".join(map(str, path[: depth + 1])) for depth in range(len(path))][start:]
        if not chain:
            return
        if part_tokens:
            chain[-1] += "part"
        one = use(chain, self.now_ns, part_tokens=part_tokens, session=session)
        used = count(self.strands, one)
        assert [unit for strand in used for unit in strand.units] == chain
        self.count(one)

    def count(self, one):
        chain, full_units = one.chain, one.token_count // UNIT_TOKENS
        before, followed = dict(self.known), set(self.followed)
        body = None  # the last known unit that is full
        for place, unit in enumerate(chain):
            is_part_filled = place >= full_units
            if unit in before:
                stats = before[unit]
                gap_ns = one.now_ns - stats.used_ns
                body = body if is_part_filled else unit
            elif body is not None and before[body].behind_tokens <= 2048:
                goes_on = before[body].behind_tokens < UNIT_TOKENS and body not in followed and not is_part_filled
                stats = before[body] if goes_on else Unit()
                gap_ns = one.now_ns - before[body].used_ns
            else:
                stats, gap_ns = Unit(), None
            behind_tokens = max(0, one.token_count - (place + 1) * UNIT_TOKENS)
            self.known[unit] = Unit(stats.uses + 1, one.now_ns, gap_ns, behind_tokens, is_part_filled)
            self.followed |= set(chain[place - 1 : place])

    @rule(path=st.lists(st.integers(1, 3), min_size=1, max_size=7))
    def come(self, path):
        unit = "".join(map(str, path))
        self.resident[unit] += 1
        self.strands.came(unit, self.now_ns)
        assert (self.strands.came_ns(unit) is None) == (unit in self.known)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def leave(self, data):
        unit = data.draw(st.sampled_from(sorted(self.resident)))
        self.resident[unit] -= 1
        self.resident += Counter()
        self.strands.left(unit)

    @invariant()
    def every_unit_is_in_one_strand_that_tells_the_truth(self):
        seen = []
        for strand in filter(None, self.strands.by_slot):
            seen += strand.units
            for unit in strand.units:
                assert self.strands.of(unit) is strand
                stats = self.known[unit]
                assert (stats.uses, stats.used_ns, stats.gap_ns) == (strand.uses, strand.used_ns, strand.gap_ns), unit
                assert stats.is_part_filled == strand.is_part_filled
            assert self.known[strand.units[-1]].behind_tokens == strand.behind_tokens
            assert strand.resident_count == sum(self.resident[unit] for unit in strand.units)
        assert sorted(seen) == sorted(self.known)
        resident = {self.strands.of(unit) for unit in self.resident} - {None}
        assert self.strands._resident_strands == len(resident)
        assert len(self.strands) == len(list(filter(None, self.strands.by_slot)))


NaiveComparison.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_strands_agree_with_a_model_of_single_units = NaiveComparison.TestCase


def test_a_use_that_takes_a_part_splits_and_both_halves_remember():
    strands = Strands()
    count(strands, use("abcdef", 0))
    count(strands, use("abcdef", 5))
    (front,) = count(strands, use("ab", 7))
    back = strands.of("c")
    assert (front.units, back.units) == (list("ab"), list("cdef"))
    assert (front.uses, back.uses, back.used_ns, back.gap_ns) == (3, 2, 5, 5)
    assert strands.before(back) is front
    assert front.uses - back.parent_uses == 1, "passed by once"


def test_a_conversation_that_goes_on_from_its_end_is_one_strand_and_the_next_turn():
    strands = Strands()
    for length in (2, 3, 5):
        (strand,) = count(strands, use("abcde"[:length], length * SECOND_NS))
    assert (strand.units, strand.uses, strand.turn, strand.gap_ns) == (list("abcde"), 3, 3, 2 * SECOND_NS)


def test_a_part_filled_last_unit_is_apart_and_passed_by():
    strands = Strands()
    first = use(["a", "b", "c-part"], 0, part_tokens=100)
    body, part = count(strands, first)
    assert (body.units, part.units, part.is_part_filled) == (["a", "b"], ["c-part"], True)
    assert count(strands, first) == [body, part]
    _, more = count(strands, use(list("abcd"), 9))
    assert (more.units, more.turn, more.gap_ns) == (["c", "d"], 3, 9)
    assert strands.before(part).uses - part.parent_uses == 1


def test_a_chain_may_be_told_from_its_middle_and_from_further_in_front():
    strands = Strands()
    count(strands, use("cde"))
    count(strands, use("de", 1))
    assert units_of(strands) == [["c"], ["d", "e"]]
    count(strands, use("abcdef", 2))
    assert units_of(strands) == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert strands.before(strands.of("c")) is strands.of("a")


def test_finding_a_long_known_chain_looks_at_few_of_its_units():
    class Counted(list):
        looked_at = 0

        def __getitem__(self, index):
            Counted.looked_at += 1
            return super().__getitem__(index)

    strands = Strands()
    chain = list(range(4000))
    count(strands, use(chain))
    count(strands, use([*chain[:1777], -1]))
    Counted.looked_at = 0
    assert [piece.stop for piece in strands.find(Counted(chain))] == [1777, 4000]
    assert [piece.stop for piece in strands.find(Counted([*chain[:999], -2]))] == [999, 1000]
    assert Counted.looked_at < 30


@pytest.fixture
def few_ghosts(monkeypatch):
    monkeypatch.setattr(strands_module, "GHOSTS_MIN", 3)
    monkeypatch.setattr(strands_module, "GHOSTS_PER_RESIDENT", 1)


@pytest.mark.usefixtures("few_ghosts")
def test_the_ghosts_used_longest_ago_are_forgotten_leaf_first():
    strands = Strands()
    for now_ns, chain in enumerate(("abc", "abd", "x", "y", "abe")):
        count(strands, use(chain, now_ns))
    strands.came("c", 9)
    strands.forget()
    # Of 6 strands, ab is in front of others, c is resident: d, x and y are older than e.
    assert units_of(strands) == [["a", "b"], ["c"], ["e"]]
    assert strands.of("x") is None
    strands.left("c")
    for number in range(9):
        count(strands, use(str(number), 10 + number))
    strands.forget()
    assert units_of(strands) == [["7"], ["8"]], "what had followers goes after them"


def test_a_session_is_counted_while_a_strand_names_it():
    strands = Strands()
    (first,) = count(strands, use("ab", 0, session="s"))
    count(strands, use("cd", 1, session="s"))
    assert (first.session_uses, first.session.uses) == (1, 2)
    for chain in ("ab", "cd"):
        count(strands, use(chain, 2, session="t"))
    (again,) = count(strands, use("ef", 3, session="s"))
    assert again.session.uses == 1, "nothing named it any more"
