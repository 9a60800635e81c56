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
    NoCapacity,
    NotFound,
    StorageFailed,
    Unavailable,
)
from ..kvstore.views import DocumentView, SwapView
from ..kvstore.wire import Attached
from .engine import Answer, Engine

CHUNK_TOKENS: Final = 2048
REPAIRS: Final = 3  # times that more of a document may turn out to be corrupt while it is ingested
FALLBACK: Final = (Unavailable, NoCapacity, DocumentIncomplete, DocumentNotFound, CorruptExtent, StorageFailed)


def ignore_progress(_: int) -> None:
    """For callers that show none."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer with its receipt; `swap` is None, and `reason` says why, when it was computed without the cache."""

    answer: Answer
    swap: SwapView | None
    reason: str = ""


class Session:
    """One engine's dealings with one daemon."""

    def __init__(self, client: Client, engine: Engine) -> None:
        self._client = client
        self._engine = engine
        self._fingerprint = client.register_spec(engine.spec)

    def ingest(
        self,
        name: str,
        tokens: Sequence[int],
        *,
        write_policy: WritePolicy = WritePolicy.AUTO,
        chunk_tokens: int = CHUNK_TOKENS,
        progress: Callable[[int], None] = ignore_progress,
        deadline_seconds: float = 120.0,
    ) -> DocumentView:
        """Prefill a document and publish it. What other documents share of it, or what is left of it, is reused.

        What is left may turn out to be corrupt only when it is read: then it is prefilled too. An error leaves nothing
        visible.
        """
        for _ in range(REPAIRS):
            with suppress(CorruptExtent, DocumentIncomplete):
                return self._ingest(name, tokens, write_policy, chunk_tokens, progress, deadline_seconds)
        return self._ingest(name, tokens, write_policy, chunk_tokens, progress, deadline_seconds)

    def _ingest(
        self,
        name: str,
        tokens: Sequence[int],
        write_policy: WritePolicy,
        chunk_tokens: int,
        progress: Callable[[int], None],
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
        )
        with self._published(opened.ingest) as publish:
            assert opened.shard is not None, "a group was named"
            points = self._engine.prefill(opened.shard, tokens, opened.cached_tokens, chunk_tokens, progress)
            view = publish()
        if points:
            measured = [(p.cached_tokens, p.new_tokens, p.elapsed_ns / 1e9) for p in points]
            self._client.observe_prefill(self._fingerprint, measured)
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

    @contextmanager
    def attached(self, name: str, deadline_seconds: float = 120.0) -> Iterator[Attached]:
        """A document attached to the engine's group; detached at the end, whatever happens."""
        attached = self._client.attach(
            name, fingerprint=self._fingerprint, group=self._engine.group, deadline_seconds=deadline_seconds
        )
        try:
            yield attached
        finally:
            with suppress(NotFound, Unavailable):  # it has ended already, or with its daemon
                self._client.detach(attached.lease)

    def ask(self, name: str, question: Sequence[int], new_tokens: int) -> Reply:
        """Answer a question over a stored document. Raises what attach and the engine raise."""
        with self.attached(name) as attached:
            assert attached.shard is not None, "a group was named"
            answer = self._engine.answer(attached.shard, question, new_tokens)
            swap = self._client.report(
                attached.lease,
                exposed_ns=answer.exposed_ns,
                prefill_ns=answer.prefill_ns,
                decode_ns=answer.decode_ns,
                answer_tokens=len(answer.tokens),
            )
        return Reply(answer, swap)

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
