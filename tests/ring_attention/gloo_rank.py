"""One rank process: `gloo_rank.py SCENARIO RANK SIZE INIT_METHOD DEADLINE_S`; prints what happened, one word a line."""

import os
import sys

import torch
from holdfast.kvstore.errors import GroupFailed
from holdfast.ring_attention.distributed import DistributedCommunicator
from ring_contract import SCENARIOS


def say(word):
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


scenario, rank, size, init_method, deadline_s = sys.argv[1:]
torch.set_num_threads(1)
try:
    communicator = DistributedCommunicator(int(rank), int(size), init_method, torch.device("cpu"), float(deadline_s))
except GroupFailed:
    say("not-joined")
    sys.exit(0)

if scenario == "contract":
    for check in SCENARIOS:
        check(communicator)
        say(check.__name__)
    communicator.close()
    again = DistributedCommunicator(
        int(rank), int(size), f"{init_method}-again", torch.device("cpu"), float(deadline_s)
    )
    again.barrier()
    again.close()
    say("joined-again")
    sys.exit(0)

communicator.barrier()
if int(rank) == int(size) - 1:
    if scenario == "dies":
        os._exit(7)
    if scenario == "raises":
        communicator.abort("raised")
        sys.stdin.read()  # alive, so that nothing but the abort can tell the others
        os._exit(0)
    if scenario == "stuck":
        sys.stdin.read()
        os._exit(0)
try:
    communicator.shift(torch.zeros(3), torch.empty(3)).wait()
    communicator.barrier()
    say("finished")
except GroupFailed:
    say("group-failed")
    os._exit(0)
