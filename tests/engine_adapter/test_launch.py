"""Ranks that somebody else starts, as torchrun does, and that join their driver at a socket."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest
from driver_process import CONFIG, group
from holdfast.engine_adapter.launch import JoinLauncher, joined
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
from holdfast.kvstore.errors import GroupFailed, SpecMismatch
from holdfast.ring_attention.synthetic import Scales, write_checkpoint

from daemon_process import DaemonProcess

JOINS = (
    "import os, pathlib, sys; from holdfast.engine_adapter.rank import join; "
    "os._exit(join(pathlib.Path(sys.argv[1]), int(sys.argv[2])))"
)
SETTINGS = {
    "ddr__capacity_bytes": "48 MiB",
    "ddr__slab_bytes": "8 MiB",
    "nvme__capacity_bytes": "64 MiB",
    "nvme__segment_bytes": "8 MiB",
}


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(**SETTINGS) as found:
        write_checkpoint(found.directory / "model", CONFIG, scales=Scales(attention=1.0))
        yield found.start()


@contextmanager
def started(path, ranks):
    """Processes that say they are these ranks."""
    with ExitStack() as stack:
        processes = [subprocess.Popen([sys.executable, "-c", JOINS, str(path), str(rank)]) for rank in ranks]
        for process in processes:
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
        yield processes


def joining(daemon, name, **more):
    path = daemon.directory / f"{name}.sock"
    return path, lambda: group(
        daemon.directory / "model", name, 2, daemon.socket, 200, JoinLauncher(path, 60.0), **more
    )


def test_a_group_of_joined_ranks_answers_and_ends_them(daemon):
    """They come before the driver listens and in any order; they end with the group, and nothing is left."""
    path, make = joining(daemon, "joined")
    with started(path, [1, 0]) as processes:
        with make() as engine, closing(Client(daemon.socket)) as client:
            assert engine.pids == [processes[1].pid, processes[0].pid]
            session = Session(client, engine)
            document = list(range(60))
            session.ingest("report", document, chunk_tokens=16)
            answer = session.ask("report", [7, 8], 4).answer
            assert answer.tokens == engine.recompute(document, [7, 8], 4, 16).tokens
            client.delete("report")
        assert [process.wait(30) for process in processes] == [0, 0]
    assert not path.exists()


def test_a_joined_rank_that_is_killed_ends_the_group(daemon):
    """The others are ended too, although they are no children of the driver."""
    path, make = joining(daemon, "killed")
    with started(path, [0, 1]) as processes, make() as engine:
        os.kill(engine.pids[1], signal.SIGKILL)
        with pytest.raises(GroupFailed, match="rank 1 died"):
            engine.recompute([1] * 20, [2], 2, 16)
        assert [process.wait(30) for process in processes] == [-9, -9]


def test_ranks_that_do_not_come_or_are_wrong_are_named(daemon):
    """Within the deadline; those that came hear that it is over."""
    path = daemon.directory / "missing.sock"
    with ThreadPoolExecutor(1) as pool:
        for rank, reason in (0, r"rank\(s\) \[1\] did not join"), (2, "rank 2 of 2 joined"):
            channel = pool.submit(joined, path, rank, 30.0)
            with pytest.raises(GroupFailed, match=reason):
                JoinLauncher(path, 1.0).launch(2)
            assert channel.result().receive_order() is None
            channel.result().close()
    with pytest.raises(GroupFailed, match="no driver"):
        joined(path, 0, 0.2)


def test_a_rank_that_cannot_start_says_why_and_all_end(daemon):
    """As children do."""
    with group(daemon.directory / "model", "taken", 1, daemon.socket, 50):
        path, make = joining(daemon, "taken")
        with started(path, [0, 1]) as processes:
            with pytest.raises(SpecMismatch):
                make()
            assert all(process.wait(30) in (1, -9) for process in processes)
