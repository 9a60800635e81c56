"""What the queue policies are built of: a segment, ghosts, a sketch."""

from __future__ import annotations

from collections import Counter

import pytest
from holdfast.eviction import ghosts as ghosts_module
from holdfast.eviction.ghosts import Bounded, Ghosts
from holdfast.eviction.segment import Segment
from holdfast.eviction.sketch import COUNT_MAX, SAMPLE_PER_UNIT, Sketch
from hypothesis import given
from hypothesis import strategies as st

steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 3)),
        st.tuples(st.sampled_from(["take", "renew"]), st.integers(0, 30)),
        st.tuples(st.just("resize"), st.integers(-3, 12)),
    ),
    max_size=40,
)


@given(steps=steps)
def test_a_segment_is_a_list_whose_newest_are_within_its_share(steps):
    share_bytes, queue, segment = 5, [], Segment(5)
    for number, (step, value) in enumerate(steps):
        if step == "push":
            queue.append((number, value))
            segment.push(number, value)
        elif step == "resize":
            share_bytes = value
            segment.resize(value)
        elif queue:
            found = queue.pop(value % len(queue))
            if step == "take":
                assert segment.take(found[0]) == found[1]
                assert found[0] not in segment
            else:
                queue.append(found)
                segment.renew(found[0])
        within = len(queue)
        while within and sum(size for _, size in queue[-within:]) > share_bytes:
            within -= 1
        over = queue[: len(queue) - within]
        assert list(segment.over) == [unit for unit, _ in over]
        assert all(unit in segment for unit, _ in queue)
        assert segment.size_bytes == sum(size for _, size in queue)


def test_ghosts_are_forgotten_oldest_first_by_bytes_and_by_number(monkeypatch):
    ghosts = Ghosts(10)
    for unit, size in (("a", 4), ("b", 4), ("c", 4)):
        ghosts.put(unit, size, uses=size)
    assert "a" not in ghosts
    assert (ghosts.bytes_of("b"), ghosts.uses("b"), ghosts.uses("a"), ghosts.size_bytes) == (4, 4, 0, 8)
    assert ghosts.discard("b")
    assert not ghosts.discard("b")
    monkeypatch.setattr(ghosts_module, "GHOSTS_MAX", 3)
    for unit in range(9):
        ghosts.put(unit, 0)
    assert len(ghosts) == 3
    ghosts.trim(-1)
    assert (len(ghosts), ghosts.size_bytes) == (0, 0)


def test_what_was_told_longest_ago_is_forgotten():
    notes = Bounded(2)
    for unit in "abac":
        notes.put(unit, unit)
    assert (notes.get("a"), notes.get("b"), notes.pop("c"), notes.pop("c"), len(notes)) == ("a", None, "c", None, 1)


@given(uses=st.lists(st.integers(0, 40), max_size=100))
def test_a_sketch_is_never_too_low(uses):
    sketch, counts = Sketch(), Counter(uses)
    for number, unit in enumerate(uses):
        sketch.add(unit)
        if number == len(uses) // 2:
            sketch.widen(number)
    for unit, count in counts.items():
        assert sketch.count(unit) >= min(COUNT_MAX, count)


@pytest.mark.parametrize("unit", [7, "seven", -(1 << 100)])
def test_a_sketch_counts_what_is_rare_exactly_and_forgets(unit):
    sketch = Sketch()
    sketch.widen(1000)
    for other in range(100):
        sketch.add(("x", "y")[other % 2] + str(other))
    for _ in range(5):
        sketch.add(unit)
    assert sketch.count(unit) == 5
    for other in range(SAMPLE_PER_UNIT * 1000 - 105):
        sketch.add(f"z{other % 3}")
    assert sketch.count(unit) == 2
    assert sketch.count("z0") <= COUNT_MAX // 2


def test_a_sketch_hashes_alike_in_every_process():
    """Python salts its own hash of strings."""
    assert Sketch()._counters("unit") == (30, 39, 48, 57)
