"""Slabs and classes: a demand never costs more than itself in whole slabs, however long and mixed the work was."""

import random
from collections import OrderedDict
from itertools import accumulate

import pytest
from holdfast.eviction.candidate import Candidate
from holdfast.kvstore.clearing import Occupant, clear_slabs, rather_slabs, whole_slabs_bytes
from holdfast.kvstore.document import DocumentId, WritePolicy
from holdfast.kvstore.errors import HoldfastError
from holdfast.kvstore.service import NS
from holdfast.kvstore.slots import SlabPool, SlotClass
from holdfast.kvstore.spec import KVSpec, LayerGroup
from hypothesis import given
from hypothesis import strategies as st

from fakes import CLIENT, FAR_NS, tiny_config, tiny_service

SLAB_BYTES, SLABS = 64, 48
KINDS = [SlotClass(tenant, size) for tenant in "abc" for size in (2, 5, 8, 16, 21)]


def candidate(name, size_bytes, previous=None):
    return Candidate(id=name, unit=name, previous=previous, size_bytes=size_bytes, movable=True, restore_ns=1)


def occupant(slot, loss=1.0):
    return Occupant(candidate(str(slot), slot.size_bytes), slot, loss)


def one_by_one(pool, kind, recency):
    """What eviction in the order of recency takes until the slot fits, those spared that were not needed."""
    chosen = []
    for slot in recency:
        chosen.append(slot)
        if (slot.size_bytes == kind.slot_bytes or len(chosen) % 8 == 0) and pool.fits({kind: 1}, chosen):
            break
    for slot in reversed(chosen):
        fewer = [other for other in chosen if other != slot]
        if pool.fits({kind: 1}, fewer):
            chosen = fewer
    return chosen


class Work:
    """Accesses to Zipf-popular items of all classes; popularity drifts, so classes grow and shrink."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.pool = SlabPool(SLAB_BYTES * SLABS, SLAB_BYTES)
        self.items = OrderedDict()  # name -> slot, the one used longest ago first
        self.evicted_bytes = self.stored_bytes = self.most_bytes = 0
        self.stuck = []
        self.policy_alone_bytes = 0  # the most that eviction in order would have taken at once
        weights = list(accumulate(1 / (rank + 1) for rank in range(3000)))
        self.ranks = self.random.choices(range(3000), cum_weights=weights, k=10_000)

    def run(self, operations):
        for step in range(operations):
            self.stuck.append(self.pool.fragmented_bytes / self.pool.capacity_bytes)
            rank = self.ranks[step]
            name = (rank + step // 500 * 37) % 5000
            if name in self.items:
                self.items.move_to_end(name)
                continue
            self.store(name, KINDS[name * 7919 % len(KINDS)])

    def store(self, name, kind):
        slot = self.pool.allocate(kind)
        if slot is None:
            self.make_room(kind)
            slot = self.pool.allocate(kind)
            assert slot is not None, "room was made on this very pool"
        self.items[name] = slot
        self.stored_bytes += kind.slot_bytes

    def make_room(self, kind):
        names = {slot: name for name, slot in self.items.items()}
        age = {name: place for place, name in enumerate(self.items)}
        victims = tuple(candidate(names[s], s.size_bytes) for s in one_by_one(self.pool, kind, names))
        slots = {names[slot]: slot for slot in names}
        self.policy_alone_bytes = max(self.policy_alone_bytes, sum(victim.size_bytes for victim in victims))
        chosen = rather_slabs(
            self.pool,
            {kind: 1},
            [],
            victims,
            lambda: [Occupant(candidate(name, slot.size_bytes), slot, 1 + age[name]) for slot, name in names.items()],
        )
        size_bytes = sum(c.size_bytes for c in chosen)
        assert size_bytes <= whole_slabs_bytes(self.pool, {kind: 1}) == SLAB_BYTES
        self.most_bytes = max(self.most_bytes, size_bytes)
        self.evicted_bytes += size_bytes
        for victim in chosen:
            self.pool.free(slots[victim.id])
            del self.items[victim.id]


@pytest.mark.parametrize("seed", [1, 2])
def test_long_mixed_work_does_not_fragment_the_pool_to_death(seed):
    """Five sizes, three tenants, drifting popularity: what leaves is bounded each time, and little is stuck."""
    work = Work(seed)
    work.run(3000)
    assert work.most_bytes <= SLAB_BYTES
    tail = work.stuck[len(work.stuck) // 2 :]
    assert sum(tail) / len(tail) < 0.25, "of capacity, free to one class only"
    assert work.evicted_bytes < 1.5 * work.stored_bytes


def test_days_of_allocating_and_freeing_leave_slabs_empty():
    """At half load slots of 15 classes come and go at random: the fullest slab is filled first, so others empty."""
    chance = random.Random(3)
    pool = SlabPool(SLAB_BYTES * 400, SLAB_BYTES)
    held, stuck = [], []
    for step in range(200_000):
        if pool.used_bytes < pool.capacity_bytes // 2:
            slot = pool.allocate(chance.choice(KINDS))
            assert slot is not None
            held.append(slot)
        else:
            index = chance.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            pool.free(held.pop())
        if step % 1000 == 0:
            stuck.append(pool.fragmented_bytes / pool.capacity_bytes)
    assert max(stuck[100:]) < 0.35


def test_the_cheapest_slabs_are_cleared_and_those_in_use_are_not():
    """Slab 0 holds something that may not leave, slab 2 is cheaper than slab 1, and slab 3 is half on its way out."""
    pool = SlabPool(4 * 10, 10)
    kind, wanted = SlotClass("a", 5), SlotClass("b", 10)
    slots = [pool.allocate(kind) for _ in range(8)]
    free = [occupant(slot, loss) for slot, loss in zip(slots[1:], (0, 5, 5, 1, 2, 4), strict=False)]
    names = [slot.slab for slot in slots]
    assert names == [0, 0, 1, 1, 2, 2, 3, 3]

    def cleared(count):
        found = clear_slabs(pool, {wanted: count}, [slots[7]], free)
        return found and [one.slot for one in found]

    assert cleared(1) == slots[4:6]
    assert cleared(2) == [*slots[4:6], slots[6]]
    assert cleared(3) == [*slots[4:6], slots[6], *slots[2:4]]
    assert cleared(4) is None


@given(st.lists(st.sampled_from(KINDS), max_size=60), st.sampled_from(KINDS), st.integers(1, 8), st.data())
def test_what_is_cleared_is_enough_and_no_more_than_the_demand_in_slabs(kinds, kind, count, data):
    pool = SlabPool(SLAB_BYTES * 8, SLAB_BYTES)
    slots = [slot for each in kinds if (slot := pool.allocate(each)) is not None]
    fixed = data.draw(st.sets(st.sampled_from(slots))) if slots else set()
    found = clear_slabs(pool, {kind: count}, [], [occupant(slot) for slot in slots if slot not in fixed])
    if found is not None:
        gone = [one.slot for one in found]
        assert pool.fits({kind: count}, gone)
        assert not fixed & set(gone)
        assert sum(slot.size_bytes for slot in gone) <= whole_slabs_bytes(pool, {kind: count})
    elif pool.could_hold({kind: count}):
        assert fixed, "only what may not leave stands in the way"


def test_the_planner_takes_no_more_than_the_demand_in_whole_slabs():
    """Documents of two models and three tenants, of which DDR keeps parts here and there: the bound holds each time."""
    chance = random.Random(5)
    service, effects, clock = tiny_service(tiny_config(nvme__capacity_bytes="16 MiB"))
    specs = [
        KVSpec(
            groups=(LayerGroup(layers=tuple(range(layers)), kv_heads=1, key_dim=8, value_dim=8),),
            dtype="float32",
            model=f"m{layers}",
            vocabulary_size=1000,
            block_tokens=16,
            extent_blocks=2,
        )
        for layers in (1, 3)
    ]
    plans = []
    plan = service.planner.make_room

    def recorded(demand):
        victims = plan(demand)
        assert victims is not None
        assert sum(v.size_bytes for v in victims) <= whole_slabs_bytes(service.state.ddr, demand.slots)
        plans.append(victims)
        return victims

    service.planner.make_room = recorded
    for step in range(60):
        spec = chance.choice(specs)
        service.register_spec(spec)
        document = DocumentId(chance.choice("xyz"), f"d{step}")
        tokens = [chance.randrange(1000) for _ in range(32 * chance.randrange(1, 12))]
        heard = []
        ingest = service.begin_ingest(
            CLIENT, document, spec.fingerprint(), tokens, WritePolicy.THROUGH, None, 64, FAR_NS, heard.append
        )
        effects.complete_all(service)
        service.commit_ingest(CLIENT, ingest.id, heard.append)
        effects.complete_all(service)
        back = chance.choice(list(service.state.documents))
        attach = service.attach(CLIENT, back, None, None, None, FAR_NS, heard.append)
        effects.complete_all(service)
        service.detach(CLIENT, attach.lease.id)
        clock.advance(NS)
        service.state.check()
        assert not [answer for answer in heard if isinstance(answer, HoldfastError)]
    assert len(plans) > 20


def test_a_fenced_slab_is_not_cleared():
    """What is freed in it can be used by nobody yet, so its copies would leave for nothing."""
    pool = SlabPool(2 * SLAB_BYTES, SLAB_BYTES)
    cheap, dear = SlotClass("a", 16), SlotClass("b", 32)
    fenced = pool.allocate(cheap)
    others = [pool.allocate(dear), pool.allocate(dear)]
    pool.fence(fenced.slab, 7)
    occupants = [occupant(fenced), *(occupant(slot, 9.0) for slot in others)]
    cleared = clear_slabs(pool, {SlotClass("c", 16): 1}, [], occupants)
    assert [item.slot for item in cleared] == others
