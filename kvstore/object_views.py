"""Object views: namespaces of opaque objects as people and clients are shown them. Looking changes nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

import msgspec

from .document import PROMPT, DocumentId
from .opaque import checked_namespace
from .service import Service

SLICE: Final = 4096  # objects that are looked at before others get their turn


class NamespaceView(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace of a tenant: its objects, the bytes of their payload, and of their slots by tier.

    Of `asked` objects so many were `hits`, since the daemon started.
    """

    tenant: str
    namespace: str
    objects: int
    size_bytes: int
    resident_bytes: dict[str, int]
    pinned: int
    asked: int
    hits: int


async def namespace_views(
    service: Service, tenant: str | None = None, namespace: str | None = None
) -> list[NamespaceView]:
    """The namespaces that have objects, of one tenant or of all; or just one, whether it has any or not."""
    if tenant is not None and namespace is not None:
        return [await _view(service, tenant, checked_namespace(namespace))]
    known = [
        (owner, name)
        for owner, name in service.state.documents.namespaces
        if name != PROMPT and (tenant is None or owner == tenant)
    ]
    return [await _view(service, owner, name) for owner, name in known]


async def _view(service: Service, tenant: str, namespace: str) -> NamespaceView:
    names = list(service.state.documents.of(tenant, namespace))
    totals: Counter[str] = Counter()
    resident: Counter[str] = Counter()
    for first in range(0, len(names), SLICE):
        for document in names[first : first + SLICE]:
            _count(service, document, totals, resident)
        await asyncio.sleep(0)
    counts = service.objects.counts(tenant, namespace)
    return NamespaceView(
        tenant=tenant,
        namespace=namespace,
        objects=totals["objects"],
        size_bytes=totals["bytes"],
        resident_bytes=dict(resident),
        pinned=totals["pinned"],
        asked=counts["asked"],
        hits=counts["hits"],
    )


def _count(service: Service, document: DocumentId, totals: Counter[str], resident: Counter[str]) -> None:
    state = service.state
    record = state.documents.get(document)
    if record is None:
        return
    totals["objects"] += 1
    totals["bytes"] += record.document.token_count
    totals["pinned"] += state.pins.get(document) is not None
    for extent in record.document.extents:
        for copy in state.extents[extent].placements():
            if copy.readable:
                resident[copy.tier.label] += copy.size_bytes
