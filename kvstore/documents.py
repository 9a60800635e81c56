"""Documents: records by id. Those without a user's name are kept apart, so that there may be many of them.

An unnamed document's name is `namespace/key`. Nobody lists it with the others, and it has a limit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from itertools import chain
from types import MappingProxyType
from typing import Final, Generic, TypeVar

from .document import DocumentId

R = TypeVar("R")
NOTHING: Final[Mapping[DocumentId, None]] = MappingProxyType({})


class Documents(MutableMapping[DocumentId, R], Generic[R]):
    """All of them; `named` and `unnamed` are views of a part."""

    def __init__(self) -> None:
        self.named: dict[DocumentId, R] = {}
        self.unnamed: dict[DocumentId, R] = {}
        self._spaces: dict[tuple[str, str], dict[DocumentId, None]] = {}

    def of(self, tenant: str, namespace: str) -> Mapping[DocumentId, None]:
        """The documents of one namespace, in the order in which they came."""
        return self._spaces.get((tenant, namespace), NOTHING)

    @property
    def namespaces(self) -> list[tuple[str, str]]:
        """Tenants and namespaces that have any, in order."""
        return sorted(self._spaces)

    def _part(self, document: DocumentId) -> dict[DocumentId, R]:
        return self.named if document.namespace is None else self.unnamed

    def __getitem__(self, document: DocumentId) -> R:
        found = self.get(document)
        if found is None:
            raise KeyError(document)
        return found

    def get(self, document: DocumentId, default: R | None = None) -> R | None:  # type: ignore[override]
        """The record, where there is one."""
        found = self.named.get(document)  # quicker than finding out which it is
        return found if found is not None else self.unnamed.get(document, default)

    def __contains__(self, document: object) -> bool:
        return document in self.named or document in self.unnamed

    def __setitem__(self, document: DocumentId, record: R) -> None:
        self._part(document)[document] = record
        namespace = document.namespace
        if namespace is not None:
            self._spaces.setdefault((document.tenant, namespace), {})[document] = None

    def __delitem__(self, document: DocumentId) -> None:
        del self._part(document)[document]
        namespace = document.namespace
        if namespace is not None:
            space = self._spaces[document.tenant, namespace]
            del space[document]
            if not space:
                del self._spaces[document.tenant, namespace]

    def __iter__(self) -> Iterator[DocumentId]:
        return chain(self.named, self.unnamed)

    def __len__(self) -> int:
        return len(self.named) + len(self.unnamed)

    def check(self) -> None:
        """Assert that the namespaces are those of the documents."""
        spaces = {document for space in self._spaces.values() for document in space}
        assert spaces == self.unnamed.keys(), "a namespace is behind"
        assert all(self._spaces.values()), "a namespace is empty"
