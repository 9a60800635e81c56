import torch
from holdfast.kvstore.layout import Layout, Run, Span, contiguous, striped, zigzag
from holdfast.ring_attention.decode import decode
from holdfast.ring_attention.local import run_ranks
from holdfast.ring_attention.pass_kv import pass_kv
from holdfast.ring_attention.share import SequenceShare
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_helpers import CPU_FLASH, dense, segments_of, spans_in, take


@st.composite
def layouts(draw, token_count, cp):
    """Any layout: cuts anywhere, owners anyhow, so shards are uneven and may be empty."""
    cuts = draw(st.lists(st.integers(1, max(1, token_count - 1)), max_size=8, unique=True))
    edges = sorted({0, token_count, *(cut for cut in cuts if cut < token_count)})
    owners = [draw(st.integers(0, cp - 1)) for _ in edges[1:]]
    runs = [Run(a, b, owner) for a, b, owner in zip(edges, edges[1:], owners, strict=False)]
    return Layout(tuple(runs), cp)


@st.composite
def cases(draw):
    """Keys over [0, n) under one layout, cut into two segments; queries over [p, n) under another."""
    cp = draw(st.integers(1, 5))
    total = draw(st.integers(1, 90))
    cached = draw(st.integers(0, total))
    keys = draw(layouts(total, cp))
    queries = draw(layouts(total, cp))
    boundary = draw(st.integers(0, total))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 4), (1, 3)]))
    return cp, total, cached, keys, queries, boundary, kv_heads, kv_heads * group


def tensors(heads, kv_heads, total, dim=16, scale=1.0):
    generator = torch.Generator().manual_seed(total)
    query = torch.randn(heads, total, dim, generator=generator) * scale
    key, value = torch.randn(2, kv_heads, total, dim, generator=generator)
    return query, key, value


class Hasty:
    """A communicator whose messages may land as soon as the transfer starts: what lay there is gone."""

    def __init__(self, communicator):
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.size

    def shift(self, send, receive):
        receive.fill_(torch.nan)
        return self.communicator.shift(send, receive)


def ring(cp, total, cached, keys, queries, boundary, kv_heads, heads, scale=1.0):
    """Worst difference between the ring's output and float64 dense attention."""
    query, key, value = tensors(heads, kv_heads, total, scale=scale)
    held = [[spans_in(keys, r, 0, boundary), spans_in(keys, r, boundary, total)] for r in range(cp)]
    asked = [spans_in(queries, r, cached, total) for r in range(cp)]

    def rank(communicator):
        positions = take(asked[communicator.rank])
        share = SequenceShare(asked, segments_of(key, value, held[communicator.rank]), held)
        out = pass_kv(Hasty(communicator), CPU_FLASH, query[:, positions], [share])
        expected = dense(query[:, positions], positions, key, value)
        assert out.dtype == torch.float32
        return (out - expected).abs().max().item() if positions.numel() else 0.0

    return max(run_ranks(cp, rank, deadline_s=20))


@given(cases())
@settings(deadline=None, max_examples=80)
def test_ring_pass_kv_is_exact_for_any_layout(case):
    """Uneven, empty and interleaved shards, GQA, odd lengths, partial prefill, 1 to 5 ranks."""
    assert ring(*case) < 5e-6


@given(cases())
@settings(deadline=None, max_examples=20)
def test_ring_pass_kv_is_exact_for_peaked_scores(case):
    """Queries eight times larger: scores far apart, still exact to float32."""
    assert ring(*case, scale=8.0) < 5e-5


def test_ring_pass_kv_is_exact_for_the_schemes():
    """The layouts that prefill and decode make, longer than a kernel's block."""
    for scheme in (contiguous, zigzag, striped):
        for cp in (2, 3):
            layout = scheme(301, cp)
            assert ring(cp, 301, 120, layout, zigzag(301, cp), 150, 2, 8) < 5e-6


@given(cases())
@settings(deadline=None, max_examples=40)
def test_decode_is_exact_and_the_same_bits_on_all_ranks(case):
    """The gathered merge equals dense attention of the last token, and ranks agree to the bit."""
    cp, total, _, keys, _, boundary, kv_heads, heads = case
    query, key, value = tensors(heads, kv_heads, total)
    last = query[:, -1:]

    def rank(communicator):
        held = [
            spans_in(keys, communicator.rank, 0, boundary),
            spans_in(keys, communicator.rank, boundary, total),
        ]
        asked = [(Span(total - 1, total),)] * cp
        return decode(communicator, CPU_FLASH, last, [SequenceShare(asked, segments_of(key, value, held), [])])

    outs = run_ranks(cp, rank, deadline_s=20)
    expected = dense(last, torch.tensor([total - 1]), key, value)
    assert (outs[0] - expected).abs().max() < 5e-6
    assert all(torch.equal(out, outs[0]) for out in outs)
