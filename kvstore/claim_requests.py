"""Claim requests: what the messages about pins ask of the service, and the replies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TypeVar

from .claim_messages import ListPins, PinDocument, Pinned, Pins, UnpinDocument, UnpinDocuments
from .claim_views import pin_view
from .claims import Pin, PinKind, PinSelection, Refresh
from .document import DocumentId
from .errors import HoldfastError, InvalidRequest
from .residency import Tier
from .service import Service

Done = Callable[[HoldfastError | None], None]
Told = Callable[[Callable[[Done], object]], Awaitable[None]]  # awaits what a command says when it is over
Word = TypeVar("Word", bound=StrEnum)

ClaimRequest = PinDocument | UnpinDocument | UnpinDocuments | ListPins


def tier_named(name: str) -> Tier:
    """The tier of that label. Raises InvalidRequest."""
    found = next((tier for tier in Tier if tier.label == name), None)
    if found is None:
        raise InvalidRequest(f"unknown tier {name!r}; use one of {', '.join(t.label for t in Tier)}")
    return found


def word(kind: type[Word], name: str) -> Word:
    """One of an enumeration's words. Raises InvalidRequest."""
    try:
        return kind(name)
    except ValueError as error:
        raise InvalidRequest(f"unknown {name!r}; use one of {', '.join(kind)}") from error


async def handle_claim(service: Service, tenant: str, body: ClaimRequest, told: Told) -> Pinned | Pins:
    """The reply, when the catalog has heard of it. Raises HoldfastError."""
    found: list[Pin] = []
    match body:
        case PinDocument():
            floor, kind, refresh = tier_named(body.tier), word(PinKind, body.kind), word(Refresh, body.refresh)
            document = DocumentId(tenant, body.name)

            def pin(done: Done) -> None:
                found.append(
                    service.pin(document, floor, body.ttl_seconds, body.owner, body.reason, kind, refresh, done)
                )

            await told(pin)
            return Pinned(pin_view(found[0], service.clock.wall_ns()))
        case UnpinDocument(name=name):
            await told(lambda done: found.append(service.unpin(DocumentId(tenant, name), done)))
            return Pinned(pin_view(found[0], service.clock.wall_ns()))
        case UnpinDocuments():
            names = None if body.names is None else {DocumentId(tenant, name) for name in body.names}
            wanted = PinSelection(tenant, body.owner, body.reason_prefix, names)
            if body.dry_run:
                found = service.state.pins.select(wanted)
            else:
                await told(lambda done: found.extend(service.unpin_all(wanted, done)))
        case ListPins():
            found = service.state.pins.select(PinSelection(tenant))
    return Pins([pin_view(pin, service.clock.wall_ns()) for pin in found])
