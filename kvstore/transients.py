"""Transients: documents that no user has named are forgotten as soon as nothing is left that only they need.

So nobody has to delete them, and none outlives its KV: neither in memory nor in the catalog. One that another has
absorbed, because that continues it, goes as well. Whoever leases, pins or moves one keeps it until that has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from .document import Document, DocumentId
from .errors import InUse
from .ingesting import Ingest
from .state import ExtentRecord
from .upkeep import Upkeep

AT_ONCE: Final = 256  # documents that are looked at; what is left waits for the next command or tick


class Transients:
    """Forgets them."""

    def __init__(self, upkeep: Upkeep) -> None:
        self.upkeep = upkeep
        self.state = upkeep.state

    def published(self, ingest: Ingest) -> None:
        """A longer one is there, which takes the place of those that it continues."""
        for document in ingest.absorbs:
            if document in self.state.documents:
                self.state.faded[document] = ingest.document.id

    def pump(self) -> None:
        """Look at those of which something has gone."""
        for document, absorber in list(islice(self.state.faded.items(), AT_ONCE)):
            del self.state.faded[document]
            owner = self.state.documents.get(document)
            if owner is None or not self._is_over(owner.document, absorber):
                continue
            try:
                self.upkeep.delete(document)
            except InUse:
                self.state.outlasting[document] = absorber

    def tick(self) -> None:
        """Look again at those that were in use."""
        self.state.faded.update(self.state.outlasting)
        self.state.outlasting.clear()

    def restore(self) -> None:
        """Forget those of which the last copy has gone with the daemon before."""
        for document, owner in self.state.documents.unnamed.items():
            if not self.state.has_copies(owner.document):
                self.state.faded[document] = None
        while self.state.faded:
            self.pump()

    def _is_over(self, document: Document, absorber: DocumentId | None) -> bool:
        """Whether nothing would be missed. One that is pinned, or whole, is not over as long as there is anything."""
        if self.state.pins.get(document.id) is not None:
            return not self.state.has_copies(document)
        is_absorbed = absorber is not None and absorber in self.state.documents
        return is_absorbed or not (self._has_its_own(document) or self._is_whole(document))

    def _has_its_own(self, document: Document) -> bool:
        """Whether something is left that nobody else needs."""
        only = frozenset((document.id,))
        return any(record.documents == only and record.placements() for record in self._records(document)) or any(
            shard.copies for shard in self.state.shards_of(document)
        )

    def _is_whole(self, document: Document) -> bool:
        return all(record.placements() for record in self._records(document))

    def _records(self, document: Document) -> Iterator[ExtentRecord]:
        return (self.state.extents[extent] for extent in document.extents)
