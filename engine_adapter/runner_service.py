"""RunnerService: what a runner answers, as typed methods: status, and iterators of events for ingest and ask.

The socket server is a thin layer over it, and any other front would be. One worker thread drives the one group; it
starts the group anew when a rank dies, within a bound, and connects again when the daemon was away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from ..kvstore.client import Client
from ..kvstore.clock import Clock
from ..kvstore.errors import (
    DaemonUnavailable,
    DocumentNotFound,
    EmptyDocument,
    GroupFailed,
    GroupNotFound,
    HoldfastError,
    InvalidRequest,
    NoCapacity,
    Unavailable,
)
from ..ring_attention.text_stream import TextStream
from ..ring_attention.tokenizer import Tokenizer
from .answering import Answering, ended
from .engine import Engine
from .foretelling import Foreteller
from .runner_queue import AbandonedError, Job, JobQueue
from .runner_wire import (
    Answered,
    AnyEvent,
    AskRequest,
    Content,
    Ingested,
    IngestRequest,
    Prefilling,
    Recomputing,
    RunnerFacts,
    RunnerStatus,
)
from .session import CHUNK_TOKENS, FALLBACK, Reply, Session, Turn
from .texts import Texts

POLL_SECONDS: Final = 1.0  # how soon the death of a rank is noticed while nobody asks
RESTARTS: Final = 3  # more of them help nobody
RESTART_WINDOW_SECONDS: Final = 600.0
REGISTER_SECONDS: Final = 20.0  # for ranks to come back to a daemon that was started again
AWAY_SECONDS: Final = 5.0  # for a daemon that is being started again, before a question is answered without it
STILL_AWAY_SECONDS: Final = 2.0  # the same for those who ask when it was found to be away before
RETRY_SECONDS: Final = 0.05
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a service is made of. `start` starts the group; `connect` takes the numbers of connections it replaces.

    `eos` are the tokens that end an answer; `restarts` how often the group is started anew in RESTART_WINDOW_SECONDS;
    `settings` tells what a group that was just started computes with.
    """

    facts: RunnerFacts
    start: Callable[[], Engine]
    connect: Callable[[list[int]], Client]
    tokenizer: Tokenizer
    eos: tuple[int, ...] = ()
    texts: Texts
    clock: Clock
    say: Callable[[str], None]
    restarts: int = RESTARTS
    settings: Callable[[], dict[str, str]] = dict


class RunnerService:
    """One group's. Methods may be called from any thread; nothing is answered before `serve` runs on one."""

    def __init__(self, parts: Parts) -> None:
        """Start the group and connect. Raises what either raises."""
        self._parts = parts
        self._queue = JobQueue(parts.clock, changed=self._foretell)
        self._foreteller: Foreteller | None = None
        self._stopping = threading.Event()
        self._engine = parts.start()
        try:
            self._client = parts.connect([])
        except HoldfastError:
            self._engine.close()
            raise
        self._settings = parts.settings()
        self._session: Session | None = None
        self._away = False
        self._problem = self._cause = ""
        self._restarted_ns: list[int] = []
        self._counts = {"answered": 0, "ingested": 0, "recomputed": 0, "restarts": 0}

    # What it answers ---------------------------------------------------------------------------

    def status(self) -> RunnerStatus:
        """What it is, and what it does at the moment."""
        return RunnerStatus(
            facts=self._parts.facts,
            settings=self._settings,
            problem=self._problem or ("" if self._client.is_open else "the daemon is away"),
            busy=self._queue.busy,
            waiting=self._queue.waiting,
            **self._counts,
        )

    def ingest(self, request: IngestRequest) -> Generator[AnyEvent]:
        """Store a document: Waiting and Prefilling, then Ingested. Raises what the queue and the session raise."""
        return self._queue.events(request)

    def ask(self, request: AskRequest) -> Generator[AnyEvent]:
        """Answer a question: Waiting, Recomputing and Piece, then Answered. Raises as the queue and the session do."""
        return self._queue.events(request)

    # The worker --------------------------------------------------------------------------------

    def serve(self) -> None:
        """Carry out requests until told to stop. Raises GroupFailed when the group cannot be kept alive."""
        try:
            while not self._stopping.is_set():
                jobs = self._queue.take(POLL_SECONDS, _joins)
                if jobs:
                    self._foretell()
                self._carry_out(jobs)
                if self._engine.failure and not self._stopping.is_set():
                    self._restart()
        finally:
            self._queue.end(GroupFailed("the runner has ended; its last words say why"))

    def stop(self) -> None:
        """Refuse what waits and what comes; what runs may end."""
        self._stopping.set()
        self._queue.close(Unavailable("the runner is being stopped"))

    def close(self) -> None:
        """End the group and disconnect, after `serve` has returned."""
        self._engine.close()
        self._client.close()

    def _carry_out(self, jobs: Sequence[Job]) -> None:
        """One ingest, one turn of a conversation, or questions that are answered together. Each job hears its last."""
        asked = [(job, job.request) for job in jobs if isinstance(job.request, AskRequest)]
        for job in jobs:
            if isinstance(job.request, IngestRequest):
                self._end(job, partial(self._ingest, job, job.request))
            elif job.request.extend:
                self._end(job, partial(self._converse, job, job.request))
                return
        if asked:
            self._ask(asked)

    def _foretell(self) -> None:
        """Tell the daemon what waits, if it is there; whoever is asked next connects again."""
        foreteller = self._foreteller
        if foreteller is not None and self._client.is_open:
            foreteller.tell(self._queue.foreseen)

    def _end(self, job: Job, call: Callable[[], AnyEvent]) -> None:
        """What the call returns, or raises, is the last that is said of the job."""
        try:
            job.tell(call())
        except HoldfastError as error:
            job.fail(error)
        except AbandonedError:
            return

    # The group and the daemon ------------------------------------------------------------------

    def _restart(self) -> None:
        """A rank died: start the group anew, unless that was in vain too often. It needs the daemon to be there."""
        reason = self._cause = self._cause or self._engine.failure
        self._engine.close()
        self._session = None
        try:
            self._connect()
        except DaemonUnavailable:
            self._problem = f"{reason}; the group waits for the daemon"
            return
        now_ns = self._parts.clock.monotonic_ns()
        self._restarted_ns = [t for t in self._restarted_ns if now_ns - t < RESTART_WINDOW_SECONDS * 1e9]
        if len(self._restarted_ns) >= self._parts.restarts:
            raise GroupFailed(f"{reason}; the runner ends after {len(self._restarted_ns)} new starts")
        self._restarted_ns.append(now_ns)
        self._problem = f"{reason}; the group is being started anew"
        self._parts.say(self._problem)
        try:
            self._engine = self._parts.start()
            self._settings = self._parts.settings()
        except HoldfastError as error:
            self._problem = self._cause = error.message
            self._parts.say(self._problem)
            return
        self._counts["restarts"] += 1
        self._problem = self._cause = ""
        self._parts.say("the group is back")

    def _connect(self) -> None:
        """Find the daemon again, which may just be starting. Raises DaemonUnavailable."""
        if self._client.is_open:
            return
        patience = STILL_AWAY_SECONDS if self._away else AWAY_SECONDS
        deadline_ns = self._parts.clock.monotonic_ns() + int(patience * 1e9)
        while True:
            try:
                client = self._parts.connect([self._client.number])
                break
            except DaemonUnavailable:
                self._away = self._parts.clock.monotonic_ns() >= deadline_ns or self._stopping.wait(RETRY_SECONDS)
                if self._away:
                    raise
        self._client.close()
        self._client, self._session, self._away = client, None, False

    def _connected(self) -> Session:
        """The session with the daemon of now. Raises DaemonUnavailable, or GroupFailed while there is no group."""
        if self._engine.failure:
            raise GroupFailed(self._problem or self._engine.failure)
        self._connect()
        if self._session is None:
            self._session = Session(self._client, self._engine)
            self._foreteller = Foreteller(self._client, self._engine.group)
        return self._session

    def _when_registered(self, call: Callable[[Session], T]) -> T:
        """What the call returns, once the ranks have found a daemon that was started again."""
        deadline_ns = self._parts.clock.monotonic_ns() + int(REGISTER_SECONDS * 1e9)
        while True:
            try:
                return call(self._connected())
            except GroupNotFound:
                if self._parts.clock.monotonic_ns() > deadline_ns or self._stopping.wait(RETRY_SECONDS):
                    raise

    # Ingest ------------------------------------------------------------------------------------

    def _ingest(self, job: Job, request: IngestRequest) -> Ingested:
        tokens = self._tokens(request.content, "document")
        began_ns = self._parts.clock.monotonic_ns()

        def call(session: Session) -> Ingested:
            cached = self._cached(tokens)
            job.tell(Prefilling(done_tokens=cached, cached_tokens=cached, total_tokens=len(tokens)))

            def progress(done: int) -> None:
                if job.abandoned:
                    raise AbandonedError
                done = min(done, len(tokens))
                job.tell(Prefilling(done_tokens=done, cached_tokens=cached, total_tokens=len(tokens)))

            view = session.ingest(
                request.name,
                tokens,
                write_policy=request.write_policy,
                ttl_seconds=request.ttl_seconds,
                progress=progress,
            )
            self._parts.texts.put(request.name, tokens, view.created_wall_ns)
            elapsed_ns = self._parts.clock.monotonic_ns() - began_ns
            return Ingested(document=view, cached_tokens=cached, elapsed_ns=elapsed_ns)

        ingested = self._when_registered(call)
        self._counts["ingested"] += 1
        return ingested

    def _cached(self, tokens: Sequence[int]) -> int:
        """How many leading tokens need not be computed."""
        return self._client.lookup_tokens(self._engine.spec.fingerprint(), tokens).token_count

    # Ask ---------------------------------------------------------------------------------------

    def _ask(self, asked: Sequence[tuple[Job, AskRequest]]) -> None:
        """Answer questions together; what is no question is refused before, and harms no other."""
        answers = []
        for job, request in asked:
            try:
                answers.append(self._begun(job, request))
            except HoldfastError as error:
                job.fail(error)
        try:
            replies = self._when_registered(lambda session: self._replies(session, answers))
        except HoldfastError as error:
            replies = [error] * len(answers)
        except AbandonedError:
            return
        crowded = [answer for answer, reply in zip(answers, replies, strict=True) if isinstance(reply, NoCapacity)]
        if len(answers) > 1 and crowded:  # the others had the room, and have left it
            self._queue.give_back([answer.job for answer in crowded if answer is not answers[0]])
            if crowded[0] is answers[0]:  # it was the first to be attached: what it lacks is not the others' fault
                self._ask([(answers[0].job, answers[0].request)])
        for answer, reply in zip(answers, replies, strict=True):
            if len(answers) == 1 or answer not in crowded:
                self._end(answer.job, partial(self._final, answer, reply))

    def _begun(self, job: Job, request: AskRequest) -> Answering:
        """Raises EmptyDocument when there is no question."""
        question = self._tokens(request.question, "question")
        return Answering(job, request, question, TextStream(self._parts.tokenizer))

    def _converse(self, job: Job, request: AskRequest) -> Answered:
        """The question and its answer become part of the document."""
        answering = self._begun(job, request)
        document = self._extensible(request)
        try:
            turn = self._when_registered(
                lambda session: session.converse(
                    request.document,
                    document,
                    answering.question,
                    request.new_tokens,
                    eos=self._parts.eos,
                    on_token=partial(_hear, [answering], 0),
                )
            )
        except FALLBACK as error:
            reply = self._recomputed(answering, error)
            tokens = [*document, *answering.question, *reply.answer.tokens]
            answering.ended(reply.answer.tokens)  # whatever becomes of the document
            turn = Turn(reply, tokens, self._connected().ingest(request.document, tokens))
        if turn.document is not None:
            self._parts.texts.put(request.document, turn.tokens, turn.document.created_wall_ns)
        return self._answered(answering, turn.reply, turn)

    def _extensible(self, request: AskRequest) -> list[int]:
        """The tokens of a document that is to grow. Raises InvalidRequest when nobody knows them, or as the daemon."""
        self._connect()
        view = self._client.document(request.document)
        tokens = self._document(request, view.created_wall_ns)
        if tokens is None or len(tokens) != view.token_count:
            raise InvalidRequest(
                f"to extend {request.document!r} its {view.token_count} tokens are needed, and this runner does not "
                "know them: give the whole text with --document, or ingest it here"
            )
        return tokens

    def _replies(self, session: Session, answers: Sequence[Answering]) -> list[Reply | HoldfastError]:
        """What the cache makes of each. Raises GroupNotFound while the ranks are not registered."""
        wanted = [(answer.request.document, answer.question, answer.request.new_tokens) for answer in answers]
        replies = session.ask_many(wanted, eos=self._parts.eos, on_token=partial(_hear, answers))
        for reply in replies:
            if isinstance(reply, GroupNotFound):
                raise reply
        return replies

    def _final(self, answering: Answering, reply: Reply | HoldfastError) -> Answered:
        """What was answered; where the cache could not, from the document's tokens. Raises why there is no answer."""
        return self._answered(answering, reply if isinstance(reply, Reply) else self._recomputed(answering, reply))

    def _answered(self, answering: Answering, reply: Reply, turn: Turn | None = None) -> Answered:
        answer, swap = reply.answer, reply.swap
        self._counts["answered"] += 1
        return Answered(
            text=answering.ended(answer.tokens),
            tokens=answer.tokens,
            swap=swap,
            reason=reply.reason,
            first_token_ns=(swap.wait_ns if swap is not None else 0) + answer.prefill_ns,
            prefill_ns=answer.prefill_ns,
            decode_ns=answer.decode_ns,
            exposed_ns=answer.exposed_ns,
            strategy=answer.strategy_reason or answer.strategy,
            document_tokens=turn.document.token_count if turn is not None and turn.document is not None else None,
            turn_reason=turn.reason if turn is not None else "",
        )

    def _recomputed(self, answering: Answering, error: HoldfastError) -> Reply:
        """The answer without the cache, where that cannot serve. Raises `error` where it says something else.

        Or where nobody knows the document's tokens.
        """
        request = answering.request
        if not isinstance(error, FALLBACK) or self._engine.failure:
            raise error
        created_wall_ns = None
        try:
            created_wall_ns = self._client.document(request.document).created_wall_ns
        except DocumentNotFound:  # perhaps it was deleted: then it is not to be had from here either
            self._parts.texts.forget(request.document)
        except HoldfastError:
            pass  # the daemon is away, or unable to say: what is remembered serves
        tokens = self._document(request, created_wall_ns)
        if tokens is None:
            raise error
        answering.job.tell(Recomputing(code=error.code, reason=error.message, total_tokens=len(tokens)))
        answer = self._engine.recompute(tokens, answering.question, request.new_tokens, CHUNK_TOKENS)
        self._counts["recomputed"] += 1
        return Reply(ended(answer, self._parts.eos), None, error.code)

    def _document(self, request: AskRequest, created_wall_ns: int | None) -> list[int] | None:
        """The document's tokens: those that came with the question, or what is remembered of it."""
        if request.content is not None:
            return self._tokens(request.content, "document")
        found = self._parts.texts.get(request.document, created_wall_ns)
        return None if found is None else [int(token) for token in found]

    def _tokens(self, content: Content, what: str) -> list[int]:
        """Token ids of what came as text or as ids. Raises EmptyDocument."""
        tokens = self._parts.tokenizer.encode(content) if isinstance(content, str) else content
        if not tokens:
            raise EmptyDocument(f"the {what} is empty")
        return tokens


def _hear(answers: Sequence[Answering], index: int, token: int) -> None:
    """The next token of one of them. Raises AbandonedError when nobody listens to any."""
    answers[index].hear(token)
    if all(answer.job.abandoned for answer in answers):
        raise AbandonedError


def _joins(first: Job, other: Job) -> bool:
    """Whether a request that waits can be answered together with the first."""
    return all(isinstance(job.request, AskRequest) and not job.request.extend for job in (first, other))
