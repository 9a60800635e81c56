"""The daemon as its clients and its operator see it: a process, a socket, signals, shared memory."""

import asyncio
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import msgspec
import pytest
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    ClaimNotFound,
    CorruptExtent,
    DaemonUnavailable,
    DocumentIncomplete,
    DocumentNotFound,
    DocumentTooLarge,
    Draining,
    EmptyDocument,
    FrameTooLarge,
    GroupFailed,
    HoldfastError,
    InvalidName,
    InvalidRequest,
    MalformedFrame,
    PinsOvercommitted,
    ProtocolError,
    SpecMismatch,
    StorageFailed,
    TokenOutOfRange,
    Unavailable,
)
from holdfast.kvstore.frames import LENGTH, Answer, Envelope, FrameBuffer, decode_answer, decode_request, encode
from holdfast.kvstore.geometry import extent_geometry
from holdfast.kvstore.prefix_wire import Found, LookupTokens
from holdfast.kvstore.requests import Requests
from holdfast.kvstore.seal import seal_planes
from holdfast.kvstore.wire import (
    PROTOCOL_VERSION,
    AttachDocument,
    Goodbye,
    Hello,
    ListDocuments,
    MapSlabs,
    ObservePrefill,
    Refused,
    RegisterRank,
    Report,
    Welcome,
)

from daemon_clients import client_process, floods, holds_lease, holds_save, ingests, reads, waits_for_room, writes
from daemon_process import (
    LAYERS,
    PATIENCE_SECONDS,
    DaemonProcess,
    durable,
    expected,
    fetch,
    put,
    tokens_of,
    until,
    write,
)
from fakes import RING_SETTING, ring, tiny_spec

SPEC = tiny_spec()
FINGERPRINT = SPEC.fingerprint()
HELLO = encode(Envelope(1, Hello(PROTOCOL_VERSION, "default")))


@pytest.fixture
def daemon():
    with DaemonProcess() as process:
        yield process.start()


@pytest.fixture(scope="module")
def shared():
    """One daemon for tests that leave nothing behind: each ends with `unharmed`."""
    with DaemonProcess(limits__frame_bytes="64 KiB", limits__connections="8") as process:
        yield process.start()


@pytest.fixture
def unharmed(shared):
    """Whatever a test does to the shared daemon: it serves on, and nothing is leaked."""
    with closing(Client(shared.socket)) as client:
        client.register_spec(SPEC)
    before = shared.descriptors()
    yield shared
    with closing(Client(shared.socket)) as client:
        client.register_spec(SPEC)
        put(client, "probe", 40)
        assert fetch(client, "probe") == expected("probe", 40)
        client.delete("probe")
        until(lambda: shared.used("ddr") == 0, "DDR is free again")
    until(lambda: shared.descriptors() <= before + 4, "descriptors are closed")  # its segment's, its slab's
    assert shared.leases() == []
    assert "bug: stopping" not in shared.events()


class Raw:
    """A socket without manners."""

    def __init__(self, daemon: DaemonProcess, data: bytes = b"") -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_SECONDS)
        self.sock.connect(str(daemon.socket))
        self.sock.sendall(data)

    def answers(self) -> list[Answer]:
        """What comes until the daemon hangs up."""
        frames, found = FrameBuffer(1 << 20), []
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return found
            if not data:
                return found
            found += [decode_answer(frame) for frame in frames.feed(data)]

    def close(self) -> None:
        self.sock.close()


# Serving ---------------------------------------------------------------------------------------


def test_a_document_is_read_by_another_process_from_shared_memory(daemon):
    client = daemon.client()
    content = put(client, "report", 100)
    assert len(content) == 4
    with client_process(reads, daemon.socket, "default", "report") as reader:
        assert reader.hear() == content
    until(lambda: durable(client, "report"), "the document is durable")
    assert [d.name for d in client.documents()] == ["report"]
    status = daemon.rest().get("/v1/status")
    assert (status["documents"], status["leases"], status["not_ready"]) == (1, 0, None)


def test_sigterm_writes_documents_out_and_leaves_no_trace_of_the_process(daemon):
    client = daemon.client()
    kept = put(client, "kept", 200, WritePolicy.BACK)
    put(client, "volatile", 100, WritePolicy.MEMORY)
    assert not durable(client, "kept")
    assert daemon.stop() == 0
    assert not daemon.socket.exists()
    assert not (daemon.data_dir / "rest.json").exists()
    assert not list(daemon._shared.iterdir()), "slabs are left in shared memory"
    with pytest.raises(DaemonUnavailable):
        client.documents()
    with pytest.raises(DaemonUnavailable, match="holdfast serve"):
        daemon.client()
    again = daemon.start().client()
    assert [(d.name, d.durable) for d in again.documents()] == [("kept", True)]
    assert fetch(again, "kept") == kept


def test_a_draining_daemon_waits_for_leases_and_refuses_new_work(daemon):
    client = daemon.client()
    put(client, "report", 100)
    attached = client.attach("report")
    client.wait_layers(attached.lease, LAYERS)
    daemon.terminate()
    until(lambda: "draining" in daemon.events(), "the daemon drains")
    with pytest.raises(Draining):
        client.attach("report")
    assert daemon.alive
    assert bytes(client.view(attached.parts[0])) == expected("report", 100)[0]
    client.detach(attached.lease)
    assert daemon.wait() == 0


def test_a_lease_that_is_never_given_back_does_not_stop_a_shutdown():
    with DaemonProcess(daemon__drain_seconds="0.3") as process:
        client = process.start().client()
        put(client, "report", 100)
        client.attach("report")
        assert process.stop() == 0


def test_a_second_daemon_on_the_same_directory_is_refused(daemon):
    """Through the command line: one line that says what to do, a status, and the first one serves on."""
    command = [sys.executable, "-m", "holdfast", "--data-dir", str(daemon.data_dir), "serve"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert second.returncode == 1
    lines = [line for line in second.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1
    assert lines[0].startswith("error: another daemon")
    assert str(daemon.pid) in lines[0]
    with DaemonProcess() as other:
        other.settings["daemon.data_dir"] = str(daemon.data_dir)
        assert other.spawn().wait() == 1
        assert "data-directory-busy" in other.log_text()
    assert daemon.client().documents() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("daemon.socket", "/proc/nowhere/holdfast.sock"),
        ("daemon.rest_host", "0.0.0.0"),
        ("daemon.data_dir", "/proc/nowhere"),
        ("nvme.directory", "/proc/nowhere"),
        ("eviction.policy", "astrology"),
    ],
)
def test_a_daemon_that_cannot_start_says_why_in_one_line(key, value):
    with DaemonProcess() as process:
        process.settings[key] = value
        assert process.spawn().wait() == 1
        said = [line for line in process.log_text().splitlines() if not line.startswith("{")]
        assert len(said) == 1, said
        assert said[0].startswith("error: ")
        if key == "eviction.policy":
            assert not process.data_dir.exists() or not any(process.data_dir.iterdir()), "nothing was made or mounted"


def test_a_rest_port_that_is_taken_is_a_refusal(daemon):
    with DaemonProcess() as process:
        process.settings["daemon.rest_port"] = daemon.rest().url.rpartition(":")[2]
        assert process.spawn().wait() == 1
        assert "config-error" in process.log_text()
        assert not process.socket.exists()


# Abuse -----------------------------------------------------------------------------------------


def frame(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data


ABUSE = {
    "garbage": (b"\xff" * 64, "frame-too-large"),
    "text": (b"GET / HTTP/1.1\r\n\r\n", "frame-too-large"),
    "not msgpack": (LENGTH.pack(3) + b"\xc1\xc1\xc1", "malformed-frame"),
    "empty frame": (LENGTH.pack(0), "malformed-frame"),
    "not an envelope": (LENGTH.pack(1) + b"\x01", "malformed-frame"),
    "no hello": (encode(Envelope(1, ListDocuments())), "protocol-error"),
    "another version": (encode(Envelope(1, Hello(PROTOCOL_VERSION + 1, "default"))), "version-mismatch"),
    "a tenant that is none": (encode(Envelope(1, Hello(PROTOCOL_VERSION, "a/b"))), "invalid-name"),
    "an empty tenant": (encode(Envelope(1, Hello(PROTOCOL_VERSION, ""))), "invalid-name"),
    "oversized": (HELLO + LENGTH.pack(1 << 30) + b"x" * 100, "frame-too-large"),
    "garbage later": (HELLO + LENGTH.pack(7) + b"garbage", "malformed-frame"),
    "an unknown message": (
        HELLO + frame(msgspec.msgpack.encode([2, ["Nope"]])),
        "malformed-frame",
    ),
    "wrong fields": (
        HELLO + frame(msgspec.msgpack.encode([2, ["ShowDocument", 7]])),
        "malformed-frame",
    ),
    "a reply as a request": (
        HELLO + frame(msgspec.msgpack.encode([2, ["Done"]])),
        "malformed-frame",
    ),
    "absurd nesting": (HELLO + LENGTH.pack(5000) + b"\x91" * 5000, "malformed-frame"),
    "broken text": (
        HELLO + frame(b"\x92\x02\x92\xacShowDocument\xa2\xff\xfe"),
        "malformed-frame",
    ),
}


@pytest.mark.parametrize("name", ABUSE)
def test_what_is_not_our_protocol_is_answered_and_ended(unharmed, name):
    data, code = ABUSE[name]
    with closing(Raw(unharmed, data)) as raw:
        answers = raw.answers()
    if data.startswith(HELLO):
        assert isinstance(answers.pop(0).body, Welcome)
    assert [answer.body.code for answer in answers] == [code]


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 9, len(HELLO), len(HELLO) + 2, len(HELLO) + 6])
def test_half_a_frame_and_a_hang_up_are_forgotten(unharmed, cut):
    whole = HELLO + encode(Envelope(2, ListDocuments()))
    Raw(unharmed, whole[:cut]).close()


def test_a_second_hello_and_a_foreign_slab_are_refused_and_the_connection_goes_on(unharmed):
    more = [Hello(PROTOCOL_VERSION, "default"), MapSlabs([0]), MapSlabs([1 << 40]), MapSlabs([-1]), ListDocuments()]
    with closing(Raw(unharmed, HELLO + b"".join(encode(Envelope(i, m)) for i, m in enumerate(more, 2)))) as raw:
        raw.sock.shutdown(socket.SHUT_WR)
        bodies = {answer.id: answer.body for answer in raw.answers()}
    assert [type(bodies[i]) for i in (2, 3, 4, 5)] == [Refused] * 4


def test_a_client_hears_why_its_frame_was_refused(unharmed):
    """Not merely that the connection is gone."""
    with closing(Client(unharmed.socket)) as client, pytest.raises(FrameTooLarge):
        client.begin_ingest("large", FINGERPRINT, [1] * 20_000)


def test_more_connections_than_allowed_are_refused_and_others_go_on(unharmed):
    clients = [Client(unharmed.socket) for _ in range(8)]
    try:
        with pytest.raises(Unavailable):
            Client(unharmed.socket)
        assert clients[0].documents() == []
    finally:
        for client in clients:
            client.close()
    until(lambda: _connects(unharmed), "there is room for another connection")


def _connects(daemon):
    try:
        Client(daemon.socket).close()
    except Unavailable:
        return False
    return True


@pytest.mark.parametrize("request_", [ListDocuments(), MapSlabs([0] * 128)], ids=["ListDocuments", "MapSlabs"])
def test_a_client_that_never_reads_stalls_nobody_and_takes_a_bounded_share(daemon, request_):
    client = daemon.client()
    put(client, "report", 100)
    until(lambda: durable(client, "report"), "the document is durable, its segment open")
    before = daemon.descriptors()
    frames = HELLO + b"".join(encode(Envelope(i, request_)) for i in range(2, 1000))
    with client_process(floods, daemon.socket, frames) as flood:
        assert flood.hear() in ("stuck", "cut off")
        for _ in range(20):
            assert len(client.documents()) == 1
        assert daemon.descriptors() < before + 200
        flood.kill()
    until(lambda: daemon.descriptors() <= before, "the flood's descriptors are closed")


def test_bad_requests_get_typed_errors_and_the_daemon_serves_on(unharmed):
    with closing(Client(unharmed.socket)) as client:
        client.register_spec(SPEC)
        put(client, "report", 100)
        other = tiny_spec("tiny@2")
        refusals = [
            (SpecMismatch, lambda: client.begin_ingest("x", other.fingerprint(), [1])),
            (TokenOutOfRange, lambda: client.begin_ingest("x", FINGERPRINT, [1, SPEC.vocabulary_size])),
            (TokenOutOfRange, lambda: client.begin_ingest("x", FINGERPRINT, [-1])),
            (EmptyDocument, lambda: client.begin_ingest("x", FINGERPRINT, [])),
            (DocumentTooLarge, lambda: client.begin_ingest("x", FINGERPRINT, [1] * 10_000)),
            (InvalidName, lambda: client.begin_ingest("a/b", FINGERPRINT, [1])),
            (InvalidRequest, lambda: client.begin_ingest("x", FINGERPRINT, [1], deadline_seconds=-1.0)),
            (DocumentNotFound, lambda: client.attach("nothing")),
            (DocumentNotFound, lambda: client.document("nothing")),
            (DocumentNotFound, lambda: client.delete("nothing")),
            (DocumentNotFound, lambda: client.free("nothing")),
            (DocumentNotFound, lambda: client.pin("nothing")),
            (InvalidRequest, lambda: client.free("report", "attic")),
            (InvalidRequest, lambda: client.pin("report", "ddr", ttl_seconds=float("nan"))),
            (ClaimNotFound, lambda: client.unpin("report")),
            (ClaimNotFound, lambda: client.detach(99)),
            (ClaimNotFound, lambda: client.renew(99)),
            (ClaimNotFound, lambda: client.commit_ingest(99)),
            (ClaimNotFound, lambda: client.abort_ingest(99)),
            (DocumentTooLarge, lambda: client.register_spec(replace(SPEC, extent_blocks=1 << 20))),
        ]
        for error, request in refusals:
            with pytest.raises(error):
                request()
        client.register_spec(other)
        with pytest.raises(SpecMismatch):
            client.attach("report", fingerprint=other.fingerprint())
        assert fetch(client, "report") == expected("report", 100)
        client.delete("report")


def test_a_pin_beyond_the_budget_is_refused():
    with DaemonProcess(limits__pin_bytes="40 KiB") as process:
        client = process.start().client()
        put(client, "small", 64)
        put(client, "large", 100)
        put(client, "other", 64)
        assert client.pin("small", owner="me", reason="because").size_bytes == 32 << 10
        with pytest.raises(PinsOvercommitted, match="default/small") as refused:
            client.pin("other")
        (holder,) = refused.value.holders
        assert (holder.kind, holder.document, holder.owner, holder.size_bytes) == ("pin", "small", "me", 32 << 10)
        with pytest.raises(PinsOvercommitted, match="by itself"):
            client.pin("large")
        assert client.document("large").pin is None
        assert [pin.document for pin in client.pins()] == ["small"]
        assert client.unpin_all(owner="you") == []
        assert [pin.document for pin in client.unpin_all(owner="me")] == ["small"]
        assert client.pin("other", kind="soft", ttl_seconds=60, refresh="hit").strength == 1.0
        with pytest.raises(InvalidRequest, match="hard, soft"):
            client.pin("other", kind="weak")


IMPOSSIBLE = [
    (client_call, number)
    for number in (-1, 1 << 62, (1 << 64) - 1)
    for client_call in (
        lambda client, lease, n: client.register_rank("g", 0, n, 1, FINGERPRINT, 10),
        lambda client, lease, n: client.register_rank("g", 0, 1, 1, FINGERPRINT, n),
        lambda client, lease, n: client.report(lease, exposed_ns=n, prefill_ns=0, decode_ns=0, answer_tokens=0),
        lambda client, lease, n: client.report(lease, exposed_ns=0, prefill_ns=0, decode_ns=0, answer_tokens=n),
        lambda client, lease, n: client.observe_prefill(FINGERPRINT, [(n, 1, 1.0)]),
        lambda client, lease, n: client.observe_prefill(FINGERPRINT, [(0, 1, float(n))]),
        lambda client, lease, n: client.begin_ingest("x", FINGERPRINT, [1], group="g", chunk_tokens=n),
    )
]


def test_numbers_no_machine_has_are_refused(unharmed):
    """Each on a connection of its own, for the daemon hangs up on such a peer."""
    for attempt, number in IMPOSSIBLE:
        with closing(Client(unharmed.socket)) as client, pytest.raises(MalformedFrame):
            attempt(client, 1, number)


@pytest.mark.parametrize(
    "body",
    [
        ["MapSlabs", []],
        ["MapSlabs", [0] * 129],
        ["MapSlabs", 0],
        ["MapSlabs", ["0"]],
        ["CommitIngest", 1, [7]],
        ["CommitIngest", 1, "seal"],
        ["CommitIngest", 1, [None]],
        ["Lookup", FINGERPRINT],
        ["Lookup", FINGERPRINT, [1, 2]],
        ["Lookup", 7, b""],
        ["LookupTokens", FINGERPRINT, None],
        ["KeysOf", FINGERPRINT, [1]],
        ["KeysOf", FINGERPRINT, bytes(4), [[0, bytes(257)]]],
        ["KeysOf", FINGERPRINT, bytes(4), [[-1, b""]]],
    ],
    ids=str,
)
def test_messages_of_another_shape_are_malformed(unharmed, body):
    with closing(Raw(unharmed, HELLO + frame(msgspec.msgpack.encode([2, body])))) as raw:
        answers = raw.answers()
    assert [answer.body.code for answer in answers[1:]] == ["malformed-frame"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (["Report", 1, 2, 3, 4, 5], Report(1, 2, 3, 4, 5, "", "")),
        (["RegisterRank", "g", 0, 1, 1, b"f", 9], RegisterRank("g", 0, 1, 1, b"f", 9, "", "", "")),
        (["LookupTokens", b"f", b"1234"], LookupTokens(b"f", b"1234", [])),
        (["ObservePrefill", b"f", [[0, 1, 1.0]]], ObservePrefill(b"f", [(0, 1, 1.0)], 1)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_an_older_client_leaves_out_is_empty(body, message):
    assert decode_request(msgspec.msgpack.encode([2, body])).body == message


def test_more_extra_key_parts_than_blocks_of_any_prompt_are_malformed():
    decode_request(msgspec.msgpack.encode([2, ["KeysOf", FINGERPRINT, b"", [[0, b""]] * 65_536]]))
    with pytest.raises(MalformedFrame):
        decode_request(msgspec.msgpack.encode([2, ["KeysOf", FINGERPRINT, b"", [[0, b""]] * 65_537]]))


def test_what_cannot_be_sent_is_refused_and_forgotten(unharmed):
    """Half of a surrogate pair comes in valid JSON, and so does a number of any length."""
    with closing(Client(unharmed.socket)) as client:
        for ask in (lambda: client.document("\ud800"), lambda: client.pin("x", "ddr", ttl_seconds=10**400, owner="me")):
            with pytest.raises(MalformedFrame, match="cannot be sent"):
                ask()
        assert not client._connection._waiting
        assert client.is_open


def test_what_cannot_be_looked_up_is_refused(unharmed):
    with closing(Client(unharmed.socket)) as client:
        client.register_spec(SPEC)
        for error, request in [
            (InvalidRequest, lambda: client.lookup(FINGERPRINT, b"1234567")),
            (SpecMismatch, lambda: client.lookup(b"nobody's", b"")),
            (SpecMismatch, lambda: client.lookup_tokens(b"nobody's", [1])),
            (SpecMismatch, lambda: client.keys_of(b"nobody's", [1])),
            (TokenOutOfRange, lambda: client.keys_of(FINGERPRINT, [SPEC.vocabulary_size])),
            (EmptyDocument, lambda: client.lookup_tokens(FINGERPRINT, [])),
            (InvalidRequest, lambda: client._ask(Found, LookupTokens(FINGERPRINT, b"123"))),
        ]:
            with pytest.raises(error):
                request()


def test_a_front_is_found_by_tokens_and_by_keys_and_only_by_its_tenant(unharmed):
    tokens = tokens_of("report", 100)
    with closing(Client(unharmed.socket)) as client, closing(Client(unharmed.socket, "other")) as other:
        for one in (client, other):
            one.register_spec(SPEC)
        put(client, "report", 100)
        keys = client.keys_of(FINGERPRINT, tokens)
        assert len(keys) == 7 * 16
        assert client.lookup(FINGERPRINT, keys).token_count == 100
        assert client.lookup(FINGERPRINT, keys[: 3 * 16]).token_count == 48
        assert client.lookup_tokens(FINGERPRINT, [*tokens[:50], 1, 2, 3]).tier_tokens["ddr"] == 48
        assert other.keys_of(FINGERPRINT, tokens) != keys
        assert other.lookup(FINGERPRINT, keys).token_count == 0
        assert other.lookup_tokens(FINGERPRINT, tokens).token_count == 0
        long = [*tokens, *([1] * 14_000)]  # hashed in several goes
        assert client.keys_of(FINGERPRINT, long[:14_000])[: 6 * 16] == keys[: 6 * 16]
        client.delete("report")
        assert client.lookup(FINGERPRINT, keys).token_count == 0


def test_what_kv_depends_on_besides_tokens_is_part_of_its_keys(unharmed):
    """Whatever its length, in every message that says tokens, and from its block on."""
    tokens, picture = tokens_of("pictured", 100), b"picture" * 100
    with closing(Client(unharmed.socket)) as client:
        client.register_spec(SPEC)
        opened = client.begin_ingest("pictured", FINGERPRINT, tokens, extras={2: picture})
        client.commit_ingest(opened.ingest)
        assert client.lookup_tokens(FINGERPRINT, tokens, {2: picture}).token_count == 100
        assert client.lookup(FINGERPRINT, client.keys_of(FINGERPRINT, tokens, {2: picture})).token_count == 100
        for other in (None, {2: picture + b"!"}, {1: b"salt", 2: picture}):
            assert client.lookup_tokens(FINGERPRINT, tokens, other).token_count == (16 if other and 1 in other else 32)
            assert client.keys_of(FINGERPRINT, tokens, other) != client.keys_of(FINGERPRINT, tokens, {2: picture})
        with pytest.raises(InvalidRequest):
            client.keys_of(FINGERPRINT, tokens, dict.fromkeys(range(65_537), b"x"))
        client.delete("pictured")


def test_seals_of_the_writer_are_kept_and_wrong_ones_are_found(daemon):
    client = daemon.client()
    spec, tokens = tiny_spec(), tokens_of("report", 64)
    for name, wrong in (("good", b""), ("bad", bytes(32))):
        tokens = [*tokens[1:], tokens[0]]
        opened = client.begin_ingest(name, spec.fingerprint(), tokens)
        write(client, name, opened.parts)
        seals = [wrong or seal_planes(view, extent_geometry(spec)) for view in client.views(opened.parts)]
        with pytest.raises(InvalidRequest):
            client.commit_ingest(opened.ingest, seals[:1])
        client.commit_ingest(opened.ingest, seals)
        until(lambda name=name: durable(client, name), "it is durable")
        client.free(name)
    assert fetch(client, "good") == expected("good", 64)
    with pytest.raises(CorruptExtent):
        fetch(client, "bad")


def test_many_slabs_are_mapped_at_once_and_only_once():
    """Whatever they are asked for in; and one that is not ours spoils the request, leaking nothing."""
    with DaemonProcess(ddr__capacity_bytes="16 MiB", ddr__slab_bytes="64 KiB", limits__pin_bytes="1 MiB") as process:
        client, other = process.start().client(), process.client("other")
        content = put(client, "long", 32 * 600, WritePolicy.MEMORY)  # 150 slabs, two messages
        before = process.descriptors()
        assert fetch(client, "long") == content
        attached = client.attach("long")
        assert len(attached.runs) < 200
        first = client.views(attached.parts)
        assert first == client.views(attached.parts)
        assert len({part.slab for part in attached.parts}) > 128
        slabs = sorted({part.slab for part in attached.parts})
        with pytest.raises(ProtocolError):
            other._connection.call(MapSlabs(slabs[:100]))
        with pytest.raises(ProtocolError):
            client._connection.call(MapSlabs([*slabs[:100], 255]))
        assert process.descriptors() <= before
        del first


def test_measurements_of_no_time_do_not_stop_the_pricing(unharmed):
    with closing(Client(unharmed.socket)) as client:
        client.register_spec(SPEC)
        for seconds in (0.0, 5e-324, 0.0, 1e-9):
            client.observe_prefill(FINGERPRINT, [(0, 1, seconds)])
            client.observe_prefill(FINGERPRINT, [(0, 1, seconds), (5, 2, seconds)])
        with pytest.raises(MalformedFrame):
            client.observe_prefill(FINGERPRINT, [(0, 1, float("nan"))])


def test_what_a_group_was_measured_to_do_is_found_after_a_restart(daemon):
    client = daemon.client()
    assert client.ring(RING_SETTING) is None
    client.keep_ring(ring())
    daemon.kill()
    daemon.start()
    client = daemon.client()
    assert client.ring(RING_SETTING) == ring()
    (shown,) = daemon.rest().get("/v1/calibration")["rings"]
    assert shown["setting"]["kernel"] == "cpu_flash"
    assert shown["pass_kv_from"] == [[32_768, 4000], [131_072, None]]


def test_a_slab_that_cannot_be_made_is_refused_to_whoever_maps_it(daemon):
    ours, theirs = daemon.client("ours"), daemon.client("theirs")
    ours.abort_ingest(ours.begin_ingest("report", FINGERPRINT, [1] * 100).ingest)
    shutil.rmtree(daemon._shared)
    ingest = theirs.begin_ingest("report", FINGERPRINT, [1] * 100)  # takes over the slab, so it needs new memory
    with pytest.raises(StorageFailed, match="slab-"):
        theirs.view(ingest.parts[0])
    theirs.abort_ingest(ingest.ingest)
    assert daemon.used("ddr") == 0


async def test_a_grant_that_comes_too_late_is_undone_but_not_from_within_the_command():
    """Its caller is gone: what it was given goes back, after the command that gave it has ended."""
    granted, undone = [], []
    waiting = asyncio.create_task(Requests(None, None)._call(granted.append, late=undone.append))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    granted[0]("lease")
    assert undone == []
    await asyncio.sleep(0)
    assert undone == ["lease"]


# Tenants ---------------------------------------------------------------------------------------


def test_a_tenant_sees_neither_documents_nor_memory_of_another(daemon):
    ours, theirs = daemon.client("ours"), daemon.client("theirs")
    put(ours, "secret", 100)
    attached = ours.attach("secret")
    part = attached.parts[0]
    assert theirs.documents() == []
    with pytest.raises(DocumentNotFound):
        theirs.attach("secret")
    with pytest.raises(DocumentNotFound):
        theirs.document("secret")
    with pytest.raises(ProtocolError):
        theirs.view(part)
    with pytest.raises(ClaimNotFound):
        theirs.detach(attached.lease)
    with pytest.raises(ClaimNotFound):
        theirs.wait_layers(attached.lease, 1)
    put(theirs, "secret", 100)  # the same tokens: shared with nobody
    mine = theirs.attach("secret")
    assert {p.slab for p in mine.parts}.isdisjoint({p.slab for p in attached.parts})
    assert daemon.used("ddr") == 8 * 16384


def test_a_slab_that_changes_tenants_shows_none_of_its_old_bytes(daemon):
    ours = daemon.client("ours")
    put(ours, "secret", 100)
    slabs = {part.slab for part in ours.attach("secret").parts}
    ours.close()
    other = daemon.client("ours")
    until(lambda: not daemon.leases(), "the lease ends with its client")
    other.delete("secret")
    until(lambda: daemon.used("ddr") == 0, "the slabs are free")
    theirs = daemon.client("theirs")
    opened = theirs.begin_ingest("new", FINGERPRINT, tokens_of("new", 2000))
    again = [part for part in opened.parts if part.slab in slabs]
    assert again, "the slab is in use again"
    assert all(bytes(theirs.view(part)) == bytes(part.size_bytes) for part in again)


# Clients that die ------------------------------------------------------------------------------


def test_a_killed_client_gives_its_lease_back(daemon):
    client = daemon.client()
    put(client, "report", 100)
    until(lambda: durable(client, "report"), "the document is durable, its segment open")
    before = daemon.descriptors()
    with client_process(holds_lease, daemon.socket, "report") as holder:
        holder.hear()
        assert len(daemon.leases()) == 1
        holder.kill()
    until(lambda: not daemon.leases(), "the lease ends")
    client.delete("report")
    until(lambda: daemon.descriptors() <= before, "descriptors are closed")


@pytest.mark.parametrize("job", [ingests, writes])
def test_a_killed_client_gives_its_open_ingest_back(daemon, job):
    with client_process(job, daemon.socket, "report") as writer:
        writer.hear()
        assert daemon.used("ddr") == 10 * 16384
        writer.kill()
    until(lambda: daemon.used("ddr") == 0, "the slots are free")
    client = daemon.client()
    assert client.documents() == []
    assert put(client, "report", 320) == fetch(client, "report")


def test_a_killed_client_that_waits_for_room_is_forgotten():
    with DaemonProcess(nvme__capacity_bytes="1 MiB") as process:
        client = process.start().client()
        opened = client.begin_ingest("huge", FINGERPRINT, tokens_of("huge", 2048))
        with client_process(waits_for_room, process.socket, "late") as waiter:
            waiter.hear()
            # All is held by an open ingest, so nothing can be freed: it is refused, or waits, but holds nothing.
            waiter.kill()
        client.abort_ingest(opened.ingest)
        until(lambda: process.used("ddr") == 0, "nothing is taken for the dead")


def test_a_client_that_drops_its_connection_but_lives_keeps_its_slots_until_it_exits(daemon):
    client = daemon.client()
    put(client, "report", 100)
    with client_process(holds_lease, daemon.socket, "report") as holder:
        holder.hear()
        before = daemon.descriptors()
        holder.say("drop it")
        assert holder.hear() == "dropped"
        until(lambda: daemon.descriptors() < before, "the daemon has noticed")
        assert len(daemon.leases()) == 1
        holder.say("exit")
        until(lambda: not daemon.leases(), "the lease ends with the process")


def test_slots_that_a_lost_rank_was_saving_into_are_not_reused_before_it_ends(daemon):
    """It may still be writing: what another document put there would be sealed with its bytes."""
    client = daemon.client()
    with client_process(holds_save, daemon.socket, "ranks") as rank:
        rank.hear()
        before = daemon.descriptors()
        opened = client.begin_ingest("report", FINGERPRINT, tokens_of("report", 100), group="ranks")
        with ThreadPoolExecutor(1) as threads:
            done = threads.submit(client.commit_ingest, opened.ingest)
            assert rank.hear() == "dropped"
            until(lambda: daemon.descriptors() < before + 2, "the daemon has noticed")  # it made a slab meanwhile
            assert daemon.used("ddr") == 4 * 16384
            rank.say("exit")
            with pytest.raises(GroupFailed):
                done.result(PATIENCE_SECONDS)
        until(lambda: daemon.used("ddr") == 0, "the slots are free when the rank has ended")


@pytest.mark.parametrize("abruptly", [True, False])
def test_a_client_that_comes_back_says_what_it_lets_go_of(daemon, abruptly):
    """Resuming frees the old connection's claims, even if the daemon has not noticed yet that it ended."""
    daemon.client("other")
    client = daemon.client()
    put(client, "report", 100)
    client.attach("report")
    opened = client.begin_ingest("open", FINGERPRINT, tokens_of("open", 64))
    write(client, "open", opened.parts)
    if not abruptly:
        before = daemon.descriptors()
        client._connection._sock.shutdown(socket.SHUT_RDWR)
        until(lambda: daemon.descriptors() < before, "the daemon has noticed")
        assert len(daemon.leases()) == 1
    again = daemon.client(resume=[client.number])
    assert daemon.leases() == []
    until(lambda: daemon.used("ddr") == 4 * 16384, "the open ingest is gone")
    assert fetch(again, "report") == expected("report", 100)


def test_a_request_that_was_overtaken_by_a_goodbye_leaves_no_lease(daemon):
    """Two threads of a client: one still asks when the other closes, and nobody would ever end what was granted."""
    put(daemon.client(), "report", 100)
    late = encode(Envelope(2, AttachDocument("report", None, None, None, 5.0))) + encode(Envelope(3, Goodbye()))
    with closing(Raw(daemon, HELLO)) as raw:
        raw.sock.recv(1 << 16)
        raw.sock.sendall(late)
        raw.answers()
    assert daemon.leases() == []


def test_nobody_resumes_the_claims_of_another_process(daemon):
    client = daemon.client()
    put(client, "report", 100)
    with client_process(holds_lease, daemon.socket, "report") as holder:
        number = holder.hear()
        daemon.client(resume=[number, 1 << 50, -1])
        assert len(daemon.leases()) == 1


def test_a_client_that_leaves_a_request_open_is_noticed_when_it_dies(daemon):
    """However many requests it has under way, and though the daemon has nothing to send to it."""
    client = daemon.client()
    put(client, "report", 100)
    client.free("report")
    until(lambda: durable(client, "report"), "the document is durable, its segment open")
    before = daemon.descriptors()
    requests = HELLO + b"".join(encode(Envelope(i, ListDocuments())) for i in range(2, 200))
    with client_process(floods, daemon.socket, requests) as flood:
        flood.hear()
        flood.kill()
    until(lambda: daemon.descriptors() <= before, "its descriptors are closed")


# Tiers, seen from outside ----------------------------------------------------------------------


def test_an_evicted_document_comes_back_and_a_dropped_one_is_incomplete(daemon):
    client = daemon.client()
    content = put(client, "report", 200)
    until(lambda: durable(client, "report"), "the document is durable")
    assert {victim.action for victim in client.plan_free("report")} == {"demote"}
    client.free("report")
    assert daemon.used("ddr") == 0
    assert fetch(client, "report") == content
    client.free("report", "none")
    until(lambda: daemon.used("nvme") == 0, "NVMe is free")
    with pytest.raises(DocumentIncomplete):
        client.attach("report")
    assert put(client, "report", 200) == fetch(client, "report")


def test_more_documents_than_ddr_holds_all_come_back():
    """Twice as much as DDR, ingested by four threads at once; every byte is as it was written."""
    with DaemonProcess() as process:
        client = process.start().client()
        names = [f"d{i}" for i in range(8)]
        failures = []

        def ingest_some(mine):
            try:
                for name in mine:
                    put(client, name, 500)
            except HoldfastError as error:
                failures.append(error)

        threads = [threading.Thread(target=ingest_some, args=(names[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert not failures
        for name in names:
            assert fetch(client, name) == expected(name, 500), name
        for name in names:
            until(lambda name=name: durable(client, name), f"{name} is durable")
        process.restart()
        client = process.client()
        for name in names:
            assert fetch(client, name) == expected(name, 500), name
        assert process.used("nvme") == 8 * 16 * 16384


def test_a_value_of_a_wrong_type_is_refused_without_costing_the_connection(unharmed):
    """Other claims share the connection, so a caller's slip must not end it."""
    with closing(Client(unharmed.socket)) as client:
        with pytest.raises(InvalidRequest):
            client.document(3)
        assert client.is_open
        assert client.documents() == []


def test_a_tier_larger_than_its_device_is_warned_of():
    """A promise that the machine cannot keep is said aloud at the start."""
    with DaemonProcess(nvme__capacity_bytes="900 TiB", nvme__segment_bytes="1 TiB").start() as process:
        warned = [line for line in process.log_text().splitlines() if "than the device has free" in line]
        assert len(warned) == 1
        assert '"tier": "nvme"' in warned[0]
