"""Groups of real ranks, and a driver in a process of its own, which a test kills."""

from holdfast.engine_adapter.group import GroupOptions, RankGroup
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
from holdfast.ring_attention.config import ModelConfig
from holdfast.ring_attention.identity import digest_of, read_config, spec_of

CONFIG = ModelConfig(
    vocabulary_size=64, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, head_dim=16
)


def spec_in(directory):
    return spec_of(read_config(directory), digest_of(directory))


def group(model, name, cp, socket, rows, launcher=None, **more):
    # A group that chooses for itself would first measure.
    more = {"threads": 1, "collective_seconds": 20.0, "strategy": "pass_kv"} | more
    options = GroupOptions(name=name, model=model, cp=cp, rows=rows, daemon_socket=socket, **more)
    return RankGroup(options, spec_in(model), launcher)


def drives(pipe, socket, model):
    """A driver in a process of its own: starts a group, attaches a document to it, and is killed."""
    engine = group(model, "driven", 2, socket, 300)
    session = Session(Client(socket), engine)
    session.ingest("report", list(range(60)), chunk_tokens=16)
    with session.attached("report"):
        pipe.send(engine.pids)
        pipe.recv()
