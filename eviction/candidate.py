"""A candidate: all that this room knows of something that could leave."""

from __future__ import annotations

from typing import NamedTuple

from .use import UnitId


class Candidate(NamedTuple):
    """One resident of one cache, as it is now.

    Ids are chained hashes, so a unit has exactly one predecessor and residents form a forest: `previous` is the id of
    the one before it, None at the front of a chain. One whose predecessor is not resident behaves like a front. `id` is
    its name in this cache, `unit` what uses name it by: copies of one unit in two shards have two ids.

    `movable` is False for what is leased, pinned or in flight: it stays, and so does all that is in front of it.
    `restore_ns` predicts the nanoseconds to get it back into this cache: reload from the next tier, or recompute behind
    what precedes it. Lower ranks leave first, whatever the scores.

    A tuple, because every decision describes a hundred of them: a frozen dataclass takes twice as long to make.
    """

    id: UnitId
    unit: UnitId
    previous: UnitId | None
    size_bytes: int
    movable: bool
    restore_ns: int
    rank: int = 0
