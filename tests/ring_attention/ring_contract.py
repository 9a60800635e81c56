"""What every communicator does: scenarios that each rank runs, over threads and over processes alike."""

import torch
from holdfast.kvstore.layout import Layout, Run, contiguous, zigzag
from holdfast.ring_attention.arena import HBMArena
from holdfast.ring_attention.runner import ContextParallelRunner
from holdfast.ring_attention.shard import KVShard
from holdfast.ring_attention.share import SequenceShare
from holdfast.ring_attention.strategies import STRATEGIES
from ring_helpers import CPU_FLASH, dense, segments_of, take, tiny_model, tokens_of


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
    lengths = [0, 5, 100_000, 1, 2][:size]
    for _ in range(2):
        received = torch.empty(lengths[(rank - 1) % size])
        communicator.shift(torch.full((lengths[rank],), float(rank)), received).wait()
        assert (received == (rank - 1) % size).all()


def long_messages_arrive_whole(communicator):
    """Megabytes, every element different, and a short message behind them."""
    rank, size = communicator.rank, communicator.size
    elements = torch.arange(1_500_000, dtype=torch.int32)
    received, short = torch.zeros_like(elements), torch.zeros(1)
    works = [communicator.shift(elements + rank, received), communicator.shift(torch.full((1,), float(rank)), short)]
    for work in works:
        work.wait()
    assert torch.equal(received, elements + (rank - 1) % size)
    assert short.item() == (rank - 1) % size


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


def all_to_all_gives_everyone_its_entry(communicator):
    """Lengths differ by pair; some are empty; the own entry is copied; two may be under way."""
    rank, size = communicator.rank, communicator.size

    def length(source, target):
        return (3 * source + target) % 4 * 5_000

    def entries(count):
        return [torch.full((length(rank, peer),), float(count * 100 + rank * 10 + peer)) for peer in range(size)]

    received = [[torch.full((length(peer, rank),), -1.0) for peer in range(size)] for _ in range(2)]
    works = [communicator.all_to_all(entries(count), received[count]) for count in range(2)]
    for work in reversed(works):
        work.wait()
    for count in range(2):
        for peer, tensor in enumerate(received[count]):
            assert (tensor == count * 100 + peer * 10 + rank).all()


def all_reduce_is_the_float32_sum_in_rank_order(communicator):
    """Small and large, odd lengths, strided, half precision and double: the bits that one process computes."""
    rank, size = communicator.rank, communicator.size
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((1,), (2, 0), (3, 37), (2, 40_001)):
            whole = (torch.randn(size, *shape, generator=generator) * 100).to(dtype)
            total = whole[0].to(torch.promote_types(dtype, torch.float32))
            for other in range(1, size):
                total = total + whole[other]
            mine = whole[rank].t().contiguous().t() if len(shape) == 2 else whole[rank].clone()
            communicator.all_reduce(mine)
            assert torch.equal(mine, total.to(dtype))


def tensors_may_be_strided_where_it_does_not_matter(communicator):
    """all_gather and broadcast take views; what is around a view stays."""
    grid = torch.arange(12.0).view(3, 4) + 100 * communicator.rank
    columns = torch.stack(communicator.all_gather(grid[:, 1]))
    assert columns.tolist() == [[100 * rank + at for at in (1, 5, 9)] for rank in range(communicator.size)]
    communicator.broadcast(grid[:, 2], communicator.size - 1)
    assert grid[:, 2].tolist() == [100 * (communicator.size - 1) + at for at in (2, 6, 10)]
    assert grid[:, 1].tolist() == [100 * communicator.rank + at for at in (1, 5, 9)]


def parts_work_apart_and_beside_the_whole(communicator):
    """A grid of cp x tp: rows, columns and the whole, with messages of all under way at once."""
    rank, size = communicator.rank, communicator.size
    tp = 2 if size % 2 == 0 else 1
    rows = [[first + other for other in range(tp)] for first in range(0, size, tp)]
    columns = [list(range(first, size, tp)) for first in range(tp)]
    row, column = communicator.split(rows), communicator.split(columns)
    assert (row.rank, row.size, row.name) == (rank % tp, tp, communicator.name)
    assert (column.rank, column.size) == (rank // tp, size // tp)
    mine = torch.full((1000,), float(rank))
    received = [torch.empty(1000) for _ in range(3)]
    works = [part.shift(mine, into) for part, into in zip((column, communicator, row), received, strict=True)]
    for work in works:
        work.wait()
    previous = [columns[rank % tp][column.rank - 1], (rank - 1) % size, rows[rank // tp][row.rank - 1]]
    assert [into[0].item() for into in received] == previous
    total = torch.tensor([float(rank)])
    row.all_reduce(total)
    assert total.item() == sum(rows[rank // tp])
    column.all_reduce(total)
    assert total.item() == sum(range(size))
    column.barrier()


def names_say_what_carries_the_bytes(communicator):
    """For status and logs."""
    assert communicator.name in {"local", "gloo", "nccl", "shm"}


def barrier_lets_everyone_through(communicator):
    """Twice, so that the rounds do not mix."""
    communicator.barrier()
    communicator.barrier()


def every_strategy_is_exact(communicator):
    """A batch of two sequences, one with most of its keys on one rank, equals float64 dense attention."""
    rank, size = communicator.rank, communicator.size
    keys = [contiguous(157, size), Layout((Run(0, 90, size - 1), Run(90, 93, 0)), size)]
    queries = [zigzag(157, size), zigzag(93, size)]
    for dtype, error in ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)):
        batch, mine, expected = [], [], []
        for laid, asking in zip(keys, queries, strict=True):
            generator = torch.Generator().manual_seed(laid.token_count)
            query = torch.randn(8, laid.token_count, 32, generator=generator).to(dtype)
            key, value = torch.randn(2, 2, laid.token_count, 32, generator=generator).to(dtype)
            held, asked = [[laid.spans(peer)] for peer in range(size)], [asking.spans(peer) for peer in range(size)]
            positions = take(asked[rank])
            batch.append(SequenceShare(asked, segments_of(key, value, held[rank]), held))
            mine.append(query[:, positions])
            expected.append(dense(query[:, positions], positions, key, value))
        for strategy in STRATEGIES.values():
            out = strategy(communicator, CPU_FLASH, torch.cat(mine, dim=1), batch, None)
            assert (out - torch.cat(expected, dim=1)).abs().max() < error


def an_answer_equals_the_dense_model(communicator):
    """Prefill, question and decode over this communicator, against one dense forward pass."""
    model, document, question = tiny_model(), tokens_of(131), tokens_of(9, seed=1)
    arena = HBMArena(model.spec, 131)
    runner = ContextParallelRunner(model, communicator)
    layout = runner.prefill(KVShard(arena=arena, layout=Layout((), communicator.size)), document, 50).layout
    answer = runner.answer(KVShard(arena=arena, layout=layout), question, 6)
    expected = model.dense_logits([*document, *question, *answer.tokens[:-1]], 6)
    assert (answer.logits - expected).abs().max() < 1e-4
    assert expected.argmax(-1).tolist() == answer.tokens


SCENARIOS = (
    shift_moves_messages_one_rank_on,
    messages_have_their_own_lengths,
    long_messages_arrive_whole,
    all_gather_is_in_rank_order,
    broadcast_overwrites,
    all_to_all_gives_everyone_its_entry,
    all_reduce_is_the_float32_sum_in_rank_order,
    tensors_may_be_strided_where_it_does_not_matter,
    parts_work_apart_and_beside_the_whole,
    names_say_what_carries_the_bytes,
    barrier_lets_everyone_through,
    every_strategy_is_exact,
    an_answer_equals_the_dense_model,
)
