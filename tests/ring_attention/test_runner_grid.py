import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from holdfast.kvstore.calibration import RingSpeed
from holdfast.kvstore.errors import InvalidRequest, LayoutError
from holdfast.kvstore.layout import Layout, Run, scheme
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.local import local_group
from holdfast.ring_attention.runner import ContextParallelRunner
from holdfast.ring_attention.shard import KVShard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ring_helpers import TINY, loaded, saved, tiny_model, tokens_of
from runner_helpers import WINDOWED, check_dense, check_equal, model_of, on_grid, prefilled_shard

DOCUMENT = tokens_of(203)
QUESTION = tokens_of(19, seed=1)
STRATEGIES = ("pass_kv", "pass_q", "all_gather")
CONFIGS = {"full": TINY, "windows": WINDOWED}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)])
def test_an_answer_equals_the_dense_model(cp, tp, config):
    """Chunked prefill, question and decode by every strategy over cp x tp ranks: all agree, logits within 1e-4."""

    def rank(runner):
        answers = []
        for strategy in STRATEGIES:
            runner.strategy = strategy
            answers.append(runner.answer(prefilled_shard(runner, DOCUMENT), QUESTION, 6))
        return answers

    for strategy, results in zip(STRATEGIES, zip(*on_grid(cp, tp, rank, config), strict=True), strict=True):
        check_equal(results)
        check_dense(model_of(config), results[0], [*DOCUMENT, *QUESTION])
        assert {decision.strategy for decision in results[0].decisions} == {strategy}


@pytest.mark.parametrize("tp", [4, 8])
def test_more_head_ranks_than_kv_heads_share_them(tp):
    """Two kv heads over four and eight ranks, whose arenas hold one each."""
    config = replace(TINY, heads=8, head_dim=8)

    def rank(runner):
        shard = prefilled_shard(runner, DOCUMENT)
        assert shard.arena.key.shape[1] == 1
        return runner.answer(shard, QUESTION, 3)

    results = on_grid(1, tp, rank, config)
    check_equal(results)
    check_dense(model_of(config), results[0], [*DOCUMENT, *QUESTION])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_answers_are_near_the_dense_model(strategy):
    """In bfloat16 logits differ by rounding only, and by no more than other orders of summing make them."""
    config = replace(TINY, dtype="bfloat16")

    def rank(runner):
        return runner.answer(prefilled_shard(runner, DOCUMENT), QUESTION, 6)

    results = on_grid(2, 2, rank, config, strategy=strategy)
    check_equal(results)
    check_dense(model_of(config), results[0], [*DOCUMENT, *QUESTION], tolerance=0.15)


def uneven(cp, tp):
    """All tokens on the last rank but a few in the middle, so that with cp > 2 some ranks have none."""
    return Layout((Run(0, 90, cp - 1), Run(90, 97, 0), Run(97, len(DOCUMENT), cp - 1)), cp, tp)


@st.composite
def layouts(draw):
    """Any layout of the document: of a scheme, or runs of any lengths on any ranks."""
    cp, tp, count = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2])), len(DOCUMENT)
    if draw(st.booleans()):
        return scheme(draw(st.sampled_from(["contiguous", "zigzag", "striped"])), count, cp, tp)
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=12)))
    runs = [Run(a, b, draw(st.integers(0, cp - 1))) for a, b in pairwise([0, *cuts, count])]
    return Layout((), cp, tp).then(Layout(tuple(runs), cp, tp))


@cache
def extents():
    """The document's canonical extents, computed by one rank."""
    shard = on_grid(1, 1, lambda runner: prefilled_shard(runner, DOCUMENT), WINDOWED)[0]
    return saved(model_of(WINDOWED), [shard.arena], shard.layout)


@settings(max_examples=12, deadline=None)
@example(uneven(3, 2), uneven(4, 1), "pass_q")
@given(layouts(), layouts(), st.sampled_from(["auto", *STRATEGIES]))
def test_a_resharded_document_gives_the_same_answer(source, target, strategy):
    """Between any two layouts, through canonical extents, an answer over each: that of the dense model."""
    whole, (buffers, holdings) = model_of(WINDOWED), extents()
    for layout in (source, target):  # the second from what the ranks of the first saved
        arenas = loaded(whole, buffers, holdings, layout)
        buffers, holdings = saved(whole, arenas, layout)

        def rank(runner, arenas=arenas, layout=layout):
            return runner.answer(KVShard(arena=arenas[runner.group.rank], layout=layout), QUESTION, 3)

        results = on_grid(layout.cp, layout.tp, rank, WINDOWED, strategy=strategy)
        check_equal(results)
        check_dense(whole, results[0], [*DOCUMENT, *QUESTION])


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 1)]),
    st.lists(st.tuples(st.integers(0, len(DOCUMENT)), st.integers(1, 120)), max_size=3),
    st.sampled_from(STRATEGIES),
)
def test_prefill_in_pieces_equals_prefill_at_once(degrees, pieces, strategy):
    """In up to four calls, each with chunks of its own size: the answer is that of the dense model."""
    cuts = [*sorted(cut for cut, _ in pieces), len(DOCUMENT)]
    sizes = [*(size for _, size in pieces), 64]

    def rank(runner):
        arena = HBMArena(runner.model.spec, len(DOCUMENT), runner.model.tp)
        layout = Layout((), *degrees)
        for stop, chunk_tokens in zip(cuts, sizes, strict=True):
            shard = KVShard(arena=arena, layout=layout)
            layout = runner.prefill(shard, DOCUMENT[:stop], chunk_tokens).layout
        return runner.answer(KVShard(arena=arena, layout=layout), QUESTION, 3)

    results = on_grid(*degrees, rank, WINDOWED, strategy=strategy)
    check_equal(results)
    check_dense(model_of(WINDOWED), results[0], [*DOCUMENT, *QUESTION])


def test_decode_leaves_the_kv_that_a_prefill_makes():
    """Prefill of question and answer behind the document, and decode of the answer: the same next token and logits."""

    def rank(runner):
        document = prefilled_shard(runner, DOCUMENT)
        answer = runner.answer(document, QUESTION, 9)
        read = [*QUESTION, *answer.tokens[:-1]]
        return answer, runner.answer(document, read, 1)

    decoded, prefilled = on_grid(3, 2, rank, WINDOWED)[0]
    assert prefilled.tokens == decoded.tokens[-1:]
    assert (prefilled.logits[0] - decoded.logits[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prefill_continues_behind_any_layout(strategy):
    """Partial prefill over uneven shards, empty on some ranks, in chunks: as if computed at once."""
    whole, front = model_of(WINDOWED), uneven(3, 2)
    arenas = loaded(whole, *extents(), front)
    more = [*DOCUMENT, *tokens_of(75, seed=2)]

    def rank(runner):
        arena = HBMArena(runner.model.spec, front.length(runner.group.rank // 2) + 50, 2)
        rows = slice(0, arenas[runner.group.rank].rows)
        arena.key[:, :, rows] = arenas[runner.group.rank].key
        arena.value[:, :, rows] = arenas[runner.group.rank].value
        done = runner.prefill(KVShard(arena=arena, layout=front), more, 31)
        assert len(done.decisions) == 3
        return runner.answer(KVShard(arena=arena, layout=done.layout), QUESTION, 5)

    results = on_grid(3, 2, rank, WINDOWED, strategy=strategy)
    check_equal(results)
    check_dense(whole, results[0], [*more, *QUESTION])


def test_auto_decides_step_by_step_and_says_why():
    """Without a calibration by bytes; with one by predicted time; every rank alike."""
    slow = RingSpeed(
        flops_per_second=1e12,
        key_bytes_per_second=1e12,
        bytes_per_second=1e6,
        latency_ns=0.0,
        exchange_bytes_per_second=1e12,
        exchange_latency_ns=0.0,
        copy_bytes_per_second=1e12,
        overlap=0.0,
    )
    decided = {}
    for name, speed in (("bytes", None), ("measured", slow)):

        def rank(runner):
            shard = prefilled_shard(runner, DOCUMENT, 203)
            return runner.answer(shard, QUESTION[:2], 1).decisions

        results = on_grid(2, 1, rank, speed=speed)
        assert results[0] == results[1]
        decided[name] = results[0]
    assert [decision.strategy for decision in decided["bytes"]] == ["pass_q"]
    assert "not calibrated" in decided["bytes"][0].reason
    assert "exposes" in decided["measured"][0].reason
    alone = on_grid(1, 1, lambda runner: runner.answer(runner.no_document(), QUESTION, 1).decisions)[0]
    assert [decision.strategy for decision in alone] == ["local"]
    once = on_grid(1, 1, lambda runner: runner.answer(runner.no_document(), QUESTION, 1).decode_ns)
    assert once == [0], "no token follows the first: any other number, a negative one above all, is wrong"
    told = on_grid(2, 1, lambda runner: runner.answer(runner.no_document(), QUESTION, 1).decisions, strategy="pass_kv")
    assert told[0][-1].reason == "pass_kv: asked for", "a receipt shows the reason only"


def test_a_group_that_does_not_fit_the_model_is_refused():
    """An odd group for tp=2, a strategy nobody knows, a shard of another tp."""
    model = tiny_model(tp=2)
    with pytest.raises(LayoutError, match="tp=2"):
        ContextParallelRunner(model, local_group(3)[0])
    with pytest.raises(InvalidRequest, match="pass_q"):
        ContextParallelRunner(tiny_model(), local_group(1)[0], strategy="ring")
    runner = ContextParallelRunner(tiny_model(), local_group(1)[0])
    shard = KVShard(arena=HBMArena(runner.model.spec, 0, 2), layout=Layout((), 1, 2))
    with pytest.raises(LayoutError, match="re-shard"):
        runner.answer(shard, QUESTION, 1)


def test_gloo_processes_of_two_by_two_ranks(tmp_path):
    """Four processes, cp=2 x tp=2: prefill, an answer by every strategy, and a batch, against the dense model."""
    script = Path(__file__).parent / "gloo_grid.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), f"file://{tmp_path}/group"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=110)
            assert (rank.returncode, out.split()) == (0, ["pass_kv", "pass_q", "all_gather", "batch"]), err
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
