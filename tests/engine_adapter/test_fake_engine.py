import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from engine_contract import EngineContract
from holdfast.engine_adapter.fake import FakeEngine
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
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
    CPS = (1, 2, 3)
    SETTINGS: ClassVar = {}

    def make(self, stage, cp):
        return FakeEngine(f"fake-{cp}", SPEC, cp=cp, rows=stage.rows(cp) + 8, daemon_socket=stage.daemon.socket)

    def other_spec(self):
        return replace(SPEC, model="fake@2")


def test_one_wrong_byte_changes_the_answer():
    """The control: equality of answers means something."""
    engine = FakeEngine("alone", SPEC, cp=0, rows=0, daemon_socket=Path("/nowhere"))
    planes = engine._made([1, 2, 3])
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
        client.evict("report", "hbm")
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
