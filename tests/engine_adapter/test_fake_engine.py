import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from engine_contract import Degree, EngineContract
from holdfast.engine_adapter.engine import Question
from holdfast.engine_adapter.fake import FakeEngine
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
from holdfast.kvstore.clock import SystemClock
from holdfast.kvstore.spec import KVSpec, LayerGroup

from daemon_process import DaemonProcess, until

SPEC = KVSpec(
    groups=(LayerGroup(layers=(0, 1), kv_heads=2, key_dim=8, value_dim=4),),
    dtype="bfloat16",
    model="fake@1",
    vocabulary_size=64,
    block_tokens=16,
    extent_blocks=2,
)


class TestFakeEngine(EngineContract):
    DEGREES = (Degree(1, 4), Degree(2, 2), Degree(3))
    SETTINGS: ClassVar = {}

    def make(self, stage, degree):
        name, rows = f"fake-{degree.cp}-{degree.tp}", stage.rows(degree) + 8
        return FakeEngine(name, SPEC, cp=degree.cp, tp=degree.tp, rows=rows, daemon_socket=stage.daemon.socket)

    def other_spec(self):
        return replace(SPEC, model="fake@2")


def test_one_wrong_byte_changes_the_answer():
    """The control: equality of answers means something."""
    engine = FakeEngine("alone", SPEC, cp=0, rows=0, daemon_socket=Path("/nowhere"))
    planes = dict(engine._made([1, 2, 3]))
    before = engine._answered(planes, [4], 3, 0)
    planes[1, 1][1, 2, 3] ^= 1
    assert engine._answered(planes, [4], 3, 0).tokens != before.tokens
    assert engine.recompute([1, 2, 3], [4], 3, 64).tokens == before.tokens
    assert engine.recompute([1, 2, 5], [4], 3, 64).tokens != before.tokens


def test_an_agent_that_hits_a_bug_leaves_nobody_waiting(monkeypatch):
    """Its group ends, the question is answered without the cache, and the daemon frees what the group held."""
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    with DaemonProcess() as daemon, closing(Client(daemon.start().socket)) as client:
        engine = FakeEngine("fake", SPEC, cp=2, rows=200, daemon_socket=daemon.socket)
        session = Session(client, engine)
        session.ingest("report", [1, 2, 3] * 30)
        client.free("report", "ddr")
        monkeypatch.setattr(engine._arenas[1], "load", lambda *_: 1 / 0)
        reply = session.ask_or_recompute("report", [1, 2, 3] * 30, [4], 3)
        assert reply.swap is None
        assert reply.answer.tokens == engine.recompute([1, 2, 3] * 30, [4], 3, 64).tokens
        until(lambda: seen, "the thread has ended")
        assert [error.exc_type for error in seen] == [ZeroDivisionError]
        until(lambda: daemon.used("hbm") == 0, "the group is gone")
        assert daemon.leases() == []
        engine.close()


def test_an_attempt_to_reconnect_that_failed_does_not_end_the_next_one():
    """Each broken attempt says that the daemon is lost; a rank that leaves for that ends the group of all others."""
    with DaemonProcess() as daemon, closing(Client(daemon.start().socket)) as client:
        engine = FakeEngine("fake", SPEC, cp=2, rows=200, daemon_socket=daemon.socket)
        with closing(engine):
            engine._agents[1]._commands.put(None)  # as an attempt's connection does when it breaks
            engine._agents[1]._commands.put(None)
            until(engine._agents[1]._commands.empty, "the agent has heard of it")
            session = Session(client, engine)
            session.ingest("report", [1, 2, 3] * 30)
            assert session.ask("report", [4], 3).answer.tokens == engine.recompute([1, 2, 3] * 30, [4], 3, 64).tokens


def test_a_rank_that_loses_its_connection_comes_back_with_its_group():
    """The daemon ends the group, and all of its ranks register anew, empty."""
    document = [1, 2, 3] * 30
    with (
        DaemonProcess() as daemon,
        closing(Client(daemon.start().socket)) as client,
        closing(FakeEngine("fake", SPEC, cp=3, rows=200, daemon_socket=daemon.socket)) as engine,
    ):
        session = Session(client, engine)
        session.ingest("report", document)
        numbers = [agent._client.number for agent in engine._agents]
        engine._agents[1]._client._connection._sock.shutdown(socket.SHUT_RDWR)
        until(
            lambda: (
                all(agent._client.number not in numbers for agent in engine._agents) and daemon.groups()[0]["complete"]
            ),
            "all ranks have registered anew",
        )
        reply = session.ask("report", [4], 3)
        assert reply.answer.tokens == engine.recompute(document, [4], 3, 64).tokens
        assert reply.swap.source_tier == "ddr"


def test_a_reading_rank_has_the_first_layer_before_the_last_has_come(monkeypatch):
    """A document that a group of another degree is still ingesting: whoever asked first reads layer by layer."""
    document = [1, 2, 3] * 30
    read_first = threading.Event()
    with DaemonProcess() as daemon, closing(Client(daemon.start().socket)) as client, ExitStack() as stack:
        writer, reader = (
            stack.enter_context(closing(FakeEngine(name, SPEC, rows=200, daemon_socket=daemon.socket, **degrees)))
            for name, degrees in (("writes", {"cp": 2}), ("reads", {"cp": 1, "tp": 2}))
        )
        for arena in reader._arenas:
            load = arena.load

            def loads(copies, buffers, geometry, start, stop, load=load):
                if start == 1:
                    assert read_first.wait(20), "the last layer is held back until the first was read"
                load(copies, buffers, geometry, start, stop)

            monkeypatch.setattr(arena, "load", loads)
        waiting = stack.enter_context(ThreadPoolExecutor(1)).submit(
            client.attach, "report", group="reads", wait_seconds=20.0
        )
        until(lambda: client._connection._waiting, "it has asked")
        client.tiers()  # answered behind it, so it waits by now
        Session(client, writer).ingest("report", document)
        shard = waiting.result(20).shard
        deadline_ns = SystemClock().monotonic_ns() + 20 * 10**9
        for agent in reader._agents:
            agent.waiter(shard.id, shard.generation, len(document), deadline_ns)(0)
        read_first.set()
        (answer,) = reader.answer_many([Question(shard, [4], 3)])
        assert answer.tokens == writer.recompute(document, [4], 3, 64).tokens
