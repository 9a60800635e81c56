import subprocess
import sys
from pathlib import Path

import pytest
import torch
from holdfast.kvstore.errors import GroupFailed
from holdfast.ring_attention.local import local_group, run_ranks
from ring_contract import SCENARIOS

RANK = Path(__file__).parent / "gloo_rank.py"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_threads_keep_the_contract(scenario, size):
    """The shared contract, over LocalCommunicator."""
    run_ranks(size, scenario, deadline_s=20)


class Ranks:
    """Rank processes of one scenario; ended and reaped on exit."""

    def __init__(self, scenario, size, directory, deadline_s=30):
        method = f"file://{directory}/group"
        self.processes = [
            subprocess.Popen(
                [sys.executable, RANK, scenario, str(rank), str(size), method, str(deadline_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def __enter__(self):
        return self

    def outputs(self, ranks):
        """Exit status and printed words of some ranks, in rank order."""
        results = []
        for rank in ranks:
            out, err = self.processes[rank].communicate(timeout=60)
            assert self.processes[rank].returncode in (0, 7), err
            results.append(out.split())
        return results

    def __exit__(self, *exc):
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                stream.close()


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_processes_keep_the_contract(size, tmp_path):
    """The shared contract, over real processes, which can then leave and form a new group."""
    names = [check.__name__ for check in SCENARIOS]
    with Ranks("contract", size, tmp_path) as ranks:
        assert ranks.outputs(range(size)) == [[*names, "joined-again"]] * size


@pytest.mark.parametrize("scenario", ["dies", "raises"])
def test_a_lost_process_fails_the_others_at_once(scenario, tmp_path):
    """Rank 2 exits, or aborts and lives on: the others raise GroupFailed long before their deadline of 300 s."""
    with Ranks(scenario, 3, tmp_path, deadline_s=300) as ranks:
        assert ranks.outputs([0, 1]) == [["group-failed"]] * 2


def test_a_stuck_process_fails_the_others_at_the_deadline(tmp_path):
    """Rank 1 never answers again: after 2 s the other raises GroupFailed."""
    with Ranks("stuck", 2, tmp_path, deadline_s=2) as ranks:
        assert ranks.outputs([0]) == [["group-failed"]]


def test_a_group_that_does_not_come_together_fails(tmp_path):
    """One of two ranks never starts: joining ends at the deadline."""
    with Ranks("contract", 2, tmp_path, deadline_s=2) as ranks:
        ranks.processes[1].kill()
        assert ranks.outputs([0]) == [["not-joined"]]


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


def test_a_thread_that_never_comes_fails_the_others_at_the_deadline():
    """A silent peer is a deadline, and the group stays failed."""
    communicator = local_group(2, deadline_s=0.01)[0]
    for _ in range(2):
        with pytest.raises(GroupFailed, match=r"0\.01 s"):
            communicator.all_gather(torch.zeros(1))
    with pytest.raises(GroupFailed):
        communicator.shift(torch.zeros(1), torch.zeros(1)).wait()
