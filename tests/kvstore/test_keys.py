"""Equal keys mean equal prefixes, of one tenant and one model."""

from dataclasses import replace

import numpy as np
import pytest
from holdfast.kvstore.errors import EmptyDocument, TokenOutOfRange
from holdfast.kvstore.keys import ROOT, as_tokens, block_keys, token_list
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import tiny_spec

SPEC = tiny_spec()  # blocks of 16 tokens
SECRET = b"s" * 32
FEW = st.lists(st.integers(0, 1), min_size=1, max_size=50)


EXTRAS = st.dictionaries(st.integers(0, 4), st.sampled_from([b"", b"a", b"b", bytes(4), bytes(8)]), max_size=3)


def keys(tokens, spec=SPEC, secret=SECRET, **kwargs):
    """Block keys of a list."""
    return block_keys(as_tokens(tokens, spec), spec, secret, **kwargs)


@given(FEW, st.integers(1, 4), EXTRAS)
def test_keys_can_be_made_piece_by_piece(tokens, blocks, extras):
    array = as_tokens(tokens, SPEC)
    made = [ROOT]
    for start in range(0, len(tokens), 16 * blocks):
        piece = array[start : start + 16 * blocks]
        made += block_keys(piece, SPEC, SECRET, made[-1], extras, len(made) - 1)
    assert made[1:] == keys(tokens, extras=extras)


@settings(deadline=None, max_examples=200)
@given(FEW, EXTRAS, EXTRAS)
def test_other_extra_parts_make_other_keys_from_their_block_on(tokens, ours, theirs):
    """And the same keys in front of it; empty parts are none."""
    pairs = zip(keys(tokens, extras=ours), keys(tokens, extras=theirs), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert (a == b) == all(ours.get(k, b"") == theirs.get(k, b"") for k in range(i + 1))


def test_keys_without_extra_parts_are_those_that_were_always_made():
    """Else what is stored would not be found again."""
    assert keys(range(40))[-1].hex() == "2b1cef01d7c3baebf7beddf7a6e6c643"
    assert keys(range(40), extras={3: b"behind the end"}) == keys(range(40))


def test_no_extra_part_reads_as_tokens():
    """Blocks of fewer tokens and a longer part differ from blocks of more tokens and a shorter one."""
    words = [bytes([number, 0, 0, 0]) for number in range(4)]
    found = [keys([0]), keys([0, 1]), keys([0, 1, 2])]
    found += [keys(range(count), extras={0: b"".join(words[count:])}) for count in (1, 2, 3)]
    found += [keys(range(count), extras={0: b"".join(words[count:3])}) for count in (1, 2)]
    assert len({only for (only,) in found}) == len(found)


@settings(deadline=None, max_examples=200)
@given(FEW, FEW, st.integers(0, 50))
def test_equal_keys_are_equal_prefixes(first, second, shared):
    """Block i of two documents has one key exactly when all tokens up to its end are the same."""
    second = first[:shared] + second
    ours, theirs = keys(first), keys(second)
    assert len(ours) == -(-len(first) // 16)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        stop = 16 * (i + 1)
        assert (a == b) == (first[:stop] == second[:stop])


def test_no_two_blocks_share_a_key():
    """Equal blocks at different places have different keys: the chain goes into them."""
    found = keys([1] * 160)
    assert len(set(found)) == 10
    assert {len(key) for key in found} == {16}


def test_a_part_filled_block_has_a_key_of_its_own():
    """Not that of the full block that it may become."""
    assert keys([1] * 17)[1] != keys([1] * 32)[1]
    assert keys([1] * 17)[0] == keys([1] * 32)[0]


def test_tenants_and_models_never_share():
    """The secret and the fingerprint are in every key."""
    tokens = list(range(40))
    sets = [keys(tokens), keys(tokens, secret=b"t" * 32), keys(tokens, replace(SPEC, model="other@1"))]
    assert len(set().union(*sets)) == 9


def test_tokens_are_checked_against_the_vocabulary():
    """Bad ids are refused by name."""
    assert as_tokens([0, 999], SPEC).dtype == np.uint32
    with pytest.raises(EmptyDocument):
        as_tokens([], SPEC)
    for bad in ([1000], [-1], [[1, 2]], [1.5], [2**70], [True]):
        with pytest.raises(TokenOutOfRange):
            as_tokens(bad, SPEC)


def test_tokens_travel_as_little_endian_words():
    """Messages carry uint32, four bytes each."""
    assert token_list(np.array([1, 70000], dtype="<u4").tobytes()) == [1, 70000]
