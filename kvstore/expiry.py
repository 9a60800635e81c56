"""Expiry: documents whose time is up are deleted, as `delete` does, once nobody needs them any more.

From then on no new lease is given on them. Those that are there end in their own time; a hard pin outlives the time of
its document, and so do an ingest and a move under way. Who looks for documents takes a few at each tick, in rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Final

from .document import DocumentId, ttl_ns_of
from .errors import DocumentNotFound, HoldfastError, InUse
from .orders import PutDocument
from .upkeep import Upkeep

LOOKED_AT: Final = 4096  # documents a tick
EXTENTS_GONE: Final = 4096  # a tick, and the rest of one document
REASON: Final = "expired"


class Expiry:
    """Sets and keeps the times of documents."""

    def __init__(self, upkeep: Upkeep) -> None:
        self.upkeep = upkeep
        self.state = upkeep.state
        self.clock = upkeep.store.clock
        self._round: Iterator[DocumentId] = iter(())

    def set(
        self,
        document: DocumentId,
        ttl_seconds: float | None,
        done: Callable[[HoldfastError | None], None] = lambda _: None,
    ) -> None:
        """Let the document end so many seconds from now; None: never. `done` hears when a restart will know it too.

        Raises DocumentNotFound or InvalidRequest.
        """
        owner = self.state.document(document)
        ttl_ns = ttl_ns_of(ttl_seconds)
        expires_wall_ns = None if ttl_ns is None else self.clock.wall_ns() + ttl_ns
        owner.document = replace(owner.document, expires_wall_ns=expires_wall_ns)
        self.upkeep.store.notes.add(PutDocument(owner.document))
        self.upkeep.store.notes.flush()
        if owner.volatile:
            done(None)  # its row is written when all of it is on NVMe
        else:
            self.upkeep.tell(document, PutDocument(owner.document), done=done)

    def refuse(self, document: DocumentId) -> None:
        """Raises DocumentNotFound for a document whose time is up, unless it is pinned hard."""
        owner = self.state.documents.get(document)
        is_pinned = self.state.pins.hard(document) is not None
        if owner is not None and owner.document.expired(self.clock.wall_ns()) and not is_pinned:
            raise DocumentNotFound(f"{document} has expired; it goes when those who use it have ended. Ingest it again")

    def tick(self) -> None:
        """Delete what has expired and can go, of the documents whose turn it is."""
        wall_ns = self.clock.wall_ns()
        extents_gone = 0
        looked_at = 0
        for document in islice(self._round, LOOKED_AT):
            looked_at += 1
            owner = self.state.documents.get(document)
            if owner is not None and owner.document.expired(wall_ns):
                extents_gone += self._delete(document)
                if extents_gone >= EXTENTS_GONE:
                    return
        if looked_at < LOOKED_AT:
            self._round = iter(tuple(self.state.documents))

    def _delete(self, document: DocumentId) -> int:
        """How many extents it had; 0 where somebody needs it still."""
        count = len(self.state.documents[document].document.extents)
        try:
            self.upkeep.delete(document, reason=REASON)
        except InUse:
            return 0
        self.state.ledger.counts["documents_expired"] += 1
        return count
