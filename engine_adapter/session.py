"""Session: questions over documents, from attach to receipt. Always releases; the cache never takes the engine down.

It knows an engine by its protocol and the daemon by its client, no tensors and no tiers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from ..kvstore.client import Client
from ..kvstore.document import WritePolicy
from ..kvstore.errors import (
    CorruptExtent,
    DocumentIncomplete,
    DocumentNotFound,
    DocumentTooLarge,
    HoldfastError,
    InvalidRequest,
    NoCapacity,
    NotFound,
    StorageFailed,
    Unavailable,
)
from ..kvstore.keys import as_tokens
from ..kvstore.layouts import ShardMessage
from ..kvstore.views import DocumentView, SwapView
from ..kvstore.wire import Attached
from .engine import Answer, Engine, OnToken, Progress, Question, ignore_progress, ignore_token

CHUNK_TOKENS: Final = 2048
ATTACH_SECONDS: Final = 120.0
REPAIRS: Final = 3  # times that more of a document may turn out to be corrupt while it is ingested
FALLBACK: Final = (  # what the cache cannot serve, the engine can still compute
    Unavailable,
    NoCapacity,
    DocumentTooLarge,
    DocumentIncomplete,
    DocumentNotFound,
    CorruptExtent,
    StorageFailed,
)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer with its receipt; `swap` is None, and `reason` says why, when it was computed without the cache."""

    answer: Answer
    swap: SwapView | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A reply, and the document that has grown by question and answer: `tokens` are all of it.

    `reason` says why the KV of the answer could not be kept, and was prefilled again; or, without a `document`, why
    that has not grown: `Session.ingest` of the tokens may try again.
    """

    reply: Reply
    tokens: list[int]
    document: DocumentView | None
    reason: str = ""


class Session:
    """One engine's dealings with one daemon."""

    def __init__(self, client: Client, engine: Engine) -> None:
        self._client = client
        self._engine = engine
        self._fingerprint = client.register_spec(engine.spec)

    # Ingest ------------------------------------------------------------------------------------

    def ingest(
        self,
        name: str,
        tokens: Sequence[int],
        *,
        write_policy: WritePolicy = WritePolicy.AUTO,
        ttl_seconds: float | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        progress: Progress = ignore_progress,
        deadline_seconds: float = ATTACH_SECONDS,
    ) -> DocumentView:
        """Prefill a document and publish it. What other documents share of it, or what is left of it, is reused.

        What is left may turn out to be corrupt only when it is read: then it is prefilled too. An error leaves nothing
        visible. The document is deleted so many seconds after it is published (None: never, or when that of its name
        would be).
        """
        for _ in range(REPAIRS):
            with suppress(CorruptExtent, DocumentIncomplete):
                return self._ingest(name, tokens, write_policy, ttl_seconds, chunk_tokens, progress, deadline_seconds)
        return self._ingest(name, tokens, write_policy, ttl_seconds, chunk_tokens, progress, deadline_seconds)

    def _ingest(
        self,
        name: str,
        tokens: Sequence[int],
        write_policy: WritePolicy,
        ttl_seconds: float | None,
        chunk_tokens: int,
        progress: Progress,
        deadline_seconds: float,
    ) -> DocumentView:
        opened = self._client.begin_ingest(
            name,
            self._fingerprint,
            tokens,
            write_policy=write_policy,
            group=self._engine.group,
            chunk_tokens=chunk_tokens,
            deadline_seconds=deadline_seconds,
            ttl_seconds=ttl_seconds,
        )
        with self._published(opened.ingest) as publish:
            assert opened.shard is not None, "a group was named"
            points = self._engine.prefill(opened.shard, tokens, opened.cached_tokens, chunk_tokens, progress)
            view = publish()
        if points:
            measured = [(p.cached_tokens, p.new_tokens, p.elapsed_ns / 1e9) for p in points]
            layout = opened.shard.layout
            self._client.observe_prefill(self._fingerprint, measured, layout.cp * layout.tp)
        return view

    @contextmanager
    def _published(self, ingest: int) -> Iterator[Callable[[], DocumentView]]:
        """Yields what commits an ingest; one that is not committed by the end, whatever happens, is aborted."""
        with ExitStack() as stack:
            stack.callback(self._abort, ingest)

            def publish() -> DocumentView:
                view = self._client.commit_ingest(ingest)
                stack.pop_all()
                return view

            yield publish

    def _abort(self, ingest: int) -> None:
        with suppress(NotFound, Unavailable):  # it has ended already, or with its daemon
            self._client.abort_ingest(ingest)

    # Ask ---------------------------------------------------------------------------------------

    @contextmanager
    def attached(
        self, name: str, *, wait_seconds: float = 0.0, deadline_seconds: float = ATTACH_SECONDS
    ) -> Iterator[Attached]:
        """A document attached to the engine's group; detached at the end, whatever happens.

        One that another group still ingests, or is about to, is waited for that long.
        """
        attached = self._client.attach(
            name,
            fingerprint=self._fingerprint,
            group=self._engine.group,
            deadline_seconds=deadline_seconds,
            wait_seconds=wait_seconds,
        )
        try:
            yield attached
        finally:
            with suppress(NotFound, Unavailable):  # it has ended already, or with its daemon
                self._client.detach(attached.lease)

    def ask(
        self,
        name: str,
        question: Sequence[int],
        new_tokens: int,
        *,
        eos: Sequence[int] = (),
        on_token: Callable[[int], None] = ignore_progress,
        wait_seconds: float = 0.0,
    ) -> Reply:
        """Answer a question over a stored document: at most `new_tokens` tokens, ending behind one of `eos`.

        `on_token` hears each token as it is decoded. A document that another group still ingests, or is about to, is
        waited for that long. Raises what attach and the engine raise.
        """
        with self.attached(name, wait_seconds=wait_seconds) as attached:
            assert attached.shard is not None, "a group was named"
            asked = Question(attached.shard, question, new_tokens, eos)
            (answer,) = self._engine.answer_many([asked], lambda _, token: on_token(token))
            return Reply(answer, self._reported(attached, [answer]))

    def converse(
        self,
        name: str,
        document: Sequence[int],
        question: Sequence[int],
        new_tokens: int,
        *,
        eos: Sequence[int] = (),
        on_token: Callable[[int], None] = ignore_progress,
        chunk_tokens: int = CHUNK_TOKENS,
        progress: Progress = ignore_progress,
    ) -> Turn:
        """As `ask`; then the document, whose tokens these are, grows by question and answer, under its name.

        The KV of both is there already, so nothing is prefilled again. Where that fails (no room for both versions in
        the group, a rank that died), the document is detached, and what is missing of the longer one is prefilled:
        `progress` hears of it.
        """
        with self.attached(name) as attached:
            if attached.token_count != len(document):
                raise InvalidRequest(f"{name} has {attached.token_count} tokens, not the {len(document)} given")
            assert attached.shard is not None, "a group was named"
            asked = Question(attached.shard, question, new_tokens, eos, keeps_tail=True)
            (answer,) = self._engine.answer_many([asked], lambda _, token: on_token(token))
            reply = Reply(answer, self._reported(attached, [answer]))
            tokens = [*document, *question, *answer.tokens]
            try:
                return Turn(reply, tokens, self._grown(name, tokens, attached.shard, answer))
            except HoldfastError as error:
                reason = error.code
        try:
            return Turn(reply, tokens, self.ingest(name, tokens, chunk_tokens=chunk_tokens, progress=progress), reason)
        except HoldfastError as error:  # the reply is worth having all the same
            return Turn(reply, tokens, None, error.code)

    def _grown(self, name: str, tokens: Sequence[int], document: ShardMessage, answer: Answer) -> DocumentView:
        """Publish the version that an answer's tail makes of a document that is attached."""
        assert answer.tail is not None, "the question asked for it"
        opened = self._client.begin_ingest(
            name,
            self._fingerprint,
            tokens,
            group=self._engine.group,
            layout=document.layout.layout().then(answer.tail.layout.layout()),
            deadline_seconds=ATTACH_SECONDS,
        )
        with self._published(opened.ingest) as publish:
            assert opened.shard is not None, "a group was named"
            self._engine.grow(opened.shard, document, answer.tail, opened.cached_tokens)
            return publish()

    def _reported(self, attached: Attached, answers: Sequence[Answer]) -> SwapView:
        """The receipt of an attach that these answers, which were made together, have used."""
        return self._client.report(
            attached.lease,
            exposed_ns=max(answer.exposed_ns for answer in answers),
            prefill_ns=max(answer.prefill_ns for answer in answers),
            decode_ns=max(answer.decode_ns for answer in answers),
            answer_tokens=sum(len(answer.tokens) for answer in answers),
            strategy=answers[0].strategy,
            strategy_reason=answers[0].strategy_reason,
            queries=len(answers),
        )

    def ask_many(
        self,
        questions: Sequence[tuple[str, Sequence[int], int]],
        *,
        eos: Sequence[int] = (),
        on_token: OnToken = ignore_token,
    ) -> list[Reply | HoldfastError]:
        """Answer questions together, each (document, question, new tokens) over its own; several may share one.

        For each its reply, or why there is none: what cannot be attached, or is no question, does not harm the others.
        Those of one document share a receipt. `on_token` hears which question, and the next token of its answer.
        """
        with ExitStack() as stack:
            places: dict[str, Attached | HoldfastError] = {}
            asked: dict[int, Question] = {}
            found: dict[int, Reply | HoldfastError] = {}
            for index, (name, tokens, new_tokens) in enumerate(questions):
                if name not in places:
                    places[name] = self._entered(stack, name)
                try:
                    asked[index] = self._question(places[name], tokens, new_tokens, eos)
                except HoldfastError as error:
                    found[index] = error
            answers = self._answered(asked, on_token)
            for name, place in places.items():
                own = {index: answer for index, answer in answers.items() if questions[index][0] == name}
                found |= self._replies(place, own)
        return [found[index] for index in range(len(questions))]

    def _entered(self, stack: ExitStack, name: str) -> Attached | HoldfastError:
        """A document attached until the stack ends, or why not."""
        try:
            return stack.enter_context(self.attached(name))
        except HoldfastError as error:
            return error

    def _question(
        self, place: Attached | HoldfastError, tokens: Sequence[int], new_tokens: int, eos: Sequence[int]
    ) -> Question:
        """Checked here, because the engine would refuse the whole call. Raises why there is no document too."""
        if isinstance(place, HoldfastError):
            raise place
        assert place.shard is not None, "a group was named"
        if not tokens or new_tokens < 1:
            raise InvalidRequest("an answer needs a question of at least one token and room for one new token")
        as_tokens(tokens, self._engine.spec)
        return Question(place.shard, tokens, new_tokens, eos)

    def _answered(self, asked: dict[int, Question], on_token: OnToken) -> dict[int, Answer | HoldfastError]:
        """The answer of each, or why there is none. If they fail together, each is asked by itself.

        A document whose loading fails fails all. Not when tokens were heard already: none is to be heard twice.
        """
        numbers = list(asked)
        heard: list[int] = []

        def hears(index: int, token: int) -> None:
            heard.append(token)
            on_token(numbers[index], token)

        try:
            answers = self._engine.answer_many(list(asked.values()), hears) if asked else []
        except HoldfastError as error:
            if len(asked) > 1 and not heard:
                alone = [self._answered({number: question}, on_token) for number, question in asked.items()]
                return {number: answer for one in alone for number, answer in one.items()}
            return dict.fromkeys(asked, error)
        return dict(zip(numbers, answers, strict=True))

    def _replies(
        self, place: Attached | HoldfastError, answers: dict[int, Answer | HoldfastError]
    ) -> dict[int, Reply | HoldfastError]:
        """The answers over one document with their receipt."""
        given = [answer for answer in answers.values() if isinstance(answer, Answer)]
        if not given:
            return {index: answer for index, answer in answers.items() if isinstance(answer, HoldfastError)}
        assert isinstance(place, Attached), place
        try:
            swap = self._reported(place, given)
        except HoldfastError as error:
            return dict.fromkeys(answers, error)
        return {n: Reply(answer, swap) if isinstance(answer, Answer) else answer for n, answer in answers.items()}

    def ask_or_recompute(
        self,
        name: str,
        document: Sequence[int],
        question: Sequence[int],
        new_tokens: int,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> Reply:
        """As `ask`; when the cache cannot serve (gone, full, corrupt), the engine computes the document itself."""
        try:
            return self.ask(name, question, new_tokens)
        except FALLBACK as error:
            answer = self._engine.recompute(document, question, new_tokens, chunk_tokens)
            return Reply(answer, None, error.code)
