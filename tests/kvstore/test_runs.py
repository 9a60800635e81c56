"""Runs: as few as can be, and every extent comes back out of them."""

import pytest
from holdfast.kvstore.extent import cut
from holdfast.kvstore.runs import PartMessage, Parts, in_runs
from holdfast.kvstore.slots import Slot
from holdfast.kvstore.spec import KVSpec, LayerGroup
from hypothesis import given
from hypothesis import strategies as st

STEP = 32
GROUPS = tuple(LayerGroup(layers=(n,), kv_heads=1, key_dim=1024 * (n + 1), value_dim=8) for n in range(2))
SPEC = KVSpec(groups=GROUPS, dtype="float32", model="m", vocabulary_size=9, block_tokens=16, extent_blocks=2)


def extents_of(token_count):
    keys = [bytes([n]) * 16 for n in range(-(-token_count // SPEC.block_tokens))]
    return cut(keys, token_count, SPEC, "t")


def serial(slab):
    return 1000 + slab


@given(st.integers(1, 400), st.data())
def test_every_extent_comes_back(token_count, data):
    extents = extents_of(token_count)
    numbers = data.draw(st.lists(st.integers(0, 60), min_size=len(extents), max_size=len(extents), unique=True))
    slots = [
        Slot(number // 8, number % 8 * extent.slot_bytes, extent.slot_bytes)
        for extent, number in zip(extents, numbers, strict=True)
    ]
    parts = Parts(in_runs(zip(extents, slots, strict=True), SPEC.extent_tokens, serial))
    wanted = [
        PartMessage(*slot, serial(slot.slab), extent.start, extent.valid_tokens, extent.group)
        for extent, slot in zip(extents, slots, strict=True)
    ]
    assert list(parts) == wanted
    assert len(parts) == len(wanted)
    assert [parts[n] for n in range(-len(wanted), len(wanted))] == wanted * 2
    assert parts[1:3] == wanted[1:3]
    with pytest.raises(IndexError):
        parts[len(wanted)]
    with pytest.raises(IndexError):
        parts[-len(wanted) - 1]


def test_neighbours_make_one_run_and_a_hole_a_slab_or_a_layer_group_ends_it():
    first, second = ([e for e in extents_of(100) if e.group == group] for group in (0, 1))
    size = first[0].slot_bytes
    whole = [Slot(3, n * size, size) for n in range(4)]
    (run,) = in_runs(zip(first, whole, strict=True), STEP, serial)
    assert (run.count, run.start, run.stop, run.size_bytes) == (4, 0, 100, 4 * size)
    assert run.part(3).valid_tokens == 4
    for other in (Slot(3, 5 * size, size), Slot(4, 2 * size, size)):
        assert [r.count for r in in_runs(zip(first, [*whole[:2], other, whole[3]], strict=True), STEP, serial)] == [
            2,
            1,
            1,
        ]
    both = [(first[0], whole[0]), (second[0], Slot(3, size, second[0].slot_bytes))]
    assert [r.group for r in in_runs(both, STEP, serial)] == [0, 1]
    missing_between = [(first[0], whole[0]), (first[2], whole[1])]
    assert [r.start for r in in_runs(missing_between, STEP, serial)] == [0, 64]
    assert in_runs([], STEP, serial) == []
