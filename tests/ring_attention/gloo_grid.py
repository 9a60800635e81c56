"""One rank process of cp=2 x tp=2: `gloo_grid.py RANK INIT_METHOD`; prints what it found exact, one word a line."""

import sys

import torch
from holdfast.ring_attention.answering import Ask
from holdfast.ring_attention.distributed import DistributedCommunicator
from holdfast.ring_attention.runner import ContextParallelRunner
from ring_helpers import tiny_model, tokens_of
from runner_helpers import WINDOWED, check_dense, prefilled_shard

rank, init_method = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
communicator = DistributedCommunicator(rank, 4, init_method, torch.device("cpu"), 100.0)
model, whole = tiny_model(0, WINDOWED, 2, rank % 2), tiny_model(0, WINDOWED)
runner = ContextParallelRunner(model, communicator)
document, question = tokens_of(67), tokens_of(9, seed=1)
for strategy in ("pass_kv", "pass_q", "all_gather"):
    runner.strategy = strategy
    shard = prefilled_shard(runner, document)
    check_dense(whole, runner.answer(shard, question, 2), [*document, *question])
    sys.stdout.write(f"{strategy}\n")
asks = [Ask(shard=shard, question=question[:count], max_new_tokens=count) for count in (1, 3)]
for ask, answer in zip(asks, runner.answer_batch(asks), strict=True):
    check_dense(whole, answer, [*document, *ask.question])
sys.stdout.write("batch\n")
communicator.close()
