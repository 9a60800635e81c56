"""Claim messages: what clients say about pins, and the answers (wire has the others)."""

from __future__ import annotations

from .claim_views import PinView
from .message import Message


class PinDocument(Message, frozen=True):
    """Pin a document; answered when the catalog has the pin. `kind` is "hard" or "soft", `refresh` "never" or "hit"."""

    name: str
    tier: str
    ttl_seconds: float | None
    owner: str
    reason: str
    kind: str = "hard"
    refresh: str = "never"


class UnpinDocument(Message, frozen=True):
    """Unpin a document; answered when the catalog has forgotten the pin."""

    name: str


class UnpinDocuments(Message, frozen=True):
    """End all of the tenant's pins that this is true of, in one commit; None is true of all."""

    owner: str | None = None
    reason_prefix: str | None = None
    names: list[str] | None = None
    dry_run: bool = False


class ListPins(Message, frozen=True):
    """The tenant's pins."""


class Pinned(Message, frozen=True):
    """A pin."""

    pin: PinView


class Pins(Message, frozen=True):
    """Pins."""

    pins: list[PinView]
