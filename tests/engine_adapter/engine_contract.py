"""The engine contract: what a session promises over any engine, proven with a real daemon that is killed on the way.

A subclass gives `make(stage, degree)` and `SETTINGS`; the stage keeps daemon and groups over the tests of a class.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
from holdfast.engine_adapter.engine import Question
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
from holdfast.kvstore.document import WritePolicy
from holdfast.kvstore.errors import (
    DaemonUnavailable,
    DocumentNotFound,
    HoldfastError,
    InvalidRequest,
    SpecMismatch,
    TokenOutOfRange,
    Unavailable,
)

from daemon_process import DaemonProcess, until

CHUNK = 48
ROWS = 512  # of a group, over its ranks
NEW = 6


class Degree(NamedTuple):
    """Of a group: ranks by tokens, and by heads."""

    cp: int
    tp: int = 1


class Stage:
    """A daemon, and the engines that were asked for so far."""

    def __init__(self, suite) -> None:
        self.daemon = DaemonProcess(**suite.SETTINGS).start()
        self._suite = suite
        self._engines = {}

    def engine(self, degree):
        if degree not in self._engines:
            self._engines[degree] = self._suite.make(self, degree)
        return self._engines[degree]

    def rows(self, degree):
        return -(-ROWS // degree.cp)

    def session(self, degree):
        """A new session with a group whose ranks are all there."""
        engine = self.engine(degree)
        until(lambda: self.is_complete(engine.group), f"{engine.group} has registered")
        return Session(self.client(), engine)

    def is_complete(self, group):
        return any(found["name"] == group and found["complete"] for found in self.daemon.groups())

    def client(self):
        client = Client(self.daemon.socket)
        self.daemon._clients.append(client)
        return client

    def forget(self, degree):
        engine = self._engines.pop(degree, None)
        if engine is not None:
            engine.close()

    def is_idle(self):
        """No lease, and no byte outside of what documents own: no ingest is open."""
        return not self.daemon.leases() and all(self.daemon.used(tier) == 0 for tier in ("hbm", "ddr", "nvme"))

    def close(self):
        for engine in self._engines.values():
            engine.close()
        self.daemon.close()

    def flip(self):
        """Change a byte of every extent on NVMe; the daemon must be down."""
        with sqlite3.connect(self.daemon.data_dir / "catalog.sqlite") as database:
            rows = list(database.execute("SELECT segment, segment_offset FROM extents"))
        database.close()
        assert rows
        for segment, offset in rows:
            with (self.daemon.data_dir / "nvme" / f"segment-{segment}").open("r+b") as file:
                file.seek(offset + 8)
                byte = file.read(1)
                file.seek(offset + 8)
                file.write(bytes([byte[0] ^ 0x55]))


class EngineContract:
    """Inherit, give SETTINGS, VOCABULARY, DEGREES, `make` and `other_spec`."""

    SETTINGS: ClassVar[dict[str, str]]
    VOCABULARY = 64
    DEGREES: ClassVar[tuple[Degree, ...]]
    _seeds = count(1)

    @pytest.fixture(scope="class")
    @classmethod
    def stage(cls):
        stage = Stage(cls())
        yield stage
        stage.close()

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, stage):
        """Whatever happened: when its documents are deleted, the daemon holds nothing, and it had no bug."""
        if not stage.daemon.alive:
            stage.daemon.start()
        yield
        assert stage.daemon.alive, "the test leaves a daemon"
        assert stage.daemon.leases() == []
        client = stage.client()
        for document in client.documents():
            client.delete(document.name)
        client.close()
        until(stage.is_idle, f"the daemon is idle: {stage.daemon.rest().get('/v1/status')}")
        assert "bug: stopping" not in stage.daemon.events()

    @pytest.fixture(params=[0, 1, 2])
    def degree(self, request):
        if request.param >= len(self.DEGREES):
            pytest.skip("fewer degrees")
        return self.DEGREES[request.param]

    def tokens(self, number):
        return np.random.default_rng(next(self._seeds)).integers(0, self.VOCABULARY, number).tolist()

    def check(self, reply, engine, document, question):
        """The reply is the one that the engine gives without any cache."""
        wanted = engine.recompute(document, question, NEW, CHUNK)
        assert reply.answer.tokens == wanted.tokens
        assert reply.answer.logits.shape == wanted.logits.shape
        assert np.abs(reply.answer.logits - wanted.logits).max() < 1e-4

    def stored(self, stage, session, name, number=200):
        """A durable document."""
        document = self.tokens(number)
        session.ingest(name, document, write_policy=WritePolicy.THROUGH, chunk_tokens=CHUNK)
        client = stage.client()
        until(lambda: client.document(name).durable, f"{name} is durable")
        client.close()
        return document

    # The answer is the recomputed one, from wherever ------------------------------------------

    def test_stored_is_recomputed_moved_once_and_evicted_without_loss(self, stage, degree):
        session, engine, client = stage.session(degree), stage.engine(degree), stage.client()
        document, question = self.stored(stage, session, "report"), self.tokens(9)
        seen = []
        self.check(session.ask("report", question, NEW), engine, document, question)
        client.free("report", "ddr")
        warm = session.ask("report", question, NEW)
        self.check(warm, engine, document, question)
        assert (warm.swap.source_tier, warm.swap.moved_bytes > 0) == ("ddr", True)
        again = session.ask("report", question, NEW)
        self.check(again, engine, document, question)
        assert (again.swap.source_tier, again.swap.moved_bytes) == ("hbm", 0)
        client.free("report", "nvme")
        cold = session.ask("report", question, NEW)
        self.check(cold, engine, document, question)
        assert cold.swap.source_tier == "nvme"
        assert cold.swap.answer_tokens == NEW
        session.ingest("report", document, chunk_tokens=CHUNK, progress=seen.append)
        self.check(session.ask("report", question, NEW), engine, document, question)
        assert seen == [], "nothing was missing, nothing is prefilled"

    def test_what_was_announced_is_in_the_group_or_goes_on_where_the_hint_is(self, stage, degree):
        """The same answer whether its moves have ended, are under way, or have just been asked for."""
        session, engine, client = stage.session(degree), stage.engine(degree), stage.client()
        document, question = self.stored(stage, session, "report"), self.tokens(9)
        for waits in (True, False):
            client.free("report", "nvme")
            client.prefetch("report", group=engine.group, queries=2)
            if waits:
                until(lambda: self.is_near(client, engine), "it is in the group before anybody asks")
            reply = session.ask("report", question, NEW)
            self.check(reply, engine, document, question)
            assert reply.swap.outcome == "ready"
            assert not waits or (reply.swap.moved_bytes, reply.swap.source_tier) == (0, "hbm")
        assert stage.daemon.metric("holdfast_hints_used_total") >= 2

    @staticmethod
    def is_near(client, engine):
        """Whether the hint has nothing left to bring."""
        return client.prefetch("report", group=engine.group, queries=2).state == "promoted"

    def test_every_degree_reads_what_any_degree_stored(self, stage):
        question = self.tokens(7)
        for writer in self.DEGREES:
            document = self.stored(stage, stage.session(writer), f"by-{writer}", 150)
            for reader in self.DEGREES:
                reply = stage.session(reader).ask(f"by-{writer}", question, NEW)
                self.check(reply, stage.engine(reader), document, question)

    def test_a_longer_document_takes_its_front_from_a_shorter_one(self, stage, degree):
        session = stage.session(degree)
        document, question = self.stored(stage, session, "short", 160), self.tokens(5)
        seen = []
        longer = [*document, *self.tokens(100)]
        session.ingest("long", longer, chunk_tokens=CHUNK, progress=seen.append)
        self.check(session.ask("long", question, NEW), stage.engine(degree), longer, question)
        self.check(session.ask("short", question, NEW), stage.engine(degree), document, question)
        assert seen[-1] == len(longer)

    def test_documents_that_do_not_fit_together_take_turns(self, stage, degree):
        """Each takes over half of the group's rows."""
        session, question = stage.session(degree), self.tokens(5)
        first = self.stored(stage, session, "first", 300)
        second = self.stored(stage, session, "second", 320)
        for name, document in (("first", first), ("second", second), ("first", first)):
            reply = session.ask(name, question, NEW)
            assert reply.swap.moved_bytes > 0 or name == "second"
            self.check(reply, stage.engine(degree), document, question)

    def test_sessions_in_turn_from_many_threads_all_get_their_own_answer(self, stage):
        degree = self.DEGREES[0]
        session, engine = stage.session(degree), stage.engine(degree)
        documents = {f"d{i}": self.stored(stage, session, f"d{i}", 120) for i in range(3)}
        questions = {name: self.tokens(4) for name in documents}
        turn, wrong = threading.Lock(), []

        def asks(name):
            try:
                for _ in range(3):
                    with session.attached(name) as attached, turn:
                        (answer,) = engine.answer_many([Question(attached.shard, questions[name], NEW)])
                        if answer.tokens != engine.recompute(documents[name], questions[name], NEW, CHUNK).tokens:
                            wrong.append(name)
            except HoldfastError as error:
                wrong.append(error)

        threads = [threading.Thread(target=asks, args=(name,)) for name in documents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []

    def test_a_batch_is_answered_each_over_its_own_document(self, stage, degree):
        """Several of one document share a receipt; what cannot be attached or asked harms no other; tokens stream."""
        session, engine, client = stage.session(degree), stage.engine(degree), stage.client()
        documents = {name: self.stored(stage, session, name, number) for name, number in (("a", 130), ("b", 60))}
        questions = [self.tokens(9), self.tokens(3), self.tokens(20)]
        client.free("a", "ddr")
        heard = {}
        asked = [
            ("a", questions[0], NEW),
            ("nothing", questions[0], NEW),
            ("b", questions[1], 2),
            ("a", [], NEW),
            ("a", [self.VOCABULARY], NEW),
            ("a", questions[2], NEW),
        ]
        replies = session.ask_many(asked, on_token=lambda number, token: heard.setdefault(number, []).append(token))
        assert stage.daemon.leases() == []
        wrong = [DocumentNotFound, InvalidRequest, TokenOutOfRange]
        assert [type(replies[i]) for i in (1, 3, 4)] == wrong
        for index, (name, number) in {0: ("a", NEW), 2: ("b", 2), 5: ("a", NEW)}.items():
            wanted = engine.recompute(documents[name], asked[index][1], number, CHUNK)
            assert replies[index].answer.tokens == wanted.tokens == heard[index]
            assert np.abs(replies[index].answer.logits - wanted.logits).max() < 1e-4
        assert replies[0].swap == replies[5].swap
        assert (replies[0].swap.answer_tokens, replies[2].swap.answer_tokens) == (2 * NEW, 2)
        assert (replies[0].swap.queries, replies[2].swap.queries) == (2, 1)
        assert replies[0].swap.source_tier == "ddr"
        assert set(heard) == {0, 2, 5}
        assert session.ask_many([]) == []

    def test_an_answer_ends_behind_an_end_token(self, stage, degree):
        session = stage.session(degree)
        self.stored(stage, session, "report", 60)
        question = self.tokens(5)
        whole = session.ask("report", question, NEW).answer.tokens
        heard = []
        short = session.ask("report", question, NEW, eos=[whole[2]], on_token=heard.append).answer
        assert short.tokens == heard == whole[: whole.index(whole[2]) + 1]

    def test_whoever_stops_listening_ends_its_question_only(self, stage, degree):
        """An error in a caller's callback reaches the caller; lease and group are fine."""

        class TestError(Exception):
            pass

        def fails(_):
            raise TestError

        session, engine = stage.session(degree), stage.engine(degree)
        document, question = self.stored(stage, session, "report"), self.tokens(5)
        with pytest.raises(TestError):
            session.ask("report", question, NEW, on_token=fails)
        assert stage.daemon.leases() == []
        self.check(session.ask("report", question, NEW), engine, document, question)

    # Conversations ------------------------------------------------------------------------------

    def test_a_document_grows_by_question_and_answer_without_prefill(self, stage, degree):
        """Turn by turn what a fresh prefill of everything gives; other groups read it; the daemon dies between."""
        session, engine = stage.session(degree), stage.engine(degree)
        document, seen = self.stored(stage, session, "talk", 130), []
        for length in (9, 70, 3):
            question = self.tokens(length)
            turn = session.converse("talk", document, question, NEW, chunk_tokens=CHUNK, progress=seen.append)
            self.check(turn.reply, engine, document, question)
            document = [*document, *question, *turn.reply.answer.tokens]
            assert (turn.tokens, turn.reason, turn.document.token_count) == (document, "", len(document))
        assert seen == [], "nothing is prefilled again"
        assert stage.daemon.leases() == []
        question = self.tokens(5)
        again = session.ask("talk", question, NEW)
        self.check(again, engine, document, question)
        assert again.swap.moved_bytes == 0, "the grown document is where it was made"
        for other in self.DEGREES:
            self.check(stage.session(other).ask("talk", question, NEW), stage.engine(other), document, question)
        client = stage.client()
        until(lambda: client.document("talk").durable, "it is durable")
        client.close()
        stage.daemon.kill()
        stage.daemon.cool()
        stage.daemon.start()
        session = stage.session(degree)
        turn = session.converse("talk", document, question, NEW, chunk_tokens=CHUNK)
        self.check(turn.reply, engine, document, question)
        assert turn.reason == ""
        self.check(session.ask("talk", [1], NEW), engine, turn.tokens, [1])

    def test_a_crash_in_the_middle_of_a_turn_leaves_the_version_before(self, stage, degree):
        """Durable it was, and whole it is."""
        session, engine = stage.session(degree), stage.engine(degree)
        document, question = self.stored(stage, session, "talk", 130), self.tokens(9)
        killed = []

        def kills(_):
            if not killed:
                killed.append(stage.daemon.kill())

        with pytest.raises(Unavailable):  # the receipt cannot be had
            session.converse("talk", document, question, NEW, on_token=kills)
        assert killed
        stage.daemon.start()
        session = stage.session(degree)
        assert stage.client().document("talk").token_count == 130
        self.check(session.ask("talk", question, NEW), engine, document, question)

    def test_without_room_for_both_versions_what_is_missing_is_prefilled(self, stage, degree):
        session, engine = stage.session(degree), stage.engine(degree)
        document, question, seen = self.stored(stage, session, "talk", 300), self.tokens(9), []
        turn = session.converse("talk", document, question, NEW, chunk_tokens=CHUNK, progress=seen.append)
        assert turn.reason == "no-capacity"
        assert seen[-1] == turn.document.token_count == len(turn.tokens)
        self.check(turn.reply, engine, document, question)
        self.check(session.ask("talk", question, NEW), engine, turn.tokens, question)

    def test_a_tail_that_is_gone_is_prefilled_again(self, stage, degree):
        """The ranks did something else between the answer and its growth."""
        session, engine = stage.session(degree), stage.engine(degree)
        document, question, seen = self.stored(stage, session, "talk", 100), self.tokens(9), []

        def loses(into, old, tail, from_token):
            return grow(into, old, replace(tail, call=tail.call - 1), from_token)

        grow, engine.grow = engine.grow, loses
        try:
            turn = session.converse("talk", document, question, NEW, chunk_tokens=CHUNK, progress=seen.append)
        finally:
            del engine.grow
        assert (turn.reason, seen[-1]) == ("claim-not-found", len(turn.tokens))
        self.check(session.ask("talk", question, NEW), engine, turn.tokens, question)

    def test_a_conversation_over_other_tokens_is_refused(self, stage):
        session = stage.session(self.DEGREES[0])
        document = self.stored(stage, session, "talk", 60)
        with pytest.raises(InvalidRequest, match="60 tokens"):
            session.converse("talk", document[1:], [1], NEW)
        turn = session.converse("talk", [*document[:-1], (document[-1] + 1) % self.VOCABULARY], [1], NEW)
        assert (turn.document, turn.reason) == (None, "document-exists")
        assert stage.client().document("talk").token_count == 60

    # Refusals -----------------------------------------------------------------------------------

    def test_bad_questions_are_refused_and_the_group_goes_on(self, stage, degree):
        session, engine = stage.session(degree), stage.engine(degree)
        document, question = self.stored(stage, session, "report"), self.tokens(5)
        for bad in ([self.VOCABULARY], [-1], [2**40]):
            with pytest.raises(TokenOutOfRange):
                session.ask("report", bad, NEW)
        with pytest.raises(InvalidRequest):
            session.ask("report", [], NEW)
        with pytest.raises(InvalidRequest):
            session.ask("report", question, 0)
        with pytest.raises(DocumentNotFound):
            session.ask("nothing", question, NEW)
        with pytest.raises(TokenOutOfRange):
            session.ingest("bad", [self.VOCABULARY])
        assert stage.daemon.leases() == []
        self.check(session.ask("report", question, NEW), engine, document, question)

    def test_a_document_of_another_model_is_refused(self, stage):
        session, client = stage.session(self.DEGREES[0]), stage.client()
        other = client.register_spec(self.other_spec())
        opened = client.begin_ingest("foreign", other, [1, 2, 3], write_policy=WritePolicy.MEMORY)
        client.commit_ingest(opened.ingest)
        with pytest.raises(SpecMismatch):
            session.ask("foreign", [1], NEW)
        with pytest.raises(SpecMismatch):
            session.ask_or_recompute("foreign", [1, 2, 3], [1], NEW)

    def test_a_failing_prefill_leaves_nothing(self, stage, degree):
        class TestError(Exception):
            pass

        def fails(_):
            raise TestError

        session, client = stage.session(degree), stage.client()
        with pytest.raises(TestError):
            session.ingest("report", self.tokens(100), chunk_tokens=CHUNK, progress=fails)
        assert client.documents() == []
        until(stage.is_idle, "nothing is held")

    # A daemon that dies -------------------------------------------------------------------------

    def test_a_killed_daemon_costs_a_recompute_and_the_group_comes_back(self, stage, degree):
        session, engine = stage.session(degree), stage.engine(degree)
        document, question = self.stored(stage, session, "report"), self.tokens(5)
        stage.daemon.kill()
        with pytest.raises(DaemonUnavailable):
            session.ask("report", question, NEW)
        reply = session.ask_or_recompute("report", document, question, NEW)
        assert (reply.swap, reply.reason) == (None, "daemon-unavailable")
        self.check(reply, engine, document, question)
        stage.daemon.start()
        session = stage.session(degree)
        self.check(session.ask("report", question, NEW), engine, document, question)

    @pytest.mark.parametrize("comes_back", [False, True])
    def test_a_daemon_killed_in_the_middle_of_a_question_is_noticed(self, stage, degree, comes_back):
        """Even when another daemon is up, and the ranks with it, before the question reaches them."""
        session, engine = stage.session(degree), stage.engine(degree)
        document, question = self.stored(stage, session, "report"), self.tokens(5)
        with session.attached("report") as attached:
            stage.daemon.kill()
            if comes_back:
                stage.daemon.start()
                stage.session(degree).ask("report", question, NEW)
            until(lambda: self.refuses(engine, attached.shard, question), "the ranks notice", 0 if comes_back else 20)
        if not comes_back:
            stage.daemon.start()
        self.check(stage.session(degree).ask("report", question, NEW), engine, document, question)

    def refuses(self, engine, shard, question):
        """Rows whose daemon has just died are still good until their ranks notice; those of another opening never."""
        try:
            engine.answer_many([Question(shard, question, NEW)])
        except Unavailable:
            return True
        return False

    def test_a_daemon_killed_at_any_time_gives_the_right_answer_or_an_error(self, stage):
        degree = self.DEGREES[-1]
        session, engine = stage.session(degree), stage.engine(degree)
        document, question = self.stored(stage, session, "report"), self.tokens(5)
        wanted = engine.recompute(document, question, NEW, CHUNK).tokens
        for delay_questions in (1, 3):
            stage.client().free("report", "nvme")
            asked, outcomes = threading.Semaphore(0), []

            def asks(session=session, asked=asked, outcomes=outcomes):
                with suppress(Unavailable):
                    while True:
                        asked.release()
                        outcomes.append(session.ask("report", question, NEW).answer.tokens)

            thread = threading.Thread(target=asks)
            thread.start()
            for _ in range(delay_questions):
                assert asked.acquire(timeout=30)
            stage.daemon.kill()
            thread.join(60)
            assert not thread.is_alive(), "the question hangs"
            assert all(tokens == wanted for tokens in outcomes)
            stage.daemon.start()
            session = stage.session(degree)
        self.check(session.ask("report", question, NEW), engine, document, question)

    def test_a_daemon_killed_in_the_middle_of_an_ingest_leaves_nothing_visible(self, stage, degree):
        session, document, question = stage.session(degree), self.tokens(200), self.tokens(5)
        killed = []

        def kills(done):
            if done >= CHUNK * 2 and not killed:
                killed.append(done)
                stage.daemon.kill()

        with pytest.raises(Unavailable):
            session.ingest("report", document, chunk_tokens=CHUNK, progress=kills)
        assert killed
        stage.daemon.start()
        session = stage.session(degree)
        assert stage.client().documents() == []
        session.ingest("report", document, chunk_tokens=CHUNK)
        self.check(session.ask("report", question, NEW), stage.engine(degree), document, question)

    def test_corruption_is_an_error_or_a_recompute_never_an_answer(self, stage, degree):
        session, engine = stage.session(degree), stage.engine(degree)
        document, question = self.stored(stage, session, "report"), self.tokens(5)
        stage.daemon.kill()
        stage.daemon.cool()  # else it is found in memory, and nobody reads the disk
        stage.flip()
        stage.daemon.start()
        session = stage.session(degree)
        good = self.tokens(150)
        session.ingest("good", good, chunk_tokens=CHUNK)
        stage.client().free("good", "ddr")
        bad, reply = session.ask_many([("report", question, NEW), ("good", question, NEW)])
        assert isinstance(bad, HoldfastError)
        self.check(reply, engine, good, question)
        with pytest.raises(HoldfastError):
            session.ask("report", question, NEW)
        reply = session.ask_or_recompute("report", document, question, NEW)
        assert reply.swap is None
        self.check(reply, engine, document, question)
        assert not stage.client().document("report").complete
        session.ingest("report", document, chunk_tokens=CHUNK)
        self.check(session.ask("report", question, NEW), engine, document, question)

    def test_a_closed_group_frees_its_memory_and_its_name(self, stage):
        degree = self.DEGREES[-1]
        session = stage.session(degree)
        document, question = self.stored(stage, session, "report"), self.tokens(5)
        session.ask("report", question, NEW)
        name = stage.engine(degree).group
        stage.forget(degree)
        until(lambda: not stage.is_complete(name), "the group is gone")
        assert stage.daemon.used("hbm") == 0
        session = stage.session(degree)
        self.check(session.ask("report", question, NEW), stage.engine(degree), document, question)
