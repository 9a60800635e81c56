"""What every communicator does: scenarios that each rank runs, over threads and over processes alike."""

import torch
from holdfast.kvstore.layout import Layout, contiguous, zigzag
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.pass_kv import pass_kv
from holdfast.ring_attention.runner import ContextParallelRunner
from holdfast.ring_attention.shard import KVShard
from ring_helpers import dense, segments_of, take, tiny_model, tokens_of


def shift_moves_messages_one_rank_on(communicator):
    """After size shifts of growing messages, everyone has its own back."""
    rank, size = communicator.rank, communicator.size
    message = torch.full((7,), float(rank))
    for hop in range(size):
        received = torch.empty(7)
        communicator.shift(message, received).wait()
        assert (received == (rank - hop - 1) % size).all()
        message = received


def messages_have_their_own_lengths(communicator):
    """Lengths differ between ranks, and empty messages are neither sent nor awaited."""
    rank, size = communicator.rank, communicator.size
    lengths = [0, 5, 100_000, 1][:size]
    for _ in range(2):
        received = torch.empty(lengths[(rank - 1) % size])
        communicator.shift(torch.full((lengths[rank],), float(rank)), received).wait()
        assert (received == (rank - 1) % size).all()


def all_gather_is_in_rank_order(communicator):
    """Everyone gets everyone's tensor."""
    for step in range(3):
        gathered = communicator.all_gather(torch.tensor([[communicator.rank, step]]))
        assert torch.cat(gathered).tolist() == [[rank, step] for rank in range(communicator.size)]


def broadcast_overwrites(communicator):
    """The source's tensor ends up everywhere."""
    for source in range(communicator.size):
        tensor = torch.full((3,), communicator.rank)
        communicator.broadcast(tensor, source)
        assert tensor.tolist() == [source] * 3


def barrier_lets_everyone_through(communicator):
    """Twice, so that the rounds do not mix."""
    communicator.barrier()
    communicator.barrier()


def ring_attention_is_exact(communicator):
    """Pass-KV over this communicator equals float64 dense attention."""
    rank, size, total = communicator.rank, communicator.size, 157
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(8, total, 32, generator=generator)
    key, value = torch.randn(2, 2, total, 32, generator=generator)
    keys, queries = contiguous(total, size), zigzag(total, size)
    held = [[keys.spans(peer)] for peer in range(size)]
    spans = queries.spans(rank)
    mine = query[:, take(spans)]
    out = pass_kv(communicator, mine, spans, segments_of(key, value, held[rank]), held)
    assert (out - dense(mine, take(spans), key, value)).abs().max() < 5e-6


def an_answer_equals_the_dense_model(communicator):
    """Prefill, question and decode over this communicator, against one dense forward pass."""
    model, document, question = tiny_model(), tokens_of(131), tokens_of(9, seed=1)
    arena = HBMArena(model.spec, 131)
    runner = ContextParallelRunner(model, communicator)
    layout = runner.prefill(KVShard(arena=arena, layout=Layout((), communicator.size)), document, 50)
    answer = runner.answer(KVShard(arena=arena, layout=layout), question, 6)
    expected = model.dense_logits([*document, *question, *answer.tokens[:-1]], 6)
    assert (answer.logits - expected).abs().max() < 1e-4
    assert expected.argmax(-1).tolist() == answer.tokens


SCENARIOS = (
    shift_moves_messages_one_rank_on,
    messages_have_their_own_lengths,
    all_gather_is_in_rank_order,
    broadcast_overwrites,
    barrier_lets_everyone_through,
    ring_attention_is_exact,
    an_answer_equals_the_dense_model,
)
