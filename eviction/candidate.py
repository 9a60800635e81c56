"""A candidate: all that this room knows of something that could leave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One resident extent of one tier, as it is now.

    Ids are chained hashes, so an extent has exactly one predecessor and residents form a forest:
    `previous` is the extent before it, None at the front of a chain. An extent whose predecessor is
    not resident behaves like a front.

    `movable` is False for what is leased or pinned: it stays, and so does all that is in front of
    it. `frequency` is the decayed count of uses that History reports (0 when it knows none).
    `restore_ns` predicts the nanoseconds to get it back: reload from the next tier or recompute.
    """

    id: str
    previous: str | None
    size_bytes: int
    movable: bool
    last_access_ns: int
    frequency: float
    restore_ns: int
