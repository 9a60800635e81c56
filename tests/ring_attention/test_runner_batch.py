from dataclasses import replace

import pytest
import torch
from holdfast.kvstore.clock import ManualClock
from holdfast.kvstore.errors import GroupFailed, InvalidRequest, TokenOutOfRange
from holdfast.kvstore.layout import Layout, chunked
from holdfast.ring_attention.answering import Ask
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.local import local_group
from holdfast.ring_attention.runner import ContextParallelRunner, Prompt
from holdfast.ring_attention.shard import KVShard
from holdfast.ring_attention.steps import steps
from hypothesis import given
from hypothesis import strategies as st
from ring_helpers import tokens_of
from runner_helpers import WINDOWED, check_dense, check_equal, model_of, on_grid, prefilled_shard

DOCUMENTS = [tokens_of(count, seed=count) for count in (157, 0, 33, 260)]
QUESTIONS = [tokens_of(count, seed=90 + count) for count in (5, 21, 1, 70)]
COUNTS = (7, 1, 4, 9)


def ask(shard, question, count, **more):
    return Ask(shard=shard, question=question, max_new_tokens=count, **more)


def asks(runner, **more):
    """A question over each document; the second has none."""
    shards = [prefilled_shard(runner, tokens) if tokens else runner.no_document() for tokens in DOCUMENTS]
    return [ask(*case, **more) for case in zip(shards, QUESTIONS, COUNTS, strict=True)]


@given(
    st.lists(st.integers(0, 40), max_size=6),
    st.integers(1, 12),
    st.integers(1, 30),
)
def test_steps_take_every_token_once_within_the_budget(counts, chunk_tokens, batch_tokens):
    """Each document's chunks are those it would have alone; a step holds one of a document, and is filled in order."""
    taken = [[] for _ in counts]
    for step in steps(counts, chunk_tokens, batch_tokens):
        assert len({chunk.document for chunk in step}) == len(step) >= 1
        assert len(step) == 1 or sum(chunk.token_count for chunk in step) <= batch_tokens
        for chunk in step:
            taken[chunk.document].append((chunk.start, chunk.stop))
    for count, chunks in zip(counts, taken, strict=True):
        assert chunks == [(start, min(start + chunk_tokens, count)) for start in range(0, count, chunk_tokens)]


def test_steps_fill_their_budget_first_come_first_served():
    """Short documents go together, beside a chunk of a long one if there is room."""
    planned = [[(chunk.document, chunk.token_count) for chunk in step] for step in steps([9, 3, 2, 8], 4, 8)]
    assert planned == [[(0, 4), (1, 3)], [(0, 4), (2, 2)], [(0, 1), (3, 4)], [(3, 4)]]


@pytest.mark.parametrize(
    ("cp", "tp", "strategy"), [(1, 1, "auto"), (2, 2, "pass_kv"), (2, 2, "pass_q"), (3, 1, "all_gather")]
)
def test_a_batch_of_questions_is_answered_as_one_by_one(cp, tp, strategy):
    """Ragged documents, questions and answers; questions in chunks that share steps: logits within 1e-4."""

    def rank(runner):
        together = runner.answer_batch(asks(runner), 32, 48)
        single = [runner.answer(one.shard, one.question, one.max_new_tokens) for one in asks(runner)]
        return together, single

    results = on_grid(cp, tp, rank, WINDOWED, strategy=strategy)
    whole = model_of(WINDOWED)
    for index, (document, question, count) in enumerate(zip(DOCUMENTS, QUESTIONS, COUNTS, strict=True)):
        check_equal([together[index] for together, _ in results])
        together, single = (result[index] for result in results[0])
        assert len(together.tokens) == count
        assert together.tokens == single.tokens
        assert (together.logits - single.logits).abs().max() < 1e-4
        check_dense(whole, together, [*document, *question])


@pytest.mark.parametrize("budget", [1, 64, 1000])
def test_documents_prefilled_together_are_those_prefilled_alone(budget):
    """KV equal to rounding, layouts equal exactly, whatever shares a step; one is continued, one is complete."""
    cp, chunk, half = 3, 32, 100

    def rank(runner):
        alone = [prefilled_shard(runner, tokens, chunk) for tokens in DOCUMENTS]
        begun = runner.prefill(runner.private_shard(half, chunk), DOCUMENTS[3][:half], chunk).layout
        final = chunked(begun, len(DOCUMENTS[3]), chunk)
        arena = HBMArena(runner.model.spec, final.length(runner.group.rank))
        front = runner.prefill(KVShard(arena=arena, layout=Layout((), cp)), DOCUMENTS[3][:half], chunk)
        done = alone[0]
        prompts = [
            Prompt(done, DOCUMENTS[0]),
            *(Prompt(runner.private_shard(len(tokens), chunk), tokens) for tokens in DOCUMENTS[:3]),
            Prompt(KVShard(arena=arena, layout=front.layout), DOCUMENTS[3]),
        ]
        heard = []
        made = runner.prefill_batch(prompts, chunk, budget, lambda *point: heard.append(point))
        for one, expected in zip(prompts[1:4], alone[:3], strict=True):
            assert torch.allclose(one.shard.arena.key, expected.arena.key, atol=1e-4)
            assert torch.allclose(one.shard.arena.value, expected.arena.value, atol=1e-4)
        assert [one.layout for one in made[:4]] == [alone[0].layout, *(shard.layout for shard in alone[:3])]
        assert [len(one.decisions) for one in made] == [0, 5, 0, 2, 5]
        assert [done for index, done in heard if index == 4] == [132, 164, 196, 228, 260]
        return runner.answer(KVShard(arena=arena, layout=made[4].layout), QUESTIONS[0], 4)

    check_dense(model_of(), on_grid(cp, 1, rank)[0], [*DOCUMENTS[3], *QUESTIONS[0]])


def test_questions_may_share_a_document():
    """Two at once over one shard, whose layers are waited for by each."""

    def rank(runner):
        shard = prefilled_shard(runner, DOCUMENTS[0])
        return runner.answer_batch([ask(shard, question, 5) for question in QUESTIONS[:2]])

    for answers, question in zip(zip(*on_grid(2, 1, rank), strict=True), QUESTIONS[:2], strict=True):
        check_equal(answers)
        check_dense(model_of(), answers[0], [*DOCUMENTS[0], *question])


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_each_answer_counts_the_waits_for_its_own_document(strategy):
    """Once per layer, whatever travels between ranks; documents that are there cost nothing."""

    def rank(runner):
        clock, waited = ManualClock(), []
        runner = ContextParallelRunner(runner.model, runner.group, strategy=strategy, clock=clock)

        def wait(layer):
            waited.append(layer)
            clock.advance(1000)

        ready, late = (prefilled_shard(runner, DOCUMENTS[index]) for index in (0, 2))
        both = [ask(ready, QUESTIONS[3], 3), ask(replace(late, wait_layer=wait), QUESTIONS[0], 3)]
        answers = runner.answer_batch(both, 32)
        assert waited == [0, 1]
        return [(answer.exposed_ns, answer.prefill_ns, answer.decode_ns) for answer in answers]

    assert on_grid(2, 1, rank) == [[(0, 2000, 0), (2000, 2000, 0)]] * 2


def test_answers_end_at_an_end_token_and_leave_the_batch():
    """Each at its own; the others go on as if alone."""

    def rank(runner):
        plain = runner.answer_batch(asks(runner))
        eos = (plain[0].tokens[2], plain[3].tokens[4])
        return plain, eos, runner.answer_batch(asks(runner, eos=eos))

    plain, eos, short = on_grid(2, 1, rank)[0]
    for before, after in zip(plain, short, strict=True):
        ends = [index for index, token in enumerate(before.tokens) if token in eos]
        assert after.tokens == before.tokens[: ends[0] + 1 if ends else None]
        assert after.logits.shape == (len(after.tokens), 64)
    assert sum(len(answer.tokens) for answer in short) < sum(COUNTS)


def test_tokens_are_heard_as_they_come():
    """On the rank that listens, before the next is computed."""

    def rank(runner):
        heard = []
        listeners = {"on_token": heard.append} if runner.group.rank == 0 else {}
        answer = runner.answer(prefilled_shard(runner, DOCUMENTS[2]), QUESTIONS[0], 5, **listeners)
        return answer.tokens, heard

    (tokens, heard), (_, silent) = on_grid(2, 1, rank)
    assert (heard, silent) == (tokens, [])


def test_logits_of_the_first_tokens_only_may_be_kept():
    """The tokens are the same."""
    runner = ContextParallelRunner(model_of(), local_group(1)[0])
    whole = runner.answer_batch([ask(runner.no_document(), QUESTIONS[1], 7)])[0]
    part = runner.answer_batch([ask(runner.no_document(), QUESTIONS[1], 7, logits_limit=3)])[0]
    assert part.tokens == whole.tokens
    assert torch.equal(part.logits, whole.logits[:3])


def test_rank_zero_cancels_an_answer_for_all():
    """After the token at hand; other ranks are not asked, and other answers go on."""

    def rank(runner):
        heard = []

        def cancelled():
            assert runner.group.rank == 0
            return len(heard) == 2

        first, *others = asks(runner)
        return runner.answer_batch([replace(first, on_token=heard.append, cancelled=cancelled), *others])

    for answers in on_grid(2, 1, rank):
        assert [len(answer.tokens) for answer in answers] == [3, *COUNTS[1:]]


@pytest.mark.timeout(30)
def test_a_listener_that_raises_ends_the_group():
    """The other ranks do not wait for it."""

    class Unplugged(Exception):
        pass

    def rank(runner):
        def on_token(token):
            if runner.group.rank == 0:
                raise Unplugged

        with pytest.raises(Unplugged if runner.group.rank == 0 else GroupFailed):
            runner.answer(runner.no_document(), QUESTIONS[1], 5, on_token=on_token)

    on_grid(3, 1, rank)


def test_one_bad_question_refuses_the_batch_before_anything_is_computed():
    """And the group can go on."""
    runner = ContextParallelRunner(model_of(), local_group(1)[0])
    good = ask(runner.no_document(), QUESTIONS[0], 2)
    for bad, error in ((replace(good, question=[]), InvalidRequest), (replace(good, question=[99]), TokenOutOfRange)):
        with pytest.raises(error):
            runner.answer_batch([good, bad])
    assert runner.answer_batch([]) == []
    assert runner.prefill_batch([]) == []
    assert len(runner.answer_batch([good])[0].tokens) == 2
