"""How documents are cut into extents."""

from dataclasses import replace

from holdfast.kvstore.extent import cut, named
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.keys import as_tokens, block_keys
from holdfast.kvstore.spec import LayerGroup
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import tiny_spec

SPEC = replace(
    tiny_spec(),
    groups=(tiny_spec().groups[0], LayerGroup(layers=(2, 3, 4), kv_heads=1, key_dim=4, value_dim=4)),
)


def pieces(tokens):
    """The extents of a document."""
    return cut(block_keys(as_tokens(tokens, SPEC), SPEC, bytes(32)), len(tokens), SPEC, "t")


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200))
def test_each_group_is_covered_once(count):
    """Every layer group has every token in exactly one extent, in order, each with its predecessor."""
    found = pieces([7] * count)
    for group in range(2):
        mine = [extent for extent in found if extent.group == group]
        covered = [t for extent in mine for t in range(extent.start, extent.stop)]
        assert covered == list(range(count))
        assert [extent.previous for extent in mine] == [None, *(extent.id for extent in mine)][:-1]
        assert {extent.slot_bytes for extent in mine} == {extent_geometry(SPEC, group).size_bytes}
        assert sum(len(extent.block_keys) // 16 for extent in mine) == -(-count // 16)
    assert len({extent.id for extent in found}) == len(found)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 100))
def test_documents_share_extents_of_a_common_prefix(one, other, shared):
    """An extent is shared exactly when all tokens up to its end are."""
    first = [1] * one
    second = first[:shared] + [2] * other
    ids = {extent.id for extent in pieces(first)}
    for extent in pieces(second):
        assert (extent.id in ids) == (first[: extent.start + 32] == second[: extent.start + 32])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200))
def test_ids_are_enough_to_name_what_was_lost(count):
    """A manifest gives back all but the block keys."""
    found = pieces([7] * count)
    again = named([extent.id for extent in found], count, SPEC, "t")
    assert again == tuple(replace(extent, block_keys=b"") for extent in found)
