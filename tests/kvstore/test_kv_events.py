"""KV events: what a router that follows them believes is what is there."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from holdfast.kvstore.changes import Changes
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import ConfigError
from holdfast.kvstore.event_publisher import END, checked_endpoint
from holdfast.kvstore.keys import KEY_BYTES, as_tokens, block_keys
from holdfast.kvstore.kv_events import AllBlocksCleared, Announcer, Batch, BlockRemoved, BlockStored

from daemon_process import DaemonProcess, durable, put, tokens_of, until
from fakes import CLIENT, FAR_NS, tiny_spec
from scene import Scene, named, secret, tokens

zmq = pytest.importorskip("zmq", reason="KV events need pyzmq: pip install 'holdfast[events]'")
BLOCK = tiny_spec().block_tokens


class Router:
    """Follows events as routers do: which blocks are in which medium, and which tokens they stand for."""

    def __init__(self, endpoint, replay=None):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.subscribe(b"")
        self.socket.connect(endpoint)
        self.replay = None
        if replay is not None:
            self.replay = self.context.socket(zmq.DEALER)
            self.replay.connect(replay)
        self.media = {}
        self.chains = {}  # by hash: its parent and its tokens
        self.number = -1
        self.clears = 0

    def take(self, number, payload):
        if number <= self.number:  # the daemon was started anew
            self.media.clear()
        self.number = number
        for event in msgspec.msgpack.decode(payload, type=Batch).events:
            match event:
                case AllBlocksCleared():
                    self.clears += 1
                    self.media.clear()
                case BlockStored(block_hashes=hashes, medium=medium, token_ids=ids):
                    assert not self.media.setdefault(medium, set()).intersection(hashes), "stored twice"
                    self.media[medium].update(hashes)
                    parent = event.parent_block_hash
                    assert not ids or len(ids) == len(hashes) * event.block_size
                    for index, name in enumerate(hashes):
                        if ids:
                            self.chains[name] = parent, ids[index * event.block_size : (index + 1) * event.block_size]
                        parent = name
                case BlockRemoved(block_hashes=hashes, medium=medium):
                    assert self.media[medium].issuperset(hashes), "removed, and never stored"
                    self.media[medium].difference_update(hashes)

    def drain(self):
        while self.socket.poll(0):
            _, number, payload = self.socket.recv_multipart()
            self.take(int.from_bytes(number, "big"), payload)

    def ask(self, first):
        """Everything since a number, by the replay socket."""
        self.replay.send_multipart((b"", first.to_bytes(8, "big")))
        found = []
        while True:
            assert self.replay.poll(10_000), "no answer"
            _, _, number, payload = self.replay.recv_multipart()
            if number == END:
                return found
            found.append((int.from_bytes(number, "big"), payload))

    def until(self, condition, what):
        until(lambda: (self.drain(), condition())[1], what)

    def blocks(self, medium):
        return len(self.media.get(medium, ()))

    def close(self):
        self.context.destroy(linger=0)


@pytest.fixture
def daemon(tmp_path):
    with DaemonProcess(
        events__endpoint=f"ipc://{tmp_path}/events", events__replay_endpoint=f"ipc://{tmp_path}/replay"
    ) as daemon:
        yield daemon


@pytest.fixture
def router(daemon):
    daemon.start()
    made = Router(daemon.settings["events.endpoint"], daemon.settings["events.replay_endpoint"])
    for number, payload in made.ask(0):  # what was before we came
        made.take(number, payload)
    yield made
    made.close()


def test_a_document_is_followed_from_tier_to_tier(daemon, router):
    client = daemon.client()
    count = 10 * BLOCK + 1  # the last block is part-filled: no block for a router
    put(client, "report", count)
    router.until(lambda: router.blocks("CPU") == 10 and router.blocks("STORAGE") == 10, "both copies are told")
    client.free("report", "nvme")
    router.until(lambda: router.blocks("CPU") == 0, "the DDR copy is told to have gone")
    assert router.blocks("STORAGE") == 10
    client.delete("report")
    router.until(lambda: router.blocks("STORAGE") == 0, "all has gone")


def test_a_router_finds_a_prompt_by_its_tokens_alone(daemon, router):
    tokens = tokens_of("report", 10 * BLOCK)
    put(daemon.client(), "report", len(tokens))
    router.until(lambda: router.blocks("CPU") == 10, "it is told")
    children = {(parent, tuple(ids)): name for name, (parent, ids) in router.chains.items()}
    found, parent = 0, None
    for start in range(0, len(tokens), BLOCK):
        parent = children.get((parent, tuple(tokens[start : start + BLOCK])))
        found += parent in router.media["CPU"]
    assert found == 10
    spec = tiny_spec()
    keys = daemon.client().keys_of(spec.fingerprint(), tokens)
    assert parent == keys[-KEY_BYTES:], "a block is named by its key"


@pytest.mark.parametrize("lengths", [(48, 64), (64, 48), (40, 60, 100), (48, 80, 112)], ids=str)
def test_blocks_that_a_longer_document_has_as_well_stay_until_the_last_goes(lengths):
    """The last extent of the shorter one goes: its blocks are in an extent of the longer one."""
    scene, spec = Scene(), replace(tiny_spec(), extent_blocks=4)
    announcer = Announcer(scene.state)
    fingerprint = scene.service.register_spec(spec)
    held, documents = {}, []

    def follow():
        for event in announcer.events(100):
            blocks = held.setdefault(event.medium, set())
            if isinstance(event, BlockStored):
                assert not blocks.intersection(event.block_hashes), "stored twice"
                blocks.update(event.block_hashes)
            else:
                assert blocks.issuperset(event.block_hashes), "removed, and never stored"
                blocks.difference_update(event.block_hashes)
        there = {key for one in documents for key in keys[: one // BLOCK]}
        assert held == {"CPU": there, "STORAGE": there}

    keys = block_keys(as_tokens(tokens(1, 4), spec), spec, secret("t"))
    for count in lengths:
        ingest = scene.service.begin_ingest(
            CLIENT,
            named(f"d{count}"),
            fingerprint,
            tokens(1, 4)[:count],
            WritePolicy.THROUGH,
            None,
            64,
            FAR_NS,
            lambda _: None,
        )
        scene.settle()
        scene.service.commit_ingest(CLIENT, ingest.id, lambda _: None)
        scene.settle()
        documents.append(count)
        follow()
    for count in lengths:
        scene.service.delete(named(f"d{count}"))
        scene.settle()
        documents.remove(count)
        follow()


def test_what_was_missed_is_replayed(daemon, router):
    put(daemon.client(), "report", 4 * BLOCK)
    router.until(lambda: router.blocks("STORAGE") == 4, "it is told")
    late = Router(daemon.settings["events.endpoint"], daemon.settings["events.replay_endpoint"])
    try:
        for number, payload in late.ask(0):
            late.take(number, payload)
        assert late.media == router.media
        assert late.ask(late.number + 1) == []
    finally:
        late.close()


def test_a_restart_clears_and_tells_what_is_left(daemon, router):
    client = daemon.client()
    put(client, "report", 4 * BLOCK)
    until(lambda: durable(client, "report"), "it is durable")
    daemon.restart_cold()
    router.number = -1

    def told():
        for number, payload in router.ask(0):  # a subscriber that was not connected in time has missed the first ones
            router.take(number, payload)
        return router.clears > 1 and router.blocks("STORAGE") == 4

    until(told, "the new daemon tells what it has")
    assert router.blocks("CPU") == 0


def test_changes_are_kept_for_followers_only():
    changes = Changes()
    changes.note("a")
    assert changes.take(10) == []
    changes.follow()
    changes.note("a")
    changes.note("b")
    changes.note("a")
    assert changes.take(1) == [("a", None)]
    assert changes.take(5) == [("b", None)]
    assert changes.take(5) == []


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:5557", "tcp://0.0.0.0:5557", "tcp://10.0.0.1:1", "ipc://", "5557", "tcp://127.0.0.1:x"]
)
def test_tokens_do_not_leave_the_machine(endpoint):
    with pytest.raises(ConfigError, match=r"say ipc:///path or tcp://127\.0\.0\.1:PORT"):
        checked_endpoint("events.endpoint", endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5557", "tcp://[::1]:5557", "ipc:///run/holdfast/events"])
def test_endpoints_of_this_machine(endpoint):
    checked_endpoint("events.endpoint", endpoint)


def test_an_endpoint_that_is_taken_is_named(daemon, router):
    with DaemonProcess(events__endpoint=daemon.settings["events.endpoint"].replace("events", "no/such/dir")) as other:
        other.spawn()
        assert other.wait() == 1
        assert "events.endpoint" in other.log_text()
