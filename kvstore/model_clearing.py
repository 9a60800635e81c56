"""Model clearing: forget what was stored for one model, in steps, so that nobody else waits long."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from .document import DocumentId
from .errors import HoldfastError, NotFound
from .problems import ended
from .service import Service
from .state import DocumentRecord

AT_ONCE: Final = 128  # deletions between two turns of the loop; their rows are dropped together
KEPT_NAMED: Final = 100


class Scope(StrEnum):
    """Which of a model's documents."""

    ALL = "all"
    UNNAMED = "unnamed"  # those that no user has named: what engines stored by themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Documents of a model, or of these specs of it; of one tenant, or (None) of all."""

    model: str | None = None
    fingerprints: frozenset[bytes] = frozenset()
    tenant: str | None = None
    scope: Scope = Scope.ALL

    def takes(self, record: DocumentRecord, model: str) -> bool:
        """Whether it means this document, whose model that is."""
        document = record.document
        if self.tenant is not None and document.id.tenant != self.tenant:
            return False
        if self.scope is Scope.UNNAMED and document.id.namespace is None:
            return False
        return document.fingerprint in self.fingerprints if self.fingerprints else model == self.model


@dataclass(slots=True, kw_only=True)
class Clearing:
    """What came of it. `kept` says of the first few that could not go why not; `kept_count` counts all."""

    deleted: int = 0
    kept_count: int = 0
    kept: dict[DocumentId, str] = field(default_factory=dict)


def selected(service: Service, wanted: Selection) -> list[DocumentId]:
    """The documents that are meant."""
    state = service.state
    return [
        name
        for name, record in state.documents.items()
        if wanted.takes(record, state.specs[record.document.fingerprint].model)
    ]


async def cleared(service: Service, wanted: Selection) -> Clearing:
    """Forget them all, except what is leased, pinned, or being written.

    Answered when no restart brings them back. Raises StorageFailed when the catalog could not be told of all.
    """
    found = Clearing()
    meant = selected(service, wanted)
    for first in range(0, len(meant), AT_ONCE):
        names = meant[first : first + AT_ONCE]
        outcomes = await asyncio.gather(*(_deleted(service, name) for name in names))
        for name, error in zip(names, outcomes, strict=True):
            if error is None:
                found.deleted += 1
                continue
            found.kept_count += 1
            if len(found.kept) < KEPT_NAMED:
                found.kept[name] = error.message
    return found


async def _deleted(service: Service, name: DocumentId) -> HoldfastError | None:
    """None when it is gone, else why it is not."""
    try:
        return await ended(lambda done: service.delete(name, done))
    except NotFound:  # it went meanwhile
        return None
    except HoldfastError as error:
        return error
