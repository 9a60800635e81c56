from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.errors import (
    GroupFailed,
    InvalidRequest,
    LayoutError,
    SpecMismatch,
    TokenOutOfRange,
)
from holdfast.kvstore.layout import Layout, chunked, contiguous, scheme, zigzag
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.local import local_group, run_ranks
from holdfast.ring_attention.runner import ContextParallelRunner
from holdfast.ring_attention.shard import KVShard
from ring_helpers import answers, loaded, prefilled, saved, tiny_model, tokens_of

MODEL = tiny_model()
DOCUMENT = tokens_of(301)
QUESTION = tokens_of(11, seed=1)


def check_against_dense(answer, document, question):
    """Every row of logits is that of a dense forward pass over all the tokens before it."""
    count = len(answer.tokens)
    expected = MODEL.dense_logits([*document, *question, *answer.tokens[:-1]], count)
    assert (answer.logits - expected).abs().max() < 1e-4
    assert expected.argmax(-1).tolist() == answer.tokens


@pytest.mark.parametrize("cp", [1, 2, 3, 5])
def test_an_answer_over_shards_equals_the_dense_model(cp):
    """Chunked zigzag prefill, question, and round-robin decode: logits within 1e-4, on all ranks."""
    arenas, layout = prefilled(MODEL, DOCUMENT, cp)
    got = answers(MODEL, arenas, layout, QUESTION, 12)
    check_against_dense(got[0], DOCUMENT, QUESTION)
    assert len(set(got[0].tokens)) > 3
    assert all(other.tokens == got[0].tokens for other in got)
    assert all(torch.equal(other.logits, got[0].logits) for other in got)


@pytest.mark.parametrize(("cp", "scheme_name"), [(1, "contiguous"), (2, "striped"), (3, "zigzag"), (4, "contiguous")])
def test_a_resharded_document_gives_the_same_answer(cp, scheme_name):
    """Saved at cp=2, loaded at another degree and scheme: same tokens, same logits to 1e-4."""
    arenas, layout = prefilled(MODEL, DOCUMENT, 2)
    before = answers(MODEL, arenas, layout, QUESTION, 12)[0]
    target = scheme(scheme_name, len(DOCUMENT), cp)
    moved = loaded(MODEL, *saved(MODEL, arenas, layout), target)
    after = answers(MODEL, moved, target, QUESTION, 12)[0]
    assert after.tokens == before.tokens
    assert (after.logits - before.logits).abs().max() < 1e-4


@pytest.mark.parametrize("index", [0, 9, 18])
def test_one_corrupted_extent_changes_the_answer(index):
    """The control: zeroing one extent of nineteen shows, so equality means something."""
    arenas, layout = prefilled(MODEL, DOCUMENT, 2)
    before = answers(MODEL, arenas, layout, QUESTION, 12)[0]
    buffers, holdings = saved(MODEL, arenas, layout)
    buffers[holdings[index].buffer][:] = 0
    target = contiguous(len(DOCUMENT), 1)
    after = answers(MODEL, loaded(MODEL, buffers, holdings, target), target, QUESTION, 12)[0]
    assert (after.logits[0] - before.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("cp", [1, 3])
def test_prefill_in_pieces_equals_prefill_at_once(cp):
    """Partial prefill over persistent KV, in two calls with odd chunks, then the same answer."""
    first = chunked(Layout((), cp), 130, 37)
    final = chunked(first, len(DOCUMENT), 50)

    def rank(communicator):
        arena = HBMArena(MODEL.spec, final.length(communicator.rank) + 5)
        runner = ContextParallelRunner(MODEL, communicator)
        shard = KVShard(arena=arena, layout=Layout((), cp), row_start=5)
        part = runner.prefill(shard, DOCUMENT[:130], 37).layout
        assert part == first
        done = []
        grown = KVShard(arena=arena, layout=part, row_start=5)
        whole = runner.prefill(grown, DOCUMENT, 50, done.append).layout
        assert whole == final
        assert done == [180, 230, 280, 301]
        return runner.answer(KVShard(arena=arena, layout=whole, row_start=5), QUESTION, 8)

    check_against_dense(run_ranks(cp, rank)[0], DOCUMENT, QUESTION)


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_a_prompt_without_a_document_is_answered(cp):
    """An empty layout; a prompt shorter than the ranks' pieces, and one of several chunks."""
    for question in (QUESTION[:1], QUESTION, DOCUMENT[:100]):

        def rank(communicator, question=question):
            runner = ContextParallelRunner(MODEL, communicator)
            return runner.answer(runner.no_document(), question, 9, chunk_tokens=40)

        check_against_dense(run_ranks(cp, rank)[0], [], question)


def test_decode_ends_after_the_end_token():
    """The end token is the answer's last."""
    arenas, layout = prefilled(MODEL, DOCUMENT, 2)
    whole = answers(MODEL, arenas, layout, QUESTION, 12)[0]
    eos = whole.tokens[4]
    short = answers(MODEL, arenas, layout, QUESTION, 12, eos=(eos,))[0]
    assert short.tokens == whole.tokens[: whole.tokens.index(eos) + 1]
    assert short.logits.shape == (len(short.tokens), 64)


def test_chunked_prefill_gives_each_rank_an_even_share():
    """Rows differ by at most two tokens per chunk, and cached tokens keep their owner."""
    layout = chunked(contiguous(203, 4), 1003, 100)
    assert layout.truncated(203) == contiguous(203, 4)
    fresh = chunked(Layout((), 4), 800, 100)
    lengths = [fresh.length(rank) for rank in range(4)]
    assert max(lengths) - min(lengths) <= 2 * 8
    assert sum(lengths) == 800


def test_layers_are_waited_for_once_and_the_wait_is_counted():
    """wait_layer is called per layer, in order, before the layer is read; a manual clock sees the time."""
    arenas, layout = prefilled(MODEL, DOCUMENT, 1)
    late = arenas[0].key.clone()
    arenas[0].key.zero_()
    clock, waited = ManualClock(), []

    def wait(layer):
        waited.append(layer)
        arenas[0].key[layer] = late[layer]
        clock.advance(1000)

    runner = ContextParallelRunner(MODEL, local_group(1)[0], clock=clock)
    shard = KVShard(arena=arenas[0], layout=layout, wait_layer=wait)
    answer = runner.answer(shard, QUESTION, 4)
    assert waited == [0, 1]
    assert answer.exposed_ns == answer.prefill_ns == 2000
    assert answer.decode_ns == 0
    check_against_dense(answer, DOCUMENT, QUESTION)


@pytest.mark.timeout(30)
def test_a_rank_whose_load_fails_ends_the_group():
    """Its runner tells the others, who raise GroupFailed long before their deadline."""
    arenas, layout = prefilled(MODEL, DOCUMENT, 3)

    class LoadError(Exception):
        pass

    def rank(communicator):
        def wait(layer):
            if communicator.rank == 1 and layer == 1:
                raise LoadError

        shard = KVShard(arena=arenas[communicator.rank], layout=layout, wait_layer=wait)
        ContextParallelRunner(MODEL, communicator).answer(shard, QUESTION, 4)

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(rank, communicator) for communicator in local_group(3, deadline_s=300)]
    assert [type(future.exception()) for future in futures] == [GroupFailed, LoadError, GroupFailed]


def test_impossible_requests_are_refused():
    """Empty questions, unknown tokens, another model's arena, another group's layout, too few rows."""
    communicator = local_group(1)[0]
    runner = ContextParallelRunner(MODEL, communicator)
    shard = runner.no_document()
    with pytest.raises(InvalidRequest):
        runner.answer(shard, [], 4)
    with pytest.raises(TokenOutOfRange):
        runner.answer(shard, [64], 4)
    with pytest.raises(SpecMismatch):
        runner.answer(KVShard(arena=HBMArena(tiny_model(1).spec, 0), layout=Layout((), 1)), [1], 4)
    with pytest.raises(LayoutError, match="re-shard"):
        runner.answer(KVShard(arena=shard.arena, layout=zigzag(4, 2)), [1], 4)
    with pytest.raises(LayoutError, match="no start of"):
        runner.prefill(KVShard(arena=shard.arena, layout=zigzag(4, 1)), [1, 2])
    with pytest.raises(LayoutError, match="arena rows"):
        runner.prefill(shard, [1, 2])
