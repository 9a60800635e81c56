"""Residency: the states of one copy of an extent in one tier, as one enum and one table.

RESERVED -> FILLING -> RESIDENT -> DRAINING -> GONE. FILLING, RESIDENT or DRAINING -> LOST -> GONE. DRAINING goes
back to RESIDENT when a hit cancels the drain. Leases and pins are guards, not states.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

from .extent import ExtentId
from .slots import Slot


class Tier(IntEnum):
    """Kinds of memory; smaller is nearer."""

    HBM = 0
    DDR = 1
    NVME = 2

    @property
    def label(self) -> str:
        """The tier's name in messages, metrics and the API."""
        return LABELS[self]


LABELS: Final = tuple(tier.name.lower() for tier in Tier)


class State(StrEnum):
    """Where one copy is in its life."""

    RESERVED = "reserved"  # a slot is set aside; no byte written
    FILLING = "filling"  # bytes arrive; layers become readable one by one
    RESIDENT = "resident"  # complete and checked
    DRAINING = "draining"  # on its way out; still readable
    LOST = "lost"  # its bytes cannot be trusted; never read again
    GONE = "gone"  # the slot is free


class Event(StrEnum):
    """What happens to a copy."""

    FILL = "fill"
    COMPLETE = "complete"
    DRAIN = "drain"
    HIT = "hit"
    FAIL = "fail"
    RELEASE = "release"


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.RESERVED, Event.FILL): State.FILLING,
    (State.RESERVED, Event.RELEASE): State.GONE,
    (State.FILLING, Event.COMPLETE): State.RESIDENT,
    (State.FILLING, Event.FAIL): State.LOST,
    (State.RESIDENT, Event.DRAIN): State.DRAINING,
    (State.RESIDENT, Event.FAIL): State.LOST,
    (State.DRAINING, Event.HIT): State.RESIDENT,
    (State.DRAINING, Event.FAIL): State.LOST,  # the device died while its content was leaving
    (State.DRAINING, Event.RELEASE): State.GONE,
    (State.LOST, Event.RELEASE): State.GONE,
}


class IllegalTransition(AssertionError):
    """Our bug: an event that the state does not allow."""


def after(state: State, event: Event) -> State:
    """The state that `event` leads to. Raises IllegalTransition where the table has none."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise IllegalTransition(f"a {state} copy cannot {event}")
    return following


@dataclass(slots=True, kw_only=True)
class Placement:
    """One copy of an extent in one tier. `device` is "ddr", "nvme" or the group whose HBM it is in.

    `slot` is set for DDR and NVMe, `shard` for HBM. `layers_ready` counts the leading layers that may be read while
    FILLING. `checksums` seal the planes of a DDR copy (see seal; unfilled rows included, so two copies of one
    extent may differ); the seal of an NVMe copy lies in its catalog row.
    `holds` counts the leases and transfers that use the bytes: the slot is not reused while any is left.
    `came_ns` is when its slot was taken, `used_ns` when it was used last since then, both monotonic.
    """

    extent: ExtentId
    tenant: str
    tier: Tier
    device: str
    size_bytes: int
    slot: Slot | None = None
    shard: int | None = None
    state: State = State.RESERVED
    checksums: bytes = b""
    layers_ready: int = 0
    holds: int = 0
    came_ns: int = 0
    used_ns: int | None = None

    def apply(self, event: Event) -> None:
        """Advance by the table; leaving needs that nobody holds the bytes."""
        self.state = after(self.state, event)
        assert self.state is not State.GONE or self.holds == 0, "a held slot must not be freed"

    @property
    def readable(self) -> bool:
        """All bytes are there and trusted."""
        return self.state in (State.RESIDENT, State.DRAINING)

    @property
    def movable(self) -> bool:
        """Complete, staying, and used by nobody: eviction may choose it."""
        return self.state is State.RESIDENT and self.holds == 0
