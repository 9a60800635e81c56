"""Owners of an extent against a plain set, however many there are."""

import pytest
from holdfast.kvstore.document import DocumentId
from holdfast.kvstore.owners import FEW, UNNAMED_TOLD, Crowd, asked, common, in_order, joined, left, names
from hypothesis import given
from hypothesis import strategies as st

DOCUMENTS = [DocumentId("t", name) for name in [*"abcdef", *(f"prompt/{number:02x}" for number in range(40))]]
CHANGES = st.lists(st.tuples(st.booleans(), st.sampled_from(DOCUMENTS)), max_size=120)
SOME = st.sets(st.sampled_from(DOCUMENTS))


def owners_of(documents):
    """They joined one after another."""
    found = frozenset()
    for document in documents:
        found = joined(found, frozenset((document,)))
    return found


@given(SOME, CHANGES, SOME)
def test_owners_are_a_set(first, changes, others):
    naive, owners = set(first), owners_of(first)
    for comes, document in changes:
        (naive.add if comes else naive.discard)(document)
        owners = joined(owners, frozenset((document,))) if comes else left(owners, document)
        assert set(owners) == naive
        assert len(owners) == len(naive)
        assert bool(owners) == bool(naive)
        assert all((one in owners) == (one in naive) for one in DOCUMENTS)
    assert set(common(owners, others)) == naive & others
    assert set(in_order(owners)) == naive
    assert (owners == frozenset(naive)) is True
    assert set(asked(owners)) == naive


def test_one_for_all_extents_between_two_forks():
    """The very object that came, as long as there is one."""
    owner = frozenset((DOCUMENTS[0],))
    assert joined(frozenset(), owner) is owner


@pytest.mark.parametrize("count", [FEW, FEW + 1, len(DOCUMENTS)])
def test_people_are_told_all_that_have_a_name(count):
    owners = owners_of(reversed(DOCUMENTS[:count]))
    told = names(owners)
    assert told[:6] == tuple(f"t/{name}" for name in "abcdef")
    assert len(told) == min(count, 6 + UNNAMED_TOLD)
    assert isinstance(owners, Crowd) == (count > FEW)


def test_a_crowd_that_shrinks_is_few_again():
    """And not at the very place where it grew, so that one that comes and goes costs nothing."""
    owners = owners_of(DOCUMENTS[: FEW + 1])
    for document in DOCUMENTS[: FEW // 2]:
        assert isinstance(owners, Crowd)
        owners = left(owners, document)
    assert isinstance(left(owners, DOCUMENTS[FEW]), frozenset)
