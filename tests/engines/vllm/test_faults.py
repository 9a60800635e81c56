"""Whatever happens to the daemon, a real vLLM answers in time, and with the tokens that it computes by itself."""

import os
import signal
import sqlite3
from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import numpy as np
import pytest
import vllm  # noqa: F401 - without it this module is one skip
from engine_faults import COMMIT, READ, SLOW, Faults
from holdfast.engine_adapter.api import connect
from holdfast.kvstore.errors import NoCapacity
from vllm_engine import Engine, Prompt

from daemon_process import DaemonProcess, until

PAGE = 32
COUNT = 3000  # two extents
PROBE = 3 * PAGE + 1
SIZES = {
    "ddr__capacity_bytes": "64 MiB",
    "ddr__slab_bytes": "16 MiB",
    "nvme__capacity_bytes": "128 MiB",
    "nvme__segment_bytes": "32 MiB",
}
SETTINGS = {"write_policy": "write-through", "lookup_seconds": 0.5, "load_seconds": 2.0, "hold_seconds": 2.0}
ALONE = {"load": False, "store": False}
WAIT = 60.0


def tokens(name, count=COUNT):
    return np.random.default_rng(list(name.encode())).integers(0, 256, count).tolist()


@pytest.fixture(scope="module")
def daemon():
    with DaemonProcess(**SIZES) as process:
        yield process


@pytest.fixture(scope="module")
def faults(daemon):
    return Faults(daemon.directory)


@pytest.fixture(scope="module")
def started(checkpoint, daemon, faults):
    """A daemon with faults, and an engine on it."""
    daemon.start(faults)
    with Engine(checkpoint, daemon.socket, SETTINGS) as engine:
        yield engine


@pytest.fixture
def engine(started, daemon, faults):
    """The engine, connected to a daemon that works."""
    faults.disarm()
    if not daemon.alive:
        daemon.wait()
        daemon.start(faults)
    until(lambda: is_hit(started, "probe", PROBE), "it is connected", WAIT)
    return started


def ask(engine, name, count=COUNT, params=None):
    """An answer, when nothing of its request is left in the engine, nor in its own prefix cache."""
    (answer,) = engine.ask([Prompt(tokens(name, count), params={} if params is None else params)])
    until(engine.forget, "its blocks are free", WAIT)
    return answer


def is_hit(engine, name, count=COUNT):
    """Whether all that could be was loaded. A save may end after its answer."""
    return ask(engine, name, count).cached == count // PAGE * PAGE


def cool(daemon, faults):
    """A restart, after which DDR is empty."""
    until(lambda: daemon.rest().get("/v1/status")["writes_queued"] == 0, "all is written")
    daemon.kill()
    daemon.cool()
    daemon.start(faults)


def alone(engine, name, count=COUNT):
    """What the engine computes by itself."""
    answer = ask(engine, name, count, ALONE)
    assert answer.cached == 0
    return answer.tokens


@pytest.mark.timeout(600)
def test_a_daemon_that_dies_while_it_reads(engine, daemon, faults):
    reference = alone(engine, "read")
    until(lambda: is_hit(engine, "read"), "it is stored", WAIT)
    cool(daemon, faults)
    faults.arm(READ)
    until(lambda: not daemon.alive or (ask(engine, "read").tokens == reference and not daemon.alive), "it dies", WAIT)
    assert ask(engine, "read").tokens == reference  # without a daemon
    faults.disarm()
    daemon.wait()
    daemon.start(faults)
    until(lambda: is_hit(engine, "read"), "the engine finds it again", WAIT)
    assert ask(engine, "read").tokens == reference


@pytest.mark.timeout(600)
def test_a_daemon_that_dies_while_it_stores(engine, daemon, faults):
    reference = alone(engine, "store")
    faults.arm(COMMIT)
    answer = ask(engine, "store")
    assert answer.tokens == reference
    assert answer.holdfast["saved"] is not True
    until(lambda: not daemon.alive, "the daemon has died")  # a commit needs no blocks, and may come after the answer
    faults.disarm()
    daemon.wait()
    daemon.start(faults)
    until(lambda: is_hit(engine, "store"), "it is stored at last", WAIT)
    assert ask(engine, "store").tokens == reference


@pytest.mark.timeout(600)
def test_a_daemon_that_does_not_answer(engine, daemon):
    reference = alone(engine, "silence")
    before = engine.metrics().get("vllm:holdfast_lookup_failures", 0)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            answer = ask(engine, "silence")
            assert (answer.tokens, answer.cached) == (reference, 0)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert engine.metrics()["vllm:holdfast_lookup_failures"] > before
    until(lambda: ask(engine, "silence").cached, "the engine hears it again", WAIT)
    assert ask(engine, "silence").tokens == reference


@pytest.mark.timeout(600)
def test_a_disk_that_is_slower_than_computing(engine, daemon, faults):
    reference = alone(engine, "slow")
    until(lambda: is_hit(engine, "slow"), "it is stored", WAIT)
    cool(daemon, faults)
    until(lambda: is_hit(engine, "probe", PROBE), "it is connected", WAIT)
    before = engine.metrics().get("vllm:holdfast_load_failures", 0)
    faults.arm(SLOW)
    until(
        lambda: (
            ask(engine, "slow").tokens == reference and engine.metrics().get("vllm:holdfast_load_failures", 0) > before
        ),
        "a load was given up",
        WAIT,
    )
    faults.disarm()


@pytest.mark.timeout(600)
def test_an_extent_that_is_corrupt(engine, daemon, faults):
    reference = alone(engine, "corrupt")
    until(lambda: is_hit(engine, "corrupt"), "it is stored", WAIT)
    until(lambda: daemon.rest().get("/v1/status")["writes_queued"] == 0, "all is written")
    daemon.kill()
    daemon.cool()
    with closing(sqlite3.connect(daemon.data_dir / "catalog.sqlite")) as database:
        found = database.execute("SELECT segment, segment_offset, start FROM extents WHERE start > 0").fetchall()
    assert found
    for segment, offset, _ in found:
        with (daemon.data_dir / "nvme" / f"segment-{segment}").open("r+b") as file:
            file.seek(offset + 8192)
            file.write(b"\xff" * 4096)
    daemon.start(faults)
    until(
        lambda: (answer := ask(engine, "corrupt")).cached > 0 and answer.tokens == reference,
        "what is good is used",
        WAIT,
    )
    quarantined = daemon.metric("holdfast_quarantined_total")
    assert quarantined >= 1
    until(lambda: is_hit(engine, "corrupt"), "what was bad is stored anew", WAIT)
    assert ask(engine, "corrupt").tokens == reference


@pytest.mark.timeout(600)
def test_a_store_without_room(engine, daemon):
    reference = alone(engine, "full")
    with connect(daemon.socket) as store, ExitStack() as stack:
        kept = []
        with suppress(NoCapacity, AssertionError):  # no room to read it any more, or to store it
            for number in range(20):
                kept.append(f"filler {number}")
                ask(engine, kept[-1], params={"document": kept[-1]})
                until(lambda: kept[-1] in [one.name for one in store.documents()], "it is stored", 10)
                stack.enter_context(store.attach(kept[-1], deadline_seconds=1.0))
        assert 2 <= len(kept) < 20, "DDR is full of leases"
        assert daemon.used("ddr") > 0.7 * (64 << 20)
        answer = ask(engine, "full")
        assert (answer.tokens, answer.cached) == (reference, 0)
    with connect(daemon.socket) as store:
        for document in store.documents():
            store.delete(document.name)
    until(lambda: is_hit(engine, "full"), "there is room again", WAIT)
    assert ask(engine, "full").tokens == reference


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("other", "page"), [("larger pages", 2 * PAGE), ("another model", PAGE)])
def test_pages_of_others_are_not_taken_for_ours(engine, checkpoint, daemon, tmp_path, other, page):
    until(lambda: is_hit(engine, "shared"), "it is stored", WAIT)
    if other == "another model":
        from holdfast.ring_attention.synthetic import DEMO, write_checkpoint

        checkpoint = tmp_path
        write_checkpoint(checkpoint, replace(DEMO, dtype="bfloat16"), seed=7)
    with Engine(checkpoint, daemon.socket, SETTINGS, {"block_size": page}) as theirs:
        reference = alone(theirs, "shared")
        answer = ask(theirs, "shared")
        assert (answer.tokens, answer.cached) == (reference, 0)
        until(lambda: ask(theirs, "shared").cached == COUNT // page * page, "theirs is stored", WAIT)
        assert ask(theirs, "shared").tokens == reference


@pytest.mark.timeout(600)
def test_bypassed_the_engine_computes(engine, daemon):
    reference = alone(engine, "bypass")
    until(lambda: is_hit(engine, "bypass"), "it is stored", WAIT)
    daemon.rest().put("/v1/bypass", {"reason": "tests"})
    try:
        answer = ask(engine, "bypass")
        assert (answer.tokens, answer.cached) == (reference, 0)
    finally:
        daemon.rest().delete("/v1/bypass")
    assert is_hit(engine, "bypass")
