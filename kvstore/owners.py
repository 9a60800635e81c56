"""Owners: the documents that need an extent. Nearly all extents have one; a common beginning may have 100,000.

So few of them are a frozenset, one for all extents between two forks of a document, and many are a crowd, in which
those that have a user's name come first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from functools import lru_cache
from itertools import chain, islice
from typing import Final

from .document import DocumentId

FEW: Final = 16
ASKED: Final = 64  # of a crowd, where each would have to be asked
UNNAMED_TOLD: Final = 16  # of a crowd, where people are told who needs an extent


class Crowd(AbstractSet[DocumentId]):
    """Many documents; one more, or one less, costs the same however many there are."""

    __slots__ = ("named", "unnamed")

    def __init__(self, documents: Collection[DocumentId]) -> None:
        self.named = {document for document in documents if document.namespace is None}
        self.unnamed = set(documents) - self.named

    def part(self, document: DocumentId) -> set[DocumentId]:
        """Where it is, if it is one of them."""
        return self.named if document.namespace is None else self.unnamed

    def __contains__(self, document: object) -> bool:
        return document in self.named or document in self.unnamed

    def __iter__(self) -> Iterator[DocumentId]:
        return chain(self.named, self.unnamed)

    def __len__(self) -> int:
        return len(self.named) + len(self.unnamed)


Owners = frozenset[DocumentId] | Crowd


def joined(owners: Owners, owner: frozenset[DocumentId]) -> Owners:
    """With one more: `owner` has just that one, and is the same object for all its extents."""
    if isinstance(owners, Crowd):
        for document in owner:
            owners.part(document).add(document)
        return owners
    both = owners | owner if owners else owner
    return both if len(both) <= FEW else Crowd(both)


def left(owners: Owners, document: DocumentId) -> Owners:
    """Without one that may be one of them."""
    if isinstance(owners, Crowd):
        owners.part(document).discard(document)
        return owners if len(owners) > FEW // 2 else frozenset(owners)
    return owners - {document}


def common(owners: Owners, others: Collection[DocumentId]) -> Iterator[DocumentId]:
    """Those that are in both, of which one may be large; `others` finds one of them at once."""
    few, many = (owners, others) if len(owners) <= len(others) else (others, owners)
    return (document for document in few if document in many)


def asked(owners: Owners) -> Iterator[DocumentId]:
    """All of a few, and of a crowd as many as one has time to ask."""
    return islice(owners, ASKED)


def in_order(owners: Owners) -> Collection[DocumentId]:
    """Few are sorted, so that what follows is the same each time; a crowd is as it is."""
    return owners if isinstance(owners, Crowd) else sorted(owners)


def names(owners: Owners) -> tuple[str, ...]:
    """For people: all that have a user's name, and some of the others where there are many."""
    if isinstance(owners, Crowd):
        return (*sorted(map(str, owners.named)), *sorted(map(str, islice(owners.unnamed, UNNAMED_TOLD))))
    return _names(owners)


@lru_cache(maxsize=1024)
def _names(documents: frozenset[DocumentId]) -> tuple[str, ...]:
    """All extents between two forks of a document have the very same set."""
    return tuple(sorted(map(str, documents)))
