"""Awaiting: attaches that came before their document, until it is published, its ingest is given up, or time is up.

So a group that decodes may ask while another one still prefills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .document import DocumentId
from .errors import DeadlineExceeded, DocumentNotFound, HoldfastError, NoCapacity
from .ingesting import Ingest
from .state import State


@dataclass(eq=False, slots=True, kw_only=True)
class Waiter:
    """`attach` is called when the document is there; what it raises, or why it never was, goes to `refused`.

    `ingest` is the one it waits for, as soon as there is one.
    """

    client: int
    document: DocumentId
    deadline_ns: int
    attach: Callable[[], object]
    refused: Callable[[HoldfastError], None]
    ingest: int | None = None


class Awaiting:
    """At most `limit` of them. `ingests` are the open ones."""

    def __init__(self, state: State, ingests: Mapping[int, Ingest], limit: int) -> None:
        self._state = state
        self._ingests = ingests
        self._limit = limit
        self.waiters: list[Waiter] = []

    def park(self, waiter: Waiter) -> None:
        """Let it wait. Raises NoCapacity."""
        if len(self.waiters) >= self._limit:
            raise NoCapacity(f"limits.pending_reservations = {self._limit} attaches wait for their documents already")
        self.waiters.append(waiter)

    def forget(self, client: int) -> None:
        """The client is gone, or does not wait any more."""
        self.waiters = [waiter for waiter in self.waiters if waiter.client != client]

    def pump(self, now_ns: int) -> None:
        """Let those go on whose wait has ended, however."""
        if not self.waiters:
            return
        writing = {ingest.document.id: ingest.id for ingest in self._ingests.values()}
        for waiter in list(self.waiters):
            if waiter not in self.waiters:
                continue  # an attach lets others go on too
            error = None
            if waiter.document not in self._state.documents:
                error = self._given_up(waiter, writing.get(waiter.document), now_ns)
                if error is None:
                    continue
            self.waiters.remove(waiter)
            try:
                if error is not None:
                    raise error
                waiter.attach()
            except HoldfastError as refusal:
                waiter.refused(refusal)

    def _given_up(self, waiter: Waiter, ingest: int | None, now_ns: int) -> HoldfastError | None:
        """Why its document will not come, or not in time."""
        if waiter.ingest is not None and waiter.ingest != ingest:
            return DocumentNotFound(f"the ingest of {waiter.document} ended without it; ingest it again")
        waiter.ingest = ingest
        if now_ns < waiter.deadline_ns:
            return None
        return DeadlineExceeded(f"{waiter.document} was not published in time")
