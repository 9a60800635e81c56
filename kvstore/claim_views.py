"""Claim views: pins and leases as people and clients are shown them."""

from __future__ import annotations

import msgspec

from .claims import NS, QUARTERS, Lease, Pin, PinKind


class PinView(msgspec.Struct, frozen=True, kw_only=True):
    """A pin. `strength` is that of a soft one, 1.0 down to 0.25 by quarters of its life; a hard one has 1.0.

    `refresh` "hit": an attach, or a publication under its name, starts its life of `ttl_seconds` again.
    """

    tenant: str
    document: str
    tier: str
    size_bytes: int
    owner: str
    reason: str
    created_wall_ns: int
    expires_wall_ns: int | None
    kind: str = PinKind.HARD.value
    refresh: str = "never"
    ttl_seconds: float | None = None
    remaining_seconds: float | None = None
    strength: float = 1.0


class LeaseView(msgspec.Struct, frozen=True, kw_only=True):
    """A lease: whose (`pid` where the daemon can see the process), of what, how long, and what it keeps where.

    `remaining_seconds` until it is overdue; negative since it is.
    """

    id: int
    client: int
    pid: int | None
    tenant: str
    document: str
    tier: str
    size_bytes: int
    age_seconds: float
    overdue: bool
    remaining_seconds: float


def pin_view(pin: Pin, wall_ns: int) -> PinView:
    """Show a pin."""
    return PinView(
        tenant=pin.document.tenant,
        document=pin.document.name,
        tier=pin.floor.label,
        size_bytes=pin.size_bytes,
        owner=pin.owner,
        reason=pin.reason,
        created_wall_ns=pin.created_wall_ns,
        expires_wall_ns=pin.expires_wall_ns,
        kind=pin.kind.value,
        refresh=pin.refresh.value,
        ttl_seconds=None if pin.ttl_ns is None else pin.ttl_ns / NS,
        remaining_seconds=pin.remaining_seconds(wall_ns),
        strength=pin.quarters(wall_ns) / QUARTERS if pin.kind is PinKind.SOFT else 1.0,
    )


def lease_view(lease: Lease, now_ns: int, pid: int | None) -> LeaseView:
    """Show a lease."""
    return LeaseView(
        id=lease.id,
        client=lease.owner,
        pid=pid,
        tenant=lease.document.tenant,
        document=lease.document.name,
        tier=lease.tier.label,
        size_bytes=lease.size_bytes,
        age_seconds=(now_ns - lease.granted_ns) / NS,
        overdue=lease.overdue(now_ns),
        remaining_seconds=(lease.deadline_ns - now_ns) / NS,
    )
