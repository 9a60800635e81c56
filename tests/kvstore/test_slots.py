"""The allocators against naive ones."""

from itertools import product

from holdfast.kvstore.slots import RowPool, SlabPool, Slot, SlotClass
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

KINDS = [SlotClass("a", 10), SlotClass("a", 25), SlotClass("b", 10), SlotClass("b", 60)]


class Slabs(RuleBasedStateMachine):
    """A slab pool of 3 x 50 bytes, and the list of slots that were handed out."""

    def __init__(self):
        super().__init__()
        self.pool = SlabPool(170, 50)
        self.held = []
        self.wrote = {}  # slab -> owner of the bytes in it

    def fits(self, kind):
        """Naively: a free place in a slab of the class, or an unused slab that is large enough."""
        for slab in range(3):
            inside = [(k, s) for k, s in self.held if s.slab == slab]
            if kind.slot_bytes <= 50 and (not inside or (inside[0][0] == kind and len(inside) < 50 // kind.slot_bytes)):
                return True
        return False

    @rule(kind=st.sampled_from(KINDS))
    def allocate(self, kind):
        expected = self.fits(kind)
        assert self.pool.fits({kind: 1}) == expected
        slot = self.pool.allocate(kind)
        assert (slot is not None) == expected
        if slot is not None:
            self.took(kind, slot)

    def took(self, kind, slot):
        before = self.wrote.get(slot.slab, kind.owner)
        assert self.pool.must_retire(slot) == (before != kind.owner), "only another owner's memory goes"
        assert not self.pool.must_retire(slot), "and only once"
        self.wrote[slot.slab] = kind.owner
        self.held.append((kind, slot))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        kind, slot = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        emptied = all(other.slab != slot.slab for _, other in self.held)
        assert self.pool.owner(slot.slab) == kind.owner
        self.pool.free(slot)
        assert (self.pool.owner(slot.slab) is None) == emptied

    @rule(kind=st.sampled_from(KINDS[:3]), slab=st.integers(0, 4), index=st.integers(0, 5))
    def claim(self, kind, slab, index):
        """A restart says where things lie: what fits is taken, exactly there."""
        slot = Slot(slab, index * kind.slot_bytes, kind.slot_bytes)
        inside = [(k, s) for k, s in self.held if s.slab == slab]
        free = slab < 3 and slot.offset + slot.size_bytes <= 50
        free = free and all(k == kind and s != slot for k, s in inside)
        assert self.pool.fits_in(kind, slot) == free
        if free:
            self.pool.claim(kind, slot)
            self.took(kind, slot)

    @invariant()
    def nothing_overlaps(self):
        cells = [(s.slab, s.offset + i) for _, s in self.held for i in range(s.size_bytes)]
        assert len(set(cells)) == len(cells)
        assert all(slab < 3 and byte < 50 for slab, byte in cells)
        assert self.pool.used_bytes == len(cells)
        assert self.pool.capacity_bytes == 150


class Rows(RuleBasedStateMachine):
    """A row pool of 20, and a list that says of each row whether it is taken."""

    def __init__(self):
        super().__init__()
        self.pool = RowPool(20)
        self.taken = [False] * 20
        self.held = []

    @rule(count=st.integers(0, 21))
    def allocate(self, count):
        starts = [s for s in range(21 - count) if not any(self.taken[s : s + count])]
        start = self.pool.allocate(count)
        assert start == (0 if count == 0 else min(starts, default=None))
        if start is not None:
            self.take(start, count)

    @rule(start=st.integers(0, 20), count=st.integers(0, 20))
    def claim(self, start, count):
        free = count == 0 or (start + count <= 20 and not any(self.taken[start : start + count]))
        assert self.pool.copy().claim(start, count) == free
        assert self.pool.claim(start, count) == free
        if free:
            self.take(start, count)

    def take(self, start, count):
        if count:
            self.held.append((start, count))
            self.taken[start : start + count] = [True] * count

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_a_tail(self, data):
        start, count = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        kept = data.draw(st.integers(0, count))
        self.pool.free(start + kept, count - kept)
        self.taken[start + kept : start + count] = [False] * (count - kept)
        if kept:
            self.held.append((start, kept))

    @invariant()
    def rows_agree(self):
        assert self.pool.used_rows == sum(self.taken)


Slabs.TestCase.settings = Rows.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSlabs = Slabs.TestCase
TestRows = Rows.TestCase


def test_fits_is_what_allocate_can_do():
    """For every small demand on every small pool, with every set of slots on its way out."""
    kinds = [SlotClass("a", 10), SlotClass("b", 15)]
    for counts in product(range(4), repeat=2):
        for wanted in product(range(5), repeat=2):
            for leaving in range(1 << sum(counts)):
                pool = SlabPool(60, 30)
                held = [
                    slot for k, n in zip(kinds, counts, strict=True) for _ in range(n) if (slot := pool.allocate(k))
                ]
                freeing = [slot for i, slot in enumerate(held) if leaving >> i & 1]
                said = pool.fits(dict(zip(kinds, wanted, strict=True)), freeing)
                for slot in freeing:
                    pool.free(slot)
                got = [pool.allocate(k) for k, n in zip(kinds, wanted, strict=True) for _ in range(n)]
                assert said == (None not in got), (counts, wanted, leaving)
