"""Lookups: asks the daemon what is cached of a prompt, on a thread, so that the engine's scheduler never waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from ...kvstore.errors import HoldfastError
from ...kvstore.keys import Extras
from ...kvstore.spec import KVSpec
from ...kvstore.views import PrefixView
from ..api import Store
from ..link import Link
from .plans import Ready, Tokens

LOG: Final = logging.getLogger("vllm.holdfast")
WAITING_MAX: Final = 256
CLEAR_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Leading tokens of a prompt that are cached, in whole pages, by the tier that each is nearest in.

    `canonical`: not in pages of the engine. `document` is one that holds all of them.
    """

    token_count: int = 0
    canonical: bool = False
    tier_tokens: Mapping[str, int] = field(default_factory=dict)
    document: str | None = None


NOTHING: Final = Found()


class Question:
    """One prompt's. `found` is None until it is answered; after the deadline it will not be waited for."""

    def __init__(self, tokens: Tokens, extras: Extras, seconds: float) -> None:
        self.tokens = tokens
        self.extras = extras
        self.asked = time.monotonic()
        self.deadline = self.asked + seconds
        self.found: Found | None = None
        self.failed = False  # nobody could say
        self._answered = threading.Event()

    def answer(self, found: Found) -> None:
        """What was found."""
        self.found = found
        self._answered.set()

    def miss(self) -> None:
        """Nobody could say: as if nothing were cached."""
        self.failed = True
        self.answer(NOTHING)

    def wait(self, seconds: float) -> None:
        """Wait for the answer, at most so long."""
        self._answered.wait(seconds)

    @property
    def seconds(self) -> float:
        """Since it was asked."""
        return time.monotonic() - self.asked


class Lookups:
    """Answers questions one after the other. While the daemon does not answer, new ones are misses at once."""

    def __init__(self, link: Link, ranks: Sequence[Ready], seconds: float) -> None:
        """`ranks`: what each rank of the engine keeps; a prefix counts as far as all of them have it."""
        self._link = link
        self._specs = [rank.spec for rank in ranks if rank.spec is not None]
        self._canonical = self._specs[0].canonical() if len(ranks) == 1 and ranks[0].canonical else None
        self._seconds = seconds
        self._changed = threading.Condition()
        self._waiting: deque[Question] = deque()
        self._current: Question | None = None
        self._closed = False
        self._to_clear = False
        threading.Thread(target=self._serve, name="holdfast-lookup", daemon=True).start()

    def ask(self, tokens: Tokens, extras: Extras) -> Question:
        """Ask without waiting."""
        question = Question(tokens, extras, self._seconds)
        with self._changed:
            current = self._current
            stuck = current is not None and time.monotonic() > current.deadline
            if stuck or self._closed or len(self._waiting) >= WAITING_MAX or not self._link.is_up:
                question.miss()
            else:
                self._waiting.append(question)
                self._changed.notify()
        return question

    def clear(self) -> None:
        """Forget what was stored in these engines' pages, for an operator, who may wait.

        What cannot be forgotten now, because nobody answers, is so before anything else is looked up.
        """
        self._to_clear = True
        why = [f"not within {CLEAR_SECONDS:g} s"]

        def work() -> None:
            try:
                with self._link.use() as store:
                    self._clear(store)
            except HoldfastError as error:
                why[0] = error.message

        thread = threading.Thread(target=work, name="holdfast-clear", daemon=True)
        thread.start()
        thread.join(CLEAR_SECONDS)
        if self._to_clear:
            LOG.warning("holdfast: the cache is cleared when it can be, and not read by this engine before: %s", why[0])

    def _clear(self, store: Store) -> None:
        if self._to_clear:
            for spec in self._specs:
                store.clear(spec)
            self._to_clear = False

    def close(self) -> None:
        """Answer nothing any more, and disconnect."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._link.close()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                question = self._current = self._waiting.popleft()
            if time.monotonic() > question.deadline:
                question.miss()
                continue
            try:
                with self._link.use() as store:
                    self._clear(store)
                    question.answer(self._look(store, question))
            except HoldfastError:
                question.miss()
            except Exception:
                LOG.exception("holdfast: a bug ended a lookup")
                question.miss()

    def _look(self, store: Store, question: Question) -> Found:
        views = [store.lookup(spec, question.tokens, extras=question.extras) for spec in self._specs]
        native = _found(min(views, key=lambda view: view.token_count), self._specs[0])
        whole = len(question.tokens) // self._specs[0].block_tokens * self._specs[0].block_tokens
        if self._canonical is None or question.extras or native.token_count == whole:
            return native
        view = store.lookup(self._canonical, question.tokens)
        canonical = _found(view, self._specs[0], "canonical")
        return canonical if canonical.token_count > native.token_count else native


def _found(view: PrefixView, spec: KVSpec, form: Literal["native", "canonical"] = "native") -> Found:
    count = view.token_count // spec.block_tokens * spec.block_tokens
    return Found(
        token_count=count,
        canonical=form == "canonical",
        tier_tokens=view.tier_tokens,
        document=view.document,
    )
