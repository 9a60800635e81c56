"""Holders: who keeps bytes where they are, so that something else cannot have them. A refusal names them, as values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

HOLDERS_MAX: Final = 32  # that a refusal names


class Kind(StrEnum):
    """By what right somebody holds bytes."""

    LEASE = "lease"
    PIN = "pin"
    INGEST = "ingest"
    TENANT = "tenant"  # all that a tenant has, where a quota is what is full


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """`owner` could let go of `size_bytes` of a tier: a client, a pin's owner. `document` is "" where it is not one.

    `remaining_seconds` until it lets go by itself (a pin) or is overdue (a lease; negative since then); None: never.
    """

    kind: Kind
    owner: str
    tenant: str
    document: str
    tier: str
    size_bytes: int
    remaining_seconds: float | None = None

    def __str__(self) -> str:
        whose = f"{self.tenant}/{self.document}" if self.document else self.tenant
        return f"{self.kind} of {whose} by {self.owner or 'nobody named'} ({self.size_bytes} B of {self.tier})"


def largest(holders: Iterable[Holder], wanted_bytes: int | None = None) -> tuple[Holder, ...]:
    """The largest first, as many as hold the wanted bytes together (None: all), and no more than HOLDERS_MAX."""
    found: list[Holder] = []
    for holder in sorted(holders, key=lambda h: (-h.size_bytes, h.tenant, h.document, h.owner)):
        if len(found) == HOLDERS_MAX or (wanted_bytes is not None and wanted_bytes <= 0):
            break
        found.append(holder)
        if wanted_bytes is not None:
            wanted_bytes -= holder.size_bytes
    return tuple(found)
