"""Arrivals against the definition: the least that any unfinished extent has."""

from holdfast.kvstore.arrivals import Arrivals
from hypothesis import given
from hypothesis import strategies as st

depths = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 5), max_size=6)


@given(st.data(), depths)
def test_the_leading_layers_are_those_that_every_unfinished_extent_has(data, depths):
    arrivals, at = Arrivals(depths), dict.fromkeys(depths, 0)
    deepest = max(depths.values(), default=0)
    for extent in data.draw(st.lists(st.sampled_from(sorted(depths)), max_size=40) if depths else st.just([])):
        layers = data.draw(st.integers(0, depths[extent]))
        arrivals.reach(extent, layers)
        at[extent] = max(at[extent], layers)
        assert arrivals.layers == min((n for e, n in at.items() if n < depths[e]), default=deepest)
        assert arrivals.complete == (at == depths)
    for extent, depth in depths.items():
        arrivals.reach(extent, depth)
    assert arrivals.complete
    assert arrivals.layers == deepest
