"""A document three times the size of DDR, out of one group's memory and into another's of a different degree."""

from contextlib import closing

import numpy as np
import pytest
from holdfast.engine_adapter.fake import FakeEngine
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import DocumentTooLarge
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
EXTENTS = 3 * 64  # of 16 KiB, and DDR has one MiB
TOKENS = 32 * EXTENTS - 5


def engine(name, cp, daemon):
    return FakeEngine(name, SPEC, cp=cp, rows=-(-TOKENS // cp) + 64, daemon_socket=daemon.socket)


def test_a_document_larger_than_ddr_goes_from_group_to_group():
    """Bit-exact: one wrong byte would change the answer. A crash after it was durable loses nothing of it."""
    document = [int(token) for token in np.random.default_rng(1).integers(0, 64, TOKENS)]
    with DaemonProcess(nvme__capacity_bytes="8 MiB") as daemon:
        daemon.start()
        with closing(Client(daemon.socket)) as client, closing(engine("two", 2, daemon)) as two:
            session = Session(client, two)
            view = session.ingest("large", document, chunk_tokens=512)
            assert view.complete
            assert daemon.used("ddr") <= 1 << 20
            wanted = two.recompute(document, [4, 5], 3, 512).tokens
            assert session.ask("large", [4, 5], 3).answer.tokens == wanted
            until(lambda: client.document("large").durable, "it is durable")
            with pytest.raises(DocumentTooLarge, match="memory-only"):
                session.ingest("other", document[1:], write_policy=WritePolicy.MEMORY)
        daemon.kill()
        daemon.cool()
        daemon.start()
        with closing(Client(daemon.socket)) as client, closing(engine("three", 3, daemon)) as three:
            assert client.document("large").complete
            reply = Session(client, three).ask("large", [4, 5], 3)
            assert reply.swap.source_bytes == {"nvme": EXTENTS << 14}
            assert reply.answer.tokens == wanted
            client.delete("large")
            until(lambda: not sum(daemon.used(tier) for tier in ("hbm", "ddr", "nvme")), "all bytes are free")
