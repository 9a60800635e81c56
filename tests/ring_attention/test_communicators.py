import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from holdfast.kvstore.errors import ConfigError, GroupFailed
from holdfast.ring_attention.join import join
from holdfast.ring_attention.local import local_group, run_ranks
from holdfast.ring_attention.shm import ShmCommunicator
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_contract import SCENARIOS

RANK = Path(__file__).parent / "rank_process.py"
CPU = torch.device("cpu")
KINDS = ("gloo", "shm")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_threads_keep_the_contract(scenario, size):
    """The shared contract, over LocalCommunicator."""
    run_ranks(size, scenario, deadline_s=20)


def shm_threads(size, rendezvous, function, deadline_s=20):
    """Futures of `function` on a thread per rank of a ShmCommunicator."""

    def rank(number):
        communicator = ShmCommunicator(number, size, rendezvous, deadline_s)
        try:
            return function(communicator)
        finally:
            communicator.close()

    with ThreadPoolExecutor(size) as pool:
        return [pool.submit(rank, number) for number in range(size)]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_shared_memory_between_threads_keeps_the_contract(scenario, size, tmp_path):
    """The same code as between processes; each rank leaves as soon as it has what it needs."""
    for future in shm_threads(size, tmp_path / "group", scenario):
        future.result()
    assert not list(tmp_path.iterdir())


class Ranks:
    """The rank processes of one scenario; ended and reaped on exit."""

    def __init__(self, kind, scenario, size, method, deadline_s=60):
        pipes = [os.pipe() for _ in range(size)]
        writing = [end for _, end in pipes]
        self.launcher = subprocess.Popen(
            [sys.executable, RANK, kind, scenario, str(size), method, str(deadline_s), *map(str, writing)],
            stdin=subprocess.PIPE,
            text=True,
            pass_fds=writing,
            start_new_session=True,
        )
        for end in writing:
            os.close(end)
        self.pipes = [os.fdopen(end) for end, _ in pipes]
        self.pids = [int(self.said(rank)) for rank in range(size)]

    def __enter__(self):
        return self

    def said(self, rank):
        """The next word of a rank."""
        return self.pipes[rank].readline().strip()

    def go(self):
        """Let happen what happens to the last rank by itself."""
        self.launcher.stdin.write("go\n")
        self.launcher.stdin.flush()

    def outputs(self, ranks):
        """What some ranks said until they ended, in rank order."""
        return [self.pipes[rank].read().splitlines() for rank in ranks]

    def __exit__(self, *exc):
        os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()
        for stream in (self.launcher.stdin, *self.pipes):
            stream.close()


@pytest.mark.parametrize(("kind", "size"), [("gloo", 2), ("gloo", 3), ("shm", 2), ("shm", 4)])
def test_processes_keep_the_contract(kind, size, tmp_path):
    """The shared contract, over real processes, which can then leave and form a new group."""
    names = [check.__name__ for check in SCENARIOS]
    with Ranks(kind, "contract", size, f"file://{tmp_path}/group") as ranks:
        assert ranks.outputs(range(size)) == [[*names, "joined-again", kind]] * size


def test_ranks_that_meet_at_a_port_of_one_host_share_memory(tmp_path):
    """And again at the same port, as torchrun's ranks do after a failure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        method = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with Ranks("auto", "contract", 2, method) as ranks:
        assert [words[-2:] for words in ranks.outputs(range(2))] == [["joined-again", "shm"]] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["raise", "abort-part", "die", "kill", "stop", "silent"])
def test_a_lost_rank_fails_the_others(kind, fault, tmp_path):
    """It exits, aborts and lives on, is killed in the middle, is stopped there, or does nothing any more.

    What can be noticed at once is: the deadline is far away then. A group that failed stays so.
    """
    deadline_s = 2 if fault in {"stop", "silent"} else 300
    with Ranks(kind, fault, 3, f"file://{tmp_path}/group", deadline_s) as ranks:
        assert [ranks.said(rank) for rank in range(3)] == ["ready"] * 3
        if fault in {"kill", "stop"}:
            os.kill(ranks.pids[2], signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        else:
            ranks.go()
        for words in ranks.outputs([0, 1]):
            assert (words[0], words[-1]) == ("group-failed", "still")
            if kind == "shm":
                assert {"die": "died", "kill": "died", "raise": "rank 2: raised", "abort-part": "rank 2: raised"}.get(
                    fault, "waited 2.0 s"
                ) in words[1]


def test_killing_all_ranks_leaves_nothing_behind(tmp_path):
    """No name in any file system is theirs once they have joined ("ready" says so), and memory ends with them."""
    with Ranks("shm", "kill", 3, f"file://{tmp_path}/group", 300) as ranks:
        assert [ranks.said(rank) for rank in range(3)] == ["ready"] * 3
        for pid in ranks.pids:
            assert "holdfast-link" in Path(f"/proc/{pid}/maps").read_text()
    assert not list(tmp_path.iterdir())


def test_a_rank_that_left_in_order_fails_those_who_need_it(tmp_path):
    """They are told that it left, not that it died."""
    with Ranks("shm", "leave", 2, f"file://{tmp_path}/group", 300) as ranks:
        assert [ranks.said(rank) for rank in range(2)] == ["ready"] * 2
        ranks.go()
        assert ranks.outputs([0]) == [["group-failed", "rank 1 has left the group", "still"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_does_not_come_together_fails(kind, tmp_path):
    """One of two ranks never starts: joining ends at the deadline."""
    with Ranks(kind, "absent", 2, f"file://{tmp_path}/group", deadline_s=2) as ranks:
        assert ranks.outputs([0]) == [["not-joined"]]
    if kind == "shm":
        assert not list(tmp_path.iterdir())


def test_another_groups_rank_is_refused(tmp_path):
    """Two ranks of unlike sizes, and two that call themselves the same."""
    for first, second in [((0, 2), (1, 3)), ((0, 3), (0, 3))]:
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(ShmCommunicator, *who, tmp_path / "group", 1.0) for who in (first, second)]
        assert {type(future.exception()) for future in futures} == {GroupFailed}


@pytest.mark.timeout(30)
def test_a_thread_that_raises_fails_the_others_at_once():
    """The first real error is what the caller sees, not its echoes."""
    echoes = []

    def rank(communicator):
        if communicator.rank == 1:
            raise KeyError("cause")
        try:
            communicator.barrier()
        except GroupFailed as error:
            echoes.append(str(error))
            raise

    with pytest.raises(KeyError, match="cause"):
        run_ranks(3, rank, deadline_s=300)
    assert echoes == ["rank 1: raised"] * 2


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["local", "shm"])
def test_aborting_a_part_fails_the_whole_and_other_parts(kind, tmp_path):
    """Even a rank that exchanges nothing with the one that aborted."""
    split, failed = threading.Barrier(4), threading.Event()

    def rank(communicator):
        part = communicator.split([[0, 1], [2, 3]])
        split.wait()
        if communicator.rank == 0:
            part.abort("enough")
            return
        if communicator.rank == 3:
            failed.wait(60)
        if communicator.rank == 2:
            with pytest.raises(GroupFailed, match="rank 0: enough"):
                part.all_gather(torch.zeros(1))  # rank 3 does not come
            failed.set()
        with pytest.raises(GroupFailed):
            communicator.barrier()

    if kind == "local":
        run_ranks(4, rank, deadline_s=300)
    else:
        for future in shm_threads(4, tmp_path / "group", rank, deadline_s=300):
            future.result()


@pytest.mark.timeout(30)
def test_another_thread_can_abort_a_rank_that_waits(tmp_path):
    """A signal handler or a supervisor ends a wait that has far to its deadline."""

    def rank(communicator):
        if communicator.rank == 1:
            return None
        aborting = threading.Timer(0.05, communicator.abort, ["supervisor"])
        aborting.start()
        with pytest.raises(GroupFailed) as failed:
            communicator.barrier()
        aborting.join()
        return str(failed.value)

    def stays(communicator):
        result = rank(communicator)
        done.wait()
        return result

    done = threading.Barrier(2)
    futures = shm_threads(2, tmp_path / "group", stays, deadline_s=300)
    assert "rank 0: supervisor" in futures[0].result()


def test_a_thread_that_never_comes_fails_the_others_at_the_deadline():
    """A silent peer is a deadline, and the group stays failed."""
    communicator = local_group(2, deadline_s=0.01)[0]
    for _ in range(2):
        with pytest.raises(GroupFailed, match=r"0\.01 s"):
            communicator.all_gather(torch.zeros(1))
    with pytest.raises(GroupFailed):
        communicator.shift(torch.zeros(1), torch.zeros(1)).wait()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["shift", "all_to_all", "all_gather", "all_reduce", "broadcast", "barrier"]),
        st.sampled_from([0, 1, 700, 40_000, 600_000]),
    ),
    max_size=6,
)


def step(communicator, name, count):
    """One operation, checked."""
    rank, size = communicator.rank, communicator.size
    places = torch.arange(count, dtype=torch.float32)
    mine = places + rank + 1
    match name:
        case "shift":
            received = torch.empty(count)
            works = [communicator.shift(mine, received), communicator.shift(mine[: count // 2], received[: count // 2])]
            for work in reversed(works):
                work.wait()
            assert torch.equal(received, places + (rank - 1) % size + 1)
        case "all_to_all":
            lengths = [[(count * (a + 2 * b + 1)) % 50_021 for b in range(size)] for a in range(size)]
            received = [torch.empty(lengths[peer][rank]) for peer in range(size)]
            sent = [torch.full((lengths[rank][peer],), rank * 10.0 + peer) for peer in range(size)]
            communicator.all_to_all(sent, received).wait()
            assert all((tensor == peer * 10 + rank).all() for peer, tensor in enumerate(received))
        case "all_gather":
            gathered = communicator.all_gather(mine)
            assert all(torch.equal(tensor, places + peer + 1) for peer, tensor in enumerate(gathered))
        case "all_reduce":
            communicator.all_reduce(mine)
            assert torch.equal(mine, places * size + size * (size + 1) / 2)
        case "broadcast":
            communicator.broadcast(mine, size - 1)
            assert torch.equal(mine, places + size)
        case "barrier":
            communicator.barrier()


class Boom(Exception):
    pass


@pytest.mark.timeout(120)
@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 4),
    steps=STEPS,
    fault=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 6)),
    kind=st.sampled_from(["local", "shm"]),
)
def test_any_sequence_of_operations_ends_right_or_fails_everywhere(size, steps, fault, kind, tmp_path_factory):
    """One rank raising before any step ends all: each has finished its steps, or raises GroupFailed."""

    def rank(communicator):
        part = communicator.split(
            [[r] for r in range(size)] if size % 2 else [[0, size - 1], list(range(1, size - 1))][: size // 2]
        )
        try:
            for number, (name, count) in enumerate([*steps, ("barrier", 0)]):
                if fault == (communicator.rank, number):
                    raise Boom
                step(communicator, name, count)
                step(part, name, count)
        except Boom:
            communicator.abort("boom")
            return "raised"
        except GroupFailed as error:
            return str(error)
        return "finished"

    if kind == "local":
        results = run_ranks(size, rank, deadline_s=30)
    else:
        directory = tmp_path_factory.mktemp("shm")
        results = [future.result() for future in shm_threads(size, directory / "group", rank, deadline_s=30)]
    happens = fault is not None and fault[0] < size and fault[1] <= len(steps)
    if not happens:
        assert results == ["finished"] * size
        return
    assert results[fault[0]] == "raised"
    assert set(results) <= {"raised", "finished", f"rank {fault[0]}: boom"}


def test_nonsense_is_refused_before_joining(tmp_path):
    """Unknown kinds, ranks outside the group, and kinds that do not suit the device."""
    method = f"file://{tmp_path}/group"
    for kind, rank, size, device in [
        ("mpi", 0, 2, CPU),
        ("shm", 2, 2, CPU),
        ("shm", -1, 2, CPU),
        ("auto", 0, 0, CPU),
        ("nccl", 0, 2, CPU),
        ("shm", 0, 2, torch.device("cuda")),
        ("gloo", 0, 2, torch.device("cuda")),
    ]:
        with pytest.raises(ConfigError):
            join(kind, rank, size, method, device, 0.1)
    assert not list(tmp_path.iterdir())
    assert join("auto", 0, 1, method, CPU).name == "local"
    assert not list(tmp_path.iterdir())
