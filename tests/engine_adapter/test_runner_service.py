"""A runner as a service over a fake engine and a real daemon: requests, turns, texts, restarts, clients that leave."""

import os
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import pytest
from holdfast.engine_adapter import runner_queue, runner_service
from holdfast.engine_adapter.fake import FakeEngine
from holdfast.engine_adapter.runner_client import RunnerClient, runner_for, running
from holdfast.engine_adapter.runner_queue import JobQueue
from holdfast.engine_adapter.runner_server import RunnerSeat, RunnerServer
from holdfast.engine_adapter.runner_service import Parts, RunnerService
from holdfast.engine_adapter.runner_wire import (
    Answered,
    AskRequest,
    Ingested,
    IngestRequest,
    Prefilling,
    Recomputing,
    RunnerFacts,
    Waiting,
    event_of,
    frame_of,
    request_of,
)
from holdfast.engine_adapter.session import Session
from holdfast.engine_adapter.texts import Texts
from holdfast.kvstore.client import Client
from holdfast.kvstore.clock import SystemClock
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    Conflict,
    DaemonUnavailable,
    DeadlineExceeded,
    DocumentNotFound,
    DocumentTooLarge,
    EmptyDocument,
    GroupFailed,
    InvalidRequest,
    MalformedFrame,
    NoCapacity,
    RunnerBusy,
    RunnerUnavailable,
    TokenOutOfRange,
    Unavailable,
)
from holdfast.kvstore.spec import KVSpec, LayerGroup
from holdfast.ring_attention.tokenizer import ByteTokenizer

from daemon_process import DaemonProcess, until

SPEC = KVSpec(
    groups=(LayerGroup(layers=(0, 1), kv_heads=2, key_dim=8, value_dim=4),),
    dtype="bfloat16",
    model="fake@1",
    vocabulary_size=256,
    block_tokens=16,
    extent_blocks=2,
)
TEXT = "We the People of the United States, in Order to form a more perfect Union, " * 3
NEW = 5


class GatedEngine(FakeEngine):
    """Answers when it may; dies when told."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.died = ""
        self.calls = 0
        self.pauses = 0

    @property
    def failure(self):
        return self.died or super().failure

    def answer_many(self, *arguments):
        self._pass()
        self.calls += 1
        return super().answer_many(*arguments)

    def prefill(self, shard, tokens, cached_tokens, chunk_tokens, progress):
        self._pass()
        for _ in range(self.pauses):
            progress(1)
            time.sleep(0.01)
        return super().prefill(shard, tokens, cached_tokens, chunk_tokens, progress)

    def _pass(self):
        self.reached.set()
        assert self.gate.wait(20)
        if self.died:
            raise GroupFailed(self.died)


class Stage:
    """A daemon, a service over it, its server, and clients."""

    def __init__(self, stack, name="main", tenant="default", daemon=None):
        self.daemon = daemon or stack.enter_context(DaemonProcess()).start()
        self.name = name
        self.tenant = tenant
        self.engines = []
        self.said = []
        self.seat = RunnerSeat(self.daemon.data_dir, name)
        stack.callback(self.seat.close)
        self.texts = Texts(self.seat.directory / "texts", tenant, SPEC.fingerprint())
        self.error = None
        self.service = RunnerService(
            Parts(
                facts=self.facts(),
                start=self.start,
                connect=lambda resume: Client(self.daemon.socket, tenant, resume=resume),
                tokenizer=ByteTokenizer(),
                texts=self.texts,
                clock=SystemClock(),
                say=self.said.append,
            )
        )
        self.server = RunnerServer(self.service, self.seat)
        self.worker = threading.Thread(target=self.serve)
        self.worker.start()
        self._stack = stack
        stack.callback(self.close)

    def start(self):
        engine = GatedEngine(self.name, SPEC, cp=2, rows=600, daemon_socket=self.daemon.socket, tenant=self.tenant)
        self.engines.append(engine)
        return engine

    def facts(self):
        return RunnerFacts(
            group=self.name, tenant=self.tenant, pid=os.getpid(), model="/model", shape="fake", kv_bytes_per_token=96,
            cp=2, tp=1, device="cpu", threads=0, kernel="", communicator="", strategy="auto",
            rows=600, hbm_bytes=600 * 96, capacity_tokens=1200,
        )  # fmt: skip

    def serve(self):
        try:
            self.service.serve()
        except GroupFailed as error:
            self.error = error

    def close(self):
        for engine in self.engines:
            engine.gate.set()
        self.service.stop()
        self.worker.join(20)
        assert not self.worker.is_alive()
        self.server.close()
        self.service.close()

    @property
    def engine(self):
        return self.engines[-1]

    def client(self):
        return self._stack.enter_context(RunnerClient(self.seat.socket))

    def ingest(self, name="report", content=TEXT, write_policy=WritePolicy.AUTO, ttl_seconds=None):
        request = IngestRequest(name=name, content=content, write_policy=write_policy, ttl_seconds=ttl_seconds)
        *progress, last = self.client().ingest(request)
        assert isinstance(last, Ingested)
        assert all(isinstance(event, Prefilling | Waiting) for event in progress)
        return last

    def ask(self, document="report", question="who?", **options):
        request = AskRequest(**{"document": document, "question": question, "new_tokens": NEW, **options})
        *_, last = self.client().ask(request)
        assert isinstance(last, Answered)
        return last


@pytest.fixture
def stage(monkeypatch):
    monkeypatch.setattr(runner_service, "AWAY_SECONDS", 0.2)
    monkeypatch.setattr(runner_service, "STILL_AWAY_SECONDS", 0.05)
    monkeypatch.setattr(runner_service, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(runner_queue, "HEARTBEAT_SECONDS", 0.05)
    with ExitStack() as stack:
        yield Stage(stack)


def wanted(stage, text=TEXT, question="who?"):
    return stage.engine.recompute(list(text.encode()), list(question.encode()), NEW, 64).tokens


# Requests --------------------------------------------------------------------------------------


def test_an_ingested_text_is_answered_from_the_cache(stage):
    first = stage.ingest()
    assert (first.cached_tokens, first.document.token_count) == (0, len(TEXT))
    answer = stage.ask()
    assert answer.tokens == wanted(stage)
    assert answer.text == bytes(answer.tokens).decode(errors="replace")
    assert answer.swap is not None
    assert answer.reason == ""
    status = stage.client().status()
    assert (status.answered, status.ingested, status.recomputed, status.problem) == (1, 1, 0, "")
    assert status.facts == stage.facts()


def test_an_ingest_says_when_its_document_ends(stage):
    assert stage.ingest().document.expires_wall_ns is None
    assert stage.ingest("short", ttl_seconds=3600).document.expires_wall_ns is not None


def test_equal_text_again_says_what_was_cached(stage):
    stage.ingest()
    assert stage.ingest().cached_tokens == len(TEXT)
    assert stage.ingest("longer", TEXT + "and so on " * 5).cached_tokens == len(TEXT) // 32 * 32


def test_tokens_are_taken_as_they_are(stage):
    stage.ingest(content=list(TEXT.encode()))
    assert stage.ask(question=list(b"who?")).tokens == wanted(stage)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"document": "nobody"}, DocumentNotFound),
        ({"question": ""}, EmptyDocument),
        ({"question": []}, EmptyDocument),
        ({"question": [256]}, TokenOutOfRange),
        ({"new_tokens": 0}, MalformedFrame),
    ],
)
def test_what_cannot_be_answered_is_refused_as_what_it_is(stage, change, kind):
    stage.ingest()
    with pytest.raises(kind):
        stage.ask(**change)
    assert stage.ask().tokens == wanted(stage)


def test_an_empty_document_is_refused(stage):
    with pytest.raises(EmptyDocument):
        stage.ingest(content="")


def test_a_frame_that_is_no_request_is_refused_and_the_connection_goes_on(stage):
    client = stage.client()
    client._sock.sendall(b"\x03\x00\x00\x00abc")
    with pytest.raises(MalformedFrame):
        client.status()  # hears the refusal of what came before
    assert isinstance(request_of(frame_of(AskRequest(document="a", question="b"))[4:]), AskRequest)
    with pytest.raises(MalformedFrame):
        event_of(b"\xc1")


def test_pieces_are_the_text_and_come_before_the_end(stage):
    stage.ingest()
    *pieces, last = stage.client().ask(AskRequest(document="report", question="who?", new_tokens=40))
    assert "".join(piece.text for piece in pieces) == last.text
    assert len(pieces) > 1
    assert last.text == bytes(last.tokens).decode(errors="replace")


def test_a_document_grows_by_what_was_asked_and_answered(stage):
    stage.ingest()
    text = list(TEXT.encode())
    for question in ("who?", "and why?"):
        answer = stage.ask(question=question, extend=True)
        assert answer.tokens == stage.engine.recompute(text, list(question.encode()), NEW, 64).tokens
        text += [*question.encode(), *answer.tokens]
        assert answer.document_tokens == len(text)
        assert stage.daemon.client().document("report").token_count == len(text)
    stage.texts.forget("report")
    with pytest.raises(InvalidRequest, match=f"{len(text)} tokens are needed"):
        stage.ask(extend=True)
    with pytest.raises(InvalidRequest, match="tokens are needed"):
        stage.ask(extend=True, content=TEXT)  # that is how it was before it grew
    assert stage.ask(extend=True, content=text).document_tokens > len(text)


def test_a_document_grows_also_by_what_the_cache_could_not_answer(stage, monkeypatch):
    stage.ingest()

    def refuses(*_, **__):
        raise NoCapacity("full")

    monkeypatch.setattr(Session, "converse", refuses)
    answer = stage.ask(extend=True)
    assert (answer.tokens, answer.reason) == (wanted(stage), "no-capacity")
    assert answer.document_tokens == stage.daemon.client().document("report").token_count == len(TEXT) + 4 + NEW


def test_an_answer_ends_with_its_end_token(stage):
    stage.ingest()
    tokens = wanted(stage)
    stage.service._parts = replace(stage.service._parts, eos=(tokens[2],))
    assert stage.ask().tokens == tokens[:3]
    stage.daemon.client().delete("report")
    assert stage.ask(content=TEXT).tokens == tokens[:3]


def test_questions_that_wait_together_are_answered_together(stage):
    stage.ingest()
    stage.ingest("other", TEXT[::-1])
    _, thread, _ = busy(stage)
    names = ["report", "other", "report", "nobody"]
    clients = [stage.client().ask(AskRequest(document=name, question="who?", new_tokens=NEW)) for name in names]
    for number, client in enumerate(clients):
        assert next(client) == Waiting(ahead=number + 1)
    stage.engine.gate.set()
    first, second, third = ([*client][-1] for client in clients[:3])
    with pytest.raises(DocumentNotFound):
        list(clients[3])
    thread.join(20)
    assert first.tokens == third.tokens == wanted(stage)
    assert second.tokens == wanted(stage, TEXT[::-1])
    assert first.swap == third.swap
    assert stage.engine.calls == 2


def test_documents_that_do_not_fit_together_are_answered_one_after_the_other(stage):
    texts = {name: (name + TEXT) * 3 for name in ("one", "two", "three")}
    for name, text in texts.items():
        stage.ingest(name, text, WritePolicy.THROUGH)
    _, thread, _ = busy(stage, "one")
    clients = [stage.client().ask(AskRequest(document=name, question="who?", new_tokens=NEW)) for name in texts]
    for client in clients:
        assert isinstance(next(client), Waiting)
    stage.engine.gate.set()
    answers = [[*client][-1] for client in clients]
    thread.join(20)
    assert [answer.reason for answer in answers] == [""] * 3
    assert [answer.tokens for answer in answers] == [wanted(stage, text) for text in texts.values()]


# Turns -----------------------------------------------------------------------------------------


def busy(stage, document="report"):
    """A question that holds the engine, on a thread; returns what it will have heard."""
    stage.engine.gate.clear()
    stage.engine.reached.clear()
    client, heard = stage.client(), []

    def asks():
        with suppress(RunnerUnavailable):
            heard.extend(client.ask(AskRequest(document=document, question="first", new_tokens=NEW)))

    thread = threading.Thread(target=asks)
    thread.start()
    assert stage.engine.reached.wait(20)
    return client, thread, heard


def test_a_second_client_waits_its_turn_and_hears_so(stage):
    stage.ingest()
    _, thread, heard = busy(stage)
    second = stage.client().ask(AskRequest(document="report", question="who?", new_tokens=NEW))
    assert next(second) == Waiting(ahead=1)
    stage.engine.gate.set()
    *_, answer = second
    thread.join(20)
    assert isinstance(heard[-1], Answered)
    assert answer.tokens == wanted(stage)


def test_a_turn_that_does_not_come_in_time_is_refused(stage):
    stage.ingest()
    _, thread, _ = busy(stage)
    with pytest.raises(DeadlineExceeded, match="1 requests are before it"):
        stage.ask(wait_seconds=0.01)
    stage.engine.gate.set()
    thread.join(20)


def test_too_many_that_wait_are_refused(stage):
    stage.ingest()
    stage.service._queue._limit = 1
    _, thread, _ = busy(stage)
    waits = stage.client().ask(AskRequest(document="report", question="who?", new_tokens=NEW))
    next(waits)
    with pytest.raises(RunnerBusy, match="1 requests wait"):
        stage.ask()
    stage.engine.gate.set()
    assert isinstance(list(waits)[-1], Answered)
    thread.join(20)


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(stage):
    stage.ingest()
    _, thread, _ = busy(stage)
    leaves = stage.client()
    next(leaves.ask(AskRequest(document="report", question="who?", new_tokens=NEW)))
    assert stage.service.status().waiting == 1
    leaves.close()
    until(lambda: stage.service.status().waiting == 0, "its place is free")
    stage.engine.gate.set()
    thread.join(20)


def test_a_client_that_leaves_during_its_answer_harms_nobody(stage):
    stage.ingest()
    client, thread, _ = busy(stage)
    client._sock.shutdown(2)
    thread.join(20)
    stage.engine.gate.set()
    assert stage.ask().tokens == wanted(stage)
    until(lambda: not stage.daemon.leases(), "its lease ends")


def test_an_ingest_whose_client_leaves_is_stopped_and_leaves_nothing(stage):
    stage.ingest()
    stage.engine.pauses = 100_000
    client = stage.client()
    events = client.ingest(IngestRequest(name="long", content=TEXT[::-1]))
    assert next(events).done_tokens == 0
    client.close()
    until(lambda: not stage.service.status().busy, "it was stopped")
    assert stage.ask().tokens == wanted(stage)
    assert [document.name for document in stage.daemon.client().documents()] == ["report"]


def test_what_runs_when_it_is_stopped_is_heard_to_its_end(stage):
    stage.ingest()
    _, thread, heard = busy(stage)
    waits = stage.client().ask(AskRequest(document="report", question="who?", new_tokens=NEW))
    next(waits)
    stage.service.stop()
    with pytest.raises(Unavailable, match="being stopped"):
        list(waits)
    stage.engine.gate.set()
    stage.worker.join(20)
    stage.server.close()
    thread.join(20)
    assert isinstance(heard[-1], Answered)
    with pytest.raises(RunnerUnavailable):
        stage.client()


def test_the_worker_that_ends_leaves_nobody_waiting():
    jobs = JobQueue(SystemClock())
    heard = []

    def asks():
        try:
            list(jobs.events(AskRequest(document="a", question="b")))
        except Unavailable as error:
            heard.append(error)

    threads = [threading.Thread(target=asks) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: jobs.waiting == 3, "all wait")
    assert len(jobs.take(1.0, lambda *_: False)) == 1
    jobs.end(Unavailable("over"))
    for thread in threads:
        thread.join(20)
    assert [error.message for error in heard] == ["over"] * 3
    with pytest.raises(Unavailable):
        next(jobs.events(AskRequest(document="a", question="b")))


# The daemon and the ranks ----------------------------------------------------------------------


def test_a_daemon_that_was_killed_is_found_again(stage):
    stage.ingest(write_policy=WritePolicy.THROUGH)
    until(lambda: stage.daemon.client().document("report").durable, "it is durable")
    stage.daemon.kill()
    *before, away = stage.client().ask(AskRequest(document="report", question="who?", new_tokens=NEW))
    assert isinstance(away, Answered)
    assert away.tokens == wanted(stage)  # remembered, so computed, and told before it takes its time
    (told,) = [event for event in before if isinstance(event, Recomputing)]
    assert (told.code, told.total_tokens) == ("daemon-unavailable", len(TEXT))
    assert told.reason
    assert (away.swap, away.reason) == (None, "daemon-unavailable")
    assert stage.client().status().problem == "the daemon is away"
    with pytest.raises(DaemonUnavailable):
        stage.ask("another")
    stage.daemon.start()
    back = stage.ask()
    assert back.swap is not None
    assert back.tokens == away.tokens
    assert stage.client().status().recomputed == 1


def test_a_text_that_comes_with_the_question_serves_for_one_that_is_gone(stage):
    stage.ingest()
    stage.daemon.client().delete("report")
    with pytest.raises(DocumentNotFound):
        stage.ask()
    assert stage.texts.get("report", None) is None  # deleted there is deleted here
    answer = stage.ask(content=TEXT)
    assert (answer.tokens, answer.reason) == (wanted(stage), "document-not-found")


def test_a_group_that_dies_is_started_anew(stage):
    stage.ingest()
    stage.engine.died = "rank 1 died"
    until(lambda: len(stage.engines) == 2, "it is noticed while nobody asks")
    assert stage.ask().tokens == wanted(stage)
    assert stage.said == ["rank 1 died; the group is being started anew", "the group is back"]
    assert stage.client().status().restarts == 1


def test_a_group_that_dies_while_the_daemon_is_away_is_started_when_that_is_back(stage):
    stage.ingest()
    stage.daemon.kill()
    stage.engine.died = "rank 1 died"
    until(lambda: "waits for the daemon" in stage.service.status().problem, "it waits")
    with pytest.raises(GroupFailed, match="waits for the daemon"):
        stage.ask()
    stage.daemon.start()
    until(lambda: len(stage.engines) == 2 and not stage.service.status().problem, "it is back")
    stage.ingest("another")
    assert stage.ask("another").tokens == wanted(stage)


def test_a_group_that_dies_again_and_again_ends_the_runner(stage):
    stage.ingest()
    for number in range(1, 5):
        until(lambda number=number: len(stage.engines) == number, "it was started anew")
        stage.engine.died = f"death {number}"
    stage.worker.join(20)
    assert "death 4" in stage.error.message
    assert "after 3 new starts" in stage.error.message
    with pytest.raises(GroupFailed):
        stage.ask()


# Names and sockets -----------------------------------------------------------------------------


def test_a_name_is_taken_once_and_a_dead_runners_socket_is_replaced(stage):
    with pytest.raises(Conflict, match=f"process {os.getpid()}"):
        RunnerSeat(stage.daemon.data_dir, "main")
    assert stage.seat.socket.stat().st_mode & 0o777 == 0o600
    stale = stage.seat.directory / "other.sock"
    stale.touch()
    with closing(RunnerSeat(stage.daemon.data_dir, "other")) as seat:
        seat.bind().close()
    assert not stale.exists()
    for bad in ("a/b", "", "x" * 200):
        with pytest.raises(InvalidRequest):
            RunnerSeat(stage.daemon.data_dir, bad)


def test_the_only_runner_of_a_tenant_is_found_and_several_are_named(stage):
    data_dir = stage.daemon.data_dir
    assert runner_for(data_dir, "default", None) == stage.seat.socket
    with pytest.raises(RunnerUnavailable):
        runner_for(data_dir / "nowhere", "default", None)
    with pytest.raises(RunnerUnavailable, match="'x'"):
        runner_for(data_dir, "default", "x")
    with pytest.raises(InvalidRequest, match="'main' serves tenant 'default'"):
        runner_for(data_dir, "acme", None)
    (stage.seat.directory / "dead.sock").touch()
    with ExitStack() as stack:
        second = Stage(stack, "second", daemon=stage.daemon)
        third = Stage(stack, "third", "acme", daemon=stage.daemon)
        assert len(running(data_dir)) == 3
        with pytest.raises(InvalidRequest, match="main, second"):
            runner_for(data_dir, "default", None)
        assert runner_for(data_dir, "default", "second") == second.seat.socket
        assert runner_for(data_dir, "acme", None) == third.seat.socket


# Texts -----------------------------------------------------------------------------------------


def test_texts_are_bounded_verified_and_of_one_document(tmp_path):
    texts = Texts(tmp_path / "texts", "default", b"f" * 16, limit_bytes=1000)
    texts.put("a", [1, 2, 3], 7)
    assert texts.get("a", 7).tolist() == [1, 2, 3]
    assert texts.get("a", None).tolist() == [1, 2, 3]
    assert texts.get("a", 8) is None
    assert texts.get("b", 7) is None
    assert Texts(tmp_path / "texts", "acme", b"f" * 16).get("a", 7) is None
    (path,) = (tmp_path / "texts").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert texts.get("a", 7) is None
    path.write_bytes(content[:10])
    assert texts.get("a", 7) is None
    texts.put("big", list(range(300)), 1)
    assert texts.get("big", 1) is None


def test_the_text_used_longest_ago_leaves_first(tmp_path):
    texts = Texts(tmp_path, "default", b"f" * 16, limit_bytes=1000)
    for age, name in enumerate("abc"):
        texts.put(name, list(range(64)), 1)
        os.utime(texts._path(name), ns=(age, age))
    assert texts.get("a", 1) is not None  # used again
    texts.put("d", list(range(64)), 1)
    assert [name for name in "abcd" if texts.get(name, 1) is not None] == ["a", "c", "d"]


# What waits is foretold --------------------------------------------------------------------------


def asking(stage, stack, name, count=1, **options):
    """So many questions on a document, asked at the same time by threads; returns where their answers will be."""
    answers = []
    for number in range(count):
        thread = threading.Thread(
            target=lambda number=number: answers.append(stage.ask(name, question=f"q{number}?", **options))
        )
        thread.start()
        stack.callback(thread.join, 20)
    return answers


def hinted(stage):
    found = stage.daemon.rest().get("/v1/hints")
    return {h["document"]: (h["state"], h["queries"]) for h in found["hints"]}, [h["state"] for h in found["ended"]]


def test_the_next_document_comes_near_while_the_present_one_is_answered(stage):
    """One hint for all questions on it, and one reattach, which moves nothing any more, serves them all."""
    for name, text in (("present", TEXT), ("next", TEXT[::-1])):
        stage.ingest(name, text, WritePolicy.THROUGH)
        until(lambda name=name: stage.daemon.client().document(name).durable, "it is on NVMe")
        stage.daemon.client().free(name, "nvme")
    stage.engine.gate.clear()
    stage.engine.reached.clear()
    with ExitStack() as stack:
        first = asking(stage, stack, "present")
        assert stage.engine.reached.wait(20)
        several = asking(stage, stack, "next", 3)
        until(lambda: hinted(stage)[0] == {"next": ("promoted", 3)}, "the next document is there for three questions")
        assert not first
        stage.engine.gate.set()
    assert [answer.reason for answer in (*first, *several)] == [""] * 4
    assert {answer.swap.document for answer in several} == {"default/next"}
    assert {(answer.swap.moved_bytes, answer.swap.queries) for answer in several} == {(0, 3)}
    assert hinted(stage) == ({}, ["used"])
    assert stage.daemon.metric("holdfast_hints_in_time_total") == 1
    found = stage.daemon.rest().get("/v1/status")
    assert (found["queries_answered"], found["reattaches"], found["amortisation"]) == (4, 2, 2.0)


def test_questions_that_are_taken_back_are_announced_no_more(stage):
    for name, text in (("present", TEXT), ("next", TEXT[::-1])):
        stage.ingest(name, text)
    stage.engine.gate.clear()
    stage.engine.reached.clear()
    with ExitStack() as stack:
        asking(stage, stack, "present")
        assert stage.engine.reached.wait(20)
        client = stage.client()
        next(client.ask(AskRequest(document="next", question="who?", new_tokens=NEW)))
        until(lambda: "next" in hinted(stage)[0], "it is announced")
        client.close()
        until(lambda: hinted(stage) == ({}, ["cancelled"]), "nobody waits for it any more")
        stage.engine.gate.set()


def test_a_document_s_questions_are_taken_together_before_others():
    """Not before the one that came first, whose document is answered next."""
    queue = JobQueue(SystemClock())
    for document in ("a", "b", "a", "c", "a"):
        queue._add(AskRequest(document=document, question="q"))
    seen = queue.foreseen()
    assert {name: expected.queries for name, expected in seen.waiting.items()} == {"a": 3, "b": 1, "c": 1}
    taken = [job.request.document for job in queue.take(0, lambda *_: True)]
    assert taken == ["a", "a", "a", "b", "c"]
    assert queue.foreseen() == ({}, {"a", "b", "c"})


def test_documents_that_do_not_fit_together_are_answered_one_after_the_other_each_with_one_reattach(stage):
    """Their questions wait again, and stay together; before, each was attached by itself."""
    texts = {name: (name + TEXT) * 4 for name in "pqr"}  # about 900 of the group's 1200 tokens each
    for name, text in texts.items():
        stage.ingest(name, text, WritePolicy.THROUGH)
    stage.engine.gate.clear()
    stage.engine.reached.clear()
    with ExitStack() as stack:
        asking(stage, stack, "p")
        assert stage.engine.reached.wait(20)
        asked = {name: asking(stage, stack, name, 2) for name in "qr"}
        until(lambda: stage.service.status().waiting == 4, "four questions wait")
        stage.engine.gate.set()
    for name, answers in asked.items():
        assert [(a.reason, a.swap.document, a.swap.queries) for a in answers] == [("", f"default/{name}", 2)] * 2
    assert stage.client().status().recomputed == 0


def test_a_document_larger_than_the_group_does_not_keep_those_beside_it_waiting(stage):
    """It is computed without the cache, alone, and they are answered from it."""
    stage.ingest("small", TEXT)
    stage.engine.gate.clear()
    stage.engine.reached.clear()
    with ExitStack() as stack:
        first = asking(stage, stack, "small")
        assert stage.engine.reached.wait(20)
        client = stack.enter_context(closing(Client(stage.daemon.socket)))
        tokens = list(TEXT.encode()) * 6
        fingerprint = client.register_spec(SPEC)
        opened = client.begin_ingest("large", fingerprint, tokens, write_policy=WritePolicy.MEMORY)
        client.commit_ingest(opened.ingest)
        stage.texts.put("large", tokens, client.document("large").created_wall_ns)
        alone = []

        thread = threading.Thread(target=lambda: alone.append(stage.ask("large")))
        thread.start()
        stack.callback(thread.join, 20)
        until(lambda: stage.service.status().waiting == 1, "the large one waits first")
        beside = asking(stage, stack, "small", 2)
        until(lambda: stage.service.status().waiting == 3, "and the small ones behind it")
        stage.engine.gate.set()
    assert [answer.reason for answer in (*first, *beside)] == [""] * 3
    assert [answer.reason for answer in alone] == [DocumentTooLarge.code]
