import pytest
import torch
from holdfast.kvstore.layout import Span
from holdfast.ring_attention.kv_message import KVMessages
from holdfast.ring_attention.segment import KVSegment
from holdfast.ring_attention.share import SequenceShare

SPANS = (Span(0, 40),)


def one(segment):
    return [SequenceShare([SPANS], [segment], [[segment.spans]])]


def check_round_trip(batch):
    messages = KVMessages(batch)
    message = messages.pack()
    assert message.shape == (messages.elements(0),)
    for share, segments in zip(batch, messages.unpack(message, 0), strict=True):
        for sent, got in zip(share.segments, segments, strict=True):
            assert torch.equal(got.key, sent.key)
            assert torch.equal(got.value, sent.value)
            assert got.spans == sent.spans
    return message


def test_kv_in_one_piece_is_the_message():
    """Nothing is copied when key and value already lie one behind the other."""
    kv = torch.randn(2, 3, 40, 8)
    assert check_round_trip(one(KVSegment(kv[0], kv[1], SPANS))).data_ptr() == kv.data_ptr()


@pytest.mark.parametrize(
    "take",
    [
        lambda kv: (kv[1], kv[0]),
        lambda kv: (kv[0], kv[2]),
        lambda kv: (kv[0, :, :40], kv[1, :, :40].clone()),
        lambda kv: (kv[0, :2], kv[0, 1:]),
    ],
    ids=["value first", "a gap", "two pieces", "overlapping"],
)
def test_other_kv_is_copied_in_order(take):
    """Whatever is not key, then value, without a gap."""
    key, value = take(torch.randn(3, 3, 40, 8))
    assert check_round_trip(one(KVSegment(key, value, SPANS))).data_ptr() != key.data_ptr()


def test_rows_of_an_arena_are_packed():
    """Several sequences and segments, some empty, with rows of others beside them."""
    key, value = torch.randn(3, 100, 8), torch.randn(3, 100, 6)
    spans = [(Span(0, 30),), (), (Span(5, 9), Span(20, 21))]
    segments = [
        KVSegment(key[:, a:b], value[:, a:b], s) for (a, b), s in zip([(0, 30), (30, 30), (60, 65)], spans, strict=True)
    ]
    batch = [
        SequenceShare([SPANS], segments[:2], [spans[:2]]),
        SequenceShare([SPANS], segments[2:], [spans[2:]]),
    ]
    check_round_trip(batch)


def test_latents_travel_once():
    """Their values are columns of the keys."""
    latents = torch.randn(1, 40, 12)
    assert check_round_trip(one(KVSegment.of_latents(latents, 8, SPANS))).numel() == 40 * 12


def test_nothing_is_a_message_too():
    """A rank may hold none of a batch's KV."""
    nothing = torch.empty(2, 0, 8)
    assert check_round_trip([SequenceShare([()], [KVSegment(nothing, nothing, ())], [[()]])]).numel() == 0
