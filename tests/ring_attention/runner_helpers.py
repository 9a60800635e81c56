"""Groups of runners over threads, for the tests of runners."""

from dataclasses import replace
from functools import cache

import torch
from holdfast.ring_attention.local import run_ranks
from holdfast.ring_attention.runner import ContextParallelRunner
from ring_helpers import TINY, tiny_model

WINDOWED = replace(TINY, layers=3, window=40, full_layers=(1,))


@cache
def model_of(config=TINY, tp=1, tp_rank=0):
    """A rank's part of the tiny model; the whole is what the dense forward pass takes."""
    return tiny_model(0, config, tp, tp_rank)


def on_grid(cp, tp, function, config=TINY, **options):
    """`function(runner)` on every rank of a group of cp x tp threads; the results in rank order."""

    def rank(communicator):
        model = model_of(config, tp, communicator.rank % tp)
        return function(ContextParallelRunner(model, communicator, **options))

    return run_ranks(cp * tp, rank, deadline_s=30)


def prefilled_shard(runner, tokens, chunk_tokens=64):
    """A document in memory of its own, prefilled."""
    shard = runner.private_shard(len(tokens), chunk_tokens)
    return replace(shard, layout=runner.prefill(shard, tokens, chunk_tokens).layout)


def check_dense(model, answer, before, tolerance=1e-4):
    """Every row of logits is that of a dense forward pass over all the tokens before it."""
    count = len(answer.tokens)
    expected = model.dense_logits([*before, *answer.tokens[:-1]], count)
    assert (answer.logits - expected).abs().max() < tolerance
    assert answer.logits.argmax(-1).tolist() == answer.tokens
    if tolerance <= 1e-4:
        assert expected.argmax(-1).tolist() == answer.tokens


def check_equal(results):
    """All ranks have the same tokens and the same bits of logits."""
    first = results[0]
    assert all(other.tokens == first.tokens for other in results)
    assert all(torch.equal(other.logits, first.logits) for other in results)
