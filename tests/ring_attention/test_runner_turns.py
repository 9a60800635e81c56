from dataclasses import replace

import pytest
import torch
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.errors import LayoutError
from holdfast.kvstore.layout import Layout, contiguous, zigzag
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.sequence import LiveSequence
from holdfast.ring_attention.shard import KVShard
from hypothesis import given
from hypothesis import strategies as st
from ring_helpers import take, tokens_of
from runner_helpers import WINDOWED, check_dense, check_equal, model_of, on_grid, prefilled_shard

DOCUMENT = tokens_of(150)
QUESTIONS = [tokens_of(count, seed=count) for count in (13, 1, 40)]
SPEC = model_of().spec


def shard_of(runner, layout):
    """Rows for a document of that layout, behind seven rows of somebody else's."""
    rank = runner.group.rank // runner.model.tp
    arena = HBMArena(runner.model.spec, 7 + layout.length(rank), runner.model.tp)
    return KVShard(arena=arena, layout=layout, row_start=7)


@pytest.mark.parametrize(
    ("strategy", "reused"), [("pass_kv", "front"), ("pass_q", "all but the last turn"), ("auto", "nothing")]
)
def test_three_turns_equal_a_fresh_prefill_of_the_conversation(strategy, reused):
    """Question and answer become the document's end, copied within each rank; logits within 1e-4, and KV as well."""
    whole = model_of(WINDOWED)

    def rank(runner):
        document, tokens, turns = prefilled_shard(runner, DOCUMENT), list(DOCUMENT), []
        for question in QUESTIONS:
            answer = runner.answer(document, question, 6)
            turns.append(([*tokens, *question], answer))
            tail = runner.complete_tail(document, answer)
            tokens += [*question, *answer.tokens]
            grown = shard_of(runner, document.layout.then(tail.layout))
            assert grown.layout.token_count == len(tokens)
            start = {"front": 128, "nothing": 0}.get(reused, document.layout.token_count)
            front = document.layout.truncated(start).length(runner.group.rank // 2)
            for part, old in ((grown.arena.key, document.arena.key), (grown.arena.value, document.arena.value)):
                part[:, :, 7 : 7 + front] = old[:, :, document.row_start : document.row_start + front]
            runner.grow(grown, document, tail, start)
            document = grown
        return turns

    results = on_grid(3, 2, rank, WINDOWED, strategy=strategy)
    for index, (before, answer) in enumerate(results[0]):
        check_equal([turns[index][1] for turns in results])
        check_dense(whole, answer, before)


def test_growing_copies_only_what_lies_behind_the_front():
    """From within the document, its end, and within the tail; rows of others stay as they are."""

    def rank(runner):
        document = prefilled_shard(runner, DOCUMENT)
        answer = runner.answer(document, QUESTIONS[2], 4)
        tail = runner.complete_tail(document, answer)
        layout = document.layout.then(tail.layout)
        rank, length = runner.group.rank, layout.length(runner.group.rank)
        whole = shard_of(runner, layout)
        runner.grow(whole, document, tail, 0)
        for start in (0, 100, 150, 163, layout.token_count):
            partly = shard_of(runner, layout)
            runner.grow(partly, document, tail, start)
            kept = 7 + layout.truncated(start).length(rank)
            for part, full in ((partly.arena.key, whole.arena.key), (partly.arena.value, whole.arena.value)):
                assert not part[:, :, :kept].any()
                assert torch.equal(part[:, :, kept:], full[:, :, kept:])
        assert whole.arena.key[:, :, 7 : 7 + length].abs().amin((0, 1, 3)).numel() == length
        with pytest.raises(LayoutError, match="joined"):
            runner.grow(document, document, tail, 0)

    on_grid(2, 1, rank)


def lengths(layout):
    return [layout.length(rank) for rank in range(layout.cp)]


def spread(counts):
    return max(counts) - min(counts)


def turn(document, question_tokens, answer_tokens):
    """The layout of a turn's tail."""
    empty = HBMArena(SPEC, 0)
    before = KVShard(arena=empty, layout=document)
    tail = KVShard(arena=empty, layout=Layout((), document.cp), first_token=document.token_count)
    live = LiveSequence([before], tail, 0, ManualClock())
    live.place_chunk(question_tokens)
    for _ in range(answer_tokens):
        live.place_token()
    return live.grown.layout


@given(st.integers(1, 8), st.integers(0, 50), st.integers(1, 40), st.integers(0, 60))
def test_decode_deals_its_tokens_round_robin(cp, document_tokens, question_tokens, answer_tokens):
    """Appended tokens even out what the question left uneven, then every rank gets one in turn."""
    document = contiguous(document_tokens, cp)
    question = lengths(zigzag(question_tokens, cp))
    tail = lengths(turn(document, question_tokens, answer_tokens))
    assert sum(tail) == question_tokens + answer_tokens
    needed = sum(max(question) - count for count in question)
    assert spread(tail) <= (1 if answer_tokens >= needed else spread(question))


@given(st.integers(1, 6), st.integers(0, 50), st.lists(st.tuples(st.integers(1, 30), st.integers(12, 40)), max_size=6))
def test_shards_stay_even_over_several_turns(cp, document_tokens, turns):
    """The extra tokens of a turn go where earlier turns left less: longest minus shortest shard never exceeds 1."""
    document = contiguous(document_tokens, cp)
    for question_tokens, answer_tokens in turns:
        document = document.then(turn(document, question_tokens, answer_tokens))
        assert spread(lengths(document)) <= 1


@given(st.integers(1, 4), st.integers(0, 30), st.integers(1, 60), st.integers(1, 200), st.integers(1, 50))
def test_a_decoded_token_sees_its_window_however_long_the_tail(cp, document_tokens, question, answer, window):
    """Tokens in the window stand where they are; all others only count, and cost nothing however many there are."""
    layout = zigzag(document_tokens, cp)
    document = KVShard(arena=HBMArena(SPEC, 0), layout=layout)
    tail = KVShard(arena=HBMArena(SPEC, 0), layout=Layout((), cp), first_token=document_tokens)
    live = LiveSequence([document], tail, 0, ManualClock(), window)
    live.place_chunk(question)
    for _ in range(answer):
        placed = live.place_token()
    before = live.end_token - window
    true = take([*document.spans(0), *live.grown.spans(0)]).tolist()
    shown = take([span for spans in placed.own for span in spans]).tolist()
    assert len(placed.own[-1]) <= window + 1
    assert [at for at in shown if at >= before] == [at for at in true if at >= before]
    assert len(shown) == len(set(shown)) == len(true)
    assert shown == sorted(shown)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 60))
def test_a_tail_has_rows_for_its_longest_answer(cp, question_tokens, answer_tokens):
    """The rows that the runner takes for a tail are enough on every rank."""
    question = lengths(zigzag(question_tokens, cp))
    tail = lengths(turn(Layout((), cp), question_tokens, answer_tokens))
    even = (question_tokens + answer_tokens - 1) // cp + 1
    assert all(count <= max(asked, even) for count, asked in zip(tail, question, strict=True))


def test_a_tail_waits_for_its_document():
    """Growing reads document rows, so it waits for layers that are still being loaded."""

    def rank(runner):
        document = prefilled_shard(runner, DOCUMENT)
        answer = runner.answer(document, QUESTIONS[0], 2)
        waited = []
        late = replace(document, wait_layer=waited.append)
        runner.grow(shard_of(runner, document.layout.then(answer.tail.layout)), late, answer.tail, 100)
        assert waited == [0, 1]

    on_grid(1, 1, rank)
