"""The rank processes of a group: `rank_process.py KIND SCENARIO SIZE INIT_METHOD DEADLINE_S PIPE...`.

torch is imported once, then a process per rank is forked. Each writes to its own pipe, line by line: its process id,
then what happened. The last rank is the one that something happens to, when a line comes on stdin.
"""

import os
import sys
from pathlib import Path

import torch
from holdfast.kvstore.errors import GroupFailed
from holdfast.ring_attention.join import join
from ring_contract import SCENARIOS

kind, scenario, size, init_method, deadline_s, *pipes = sys.argv[1:]
size, deadline_s = int(size), float(deadline_s)
rank = 0


def say(word):
    os.write(int(pipes[rank]), f"{word}\n".encode())


def joined(method):
    communicator = join(kind, rank, size, method, torch.device("cpu"), deadline_s)
    assert communicator.name == kind or kind == "auto"
    return communicator


def contract():
    communicator = joined(init_method)
    for check in SCENARIOS:
        check(communicator)
        say(check.__name__)
    communicator.close()
    again = joined(init_method if "tcp://" in init_method else f"{init_method}-again")
    again.barrier()
    again.close()
    say("joined-again")
    say(again.name)


def everything(communicator):
    """One of each, with messages that take many chunks."""
    megabytes = torch.zeros(3 << 20, dtype=torch.uint8)
    communicator.shift(megabytes, torch.empty_like(megabytes)).wait()
    communicator.all_reduce(torch.zeros(100_000))
    communicator.all_to_all([torch.zeros(50_000)] * size, [torch.empty(50_000) for _ in range(size)]).wait()
    communicator.all_gather(torch.zeros(10))
    communicator.broadcast(torch.zeros(10), 0)


def happen(communicator):
    """What the victim does itself; "kill" and "stop" come from outside, in the middle of something."""
    if scenario in {"kill", "stop"}:
        return
    sys.stdin.readline()
    if scenario == "die":
        os._exit(7)
    if scenario == "raise":
        communicator.abort("raised")
    if scenario == "abort-part":
        communicator.split([[peer] for peer in range(size)]).abort("raised")
    if scenario == "leave":
        communicator.close()
    sys.stdin.read()  # alive, so that nothing but words can tell the others


def lose_one():
    """Work together until something happens."""
    try:
        group = joined(init_method)
    except GroupFailed:
        say("not-joined")
        return
    try:
        everything(group)
        say("ready" if kind == "gloo" or not Path(init_method.removeprefix("file://")).exists() else "left-behind")
        if rank == size - 1:
            happen(group)
        while True:
            everything(group)
    except GroupFailed as error:
        say("group-failed")
        say(error)
    try:
        group.barrier()
    except GroupFailed:
        say("still")


torch.set_num_threads(1)
ranks = []
for rank in range(size):  # noqa: B007 - the child's
    child = os.fork()
    if not child:
        break
    ranks.append(child)
else:
    for pipe in pipes:
        os.close(int(pipe))
    for child in ranks:
        os.waitpid(child, 0)
    sys.exit(0)
for other, pipe in enumerate(pipes):
    if other != rank:
        os.close(int(pipe))
say(os.getpid())
if scenario == "contract":
    contract()
elif scenario != "absent" or rank != size - 1:
    lose_one()
os._exit(0)
