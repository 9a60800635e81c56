from unittest.mock import patch

import pytest
import torch
from holdfast.kvstore.errors import GroupFailed
from holdfast.kvstore.layout import Span, chunked, contiguous, striped, zigzag
from holdfast.ring_attention import pass_q
from holdfast.ring_attention.decode import decode
from holdfast.ring_attention.local import run_ranks
from holdfast.ring_attention.share import SequenceShare
from holdfast.ring_attention.strategies import STRATEGIES
from hypothesis import given
from hypothesis import strategies as st
from ring_cases import Case, Sequence, cases, examples, latent, windowed
from ring_helpers import CPU_FLASH, segments_of, spans_in, take

HALF = (torch.bfloat16, torch.float16)


class Hasty:
    """A communicator whose messages may land as soon as the transfer starts: what lay there is gone."""

    def __init__(self, communicator):
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.size

    def shift(self, send, receive):
        receive.fill_(torch.nan)
        return self.communicator.shift(send, receive)

    def all_to_all(self, send, receive):
        for rank, tensor in enumerate(receive):
            if rank != self.rank:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 255)
        return self.communicator.all_to_all(send, receive)


def outputs(case, name, kernel=CPU_FLASH):
    """Every rank's output of one strategy."""

    def rank(communicator):
        batch = [case.share(index, communicator.rank) for index in range(len(case.sequences))]
        packed = case.packed(communicator.rank)
        return STRATEGIES[name](Hasty(communicator), kernel, packed, batch, case.window)

    return run_ranks(case.cp, rank, deadline_s=20)


def check_exact(case, name):
    outs = outputs(case, name)
    for rank, out in enumerate(outs):
        expected = case.expected(rank)
        assert out.dtype == torch.float32
        assert out.shape == expected.shape
        if not out.numel():
            continue
        if case.dtype == torch.float32:
            assert (out - expected).abs().max() < (5e-5 if case.scale > 1 else 5e-6)
        else:
            assert (out - expected).norm() <= 5e-3 * expected.norm()


@given(cases(), st.sampled_from(sorted(STRATEGIES)))
@examples(90)
def test_every_strategy_is_exact(case, name):
    """Any layout, uneven and empty shards, ragged batches, GQA, windows, partial prefill, 1 to 8 ranks."""
    check_exact(case, name)


@given(cases(dtypes=HALF), st.sampled_from(sorted(STRATEGIES)))
@examples(40)
def test_every_strategy_is_exact_in_half_precision(case, name):
    """Partials are merged in float32, however they travel."""
    check_exact(case, name)


@given(cases(dtypes=(torch.float32, *HALF)), st.sampled_from([1, 16, 128]))
@examples(50)
def test_queries_enough_to_fill_calls_stay_while_the_others_come(case, own_rows):
    """Some ranks, or all, or none have so many; the one call for all of them is in the tests above."""
    with patch.object(pass_q, "OWN_ROWS", own_rows):
        check_exact(case, "pass_q")


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("cp", [2, 3])
def test_the_layouts_that_prefill_and_decode_make(name, cp):
    """Longer than a kernel's block, and than a masked one."""
    for window in (None, 64, 900):
        keys = chunked(striped(700, cp), 1500, 400)
        sequences = [
            Sequence(700, 1500, keys, chunked(contiguous(700, cp), 1500, 400)),
            Sequence(300, 400, contiguous(400, cp), zigzag(400, cp)),
        ]
        check_exact(Case(cp, 2, 4, 32, torch.float32, 1.0, window, sequences), name)


@given(cases(max_sequences=2), st.sampled_from(sorted(STRATEGIES)), st.data())
@examples(15)
def test_a_prefill_in_pieces_is_a_prefill_at_once(case, name, data):
    """Queries [a, b) then [b, c), each over the keys that are there by then, equal one call for all."""
    whole = outputs(case, name)
    cut = [data.draw(st.integers(sequence.cached, sequence.total)) for sequence in case.sequences]
    fronts = [
        Sequence(s.cached, at, s.keys.truncated(at), s.queries) for s, at in zip(case.sequences, cut, strict=True)
    ]
    backs = [Sequence(at, s.total, s.keys, s.queries) for s, at in zip(case.sequences, cut, strict=True)]
    # Tensors are seeded by their length, so pieces take theirs from the whole.
    pieces = [outputs(_Piece(case, part), name) for part in (fronts, backs)]
    for rank in range(case.cp):
        fronts_out, backs_out = (
            piece[rank].split([take(s.asked(case.cp)[rank]).numel() for s in part], dim=1)
            for piece, part in zip(pieces, (fronts, backs), strict=True)
        )
        joined = torch.cat([part for pair in zip(fronts_out, backs_out, strict=True) for part in pair], dim=1)
        torch.testing.assert_close(joined, whole[rank], atol=2e-5 * case.scale, rtol=1e-5)


class _Piece(Case):
    """Some of a case's tokens, with the tensors of the whole."""

    def __init__(self, whole, sequences):
        super().__init__(**{**vars(whole), "sequences": sequences})
        self.whole = whole

    def tensors(self, index):
        stop = self.sequences[index].total
        return tuple(part[:, :stop] for part in self.whole.tensors(index))


@given(cases(dtypes=(torch.float32, *HALF)))
@examples(40)
def test_decode_is_exact_and_the_same_bits_on_all_ranks(case):
    """The gathered merge equals dense attention of each sequence's last token, and ranks agree to the bit."""
    case.sequences = [sequence for sequence in case.sequences if sequence.total] or [
        Sequence(0, 1, zigzag(1, case.cp), zigzag(1, case.cp))
    ]
    last = torch.cat([case.tensors(index)[0][:, -1:] for index in range(len(case.sequences))], dim=1)

    def rank(communicator):
        batch = []
        for index, sequence in enumerate(case.sequences):
            share = case.share(index, communicator.rank)
            asked = [(Span(sequence.total - 1, sequence.total),)] * case.cp
            batch.append(SequenceShare(asked, share.segments, []))
        return decode(communicator, CPU_FLASH, last, batch, case.window)

    outs = run_ranks(case.cp, rank, deadline_s=20)
    assert all(torch.equal(out, outs[0]) for out in outs)
    for index, sequence in enumerate(case.sequences):
        query, key, value = case.tensors(index)
        expected = windowed(query[:, -1:], torch.tensor([sequence.total - 1]), key, value, case.window)
        difference = outs[0][:, index : index + 1] - expected
        if case.dtype == torch.float32:
            assert difference.abs().max() < (5e-5 if case.scale > 1 else 5e-6)
        else:
            assert difference.norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_latent_attention_is_one_wide_kv_head(name):
    """Absorbed MLA: queries times the up-projection attend over latents, whose first columns are the values."""
    heads, rank_dim, rope_dim, nope_dim, tokens, cp = 6, 64, 8, 16, 230, 3
    torch.manual_seed(1)
    latents = torch.randn(1, tokens, rank_dim + rope_dim)
    up_key, up_value = torch.randn(heads, nope_dim, rank_dim) / 8, torch.randn(heads, 24, rank_dim) / 8
    query = torch.randn(heads, tokens, nope_dim + rope_dim)
    positions = torch.arange(tokens)
    # Expanded: every head has keys and values of its own.
    content, rotary = latents[..., :rank_dim], latents[..., rank_dim:]
    key = torch.cat([content @ up_key.transpose(1, 2), rotary.expand(heads, -1, -1)], dim=-1)
    expected = windowed(query, positions, key, content @ up_value.transpose(1, 2))
    # Absorbed, with the scale of the expanded form.
    scale = ((rank_dim + rope_dim) / (nope_dim + rope_dim)) ** 0.5
    absorbed = torch.cat([query[..., :nope_dim] @ up_key, query[..., nope_dim:]], dim=-1) * scale
    keys, queries = contiguous(tokens, cp), zigzag(tokens, cp)
    held, asked = [[keys.spans(peer)] for peer in range(cp)], [queries.spans(peer) for peer in range(cp)]

    def rank(communicator):
        segments = latent(segments_of(latents, latents, held[communicator.rank]), rank_dim)
        mine = take(asked[communicator.rank])
        share = SequenceShare(asked, segments, held)
        return STRATEGIES[name](Hasty(communicator), CPU_FLASH, absorbed[:, mine], [share], None)

    for peer, out in enumerate(run_ranks(cp, rank, deadline_s=20)):
        assert out.shape[2] == rank_dim
        assert (out @ up_value.transpose(1, 2) - expected[:, take(asked[peer])]).abs().max() < 1e-5


class Breaking(Hasty):
    """A communicator that raises on rank 1 instead of its nth exchange."""

    def __init__(self, communicator, nth):
        super().__init__(communicator)
        self.left = nth if self.rank == 1 else 1000

    def count(self):
        if not self.left:
            raise ZeroDivisionError
        self.left -= 1

    def shift(self, send, receive):
        self.count()
        return super().shift(send, receive)

    def all_to_all(self, send, receive):
        self.count()
        return super().all_to_all(send, receive)


@pytest.mark.parametrize(
    ("name", "nth"), [("all_gather", 0), ("pass_kv", 0), ("pass_kv", 1), ("pass_q", 0), ("pass_q", 1)]
)
def test_a_rank_that_raises_ends_all(name, nth):
    """Wherever it raises: who waits for it fails, long before the deadline, and the cause is what is raised."""
    case = Case(3, 2, 4, 32, torch.float32, 1.0, None, [Sequence(90, 150, zigzag(150, 3), zigzag(150, 3))])
    failed = []

    def rank(communicator):
        batch = [case.share(0, communicator.rank)]
        try:
            STRATEGIES[name](Breaking(communicator, nth), CPU_FLASH, case.packed(communicator.rank), batch, case.window)
        except GroupFailed:
            failed.append(communicator.rank)
            raise

    with pytest.raises(ZeroDivisionError):
        run_ranks(3, rank, deadline_s=20)
    assert 2 in failed  # rank 0 may have all that it needs already


class Counting:
    """A communicator that notes how many bytes this rank sends."""

    def __init__(self, communicator):
        self.communicator = communicator
        self.rank, self.size, self.sent_bytes = communicator.rank, communicator.size, 0

    def shift(self, send, receive):
        self.sent_bytes += send.numel() * send.element_size()
        return self.communicator.shift(send, receive)


@pytest.mark.parametrize(("window", "kept"), [(None, 300), (10, 100 + 9)])
def test_keys_out_of_reach_do_not_travel(window, kept):
    """With a window only what some query may see is sent; without one, all there is."""
    keys, new = striped(300, 2, stripe=50), zigzag(300, 2)
    asked = [spans_in(new, peer, 200, 300) for peer in range(2)]
    held = [[spans_in(keys, peer, 0, 300)] for peer in range(2)]
    key = torch.randn(2, 300, 32)

    def rank(communicator):
        counting = Counting(communicator)
        share = SequenceShare(asked, segments_of(key, key, held[communicator.rank]), held)
        query = torch.randn(4, take(asked[communicator.rank]).numel(), 32)
        STRATEGIES["pass_kv"](counting, CPU_FLASH, query, [share], window)
        return counting.sent_bytes

    assert sum(run_ranks(2, rank, deadline_s=20)) == kept * 2 * (32 + 32) * 4
